"""A VMM of a few lines for tests of the KVM layer: an arm64 VM with GICv3 and ITS, set up as far as asked for."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

from fabric.devices.arm.vgic_its_commands import encode
from fabric.kvm import Kvm
from fabric.kvm.typed import Device, Host, VcpuFd, VmFd
from fabric.uapi import arm64 as arm
from fabric.uapi import kvm as uapi
from fabric.uapi.usermem import SparseMemory

RAM = 0x8000_0000
RAM_SIZE = 0x0100_0000
QUEUE = RAM
DEVICE_TABLE = RAM + 0x10_0000
COLLECTION_TABLE = RAM + 0x20_0000
ITT = RAM + 0x40_0000
CONFIG = RAM + 0x80_0000
PENDING = RAM + 0x90_0000
GICD, GICR, GITS = 0x0800_0000, 0x080A_0000, 0x0808_0000
DOORBELL = GITS + 0x1_0040
VALID = 1 << 63

GICD_ISPENDR, GICD_ICFGR, GICD_ISENABLER = 0x200, 0xC00, 0x100
GICR_CTLR, GICR_PROPBASER, GICR_PENDBASER = 0x0, 0x70, 0x78
GITS_CTLR, GITS_CBASER, GITS_CWRITER, GITS_BASER = 0x0, 0x80, 0x88, 0x100


def outcome(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a call returns, or the name of the errno that it raises."""
    try:
        return call(*args, **kwargs)
    except OSError as error:
        return errno.errorcode[error.errno or 0]


class Arm:
    """The VM. ``init=False`` leaves the GIC as created, ``gic=False`` makes none."""

    features: tuple[int, ...] = ()
    """KVM_ARM_VCPU_* of its vCPUs."""

    def __init__(
        self, vcpus: int = 1, *, gic: bool = True, init: bool = True, memory: bool = False, **options: Any
    ) -> None:
        self.user = SparseMemory()
        self.kvm = Kvm("aarch64", user_memory=self.user, **options)
        self.host = Host(self.kvm)
        self.vm: VmFd = self.host.create_vm()
        self.vcpus: list[VcpuFd] = [self.vm.create_vcpu(number) for number in range(vcpus)]
        for vcpu in self.vcpus:
            vcpu.init(self.features)
        self.gic: Device
        self.its: Device
        if memory:
            self.ram = self.user.map(RAM_SIZE)
            self.vm.set_memory(0, RAM, RAM_SIZE, self.ram)
        if gic:
            self.gic = self.vm.create_device(uapi.KVM_DEV_TYPE_ARM_VGIC_V3)
            self.gic.set_attr(arm.KVM_DEV_ARM_VGIC_GRP_ADDR, arm.KVM_VGIC_V3_ADDR_TYPE_DIST, GICD)
            self.gic.set_attr(arm.KVM_DEV_ARM_VGIC_GRP_ADDR, arm.KVM_VGIC_V3_ADDR_TYPE_REDIST, GICR)
            if init:
                self.gic.set_attr(arm.KVM_DEV_ARM_VGIC_GRP_CTRL, arm.KVM_DEV_ARM_VGIC_CTRL_INIT)

    @property
    def inside(self) -> Any:
        """The Vm behind the fds."""
        return self.kvm.vm(self.vm.fd)

    @property
    def ledger(self) -> Any:
        """The ledger's statement."""
        return self.inside.ledger.statement()

    # -- GIC

    def gicd(self, offset: int) -> int:
        """A distributor register."""
        return self.gic.get_attr(arm.KVM_DEV_ARM_VGIC_GRP_DIST_REGS, offset, 4)

    def set_gicd(self, offset: int, value: int) -> None:
        """Write a distributor register."""
        self.gic.set_attr(arm.KVM_DEV_ARM_VGIC_GRP_DIST_REGS, offset, value)

    def level_triggered(self) -> None:
        """Make SPIs 32 to 63 level-triggered."""
        self.set_gicd(GICD_ICFGR + 8, 0)
        self.set_gicd(GICD_ICFGR + 12, 0)

    def pending(self) -> int:
        """SPIs 32 to 63 that are latched pending."""
        return self.gicd(GICD_ISPENDR + 4)

    def lines(self) -> int:
        """SPIs 32 to 63 whose line is up (level-triggered ones)."""
        return self.gic.get_attr(arm.KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO, 32, 4)

    def forward(self) -> None:
        """Enable SPIs 32 to 63 in group 1, and have distributor and vCPU 0 take them."""
        self.set_gicd(0, 2)
        self.set_gicd(GICD_ISENABLER + 4, 0xFFFF_FFFF)
        self.set_sysreg(0xC230, 0xF0)  # ICC_PMR_EL1
        self.set_sysreg(0xC667, 1)  # ICC_IGRPEN1_EL1

    def set_sysreg(self, encoding: int, value: int) -> None:
        """Write a CPU interface register of vCPU 0."""
        self.gic.set_attr(arm.KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS, encoding, value)

    # -- ITS

    def add_its(self) -> None:
        """An ITS that maps event 0 of device 8 to LPI 8192 on vCPU 0. Needs memory."""
        self.its = self.vm.create_device(uapi.KVM_DEV_TYPE_ARM_VGIC_ITS)
        self.its.set_attr(arm.KVM_DEV_ARM_VGIC_GRP_ADDR, arm.KVM_VGIC_ITS_ADDR_TYPE, GITS)
        self.user.write(self.ram + CONFIG - RAM, b"\xa1" * 0x1000)
        self._redist(GICR_PROPBASER, CONFIG | 15)
        self._redist(GICR_PENDBASER, PENDING)
        self._redist(GICR_CTLR, 1)
        self._its(GITS_CBASER, VALID | QUEUE)
        self._its(GITS_BASER, VALID | DEVICE_TABLE)
        self._its(GITS_BASER + 8, VALID | COLLECTION_TABLE)
        self._its(GITS_CTLR, 1)
        self.command("MAPC", ICID=0, RDbase=0, V=1)
        self.command("MAPD", DeviceID=8, Size=4, ITT_addr=ITT >> 8, V=1)
        self.command("MAPTI", DeviceID=8, EventID=0, pINTID=8192, ICID=0)

    def command(self, name: str, **fields: int) -> None:
        """Have the ITS carry out a command."""
        at = self.its.get_attr(arm.KVM_DEV_ARM_VGIC_GRP_ITS_REGS, GITS_CWRITER)
        self.user.write(self.ram + QUEUE - RAM + at, encode(name, **fields))
        self._its(GITS_CWRITER, (at + 32) % 4096)

    def lpi_pending(self) -> bool:
        """Whether LPI 8192 is pending."""
        return bool(self.inside.irqchip.lpis[8192].pending)

    def _redist(self, offset: int, value: int) -> None:
        for at, word in ((offset, value & 0xFFFF_FFFF), (offset + 4, value >> 32)):
            if at % 8 == 0 or offset != GICR_CTLR:
                self.gic.set_attr(arm.KVM_DEV_ARM_VGIC_GRP_REDIST_REGS, at, word)

    def _its(self, offset: int, value: int) -> None:
        self.its.set_attr(arm.KVM_DEV_ARM_VGIC_GRP_ITS_REGS, offset, value)
