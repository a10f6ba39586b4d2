"""A VM with a GICv2 for tests: no KVM layer, attributes through the table, frames through the MMIO space."""

from __future__ import annotations

from typing import Any

from gic_machine import ADDR, CTRL, DIST_REGS, INIT, NR_IRQS, refusal
from its_machine import FakeVcpu, FakeVm

from fabric.devices.arm.vgic_v2 import VgicV2
from fabric.uapi.usermem import BufferPointer

CPU_REGS = 2
DIST, CPU = 0, 1
GICD_BASE, GICC_BASE = 0x0800_0000, 0x0801_0000
ISENABLER, ICENABLER, ISPENDR, ICPENDR, ISACTIVER, ICACTIVER = 0x100, 0x180, 0x200, 0x280, 0x300, 0x380
IGROUPR, IPRIORITYR, ITARGETSR, ICFGR, SGIR, CPENDSGIR, SPENDSGIR = 0x80, 0x400, 0x800, 0xC00, 0xF00, 0xF10, 0xF20
CTLR, PMR, BPR, IAR, EOIR, RPR, HPPIR, ABPR, AIAR, AEOIR, AHPPIR = range(0, 0x2C, 4)
APR, NSAPR, IIDR, DIR = 0xD0, 0xE0, 0xFC, 0x1000
SPURIOUS, OTHER_GROUP = 1023, 1022
SIZES = {ADDR: 8, DIST_REGS: 4, CPU_REGS: 4, NR_IRQS: 4, CTRL: 0}


class Gicv2Machine:
    """``vcpus`` vCPUs and a GICv2. ``ready`` sets addresses, initialises, forwards, and opens every CPU interface.

    Then the vCPUs run, as guests do that access the frames.
    """

    def __init__(self, vcpus: int = 1, *, ready: bool = True, nr_irqs: int = 96, ipa_bits: int = 40) -> None:
        self.vm = FakeVm(vcpus, ipa_bits, host_gic=2)
        self.vgic = VgicV2.create(self.vm)  # type: ignore[arg-type]
        self.ledger = self.vm.ledger
        if ready:
            self.set(NR_IRQS, 0, nr_irqs)
            self.place()
            self.set(CTRL, INIT)
            self.run()
            self.gicd(0, 1)
            for index in range(vcpus):
                self.gicc(PMR, 0xF0, cpu=index)
                self.gicc(CTLR, 1, cpu=index)

    def place(self) -> None:
        """Give the frames their addresses."""
        self.set(ADDR, DIST, GICD_BASE)
        self.set(ADDR, CPU, GICC_BASE)

    def run(self) -> None:
        """Every vCPU is inside KVM_RUN from now on."""
        self.vgic.first_run()
        for vcpu in self.vm.vcpus:
            vcpu.running = True
            vcpu.cpu_interface.load()

    def stop(self) -> None:
        """Every vCPU has left KVM_RUN."""
        for vcpu in self.vm.vcpus:
            vcpu.running = False

    def add_vcpu(self, vcpu_id: int | None = None) -> FakeVcpu:
        """KVM_CREATE_VCPU."""
        vcpu = FakeVcpu(len(self.vm.vcpus))
        if vcpu_id is not None:
            vcpu.vcpu_id = vcpu_id
        self.vgic.check_create_vcpu(vcpu.vcpu_id)
        self.vm.vcpus.append(vcpu)
        self.vgic.vcpu_created(vcpu)
        return vcpu

    # -- attributes

    def set(self, group: int, attr: int, value: int = 0, *, size: int | None = None) -> int:
        """KVM_SET_DEVICE_ATTR; ``size`` of the buffer, where it is not that of the group."""
        data = bytearray(value.to_bytes(8, "little")[: SIZES.get(group, 8) if size is None else size])
        return VgicV2.attributes.dispatch(self.vgic, "set", group, attr, BufferPointer(data))

    def get(self, group: int, attr: int, *, size: int | None = None) -> int:
        """KVM_GET_DEVICE_ATTR."""
        data = bytearray(SIZES.get(group, 8) if size is None else size)
        VgicV2.attributes.dispatch(self.vgic, "get", group, attr, BufferPointer(data))
        return int.from_bytes(data, "little")

    def has(self, group: int, attr: int) -> int:
        """KVM_HAS_DEVICE_ATTR: the errno, 0 if it has it."""
        return refusal(VgicV2.attributes.dispatch, self.vgic, "has", group, attr, BufferPointer(bytearray()))

    def user(self, group: int, offset: int, value: int | None = None, *, cpu: int = 0) -> int:
        """Userspace reads a register as the vCPU with id ``cpu`` sees it, or writes it; no vCPU runs meanwhile."""
        running = [vcpu.running for vcpu in self.vm.vcpus]
        self.stop()
        try:
            if value is None:
                return self.get(group, cpu << 32 | offset)
            return self.set(group, cpu << 32 | offset, value)
        finally:
            for vcpu, runs in zip(self.vm.vcpus, running, strict=True):
                vcpu.running = runs
                if runs:
                    vcpu.cpu_interface.load()

    # -- what the guest does

    def _access(self, address: int, value: int | None, size: int, cpu: int) -> int:
        found = self.vm.mmio.find(address)
        assert found is not None
        handler, offset = found
        if value is None:
            return handler.mmio_read(offset, size, self.vm.vcpus[cpu])
        handler.mmio_write(offset, size, value, self.vm.vcpus[cpu])
        return 0

    def gicd(self, offset: int, value: int | None = None, *, size: int = 4, cpu: int = 0) -> int:
        """A vCPU reads a register of the distributor, or writes it."""
        return self._access(GICD_BASE + offset, value, size, cpu)

    def gicc(self, offset: int, value: int | None = None, *, size: int = 4, cpu: int = 0) -> int:
        """A vCPU reads a register of its CPU interface, or writes it."""
        return self._access(GICC_BASE + offset, value, size, cpu)

    # -- interrupts

    def spi(self, intid: int, *, priority: int = 0xA0, edge: bool = True, cpu: int = 0) -> Any:
        """The SPI ``intid``, enabled and configured."""
        irq = self.vgic.spis[intid - 32]
        self.vgic.set_priority(irq, priority)
        self.vgic.set_edge(irq, edge)
        self.vgic.retarget(irq, self.vgic.cpus[cpu])
        self.vgic.set_enabled(irq, True)
        return irq

    def raise_spi(self, *intids: int) -> None:
        """An edge, or a rising line, on each."""
        for intid in intids:
            self.vgic.line_level(self.vgic.spis[intid - 32], True)

    def send(self, intid: int, targets: int, *, cpu: int = 0) -> None:
        """vCPU ``cpu`` sends an SGI to the vCPUs with these bits."""
        self.gicd(SGIR, targets << 16 | intid, cpu=cpu)

    @property
    def cpu(self) -> Any:
        """The interface of vCPU 0."""
        return self.vgic.cpus[0]

    def check(self) -> Any:
        """Invariants and the ledger; returns its statement."""
        self.vgic._check()
        return self.ledger.check()
