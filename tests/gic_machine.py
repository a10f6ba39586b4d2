"""A VM with a GICv3 for tests: no KVM layer, attributes through the table, frames through the MMIO space."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from its_machine import FakeVcpu, FakeVm

from fabric.devices.arm.vgic_v3 import VgicV3
from fabric.errors import KvmError
from fabric.uapi.usermem import BufferPointer

GICD_BASE = 0x0800_0000
GICR_BASE = 0x080A_0000
GICR_SIZE = 0x2_0000
SGI_BASE = 0x1_0000
ADDR, DIST_REGS, NR_IRQS, CTRL, REDIST_REGS, CPU_SYSREGS, LEVEL_INFO = 0, 1, 3, 4, 5, 6, 7
DIST, REDIST, REDIST_REGION = 2, 3, 5
INIT, SAVE_PENDING_TABLES = 0, 3
SIZES = {ADDR: 8, DIST_REGS: 4, NR_IRQS: 4, CTRL: 0, REDIST_REGS: 4, CPU_SYSREGS: 8, LEVEL_INFO: 4}


def refusal(call: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """The errno that a call answers with, 0 for success."""
    try:
        call(*args, **kwargs)
    except KvmError as error:
        return error.errno or 0
    return 0


class GicMachine:
    """``vcpus`` vCPUs and a GICv3. ``ready`` sets addresses, initialises, forwards, and opens every CPU interface."""

    def __init__(self, vcpus: int = 1, *, ready: bool = True, nr_irqs: int = 96, ipa_bits: int = 40) -> None:
        self.vm = FakeVm(vcpus, ipa_bits)
        self.vgic = VgicV3.create(self.vm)  # type: ignore[arg-type]
        self.ledger = self.vm.ledger
        if ready:
            self.set(NR_IRQS, 0, nr_irqs)
            self.set(ADDR, DIST, GICD_BASE)
            self.set(ADDR, REDIST, GICR_BASE)
            self.set(CTRL, INIT)
            self.vgic.first_run()
            self.write(0, 2)
            for cpu in self.vgic.cpus:
                cpu.load()
                cpu.write_sysreg("ICC_PMR_EL1", 0xF0)
                cpu.write_sysreg("ICC_IGRPEN1_EL1", 1)

    @property
    def cpu(self) -> Any:
        """The interface of vCPU 0."""
        return self.vgic.cpus[0]

    def add_vcpu(self, vcpu_id: int | None = None) -> FakeVcpu:
        """KVM_CREATE_VCPU."""
        vcpu = FakeVcpu(len(self.vm.vcpus))
        if vcpu_id is not None:
            vcpu.vcpu_id = vcpu.mpidr = vcpu_id
        self.vgic.check_create_vcpu(vcpu.vcpu_id)
        self.vm.vcpus.append(vcpu)
        self.vgic.vcpu_created(vcpu)
        return vcpu

    def set(self, group: int, attr: int, value: int = 0, *, size: int | None = None) -> int:
        """KVM_SET_DEVICE_ATTR; ``size`` of the buffer, where it is not that of the group."""
        data = bytearray(value.to_bytes(8, "little")[: SIZES.get(group, 8) if size is None else size])
        return VgicV3.attributes.dispatch(self.vgic, "set", group, attr, BufferPointer(data))

    def get(self, group: int, attr: int, value: int = 0, *, size: int | None = None) -> int:
        """KVM_GET_DEVICE_ATTR; ``value`` is in the buffer before."""
        data = bytearray(value.to_bytes(8, "little")[: SIZES.get(group, 8) if size is None else size])
        VgicV3.attributes.dispatch(self.vgic, "get", group, attr, BufferPointer(data))
        return int.from_bytes(data, "little")

    def has(self, group: int, attr: int) -> int:
        """KVM_HAS_DEVICE_ATTR: the errno, 0 if it has it."""
        return refusal(VgicV3.attributes.dispatch, self.vgic, "has", group, attr, BufferPointer(bytearray()))

    def read(self, offset: int, size: int = 4, *, base: int = GICD_BASE) -> int:
        """The guest reads a frame, by default the distributor."""
        found = self.vm.mmio.find(base + offset)
        assert found is not None
        handler, start = found
        return handler.mmio_read(start, size, self.vm.vcpus[0])

    def write(self, offset: int, value: int, size: int = 4, *, base: int = GICD_BASE) -> None:
        """The guest writes to a frame."""
        found = self.vm.mmio.find(base + offset)
        assert found is not None
        handler, start = found
        handler.mmio_write(start, size, value, self.vm.vcpus[0])

    def spi(self, intid: int, *, priority: int = 0xA0, edge: bool = True, cpu: int = 0) -> Any:
        """The SPI ``intid``, enabled and configured."""
        irq = self.vgic.spis[intid - 32]
        self.vgic.set_priority(irq, priority)
        self.vgic.set_edge(irq, edge)
        self.vgic.retarget(irq, self.vgic.cpus[cpu])
        self.vgic.set_enabled(irq, True)
        return irq

    def lpi(self, intid: int, *, priority: int = 0xA0, cpu: int = 0) -> Any:
        """The LPI ``intid``, made, enabled and configured."""
        irq = self.vgic.add_lpi(intid, self.vgic.cpus[cpu])
        self.vgic.set_lpi_config(irq, True, priority)
        return irq

    def check(self) -> Any:
        """Invariants and the ledger; returns its statement."""
        self.vgic._check()
        return self.ledger.check()
