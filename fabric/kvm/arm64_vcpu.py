"""arm64 vCPU fds: KVM_ARM_VCPU_INIT, the first KVM_RUN, power state.

Registers are in :mod:`fabric.kvm.arm64_regs`, attributes in :mod:`fabric.kvm.arm64_attrs`. Rules: api.arm-vcpu-init
and vcpu.first-run of the interface inventory.
"""

from __future__ import annotations

import errno
from functools import partial
from sys import byteorder
from typing import TYPE_CHECKING, ClassVar

from fabric.clock.arch_timer import ArchTimer, ArchTimers
from fabric.devices.attributes import AttrTable, Pointer
from fabric.errors import KvmError
from fabric.kvm.arm64_attrs import VCPU_ATTRIBUTES, s32
from fabric.kvm.arm64_regs import CORE_REGS_SIZE, EXCEPTION_STATE, PSTATE, get_reg, reg_list, set_reg
from fabric.kvm.device_fd import attribute_table
from fabric.kvm.dispatch import POINTER, Ioctl, Members
from fabric.uapi import arm64 as arm
from fabric.uapi import ioctl as requests
from fabric.uapi import kvm as uapi
from fabric.uapi.usermem import UserPointer
from fabric.vcpu.arm64 import DataAbort
from fabric.vcpu.arm64_pmu import PmuCpu
from fabric.vcpu.arm64_sysregs import MPIDR
from fabric.vcpu.exits import MmioExit, NisvExit
from fabric.vcpu.pmu import Pmu

if TYPE_CHECKING:
    from fabric.devices.arm.vgic_irq import WiredIrq
    from fabric.kvm.arm64 import ArmVmPart
    from fabric.kvm.vm import VcpuFile, Vm
    from fabric.vcpu import Arm64Vcpu

AFFINITY_MASK = 0xFF_00FF_FFFF

_PTRAUTH = (1 << arm.KVM_ARM_VCPU_PTRAUTH_ADDRESS) | (1 << arm.KVM_ARM_VCPU_PTRAUTH_GENERIC)
_ALL_FEATURES = (1 << arm.KVM_VCPU_MAX_FEATURES) - 1


class ArmVcpuPart:
    """What the KVM layer keeps for an arm64 vCPU, besides the vCPU itself."""

    __slots__ = (
        "_timer_lines",
        "core",
        "events",
        "features",
        "pmu_created",
        "pmu_irq",
        "sve",
        "sve_finalized",
        "sve_vq",
        "timers_enabled",
        "vcpu",
        "vm",
    )

    attributes: ClassVar[AttrTable] = VCPU_ATTRIBUTES

    def __init__(self, vm: Vm, vcpu: Arm64Vcpu) -> None:
        self.vm = vm
        self.vcpu = vcpu
        self.features = 0
        """Bits of KVM_ARM_VCPU_*."""
        self.pmu_irq: int | None = None
        self.pmu_created = False
        self.sve: dict[int, bytes] = {}
        """SVE registers by id; one that is not in it is 0."""
        self.sve_vq: int = vm.options["sve_max_vq"]
        """The longest vectors, in quadwords."""
        self.sve_finalized = False
        self.timers_enabled = False
        self._timer_lines: list[tuple[ArchTimer, WiredIrq]] = []
        self.core = bytearray(CORE_REGS_SIZE)
        """struct kvm_regs. Kept for its owner; guest programs have no registers."""
        self.events = arm.KvmVcpuEvents()

    @property
    def shared(self) -> ArmVmPart:
        """What all vCPUs of the VM have in common."""
        part: ArmVmPart = self.vm.part
        return part

    def has(self, feature: int) -> bool:
        """Whether the vCPU has a KVM_ARM_VCPU_* feature."""
        return bool(self.features >> feature & 1)

    # -- KVM_ARM_VCPU_INIT

    def initialize(self, init: arm.KvmVcpuInit) -> None:
        """Set target and features, and reset. KvmError(EINVAL, ENOENT)."""
        if init.target != arm.KVM_ARM_TARGET_GENERIC_V8:
            raise KvmError(errno.EINVAL, f"the target must be {arm.KVM_ARM_TARGET_GENERIC_V8}, not {init.target}")
        wanted = sum(word << 32 * n for n, word in enumerate(init.features))
        known = wanted & _ALL_FEATURES
        if not self.vcpu.initialized:
            # Known features of a call that fails with ENOENT stay, and are there in the next.
            self.features |= known
        elif known != self.features:
            raise KvmError(errno.EINVAL, f"features {known:#x} are not {self.features:#x}, those of the first call")
        if wanted != known:
            raise KvmError(errno.ENOENT, f"features {wanted:#x} has a bit of {arm.KVM_VCPU_MAX_FEATURES} or above")
        try:
            self._check_features()
        except KvmError:
            self.features = 0
            self.vcpu.initialized = False
            raise
        self._reset()

    def _check_features(self) -> None:
        options = self.vm.options
        narrow = self.has(arm.KVM_ARM_VCPU_EL1_32BIT)
        if narrow and not options["el1_32bit"]:
            raise KvmError(errno.EINVAL, "this host has no 32-bit EL1")
        if self.shared.el1_32bit not in (None, narrow):
            raise KvmError(errno.EINVAL, "all vCPUs of a VM have the same register width")
        self.shared.el1_32bit = narrow
        if self.has(arm.KVM_ARM_VCPU_SVE) and not options["sve"]:
            raise KvmError(errno.EINVAL, "this host has no SVE")
        if self.features & _PTRAUTH and (self.features & _PTRAUTH != _PTRAUTH or not options["ptrauth"]):
            raise KvmError(errno.EINVAL, "pointer authentication comes with both kinds of keys, or not at all")
        if self.has(arm.KVM_ARM_VCPU_PMU_V3) and not options["pmu_ids"]:
            raise KvmError(errno.EINVAL, "this host has no PMU")

    def _reset(self) -> None:
        vcpu = self.vcpu
        kept = self.core[EXCEPTION_STATE.start : EXCEPTION_STATE.stop]  # a reset leaves these alone, as 6.1 does
        self.core[:] = bytes(CORE_REGS_SIZE)
        self.core[EXCEPTION_STATE.start : EXCEPTION_STATE.stop] = kept
        self.sve.clear()
        self.core[PSTATE : PSTATE + 8] = _PSTATE_RESET[self.has(arm.KVM_ARM_VCPU_EL1_32BIT)].to_bytes(8, byteorder)
        self.events = arm.KvmVcpuEvents()
        vcpu.features = frozenset(n for n in range(arm.KVM_VCPU_MAX_FEATURES) if self.has(n))
        vcpu.sysregs.reset(vcpu.features)
        self.set_mpidr(arm.mpidr_for_vcpu_id(vcpu.vcpu_id))
        vcpu.timers.reset()
        if vcpu.pmu is not None:
            vcpu.pmu.reset()
        elif self.has(arm.KVM_ARM_VCPU_PMU_V3):
            shared = self.shared
            pmu = Pmu(shared.counter.clock, shared.pmu_host, shared.pmu_filter, name=f"vcpu{vcpu.vcpu_id}")
            vcpu.give_pmu(pmu, PmuCpu)
        vcpu.initialized = True
        vcpu.suspended = False
        vcpu.restart()
        if self.has(arm.KVM_ARM_VCPU_POWER_OFF):
            vcpu.power_off()
        else:
            vcpu.power_on()
        if self.vm.irqchip is not None:
            self.vm.irqchip.vcpu_initialized(vcpu)

    def set_mpidr(self, value: int) -> None:
        """MPIDR_EL1, and with it the affinity by which the GIC knows the vCPU."""
        self.vcpu.sysregs.state[MPIDR] = value
        self.vcpu.mpidr = value & AFFINITY_MASK

    def finalize(self, feature: int) -> None:
        """KVM_ARM_VCPU_FINALIZE. KvmError(ENOEXEC, EINVAL, EPERM)."""
        self.check_initialized()
        if feature != arm.KVM_ARM_VCPU_SVE or not self.has(feature):
            raise KvmError(errno.EINVAL, f"feature {feature} is not one of this vCPU that is finalised")
        if self.sve_finalized:
            raise KvmError(errno.EPERM, "SVE is finalised already")
        self.sve_finalized = True

    # -- what calls and the first KVM_RUN ask for

    def check_initialized(self) -> None:
        """KvmError(ENOEXEC) before KVM_ARM_VCPU_INIT."""
        if not self.vcpu.initialized:
            raise KvmError(errno.ENOEXEC, f"vCPU {self.vcpu.vcpu_id} was not given KVM_ARM_VCPU_INIT")

    def check_finalized(self) -> None:
        """KvmError(EPERM) with a feature that was not finalised."""
        if self.has(arm.KVM_ARM_VCPU_SVE) and not self.sve_finalized:
            raise KvmError(errno.EPERM, "SVE was not finalised")

    def enable_timers(self) -> None:
        """Wire the timers to their PPIs. KvmError(EINVAL) when the PPIs are not theirs alone, or differ."""
        if self.timers_enabled:
            return
        timers = self.vcpu.timers
        vgic = self.vm.irqchip
        if vgic is None:
            timers.virtual.sink = partial(self.vcpu.lines.device, arm.KVM_ARM_DEV_EL1_VTIMER)
            timers.physical.sink = partial(self.vcpu.lines.device, arm.KVM_ARM_DEV_EL1_PTIMER)
        else:
            try:
                lines = [(timer, self.claim(timer.intid, timer)) for timer in (timers.virtual, timers.physical)]
            except KvmError as error:
                raise KvmError(errno.EINVAL, f"a timer cannot have its interrupt: {error.strerror}") from None
            for vcpu in self.vm.vcpus:
                other = vcpu.timers  # type: ignore[attr-defined]
                if _intids(other) != _intids(timers):
                    raise KvmError(errno.EINVAL, "the timer interrupts must be the same on all vCPUs")
            for timer, irq in lines:
                self._wire(timer, irq)
            self._timer_lines = lines
        self.timers_enabled = True

    def timers_renumbered(self) -> None:
        """Another vCPU gave the timers of this one other interrupts; once wired, they have these or none."""
        for timer, irq in self._timer_lines:
            timer.sink = partial(self.vm.irqchip.line_level, irq) if timer.intid == irq.intid else None

    def enable_pmu(self) -> None:
        """Wire the PMU to its interrupt. KvmError(EINVAL) with a PMU that was not set up."""
        pmu = self.vcpu.pmu
        if pmu is None:
            return
        if not self.pmu_created:
            raise KvmError(errno.EINVAL, "the PMU was not initialised")
        vgic = self.vm.irqchip
        if vgic is None:
            if self.pmu_irq is not None:
                raise KvmError(errno.EINVAL, "the PMU has an interrupt, and the VM no in-kernel GIC")
            pmu.sink = partial(self.vcpu.lines.device, arm.KVM_ARM_DEV_PMU)
        elif self.pmu_irq is None or not arm.VGIC_NR_SGIS <= self.pmu_irq < vgic.nr_irqs:
            raise KvmError(errno.EINVAL, f"this GIC does not have the PMU's interrupt {self.pmu_irq}")
        else:
            self._wire(pmu, self.claim(self.pmu_irq, self))
        pmu.cpus = self.shared.pmu_cpus

    def _wire(self, device: ArchTimer | Pmu, irq: WiredIrq) -> None:
        """Have an interrupt follow the line of a device.

        Where the device's registers were restored its line may be up already; that is the interrupt that userspace
        restored in the GIC, and no other one.
        """
        vgic = self.vm.irqchip
        device.sink = partial(vgic.line_level, irq)
        if not irq.edge:
            device.level = device.asserted
            vgic.store_line(irq, device.level)

    def claim(self, intid: int, owner: object) -> WiredIrq:
        """Wire a PPI of this vCPU, or an SPI, to an in-kernel device.

        Raises:
            KvmError: EAGAIN before the GIC is initialised, EINVAL for a number that it does not have, EEXIST
                when another device has it.
        """
        vgic = self.vm.irqchip
        if not vgic.initialized:
            raise KvmError(errno.EAGAIN, "the GIC is not initialised")
        if not arm.VGIC_NR_SGIS <= intid < vgic.nr_irqs:
            raise KvmError(errno.EINVAL, f"the GIC has no PPI or SPI {intid}")
        irq: WiredIrq
        if intid < arm.VGIC_NR_PRIVATE_IRQS:
            irq = self.vcpu.cpu_interface.private[intid]
        else:
            irq = vgic.spis[intid - arm.VGIC_NR_PRIVATE_IRQS]
        if irq.owner is not None and irq.owner is not owner:
            raise KvmError(errno.EEXIST, f"interrupt {intid} belongs to another device")
        irq.owner = owner
        return irq

    # -- power

    @property
    def mp_state(self) -> int:
        """KVM_MP_STATE_*."""
        if self.vcpu.powered_off:
            return uapi.KVM_MP_STATE_STOPPED
        return uapi.KVM_MP_STATE_SUSPENDED if self.vcpu.suspended else uapi.KVM_MP_STATE_RUNNABLE

    @mp_state.setter
    def mp_state(self, state: int) -> None:
        if state not in (uapi.KVM_MP_STATE_RUNNABLE, uapi.KVM_MP_STATE_STOPPED, uapi.KVM_MP_STATE_SUSPENDED):
            raise KvmError(errno.EINVAL, f"an arm64 vCPU has no state {state}")
        self.vcpu.suspended = state == uapi.KVM_MP_STATE_SUSPENDED
        if state == uapi.KVM_MP_STATE_STOPPED:
            self.vcpu.power_off()
        else:
            self.vcpu.power_on()


_ESR_ISV = 1 << 24
"""The syndrome of an SError whose syndrome is not given: implementation defined."""
_PSTATE_RESET = (0x3C5, 0x1D3)
"""EL1h or, in AArch32, SVC; all exceptions masked."""


def _intids(timers: ArchTimers) -> tuple[int, int]:
    return timers.virtual.intid, timers.physical.intid


# -- ioctls -----------------------------------------------------------------------------------------------------


def _vcpu_init(file: VcpuFile, init: arm.KvmVcpuInit) -> None:
    file.part.initialize(init)


def _vcpu_finalize(file: VcpuFile, ptr: Pointer) -> None:
    file.part.check_initialized()
    file.part.finalize(s32(ptr))


def _get_one_reg(file: VcpuFile, ptr: Pointer) -> None:
    file.part.check_initialized()
    reg = uapi.KvmOneReg.unpack(ptr.read(uapi.KvmOneReg.SIZE))
    get_reg(file.part, reg.id, UserPointer(file.kvm.user_memory, reg.addr))


def _set_one_reg(file: VcpuFile, ptr: Pointer) -> None:
    file.part.check_initialized()
    reg = uapi.KvmOneReg.unpack(ptr.read(uapi.KvmOneReg.SIZE))
    set_reg(file.part, reg.id, UserPointer(file.kvm.user_memory, reg.addr))


def _get_reg_list(file: VcpuFile, ptr: Pointer) -> None:
    """KVM_GET_REG_LIST. KvmError(E2BIG) with the number there is when there is no room for all."""
    part: ArmVcpuPart = file.part
    part.check_initialized()
    part.check_finalized()
    room = uapi.KvmRegList.unpack(ptr.read(uapi.KvmRegList.SIZE)).n
    ids = reg_list(part)
    ptr.put_u64(len(ids))
    if room < len(ids):
        raise KvmError(errno.E2BIG, f"there are {len(ids)} registers, more than {room}")
    for n, reg in enumerate(ids, start=1):
        ptr.put_u64(reg, 8 * n)


def _get_mp_state(file: VcpuFile, ptr: Pointer) -> None:
    ptr.put_u32(file.part.mp_state)


def _set_mp_state(file: VcpuFile, state: int) -> None:
    file.part.mp_state = state


def _get_vcpu_events(file: VcpuFile, ptr: Pointer) -> None:
    """The SError that is pending; ``serror_has_esr`` says that this host can give it a syndrome."""
    events: arm.KvmVcpuEvents = file.part.events
    has_esr = int(file.vm.options["ras"])
    syndrome = events.serror_esr if has_esr else 0
    ptr.write(arm.KvmVcpuEvents(events.serror_pending, has_esr, serror_esr=syndrome).pack())


def _set_vcpu_events(file: VcpuFile, events: arm.KvmVcpuEvents) -> None:
    if any(events.reserved) or any(events.pad):
        raise KvmError(errno.EINVAL, "what is reserved in struct kvm_vcpu_events must be 0")
    if events.serror_pending and events.serror_has_esr:
        if not file.vm.options["ras"]:
            raise KvmError(errno.EINVAL, "this host cannot give an SError a syndrome")
        if events.serror_esr >> 25:
            raise KvmError(errno.EINVAL, f"a syndrome has 25 bits, not {events.serror_esr:#x}")
    if events.serror_pending:
        esr = events.serror_esr if events.serror_has_esr else _ESR_ISV
        file.part.events = arm.KvmVcpuEvents(serror_pending=1, serror_esr=esr)
    exited = file.vcpu.exited
    if events.ext_dabt_pending and isinstance(exited, MmioExit | NisvExit):
        # After any other exit it is, in the words of the text, a programming error; then nothing is aborted.
        file.vcpu.abort = DataAbort(exited.gpa)


VCPU_TABLE = (
    *attribute_table(lambda file: file.part),
    Ioctl(requests.KVM_ARM_VCPU_INIT, arm.KvmVcpuInit, _vcpu_init, "api.arm-vcpu-init"),
    Ioctl(requests.KVM_ARM_VCPU_FINALIZE, POINTER, _vcpu_finalize),
    Ioctl(requests.KVM_GET_REG_LIST, POINTER, _get_reg_list),
    Ioctl(requests.KVM_GET_ONE_REG, POINTER, _get_one_reg, "api.get-one-reg"),
    Ioctl(requests.KVM_SET_ONE_REG, POINTER, _set_one_reg, "api.set-one-reg"),
    Ioctl(requests.KVM_GET_MP_STATE, POINTER, _get_mp_state),
    Ioctl(requests.KVM_SET_MP_STATE, Members(uapi.KvmMpState), _set_mp_state),
    Ioctl(requests.KVM_GET_VCPU_EVENTS, POINTER, _get_vcpu_events),
    Ioctl(requests.KVM_SET_VCPU_EVENTS, arm.KvmVcpuEvents, _set_vcpu_events),
)
