"""An arm64 VM as its VMM knows it, and the steps that concern memory, vCPUs and routes."""

from __future__ import annotations

import errno
from sys import byteorder
from typing import TYPE_CHECKING, Any

import attrs

from fabric.kvm.typed import Device, Host, VcpuFd, VmFd
from fabric.migration.arm64_state import ArmState, SlotState, VcpuState
from fabric.uapi import arm64 as arm
from fabric.uapi import ioctl as requests
from fabric.uapi import kvm as uapi
from fabric.uapi.usermem import PAGE_SIZE, ProcessMemory, SparseMemory, UserMemory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from fabric.vcpu import Guest

NO_PVTIME = (1 << 64) - 1
"""KVM_ARM_VCPU_PVTIME_IPA of a vCPU that has none."""
TIMER_ORDER = (arm.KVM_REG_ARM_TIMER_CNT, arm.KVM_REG_ARM_TIMER_CVAL, arm.KVM_REG_ARM_TIMER_CTL)
"""A timer is enabled when counter and compare value are right."""
BEFORE_FINALIZE = (arm.KVM_REG_ARM64_SVE_VLS,)
"""What cannot be written any more once SVE is finalised."""


@attrs.frozen
class Irqfd:
    """An irqfd of the VMM: its GSI, the eventfd, and the resample eventfd or None."""

    gsi: int
    event: Any
    resample: Any = None


def _place(vm: ArmVm, size: int) -> int:
    memory = vm.memory
    if not isinstance(memory, SparseMemory):
        raise TypeError("memory of this process has to be mapped by the caller: give `place`")
    return memory.map(size)


@attrs.define(eq=False)
class ArmVm:
    """An arm64 VM: its fds, and what KVM is told and never tells back.

    To save, all has to be there. To restore into a VM that does not exist yet, ``host`` is enough: the rest is filled
    in on the way.
    """

    host: Host
    vm: VmFd | None = None
    vcpus: list[VcpuFd] = attrs.field(factory=list)
    gic: Device | None = None
    its: list[Device] = attrs.field(factory=list)
    gic_version: int = 3
    """Which GIC it is, as KVM does not tell."""
    machine_type: int = 0
    vcpu_ids: list[int] = attrs.field(factory=list)
    """As given to KVM_CREATE_VCPU."""
    inits: list[arm.KvmVcpuInit] = attrs.field(factory=list)
    """As given to KVM_ARM_VCPU_INIT, which a restore needs to make the same vCPUs."""
    slots: list[uapi.KvmUserspaceMemoryRegion] = attrs.field(factory=list)
    routes: list[uapi.KvmIrqRoutingEntry] = attrs.field(factory=list)
    irqfds: list[Irqfd] = attrs.field(factory=list)
    lines: list[int] = attrs.field(factory=list)
    """INTIDs of the SPIs whose lines the VMM holds up, which a GICv2 does not tell."""
    guests: list[Guest | None] = attrs.field(factory=list)
    """What was taken out of each vCPU, or is to be loaded into it."""
    place: Callable[[ArmVm, int], int] = _place
    """Where to put ``size`` bytes of guest memory: a user address."""

    @property
    def version(self) -> int:
        """GIC version, 0 without an in-kernel GIC."""
        return 0 if self.gic is None else self.gic_version

    @property
    def memory(self) -> UserMemory:
        """What user addresses point into."""
        memory: UserMemory | None = getattr(self.host.kvm, "user_memory", None)
        return ProcessMemory() if memory is None else memory

    @property
    def fd(self) -> VmFd:
        """The VM. ValueError when there is none yet."""
        if self.vm is None:
            raise ValueError("the VM is not created yet")
        return self.vm

    @property
    def controller(self) -> Device:
        """The GIC. ValueError when there is none yet."""
        if self.gic is None:
            raise ValueError("the VM has no GIC yet")
        return self.gic

    def close(self) -> None:
        """Close every fd of the VM."""
        for file in (*self.vcpus, *self.its, self.gic, self.vm):
            if file is not None:
                file.close()


# -- saving ---------------------------------------------------------------------------------------------------


def check_stopped(vm: ArmVm, _found: dict[str, Any]) -> None:
    """A vCPU inside KVM_RUN answers nothing."""
    for vcpu in vm.vcpus:
        assert vcpu.mp_state is not None


def complete_exits(vm: ArmVm, _found: dict[str, Any]) -> None:
    """A load that exited becomes a register's value only when KVM_RUN is called again."""
    for vcpu in vm.vcpus:
        area = vcpu.run_area
        reason = int.from_bytes(area[uapi.KVM_RUN_EXIT_REASON : uapi.KVM_RUN_EXIT_REASON + 4], byteorder)
        if reason in (uapi.KVM_EXIT_UNKNOWN, uapi.KVM_EXIT_INTR):
            continue
        area[uapi.KVM_RUN_IMMEDIATE_EXIT] = 1
        try:
            vcpu.ioctl(requests.KVM_RUN)
        except OSError as error:
            if error.errno != errno.EINTR:
                raise
        finally:
            area[uapi.KVM_RUN_IMMEDIATE_EXIT] = 0


def save_vcpus(vm: ArmVm, found: dict[str, Any]) -> None:
    """Registers, timers among them, power state and attributes of every vCPU."""
    found["vcpus"] = tuple(
        _save_vcpu(vm, vcpu, vcpu_id, init) for vcpu, vcpu_id, init in zip(vm.vcpus, vm.vcpu_ids, vm.inits, strict=True)
    )


def _save_vcpu(vm: ArmVm, vcpu: VcpuFd, vcpu_id: int, init: arm.KvmVcpuInit) -> VcpuState:
    events = bytearray(arm.KvmVcpuEvents.SIZE)
    vcpu.ioctl(requests.KVM_GET_VCPU_EVENTS, events)
    serror = arm.KvmVcpuEvents.unpack(events)
    pmu = init.features[0] >> arm.KVM_ARM_VCPU_PMU_V3 & 1 and vm.gic is not None
    timer, steal = arm.KVM_ARM_VCPU_TIMER_CTRL, arm.KVM_ARM_VCPU_PVTIME_CTRL
    pvtime = NO_PVTIME
    if vcpu.has_attr(steal, arm.KVM_ARM_VCPU_PVTIME_IPA):
        pvtime = vcpu.get_attr(steal, arm.KVM_ARM_VCPU_PVTIME_IPA)
    return VcpuState(
        vcpu_id,
        init.target,
        tuple(init.features),
        tuple((reg, vcpu.get_reg(reg)) for reg in _reg_list(vcpu)),
        vcpu.mp_state,
        (serror.serror_pending, serror.serror_has_esr, serror.serror_esr),
        None
        if vm.gic is None
        else (
            vcpu.get_attr(timer, arm.KVM_ARM_VCPU_TIMER_IRQ_VTIMER, 4),
            vcpu.get_attr(timer, arm.KVM_ARM_VCPU_TIMER_IRQ_PTIMER, 4),
        ),
        vcpu.get_attr(arm.KVM_ARM_VCPU_PMU_V3_CTRL, arm.KVM_ARM_VCPU_PMU_V3_IRQ, 4) if pmu else None,
        None if pvtime == NO_PVTIME else pvtime,
    )


def _reg_list(vcpu: VcpuFd) -> list[int]:
    """KVM_GET_REG_LIST, timers last and in the order in which they are written."""
    buffer = bytearray(uapi.KvmRegList(0).pack())
    try:
        vcpu.ioctl(requests.KVM_GET_REG_LIST, buffer)
    except OSError as error:
        if error.errno != errno.E2BIG:
            raise
    count = uapi.KvmRegList.unpack(buffer).n
    buffer = bytearray(uapi.KvmRegList(count).pack()) + bytearray(8 * count)
    vcpu.ioctl(requests.KVM_GET_REG_LIST, buffer)
    ids = [int.from_bytes(buffer[8 * n : 8 * n + 8], byteorder) for n in range(1, count + 1)]
    return [reg for reg in ids if reg not in TIMER_ORDER] + [reg for reg in TIMER_ORDER if reg in ids]


def save_memory(vm: ArmVm, found: dict[str, Any]) -> None:
    """Every page of every slot that is not all zeros."""
    found["slots"] = tuple(
        SlotState(
            slot.slot,
            slot.flags,
            slot.guest_phys_addr,
            slot.memory_size,
            tuple(_pages(vm.memory, slot.userspace_addr, slot.memory_size)),
        )
        for slot in vm.slots
    )


def _pages(memory: UserMemory, base: int, size: int) -> Iterator[tuple[int, bytes]]:
    zero = bytes(PAGE_SIZE)
    written = memory.written(base, size) if isinstance(memory, SparseMemory) else range(base, base + size, PAGE_SIZE)
    for addr in written:
        page = memory.read(addr, PAGE_SIZE)
        if page != zero:
            yield addr - base, page


def save_wiring(vm: ArmVm, found: dict[str, Any]) -> None:
    """What KVM was told and does not tell: machine type, routes, irqfds, lines that are up."""
    found["machine_type"] = vm.machine_type
    found["routes"] = tuple(route.pack() for route in vm.routes)
    found["lines"] = tuple(vm.lines)
    found["irqfds"] = tuple((irqfd.gsi, irqfd.resample is not None) for irqfd in vm.irqfds)


def unload_guests(vm: ArmVm, _found: dict[str, Any]) -> None:
    """Take the guests out, all or none."""
    if not hasattr(vm.host.kvm, "unload"):
        return  # the true KVM
    guests: list[Guest | None] = []
    try:
        for vcpu in vm.vcpus:
            guests.append(vcpu.unload())
    except Exception:
        _load(vm, guests)
        raise
    vm.guests = guests


# -- restoring ------------------------------------------------------------------------------------------------


def create_vm(vm: ArmVm, state: ArmState) -> None:
    """The VM and its memory slots."""
    vm.machine_type = state.machine_type
    vm.vm = vm.host.create_vm(state.machine_type)
    for slot in state.slots:
        addr = vm.place(vm, slot.size)
        region = uapi.KvmUserspaceMemoryRegion(slot.slot, slot.flags, slot.gpa, slot.size, addr)
        vm.vm.ioctl(requests.KVM_SET_USER_MEMORY_REGION, region)
        vm.slots.append(region)


def restore_memory(vm: ArmVm, state: ArmState) -> None:
    """What was in the slots, into memory that is all zeros."""
    memory = vm.memory
    for slot, saved in zip(vm.slots, state.slots, strict=True):
        for offset, page in saved.pages:
            memory.write(slot.userspace_addr + offset, page)


def create_vcpus(vm: ArmVm, state: ArmState) -> None:
    """All vCPUs with the ids they had, initialised."""
    for saved in state.vcpus:
        vcpu = vm.fd.create_vcpu(saved.vcpu_id)
        vm.vcpus.append(vcpu)
        init = arm.KvmVcpuInit(saved.target, saved.features)
        vcpu.ioctl(requests.KVM_ARM_VCPU_INIT, init)
        if init.features[0] >> arm.KVM_ARM_VCPU_SVE & 1:
            _write(vcpu, [row for row in saved.registers if row[0] in BEFORE_FINALIZE])
            vcpu.ioctl(requests.KVM_ARM_VCPU_FINALIZE, bytearray(arm.KVM_ARM_VCPU_SVE.to_bytes(4, byteorder)))
        vm.vcpu_ids.append(saved.vcpu_id)
        vm.inits.append(init)


def restore_affinities(vm: ArmVm, state: ArmState) -> None:
    """MPIDR_EL1, by which the GIC's registers name the vCPUs."""
    for vcpu, saved in zip(vm.vcpus, state.vcpus, strict=True):
        _write(vcpu, [row for row in saved.registers if row[0] == arm.KVM_REG_ARM_MPIDR_EL1])


def restore_attributes(vm: ArmVm, state: ArmState) -> None:
    """Interrupt numbers of timers and PMU, and the stolen-time structure."""
    timer, pmu = arm.KVM_ARM_VCPU_TIMER_CTRL, arm.KVM_ARM_VCPU_PMU_V3_CTRL
    for vcpu, saved in zip(vm.vcpus, state.vcpus, strict=True):
        if saved.timer_irqs is not None:
            vcpu.set_attr(timer, arm.KVM_ARM_VCPU_TIMER_IRQ_VTIMER, saved.timer_irqs[0])
            vcpu.set_attr(timer, arm.KVM_ARM_VCPU_TIMER_IRQ_PTIMER, saved.timer_irqs[1])
        if saved.pmu_irq is not None:
            vcpu.set_attr(pmu, arm.KVM_ARM_VCPU_PMU_V3_IRQ, saved.pmu_irq)
        if saved.features[0] >> arm.KVM_ARM_VCPU_PMU_V3 & 1:
            vcpu.set_attr(pmu, arm.KVM_ARM_VCPU_PMU_V3_INIT)
        if saved.pvtime is not None:
            vcpu.set_attr(arm.KVM_ARM_VCPU_PVTIME_CTRL, arm.KVM_ARM_VCPU_PVTIME_IPA, saved.pvtime)


def restore_registers(vm: ArmVm, state: ArmState) -> None:
    """The vCPUs' registers, and the SError that is pending."""
    elsewhere = (*TIMER_ORDER, *BEFORE_FINALIZE)
    for vcpu, saved in zip(vm.vcpus, state.vcpus, strict=True):
        _write(vcpu, [row for row in saved.registers if row[0] not in elsewhere])
        pending, has_esr, esr = saved.serror
        events = arm.KvmVcpuEvents(serror_pending=pending, serror_has_esr=has_esr, serror_esr=esr)
        vcpu.ioctl(requests.KVM_SET_VCPU_EVENTS, events)


def restore_timers(vm: ArmVm, state: ArmState) -> None:
    """Counter, compare value and control of every virtual timer."""
    for vcpu, saved in zip(vm.vcpus, state.vcpus, strict=True):
        _write(vcpu, [row for row in saved.registers if row[0] in TIMER_ORDER])


def restore_power(vm: ArmVm, state: ArmState) -> None:
    """Which vCPUs are on."""
    for vcpu, saved in zip(vm.vcpus, state.vcpus, strict=True):
        vcpu.mp_state = saved.mp_state


def restore_routes(vm: ArmVm, state: ArmState) -> None:
    """The GSI table, if the VMM had set one."""
    if state.routes:
        vm.routes = [uapi.KvmIrqRoutingEntry.unpack(entry) for entry in state.routes]
        vm.fd.set_routes(vm.routes)


def restore_irqfds(vm: ArmVm, state: ArmState) -> None:
    """An irqfd with eventfds of its own for each that there was."""
    for gsi, resampled in state.irqfds:
        event = vm.host.kvm.eventfd()
        resample = vm.host.kvm.eventfd() if resampled else None
        vm.fd.irqfd(event, gsi, resamplefd=resample)
        vm.irqfds.append(Irqfd(gsi, event, resample))


def _write(vcpu: VcpuFd, registers: Iterable[tuple[int, int]]) -> None:
    for reg, value in registers:
        vcpu.set_reg(reg, value)


def load_guests(vm: ArmVm, _state: ArmState) -> None:
    """Each vCPU gets its guest, and may run."""
    _load(vm, vm.guests)


def _load(vm: ArmVm, guests: list[Guest | None]) -> None:
    for vcpu, guest in zip(vm.vcpus, guests, strict=False):
        if guest is not None:
            vcpu.load(guest)
