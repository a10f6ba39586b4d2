"""The MSRs that Hyper-V adds to a vCPU, a row each: who may access it, what a read gives and a write does.

A guest may use them when it sees Hyper-V in its CPUID; with KVM_CAP_HYPERV_ENFORCE_CPUID only those whose privilege its
CPUID leaf 0x40000003 has. The VMM may always.

Sources: TLFS, chapters Feature and Interface Discovery, Virtual Interrupts, Timers, Virtual Processors; what KVM lets
the VMM do, and the guest not, as seen in its list of MSRs to save.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import attrs

from fabric.devices.x86.hyperv import VirtualProcessor
from fabric.devices.x86.lapic import EOI, ICR, ICR2, ICR_X2APIC_RESERVED, MSR_BASE, TPR, NotWritable
from fabric.devices.x86.synic import Refused
from fabric.errors import KvmError
from fabric.uapi import hyperv as hv
from fabric.uapi.kvm import PAGE_SIZE
from fabric.uapi.x86 import HypervSynic

MAX_VP_INDEX: Final = 1024
SECOND_NS: Final = 1_000_000_000
_PAGE = PAGE_SIZE - 1

# Privileges of a partition: bits of CPUID leaf 0x40000003 EAX, from 64 on of EDX.
VP_RUNTIME, TIME_REF_COUNT, SYNIC, SYNTIMER, APIC_ACCESS, HYPERCALL, VP_INDEX, RESET = range(8)
REFERENCE_TSC, FREQUENCIES, REENLIGHTENMENT, INVARIANT_TSC = 9, 11, 13, 15
CRASH, DEBUG, DIRECT_TIMERS = 64 + 10, 64 + 11, 64 + 19

Read = Callable[[VirtualProcessor], int]
Write = Callable[[VirtualProcessor, int, bool], None]


@attrs.frozen
class HypervMsr:
    """One MSR: ``read(vp)``, and ``write(vp, value, host)``, both of which raise Refused."""

    name: str
    privilege: int
    read: Read
    write: Write
    listed: bool = True
    """KVM_GET_MSR_INDEX_LIST has it; VMMs know the others by themselves."""


def _read_only(_vp: VirtualProcessor, _value: int, host: bool) -> None:
    """What a VMM writes is dropped, so that it can restore all that it has saved."""
    if not host:
        raise Refused("the MSR cannot be written")


def _nothing_to_read(_vp: VirtualProcessor) -> int:
    return 0


# -- the partition


def _of_partition(name: str, privilege: int, attribute: str) -> HypervMsr:
    """An MSR that is only kept."""

    def write(vp: VirtualProcessor, value: int, host: bool) -> None:
        setattr(vp.partition, attribute, value)

    return HypervMsr(name, privilege, lambda vp: int(getattr(vp.partition, attribute)), write)


def _write_reset(vp: VirtualProcessor, value: int, host: bool) -> None:
    if value == 1:
        vp.reset_partition()


def _crash_parameter(n: int) -> HypervMsr:
    def write(vp: VirtualProcessor, value: int, host: bool) -> None:
        vp.partition.crash[n] = value

    return HypervMsr(f"HV_X64_MSR_CRASH_P{n}", CRASH, lambda vp: vp.partition.crash[n], write)


def _write_crash_control(vp: VirtualProcessor, value: int, host: bool) -> None:
    notify = value & hv.HV_CRASH_CTL_CRASH_NOTIFY
    if host:
        vp.partition.crash_control = notify  # what the guest is offered
    elif notify:
        vp.report_crash()


def _write_emulation_control(vp: VirtualProcessor, value: int, host: bool) -> None:
    vp.partition.reference_tsc.emulation = value


def _write_emulation_status(vp: VirtualProcessor, value: int, host: bool) -> None:
    if value and not host:
        raise Refused("a guest can only say that the TSC is not emulated any more")
    vp.partition.tsc_emulation_status = value


def _write_invariant_tsc(vp: VirtualProcessor, value: int, host: bool) -> None:
    if value & ~hv.HV_EXPOSE_INVARIANT_TSC or (not host and vp.partition.invariant_tsc and not value):
        raise Refused("the invariant TSC can be shown, and a guest cannot hide it again")
    vp.partition.invariant_tsc = value


def _syndbg(name: str, member: str, *, exits: bool = False) -> HypervMsr:
    """A register of the synthetic debugger, which the VMM has: it is told of commands."""

    def read(vp: VirtualProcessor) -> int:
        return int(getattr(vp.partition.syndbg, member))

    def write(vp: VirtualProcessor, value: int, host: bool) -> None:
        vp.partition.syndbg = vp.partition.syndbg.with_(**{member: value})
        if exits and not host:
            vp.leave(vp.partition.syndbg.with_(msr=_NUMBERS[name]))

    return HypervMsr(name, DEBUG, read, write)


# -- the virtual processor


def _write_vp_index(vp: VirtualProcessor, value: int, host: bool) -> None:
    index = value & 0xFFFF_FFFF
    if not host or index >= MAX_VP_INDEX:
        raise Refused(f"a VMM sets VP indices below {MAX_VP_INDEX}, not {index}")
    vp.index = index


def _write_runtime(vp: VirtualProcessor, value: int, host: bool) -> None:
    if not host:
        raise Refused("a VMM sets how long a virtual processor has run")
    vp.runtime = value


def _write_assist_page(vp: VirtualProcessor, value: int, host: bool) -> None:
    """Its first word tells the guest that it need not write EOI, as KVM's own paravirtual EOI does."""
    pv = vp.vcpu.pv
    if not value & hv.HV_ENABLE:
        vp.assist_page, pv.pv_eoi = value, 0
        return
    try:
        vp.vcpu.vm.memory.write_u32(value & ~_PAGE, 0)
    except KvmError as error:
        raise Refused(f"there is no memory for an assist page at {value & ~_PAGE:#x}") from error
    vp.assist_page, pv.pv_eoi = value, value & ~_PAGE | hv.HV_ENABLE


def _apic(vp: VirtualProcessor) -> Any:
    apic = vp.vcpu.cpu_interface
    if apic is None:
        raise Refused("the VMM has the local APIC")
    return apic


def _read_apic_frequency(vp: VirtualProcessor) -> int:
    apic = vp.vcpu.cpu_interface
    return SECOND_NS if apic is None else SECOND_NS // int(apic.bus.cycle_ns)


def _apic_register(name: str, offset: int) -> HypervMsr:
    """A fast way to a register of the local APIC, whatever its mode."""

    def read(vp: VirtualProcessor) -> int:
        try:
            return int(_apic(vp).read(offset))
        except KeyError as error:
            raise Refused(f"{name} cannot be read") from error

    def write(vp: VirtualProcessor, value: int, host: bool) -> None:
        if value >> 32:
            raise Refused(f"{name} has 32 bits")
        try:
            _apic(vp).write(offset, value)
        except NotWritable as error:
            raise Refused(f"{name} does not take {value:#x}") from error

    return HypervMsr(name, APIC_ACCESS, read, write, listed=False)


def _read_icr(vp: VirtualProcessor) -> int:
    apic = _apic(vp)
    if apic.x2apic:
        return int(apic.icr)
    return int(apic.word(ICR2) << 32 | apic.word(ICR))


def _write_icr(vp: VirtualProcessor, value: int, host: bool) -> None:
    apic = _apic(vp)
    if value & ICR_X2APIC_RESERVED:
        raise Refused(f"{value:#x} has reserved bits of the ICR")
    if apic.x2apic:
        apic.msr_write(MSR_BASE + (ICR >> 4), value)
    else:
        apic.write(ICR2, value >> 32)
        apic.write(ICR, value & 0xFFFF_FFFF)


# -- the SynIC


def _synic(name: str, attribute: str) -> HypervMsr:
    """SCONTROL, SIEFP or SIMP: a guest's write exits, as the VMM has a part in what it names."""
    page = attribute != "control"

    def read(vp: VirtualProcessor) -> int:
        return int(getattr(vp.synic, attribute))

    def write(vp: VirtualProcessor, value: int, host: bool) -> None:
        synic = vp.synic
        if page:
            synic.clear_page(value, host)
        setattr(synic, attribute, value)
        if not host:
            vp.leave(HypervSynic(_NUMBERS[name], 0, synic.control, synic.event_page, synic.message_page))

    return _of_active_synic(HypervMsr(name, SYNIC, read, write, listed=not page))


def _write_version(vp: VirtualProcessor, value: int, host: bool) -> None:
    if not host:
        raise Refused("the version of the SynIC cannot be written")
    vp.synic.version = value


def _write_eom(vp: VirtualProcessor, value: int, host: bool) -> None:
    if vp.synic.active:
        vp.synic.acknowledge()


def _sint(n: int) -> HypervMsr:
    return _of_active_synic(
        HypervMsr(
            f"HV_X64_MSR_SINT{n}",
            SYNIC,
            lambda vp: vp.synic.sints[n],
            lambda vp, value, host: vp.synic.write_sint(n, value, host),
            listed=False,
        )
    )


def _of_active_synic(msr: HypervMsr) -> HypervMsr:
    """The same MSR, whose writes need an active SynIC."""

    def write(vp: VirtualProcessor, value: int, host: bool) -> None:
        vp.synic.check_access(value, host)
        msr.write(vp, value, host)

    return attrs.evolve(msr, write=write)


def _timer(n: int, attribute: str) -> HypervMsr:
    def read(vp: VirtualProcessor) -> int:
        return int(getattr(vp.synic.timers[n], attribute)) if vp.synic.timers else 0

    def write(vp: VirtualProcessor, value: int, host: bool) -> None:
        if not vp.synic.timers:
            return  # a 0 of the VMM's: it is 0
        timer = vp.synic.timers[n]
        if attribute == "count":
            timer.write_count(value, host)
            return
        if value & hv.HV_STIMER_DIRECT and not host and not vp.has(DIRECT_TIMERS):
            raise Refused("the guest's CPUID has no timers in direct mode")
        timer.write_config(value)

    name = f"HV_X64_MSR_STIMER{n}_{attribute.upper()}"
    return _of_active_synic(HypervMsr(name, SYNTIMER, read, write, listed=not n and attribute == "config"))


_PARTITION: dict[int, HypervMsr] = {
    hv.HV_X64_MSR_GUEST_OS_ID: HypervMsr(
        "HV_X64_MSR_GUEST_OS_ID",
        HYPERCALL,
        lambda vp: vp.partition.guest_os_id,
        lambda vp, value, host: vp.partition.write_guest_os_id(value),
    ),
    hv.HV_X64_MSR_HYPERCALL: HypervMsr(
        "HV_X64_MSR_HYPERCALL",
        HYPERCALL,
        lambda vp: vp.partition.hypercall,
        lambda vp, value, host: vp.partition.write_hypercall(value),
    ),
    hv.HV_X64_MSR_RESET: HypervMsr("HV_X64_MSR_RESET", RESET, _nothing_to_read, _write_reset),
    hv.HV_X64_MSR_TIME_REF_COUNT: HypervMsr(
        "HV_X64_MSR_TIME_REF_COUNT", TIME_REF_COUNT, lambda vp: vp.partition.reference_time, _read_only
    ),
    hv.HV_X64_MSR_REFERENCE_TSC: HypervMsr(
        "HV_X64_MSR_REFERENCE_TSC",
        REFERENCE_TSC,
        lambda vp: vp.partition.reference_tsc.msr,
        lambda vp, value, host: vp.partition.reference_tsc.write(value, host),
    ),
    **{hv.HV_X64_MSR_CRASH_P0 + n: _crash_parameter(n) for n in range(5)},
    hv.HV_X64_MSR_CRASH_CTL: HypervMsr(
        "HV_X64_MSR_CRASH_CTL", CRASH, lambda vp: vp.partition.crash_control, _write_crash_control
    ),
    hv.HV_X64_MSR_REENLIGHTENMENT_CONTROL: _of_partition(
        "HV_X64_MSR_REENLIGHTENMENT_CONTROL", REENLIGHTENMENT, "reenlightenment"
    ),
    hv.HV_X64_MSR_TSC_EMULATION_CONTROL: HypervMsr(
        "HV_X64_MSR_TSC_EMULATION_CONTROL",
        REENLIGHTENMENT,
        lambda vp: vp.partition.reference_tsc.emulation,
        _write_emulation_control,
    ),
    hv.HV_X64_MSR_TSC_EMULATION_STATUS: HypervMsr(
        "HV_X64_MSR_TSC_EMULATION_STATUS",
        REENLIGHTENMENT,
        lambda vp: vp.partition.tsc_emulation_status,
        _write_emulation_status,
    ),
    hv.HV_X64_MSR_TSC_INVARIANT_CONTROL: HypervMsr(
        "HV_X64_MSR_TSC_INVARIANT_CONTROL",
        INVARIANT_TSC,
        lambda vp: vp.partition.invariant_tsc,
        _write_invariant_tsc,
    ),
    hv.HV_X64_MSR_SYNDBG_CONTROL: _syndbg("HV_X64_MSR_SYNDBG_CONTROL", "control", exits=True),
    hv.HV_X64_MSR_SYNDBG_STATUS: _syndbg("HV_X64_MSR_SYNDBG_STATUS", "status"),
    hv.HV_X64_MSR_SYNDBG_SEND_BUFFER: _syndbg("HV_X64_MSR_SYNDBG_SEND_BUFFER", "send_page"),
    hv.HV_X64_MSR_SYNDBG_RECV_BUFFER: _syndbg("HV_X64_MSR_SYNDBG_RECV_BUFFER", "recv_page"),
    hv.HV_X64_MSR_SYNDBG_PENDING_BUFFER: _syndbg("HV_X64_MSR_SYNDBG_PENDING_BUFFER", "pending_page", exits=True),
    hv.HV_X64_MSR_SYNDBG_OPTIONS: _of_partition("HV_X64_MSR_SYNDBG_OPTIONS", DEBUG, "syndbg_options"),
}
_VIRTUAL_PROCESSOR: dict[int, HypervMsr] = {
    hv.HV_X64_MSR_VP_INDEX: HypervMsr("HV_X64_MSR_VP_INDEX", VP_INDEX, lambda vp: vp.index, _write_vp_index),
    hv.HV_X64_MSR_VP_RUNTIME: HypervMsr("HV_X64_MSR_VP_RUNTIME", VP_RUNTIME, lambda vp: vp.runtime, _write_runtime),
    hv.HV_X64_MSR_TSC_FREQUENCY: HypervMsr(
        "HV_X64_MSR_TSC_FREQUENCY", FREQUENCIES, lambda vp: int(vp.vcpu.tsc.khz) * 1000, _read_only
    ),
    hv.HV_X64_MSR_APIC_FREQUENCY: HypervMsr("HV_X64_MSR_APIC_FREQUENCY", FREQUENCIES, _read_apic_frequency, _read_only),
    hv.HV_X64_MSR_EOI: _apic_register("HV_X64_MSR_EOI", EOI),
    hv.HV_X64_MSR_ICR: HypervMsr("HV_X64_MSR_ICR", APIC_ACCESS, _read_icr, _write_icr, listed=False),
    hv.HV_X64_MSR_TPR: _apic_register("HV_X64_MSR_TPR", TPR),
    hv.HV_X64_MSR_VP_ASSIST_PAGE: HypervMsr(
        "HV_X64_MSR_VP_ASSIST_PAGE", APIC_ACCESS, lambda vp: vp.assist_page, _write_assist_page
    ),
    hv.HV_X64_MSR_SCONTROL: _synic("HV_X64_MSR_SCONTROL", "control"),
    hv.HV_X64_MSR_SVERSION: _of_active_synic(
        HypervMsr("HV_X64_MSR_SVERSION", SYNIC, lambda vp: vp.synic.version, _write_version, listed=False)
    ),
    hv.HV_X64_MSR_SIEFP: _synic("HV_X64_MSR_SIEFP", "event_page"),
    hv.HV_X64_MSR_SIMP: _synic("HV_X64_MSR_SIMP", "message_page"),
    hv.HV_X64_MSR_EOM: _of_active_synic(HypervMsr("HV_X64_MSR_EOM", SYNIC, _nothing_to_read, _write_eom, listed=False)),
    **{hv.HV_X64_MSR_SINT0 + n: _sint(n) for n in range(hv.HV_SYNIC_SINT_COUNT)},
    **{hv.HV_X64_MSR_STIMER0_CONFIG + 2 * n: _timer(n, "config") for n in range(hv.HV_SYNIC_STIMER_COUNT)},
    **{hv.HV_X64_MSR_STIMER0_COUNT + 2 * n: _timer(n, "count") for n in range(hv.HV_SYNIC_STIMER_COUNT)},
}
HYPERV_MSRS: dict[int, HypervMsr] = {**_PARTITION, **_VIRTUAL_PROCESSOR}
"""By number."""
_NUMBERS = {msr.name: number for number, msr in HYPERV_MSRS.items()}
_NEED_SYNIC = frozenset(number for number, msr in _VIRTUAL_PROCESSOR.items() if msr.privilege == SYNIC)


def read(vp: VirtualProcessor, number: int, host: bool) -> int:
    """The value of an MSR. Refused for one that the guest may not read."""
    msr = HYPERV_MSRS[number]
    _check(vp, msr, host)
    if not host and number in _NEED_SYNIC:
        vp.synic.check_access(0, host)
    return msr.read(vp)


def write(vp: VirtualProcessor, number: int, value: int, host: bool) -> None:
    """Write an MSR. Refused for one that the guest may not write, or that does not take the value."""
    msr = HYPERV_MSRS[number]
    _check(vp, msr, host)
    msr.write(vp, value, host)


def _check(vp: VirtualProcessor, msr: HypervMsr, host: bool) -> None:
    if not host and not (vp.offered and vp.has(msr.privilege)):
        raise Refused(f"the guest's CPUID does not offer {msr.name}")
    if not host and msr.privilege == DEBUG and not vp.can_debug:
        raise Refused("the guest's CPUID has no synthetic debugger")
