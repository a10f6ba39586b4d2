"""Attributes of arm64 vCPU fds: PMU, timers, stolen time.

Rules: vcpu.* of the interface inventory.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from fabric.devices.attributes import Attr, AttrTable, Group, Pointer
from fabric.errors import KvmError
from fabric.uapi import arm64 as arm
from fabric.vcpu.pvtime import INVALID_IPA, STOLEN_TIME_ALIGN, STRUCTURE_SIZE

if TYPE_CHECKING:
    from fabric.clock.arch_timer import ArchTimer
    from fabric.kvm.arm64_vcpu import ArmVcpuPart


def s32(ptr: Pointer) -> int:
    """The signed 32-bit value at ``ptr``."""
    value = ptr.u32()
    return value - (1 << 32) if value >> 31 else value


def _is_ppi(intid: int) -> bool:
    return arm.VGIC_NR_SGIS <= intid < arm.VGIC_NR_PRIVATE_IRQS


def _check_pmu_set(part: ArmVcpuPart) -> None:
    """What every write to the PMU group asks for, before it looks at the attribute."""
    if not part.has(arm.KVM_ARM_VCPU_PMU_V3):
        raise KvmError(errno.ENODEV, "the vCPU has no PMU (feature KVM_ARM_VCPU_PMU_V3)")
    if part.pmu_created:
        raise KvmError(errno.EBUSY, "the PMU is initialised already")
    if part.shared.pmu_id is None:
        part.shared.pmu_id = _default_pmu(part)


def _default_pmu(part: ArmVcpuPart) -> int:
    """The PMU of the physical CPU that the VMM is on when it first asks: that is CPU 0 here."""
    options = part.vm.options
    for number in options["pmu_ids"]:
        if 0 in options["pmu_cpus"].get(number, (0,)):
            return int(number)
    raise KvmError(errno.ENODEV, "the physical CPU of the VMM has no PMU")


def _set_pmu_irq(part: ArmVcpuPart, _attr: int, ptr: Pointer) -> None:
    _check_pmu_set(part)
    if part.vm.irqchip is None:
        raise KvmError(errno.EINVAL, "a PMU interrupt needs an in-kernel GIC")
    intid = s32(ptr)
    if not arm.VGIC_NR_SGIS <= intid <= arm.VGIC_MAX_SPI:
        raise KvmError(errno.EINVAL, f"the PMU interrupt must be a PPI or an SPI, not {intid}")
    # A PPI must be that of all vCPUs that have one, an SPI that of none, this vCPU included: so the same SPI
    # again is EINVAL and another one EBUSY. An SPI beside another vCPU's PPI passes, though the text wants one kind.
    for other in part.shared.vcpus:
        if other.pmu_irq is not None and (other.pmu_irq == intid) != _is_ppi(intid):
            raise KvmError(errno.EINVAL, f"interrupt {intid} does not go with {other.pmu_irq} of another vCPU")
    if part.pmu_irq is not None:
        raise KvmError(errno.EBUSY, f"the PMU interrupt is {part.pmu_irq} already")
    part.pmu_irq = intid


def _get_pmu_irq(part: ArmVcpuPart, _attr: int, ptr: Pointer) -> None:
    if part.vm.irqchip is None:
        raise KvmError(errno.EINVAL, "a PMU interrupt needs an in-kernel GIC")
    if not part.has(arm.KVM_ARM_VCPU_PMU_V3):
        raise KvmError(errno.ENODEV, "the vCPU has no PMU (feature KVM_ARM_VCPU_PMU_V3)")
    if part.pmu_irq is None:
        raise KvmError(errno.ENXIO, "the PMU has no interrupt yet")
    ptr.put_u32(part.pmu_irq)


def _init_pmu(part: ArmVcpuPart, _attr: int, _ptr: Pointer) -> None:
    _check_pmu_set(part)
    if part.vm.irqchip is not None:
        if not part.vm.irqchip.initialized:
            raise KvmError(errno.ENODEV, "the GIC is not initialised")
        if part.pmu_irq is None:
            raise KvmError(errno.ENXIO, "the PMU has no interrupt yet")
        part.claim(part.pmu_irq, part)
    part.pmu_created = True


def _set_pmu_filter(part: ArmVcpuPart, _attr: int, ptr: Pointer) -> None:
    _check_pmu_set(part)
    wanted = arm.KvmPmuEventFilter.unpack(ptr.read(arm.KvmPmuEventFilter.SIZE))
    events = 1 << part.vm.options["pmu_event_bits"]
    if wanted.base_event + wanted.nevents > events:
        raise KvmError(errno.EINVAL, f"events {wanted.base_event} and {wanted.nevents} on are not below {events}")
    if wanted.action not in (arm.KVM_PMU_EVENT_ALLOW, arm.KVM_PMU_EVENT_DENY):
        raise KvmError(errno.EINVAL, f"action must be allow (0) or deny (1), not {wanted.action}")
    if part.shared.has_run:
        raise KvmError(errno.EBUSY, "a filter comes before any vCPU has run")
    try:
        part.shared.pmu_filter.apply(wanted.base_event, wanted.nevents, wanted.action == arm.KVM_PMU_EVENT_ALLOW)
    except MemoryError:
        raise KvmError(errno.ENOMEM, "there is no memory for the bitmap of events") from None


def _set_pmu(part: ArmVcpuPart, _attr: int, ptr: Pointer) -> None:
    _check_pmu_set(part)
    wanted = s32(ptr)
    if wanted not in part.vm.options["pmu_ids"]:
        raise KvmError(errno.ENXIO, f"this host has no PMU {wanted}")
    shared = part.shared
    if shared.has_run or (shared.pmu_filter.bits is not None and shared.pmu_id != wanted):
        raise KvmError(errno.EBUSY, "a PMU is chosen before any vCPU has run and before any filter")
    shared.pmu_id = wanted
    cpus = part.vm.options["pmu_cpus"].get(wanted)
    shared.pmu_cpus = None if cpus is None else frozenset(cpus)


def _set_pmu_other(part: ArmVcpuPart, attr: int, _ptr: Pointer) -> None:
    _check_pmu_set(part)
    _no_attribute(part, attr)


def _has_pmu(part: ArmVcpuPart, _attr: int) -> None:
    if not part.has(arm.KVM_ARM_VCPU_PMU_V3):
        raise KvmError(errno.ENXIO, "the vCPU has no PMU (feature KVM_ARM_VCPU_PMU_V3)")


def _no_attribute(_part: ArmVcpuPart, attr: int) -> None:
    raise KvmError(errno.ENXIO, f"the group has no attribute {attr:#x}")


def _timer(part: ArmVcpuPart, attr: int) -> ArchTimer:
    timers = part.vcpu.timers
    return timers.virtual if attr == arm.KVM_ARM_VCPU_TIMER_IRQ_VTIMER else timers.physical


def _set_timer_irq(part: ArmVcpuPart, attr: int, ptr: Pointer) -> None:
    if part.vm.irqchip is None:
        raise KvmError(errno.EINVAL, "a timer interrupt needs an in-kernel GIC")
    intid = s32(ptr)
    if not _is_ppi(intid):
        raise KvmError(errno.EINVAL, f"a timer interrupt must be a PPI (16 to 31), not {intid}")
    # The text says: once any vCPU has run.
    if part.timers_enabled:
        raise KvmError(errno.EBUSY, "the vCPU has run")
    if attr not in (arm.KVM_ARM_VCPU_TIMER_IRQ_VTIMER, arm.KVM_ARM_VCPU_TIMER_IRQ_PTIMER):
        _no_attribute(part, attr)
    _timer(part, attr).intid = intid
    timers = part.vcpu.timers
    for other in part.shared.vcpus:
        other.vcpu.timers.virtual.intid = timers.virtual.intid
        other.vcpu.timers.physical.intid = timers.physical.intid
        other.timers_renumbered()


def _get_timer_irq(part: ArmVcpuPart, attr: int, ptr: Pointer) -> None:
    ptr.put_u32(_timer(part, attr).intid)


def _check_steal(part: ArmVcpuPart, _attr: int) -> None:
    if not part.vm.options["steal_time"]:
        raise KvmError(errno.ENXIO, "this host has no stolen time")


def _set_steal(part: ArmVcpuPart, attr: int, ptr: Pointer) -> None:
    _check_steal(part, attr)
    ipa = ptr.u64()
    if ipa % STOLEN_TIME_ALIGN:
        raise KvmError(errno.EINVAL, f"{ipa:#x} is not {STOLEN_TIME_ALIGN}-byte aligned")
    stolen = part.vcpu.stolen
    if stolen.base != INVALID_IPA:
        raise KvmError(errno.EEXIST, f"the stolen-time structure is at {stolen.base:#x} already")
    if not part.vm.memory.is_writable(ipa, STRUCTURE_SIZE):
        raise KvmError(errno.EINVAL, f"{ipa:#x} is in no memory slot that can be written")
    stolen.base = ipa


def _get_steal(part: ArmVcpuPart, attr: int, ptr: Pointer) -> None:
    _check_steal(part, attr)
    ptr.put_u64(part.vcpu.stolen.base)


_EFAULT, _EINVAL, _EEXIST, _ENXIO = errno.EFAULT, errno.EINVAL, errno.EEXIST, errno.ENXIO
_EBUSY, _ENODEV, _ENOMEM = errno.EBUSY, errno.ENODEV, errno.ENOMEM

VCPU_ATTRIBUTES = AttrTable(
    (
        Group(
            arm.KVM_ARM_VCPU_PMU_V3_CTRL,
            "KVM_ARM_VCPU_PMU_V3_CTRL",
            (
                Attr(
                    "vcpu.pmu.irq",
                    "KVM_ARM_VCPU_PMU_V3_IRQ",
                    number=arm.KVM_ARM_VCPU_PMU_V3_IRQ,
                    type="s32",
                    set=_set_pmu_irq,
                    get=_get_pmu_irq,
                    has=_has_pmu,
                    errors=(_ENODEV, _EBUSY, _EINVAL, _EFAULT, _ENXIO),
                ),
                Attr(
                    "vcpu.pmu.init",
                    "KVM_ARM_VCPU_PMU_V3_INIT",
                    number=arm.KVM_ARM_VCPU_PMU_V3_INIT,
                    set=_init_pmu,
                    has=_has_pmu,
                    errors=(_ENODEV, _EBUSY, _ENXIO, _EEXIST, _EINVAL),
                ),
                Attr(
                    "vcpu.pmu.filter",
                    "KVM_ARM_VCPU_PMU_V3_FILTER",
                    number=arm.KVM_ARM_VCPU_PMU_V3_FILTER,
                    type="struct",
                    set=_set_pmu_filter,
                    has=_has_pmu,
                    errors=(_ENODEV, _EBUSY, _EFAULT, _EINVAL, _ENOMEM, _ENXIO),
                ),
                Attr(
                    "vcpu.pmu.set-pmu",
                    "KVM_ARM_VCPU_PMU_V3_SET_PMU",
                    number=arm.KVM_ARM_VCPU_PMU_V3_SET_PMU,
                    type="s32",
                    set=_set_pmu,
                    has=_has_pmu,
                    errors=(_ENODEV, _EBUSY, _EFAULT, _ENXIO),
                ),
                Attr(
                    "vcpu.any",
                    "(any other PMU attribute)",
                    set=_set_pmu_other,
                    has=_no_attribute,
                    errors=(_ENODEV, _EBUSY, _ENXIO),
                ),
            ),
        ),
        Group(
            arm.KVM_ARM_VCPU_TIMER_CTRL,
            "KVM_ARM_VCPU_TIMER_CTRL",
            (
                *(
                    Attr(
                        id,
                        name,
                        number=number,
                        type="s32",
                        set=_set_timer_irq,
                        get=_get_timer_irq,
                        errors=(_EINVAL, _EFAULT, _EBUSY),
                    )
                    for id, name, number in (
                        ("vcpu.timer.vtimer", "KVM_ARM_VCPU_TIMER_IRQ_VTIMER", arm.KVM_ARM_VCPU_TIMER_IRQ_VTIMER),
                        ("vcpu.timer.ptimer", "KVM_ARM_VCPU_TIMER_IRQ_PTIMER", arm.KVM_ARM_VCPU_TIMER_IRQ_PTIMER),
                    )
                ),
                Attr(
                    "vcpu.any",
                    "(any other timer attribute)",
                    type="s32",
                    set=_set_timer_irq,
                    has=_no_attribute,
                    errors=(_EINVAL, _EFAULT, _EBUSY, _ENXIO),
                ),
            ),
        ),
        Group(
            arm.KVM_ARM_VCPU_PVTIME_CTRL,
            "KVM_ARM_VCPU_PVTIME_CTRL",
            (
                Attr(
                    "vcpu.pvtime.ipa",
                    "KVM_ARM_VCPU_PVTIME_IPA",
                    number=arm.KVM_ARM_VCPU_PVTIME_IPA,
                    type="u64",
                    set=_set_steal,
                    get=_get_steal,
                    has=_check_steal,
                    errors=(_ENXIO, _EFAULT, _EINVAL, _EEXIST),
                ),
            ),
        ),
    )
)
