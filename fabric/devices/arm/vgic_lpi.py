"""LPI tables in guest memory: configuration (GICR_PROPBASER) and pending (GICR_PENDBASER).

The configuration table has a byte for each LPI from INTID 8192 on: bits 7:2 priority, bit 0 enable. A pending
table has a bit for each INTID from 0 on, of which those below 8192 are never touched.

Specification: GICv3 architecture (IHI 0069), section 6.2 (LPIs in tables); arm-vgic-v3, saving pending tables.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fabric.devices.arm.vgic_irq import MIN_LPI
from fabric.errors import KvmError

if TYPE_CHECKING:
    from collections.abc import Callable

    from fabric.devices.arm.vgic import Vgic
    from fabric.devices.arm.vgic_cpuif import VgicV3Cpu
    from fabric.devices.arm.vgic_irq import VgicIrq

PROPBASER_ADDRESS = 0x000F_FFFF_FFFF_F000
PENDBASER_ADDRESS = 0x000F_FFFF_FFFF_0000
PENDBASER_PTZ = 1 << 62
PROPBASER_FIELDS = 0x070F_FFFF_FFFF_FF9F
PENDBASER_FIELDS = 0x470F_FFFF_FFFF_0F80
CONFIG_ENABLE = 1 << 0
CONFIG_PRIORITY = 0xFC


def sanitise_baser(value: int) -> int:
    """The memory attributes of a table base register as KVM keeps them; the other bits as they are.

    Shareability (11:10): outer becomes inner. Inner cacheability (9:7): non-cacheable becomes read-allocate
    write-back. Outer cacheability (58:56): all but non-cacheable becomes "same as inner".
    """
    if value >> 10 & 3 == 2:
        value ^= 3 << 10
    if value >> 7 & 7 <= 1:
        value = value & ~(7 << 7) | 3 << 7
    if value >> 56 & 7 != 1:
        value &= ~(7 << 56)
    return value


def load_config(vgic: Vgic, irq: VgicIrq, read_u8: Callable[[int], int] | None = None) -> None:
    """Take enable and priority of an LPI from the configuration table. KvmError(EFAULT) where there is no RAM.

    ``read_u8`` reads guest memory, for a caller that reads it in larger pieces.
    """
    address = (vgic.propbaser & PROPBASER_ADDRESS) + irq.intid - MIN_LPI
    config = vgic.vm.memory.read_u8(address) if read_u8 is None else read_u8(address)
    vgic.set_lpi_config(irq, bool(config & CONFIG_ENABLE), config & CONFIG_PRIORITY)


def reload_config(vgic: Vgic, irq: VgicIrq) -> None:
    """As :func:`load_config`; a table that is not there changes nothing (INV, INVALL, GICR_INVLPIR)."""
    try:
        load_config(vgic, irq)
    except KvmError:
        return


def reload_all(vgic: Vgic, cpu: VgicV3Cpu) -> None:
    """Reload the configuration of every LPI that goes to ``cpu``."""
    for irq in list(vgic.mapped_lpis()):
        if irq.target is cpu:
            reload_config(vgic, irq)


def pending_bit(irq: VgicIrq, cpu: VgicV3Cpu) -> tuple[int, int]:
    """Guest address of the byte with the pending bit of ``irq`` in the table of ``cpu``, and the bit's value."""
    return (cpu.pendbaser & PENDBASER_ADDRESS) + irq.intid // 8, 1 << irq.intid % 8


def load_pending(vgic: Vgic, cpu: VgicV3Cpu) -> None:
    """EnableLPIs went from 0 to 1: the pending table of ``cpu`` says which of its mapped LPIs are pending.

    Stops silently at the first byte that is not in RAM.
    """
    if cpu.pendbaser & PENDBASER_PTZ:
        return
    for irq in list(vgic.mapped_lpis()):
        if irq.target is not cpu:
            continue
        address, bit = pending_bit(irq, cpu)
        try:
            pending = vgic.vm.memory.read_u8(address) & bit
        except KvmError:
            return
        vgic.set_latch(irq, bool(pending), "not in the pending table")


def save_pending(vgic: Vgic) -> None:
    """Write the pending bit of every LPI that has a target to that vCPU's pending table.

    A byte is written only when its bit changes.

    Raises:
        KvmError: EFAULT when a table is not in RAM; what came before is written.
    """
    memory = vgic.vm.memory
    for irq in vgic.mapped_lpis():
        if irq.target is None:
            continue
        address, bit = pending_bit(irq, irq.target)  # type: ignore[arg-type]
        stored = memory.read_u8(address)
        wanted = stored | bit if irq.pending else stored & ~bit
        if wanted != stored:
            memory.write_u8(address, wanted)
