"""Hypercalls, KVM_HYPERV_EVENTFD, CPUID and the MSRs of the partition. Rules: TLFS, Hypercall Interface and Feature and
Interface Discovery; KVM API document for what the VMM sees."""

from __future__ import annotations

import os
import struct
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from hyperv_machine import CALLS, INPUT, NOWHERE, X2APIC_EOI, HypervVm, done, sint_msr
from hypothesis import given, settings
from hypothesis import strategies as st
from kvm_machine import outcome

import fabric
from fabric.kvm import Kvm
from fabric.kvm.typed import Host
from fabric.kvm.x86_hyperv import supported_cpuid
from fabric.uapi import hyperv as hv
from fabric.uapi import ioctl
from fabric.uapi import kvm as uapi
from fabric.uapi.hyperv import (
    HV_HYPERCALL_FAST,
    HV_STATUS_ACCESS_DENIED,
    HV_STATUS_INVALID_ALIGNMENT,
    HV_STATUS_INVALID_HYPERCALL_CODE,
    HV_STATUS_INVALID_HYPERCALL_INPUT,
    HV_STATUS_INVALID_PARAMETER,
    HV_STATUS_OPERATION_DENIED,
    HV_STATUS_SUCCESS,
    HVCALL_POST_MESSAGE,
    HVCALL_SEND_IPI,
    HVCALL_SEND_IPI_EX,
    HVCALL_SIGNAL_EVENT,
)
from fabric.uapi.x86 import HypervHcall, HypervSyndbg, KvmCpuid2, KvmCpuidEntry2, KvmHypervExit
from fabric.vcpu.x86_cpu import GeneralProtection
from fabric.vcpu.x86_hyperv import InvalidOpcode

FAST_SIGNAL = HVCALL_SIGNAL_EVENT | HV_HYPERCALL_FAST
CONNECTION = 0x1234
REPEATS, START = hv.HV_HYPERCALL_REP_COUNT_SHIFT, hv.HV_HYPERCALL_REP_START_SHIFT
VARIABLE = hv.HV_HYPERCALL_VARHEAD_SHIFT


async def prepare(cpu: Any) -> None:
    """Set up the hypercall page (TLFS, Establishing the Hypercall Interface)."""
    await cpu.wrmsr(hv.HV_X64_MSR_GUEST_OS_ID, 1)
    await cpu.wrmsr(hv.HV_X64_MSR_HYPERCALL, CALLS | 1)


def calling(machine: HypervVm, *calls: Sequence[Any]) -> tuple[list[int], list[Any]]:
    """What a guest's hypercalls return, and the exits on the way; to be called within a simulation."""
    results: list[int] = []

    async def program(cpu: Any) -> None:
        await prepare(cpu)
        for call in calls:
            results.append(await cpu.hypercall(*call))
        await done(cpu)

    return results, [machine, program]


async def call(machine: HypervVm, *calls: Sequence[Any]) -> tuple[list[int], list[Any]]:
    """Run a guest that makes these calls: what they return, and the exits on the way."""
    results, (_, program) = calling(machine, *calls)
    exits = await machine.run(program)
    return results, exits


def simulate(test: Callable[[], Awaitable[Any]]) -> Any:
    """Run a test in a simulation."""
    return fabric.run(test)


def results_of(*calls: Sequence[Any], **options: Any) -> list[int]:
    """What calls of a guest return that the VMM is not asked for."""

    async def main() -> list[int]:
        results, exits = await call(HypervVm(**options), *calls)
        assert [] == exits
        return results

    return list(simulate(main))


# -- the page


def test_the_page_is_there_when_the_guest_asks_for_it() -> None:
    """Once it has said who it is; VMMCALL and RET are put at its beginning."""

    async def main() -> None:
        machine = HypervVm()

        async def program(cpu: Any) -> None:
            await cpu.wrmsr(hv.HV_X64_MSR_HYPERCALL, CALLS | 1)
            assert 0 == await cpu.rdmsr(hv.HV_X64_MSR_HYPERCALL), "no guest OS id: ignored"
            with pytest.raises(InvalidOpcode):
                await cpu.hypercall(0)
            await prepare(cpu)
            assert bytes.fromhex("0f01d9c3") == machine.read(CALLS, 4)
            assert HV_STATUS_INVALID_HYPERCALL_CODE == await cpu.hypercall(0)
            with pytest.raises(GeneralProtection):
                await cpu.wrmsr(hv.HV_X64_MSR_HYPERCALL, NOWHERE | 1)
            assert CALLS | 1 == await cpu.rdmsr(hv.HV_X64_MSR_HYPERCALL)
            await cpu.wrmsr(hv.HV_X64_MSR_GUEST_OS_ID, 0)
            assert CALLS == await cpu.rdmsr(hv.HV_X64_MSR_HYPERCALL), "no guest OS id: disabled"
            with pytest.raises(InvalidOpcode):
                await cpu.hypercall(0)
            await done(cpu)

        await machine.run(program)

    simulate(main)


def test_a_guest_without_hyper_v_has_no_page() -> None:
    """#UD, also when the VMM has set one up."""

    async def main() -> None:
        machine = HypervVm(offered=False)
        machine.set_msr(hv.HV_X64_MSR_GUEST_OS_ID, 1)
        machine.set_msr(hv.HV_X64_MSR_HYPERCALL, CALLS | 1)

        async def program(cpu: Any) -> None:
            with pytest.raises(InvalidOpcode):
                await cpu.hypercall(0)
            await done(cpu)

        await machine.run(program)

    simulate(main)


# -- messages and events


@pytest.mark.spec("api.exit.hyperv", "api.exit.hyperv.note.hcall")
def test_a_message_is_posted_by_the_vmm() -> None:
    """KVM_EXIT_HYPERV_HCALL: input value and parameters; the result that the VMM writes is what the guest gets."""

    async def main() -> None:
        machine = HypervVm()
        results, (_, program) = calling(machine, (HVCALL_POST_MESSAGE, INPUT, 0x77))
        machine.vcpus[0].load(program)

        exit_ = await machine.step()
        assert HypervHcall(HVCALL_POST_MESSAGE, 0, (INPUT, 0x77)) == exit_
        machine.complete(0xFFFF_0000_0000_0012)
        assert None is await machine.step()
        assert [0xFFFF_0000_0000_0012] == results

    simulate(main)


@pytest.mark.spec("api.exit.hyperv")
@pytest.mark.parametrize(
    ("value", "given", "params"),
    [
        pytest.param(FAST_SIGNAL, CONNECTION, (CONNECTION, 5), id="fast"),
        pytest.param(HVCALL_SIGNAL_EVENT, INPUT, (CONNECTION, 5), id="in-memory"),
        pytest.param(FAST_SIGNAL, CONNECTION | 3 << 32, (CONNECTION | 3 << 32, 5), id="flag-number"),
    ],
)
def test_an_event_that_has_no_eventfd_is_the_vmms(value: int, given: int, params: tuple[int, int]) -> None:
    """Its first parameter is the connection, wherever the guest had it; flag numbers are the VMM's to understand."""

    async def main() -> list[Any]:
        machine = HypervVm()
        machine.write(INPUT, CONNECTION.to_bytes(8, "little"))
        return (await call(machine, (value, given, 5)))[1]

    assert [HypervHcall(value, 0, params)] == simulate(main)


@pytest.mark.parametrize("kind", ["simulated", "real"])
@pytest.mark.parametrize(("value", "given"), [(FAST_SIGNAL, CONNECTION), (HVCALL_SIGNAL_EVENT, INPUT)])
def test_an_event_by_eventfd(kind: str, value: int, given: int) -> None:
    """KVM_HYPERV_EVENTFD: HvSignalEvent signals the eventfd of its connection, without an exit; until deassigned."""

    async def main() -> None:
        machine = HypervVm()
        machine.write(INPUT, CONNECTION.to_bytes(8, "little"))
        fd: Any = machine.kvm.eventfd() if kind == "simulated" else os.eventfd(0, os.EFD_NONBLOCK)
        machine.connect(CONNECTION, fd)

        assert ([HV_STATUS_SUCCESS] * 2, []) == await call(machine, (value, given), (value, given))
        assert 2 == (fd.read() if kind == "simulated" else os.eventfd_read(fd))

        machine.connect(CONNECTION, fd, hv.KVM_HYPERV_EVENTFD_DEASSIGN)
        assert 1 == len((await call(machine, (value, given)))[1])
        if kind == "real":
            os.close(fd)

    simulate(main)


def test_a_closed_eventfd_is_signalled_in_vain() -> None:
    """The connection is there still."""

    async def main() -> None:
        machine = HypervVm()
        fd = machine.kvm.eventfd()
        machine.connect(CONNECTION, fd)
        fd.close()

        assert ([HV_STATUS_SUCCESS], []) == await call(machine, (FAST_SIGNAL, CONNECTION))

    simulate(main)


@pytest.mark.parametrize(
    ("conn_id", "flags", "answer"),
    [
        pytest.param(0xFF_FFFF, 0, None, id="largest"),
        pytest.param(0x100_0000, 0, "EINVAL", id="too-large"),
        pytest.param(1, 2, "EINVAL", id="flags"),
        pytest.param(CONNECTION, 0, "EEXIST", id="twice"),
        pytest.param(CONNECTION + 1, 1, "ENOENT", id="not-there"),
        pytest.param(CONNECTION, 1, None, id="deassign"),
        pytest.param(0x100_0000, 1, "EINVAL", id="deassign-too-large"),
    ],
)
def test_connecting(conn_id: int, flags: int, answer: str | None) -> None:
    """Ids have 24 bits, and each has one eventfd at most."""
    machine = HypervVm()
    machine.connect(CONNECTION, machine.kvm.eventfd())

    assert answer == outcome(machine.connect, conn_id, machine.kvm.eventfd(), flags)


def test_what_is_connected_is_an_eventfd() -> None:
    """EBADF for a number that is no open file, EINVAL for one of another kind, both before EEXIST."""
    machine = HypervVm()
    machine.connect(CONNECTION, machine.kvm.eventfd())
    with open(os.devnull) as other:
        assert "EINVAL" == outcome(machine.connect, CONNECTION, other.fileno())

    assert "EBADF" == outcome(machine.connect, CONNECTION, -1)


# -- refused by KVM


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        pytest.param((0x4242,), HV_STATUS_INVALID_HYPERCALL_CODE, id="code"),
        pytest.param((HVCALL_POST_MESSAGE | 1 << 27,), HV_STATUS_INVALID_HYPERCALL_INPUT, id="reserved"),
        pytest.param((HVCALL_POST_MESSAGE | 1 << 44,), HV_STATUS_INVALID_HYPERCALL_INPUT, id="reserved-44"),
        pytest.param((HVCALL_POST_MESSAGE | 1 << 63,), HV_STATUS_INVALID_HYPERCALL_INPUT, id="reserved-63"),
        pytest.param((HVCALL_POST_MESSAGE | 1 << REPEATS,), HV_STATUS_INVALID_HYPERCALL_INPUT, id="repeats"),
        pytest.param((HVCALL_POST_MESSAGE | 1 << START,), HV_STATUS_INVALID_HYPERCALL_INPUT, id="start"),
        pytest.param((HVCALL_POST_MESSAGE | 1 << VARIABLE,), HV_STATUS_INVALID_HYPERCALL_INPUT, id="variable"),
        pytest.param((FAST_SIGNAL | 1 << REPEATS, 1), HV_STATUS_INVALID_HYPERCALL_INPUT, id="signal-repeats"),
        pytest.param((FAST_SIGNAL, 1 << 24), HV_STATUS_INVALID_HYPERCALL_INPUT, id="connection"),
        pytest.param((FAST_SIGNAL, 1 << 48), HV_STATUS_INVALID_HYPERCALL_INPUT, id="connection-48"),
        pytest.param((HVCALL_SIGNAL_EVENT, INPUT + 4), HV_STATUS_INVALID_ALIGNMENT, id="alignment"),
        pytest.param((HVCALL_SIGNAL_EVENT, NOWHERE), HV_STATUS_INVALID_ALIGNMENT, id="no-memory"),
        pytest.param((0x8001 | HV_HYPERCALL_FAST,), HV_STATUS_INVALID_PARAMETER, id="extended-fast"),
        pytest.param((0x8042,), HV_STATUS_INVALID_HYPERCALL_CODE, id="beyond-extended"),
        pytest.param((hv.HVCALL_NOTIFY_LONG_SPIN_WAIT,), HV_STATUS_SUCCESS, id="spin"),
        pytest.param((hv.HVCALL_NOTIFY_LONG_SPIN_WAIT | 1 << REPEATS,), HV_STATUS_INVALID_HYPERCALL_INPUT, id="spin-2"),
    ],
)
def test_what_kvm_answers_by_itself(arguments: tuple[int, ...], status: int) -> None:
    """TLFS, Hypercall Inputs: reserved bits are 0, simple calls have no repeats; KVM's choice of status codes."""
    assert [status] == results_of(arguments)


@pytest.mark.parametrize("value", [HVCALL_POST_MESSAGE, FAST_SIGNAL])
def test_without_a_synic_there_are_no_messages(value: int) -> None:
    """The VMM is not asked."""
    assert [HV_STATUS_INVALID_HYPERCALL_INPUT] == results_of((value, CONNECTION), synic=0)


def test_extended_calls_are_the_vmms() -> None:
    """HvExtCallQueryCapabilities and what follows it, with or without a SynIC."""

    async def main() -> list[Any]:
        return (await call(HypervVm(synic=0), (0x8001, INPUT, CALLS)))[1]

    assert [HypervHcall(0x8001, 0, (INPUT, CALLS))] == simulate(main)


# -- IPIs


def taken(machine: HypervVm, vector: int) -> set[int]:
    """Indices of the virtual processors at which a vector waits."""
    return {vcpu.hyperv.index for vcpu in machine.inside.vcpus if vcpu.cpu_interface.irr >> vector & 1 and vcpu.hyperv}


BANKS = st.dictionaries(st.sampled_from([0, 1, 2, 15]), st.integers(0, (1 << 64) - 1), max_size=4)
INDICES = st.permutations([0, 1, 63, 64, 130, 1023])


@settings(max_examples=40, deadline=None)
@given(banks=BANKS, indices=INDICES, fast=st.booleans(), everybody=st.booleans())
def test_an_ipi_reaches_a_sparse_set(banks: dict[int, int], indices: list[int], fast: bool, everybody: bool) -> None:
    """TLFS, Sparse Virtual Processor Sets: a bank of 64 for each bit of the mask, in ascending order; or all."""
    valid = sum(1 << bank for bank in banks)
    form = hv.HV_GENERIC_SET_ALL if everybody else hv.HV_GENERIC_SET_SPARSE_4K
    words = [0x55, form, valid, *(banks[bank] for bank in sorted(banks))]
    value = HVCALL_SEND_IPI_EX | len(banks) << VARIABLE

    async def main() -> set[int]:
        machine = HypervVm(vcpus=6)
        for n, index in enumerate(indices):
            assert machine.set_msr(hv.HV_X64_MSR_VP_INDEX, index, n)
        if fast:
            arguments: Any = (value | HV_HYPERCALL_FAST, *words[:2], words[2:])
        else:
            machine.write(INPUT, struct.pack(f"<{len(words)}Q", *words))
            arguments = (value, INPUT)
        assert ([HV_STATUS_SUCCESS], []) == await call(machine, arguments)
        machine.inside.ledger.check()
        return taken(machine, 0x55)

    named = {index for index in indices if everybody or banks.get(index >> 6, 0) >> (index & 63) & 1}
    assert named == simulate(main)


@pytest.mark.parametrize("fast", [False, True])
def test_an_ipi_to_a_mask(fast: bool) -> None:
    """HvCallSendSyntheticClusterIpi: the vector, and a mask of indices below 64."""

    async def main() -> set[int]:
        machine = HypervVm(vcpus=4)
        machine.set_msr(hv.HV_X64_MSR_VP_INDEX, 65, 3)
        machine.write(INPUT, struct.pack("<QQ", 0x31, 0b1110))
        arguments = (HVCALL_SEND_IPI | HV_HYPERCALL_FAST, 0x31, 0b1110) if fast else (HVCALL_SEND_IPI, INPUT)
        assert ([HV_STATUS_SUCCESS], []) == await call(machine, arguments)
        return taken(machine, 0x31)

    assert {1, 2} == simulate(main)


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param((HVCALL_SEND_IPI | HV_HYPERCALL_FAST, 0x0F, 1), id="vector-low"),
        pytest.param((HVCALL_SEND_IPI | HV_HYPERCALL_FAST, 0x100, 1), id="vector-high"),
        pytest.param((HVCALL_SEND_IPI | HV_HYPERCALL_FAST, 0x31 | 1 << 32, 1), id="reserved"),
        pytest.param((HVCALL_SEND_IPI, NOWHERE), id="no-memory"),
        pytest.param((HVCALL_SEND_IPI_EX, NOWHERE), id="ex-no-memory"),
        pytest.param((HVCALL_SEND_IPI_EX | HV_HYPERCALL_FAST, 0x31, 0, [1]), id="ex-banks"),
        pytest.param((HVCALL_SEND_IPI_EX | HV_HYPERCALL_FAST, 0x0F, 1, [0]), id="ex-vector"),
        pytest.param(
            (HVCALL_SEND_IPI_EX | HV_HYPERCALL_FAST | 12 << VARIABLE, 0x31, 0, [0xFFF]), id="ex-more-than-registers"
        ),
        pytest.param((HVCALL_SEND_IPI | HV_HYPERCALL_FAST | 1 << VARIABLE, 0x31, 1), id="variable"),
    ],
)
def test_ipis_that_cannot_be(arguments: tuple[Any, ...]) -> None:
    """HV_STATUS_INVALID_HYPERCALL_INPUT."""
    assert [HV_STATUS_INVALID_HYPERCALL_INPUT] == results_of(arguments)


def test_ipis_need_local_apics_in_the_kernel() -> None:
    """HV_STATUS_INVALID_HYPERCALL_INPUT without."""
    fast = HV_HYPERCALL_FAST
    calls = [(HVCALL_SEND_IPI | fast, 0x31, 1), (HVCALL_SEND_IPI_EX | fast, 0x31, 1, [0])]

    assert [HV_STATUS_INVALID_HYPERCALL_INPUT] * 2 == results_of(*calls, synic=0, irqchip="")


def test_an_empty_set_is_nobody() -> None:
    """And its vector is not looked at."""
    assert [HV_STATUS_SUCCESS] == results_of((HVCALL_SEND_IPI_EX | HV_HYPERCALL_FAST, 0, 0, [0]))


# -- TLB flushes


FLUSH, FLUSH_LIST, FLUSH_EX, FLUSH_LIST_EX = 0x02, 0x03, 0x13, 0x14


@pytest.mark.parametrize(
    ("arguments", "result"),
    [
        pytest.param((FLUSH, INPUT), HV_STATUS_SUCCESS, id="space"),
        pytest.param((FLUSH | HV_HYPERCALL_FAST, 0, 1), HV_STATUS_SUCCESS, id="space-fast"),
        pytest.param((FLUSH, NOWHERE), HV_STATUS_INVALID_HYPERCALL_INPUT, id="no-memory"),
        pytest.param((FLUSH | 1 << REPEATS, INPUT), HV_STATUS_INVALID_HYPERCALL_INPUT, id="space-repeats"),
        pytest.param((FLUSH_LIST | 3 << REPEATS, INPUT), 3 << REPEATS, id="list"),
        pytest.param((FLUSH_LIST, INPUT), HV_STATUS_INVALID_HYPERCALL_INPUT, id="empty-list"),
        pytest.param((FLUSH_LIST | 3 << REPEATS | 1 << START, INPUT), HV_STATUS_INVALID_HYPERCALL_INPUT, id="start"),
        pytest.param((FLUSH_LIST | 500 << REPEATS, 0xF_FFE8), 500 << REPEATS, id="long-list-unread"),
        pytest.param((FLUSH_LIST | 3 << REPEATS, 0xF_FFE8), HV_STATUS_INVALID_HYPERCALL_INPUT, id="list-no-memory"),
        pytest.param((FLUSH_EX, INPUT), HV_STATUS_SUCCESS, id="ex"),
        pytest.param((FLUSH_EX | 1 << VARIABLE, INPUT), HV_STATUS_INVALID_HYPERCALL_INPUT, id="ex-banks"),
        pytest.param((FLUSH_LIST_EX | 2 << REPEATS, INPUT), 2 << REPEATS, id="list-ex"),
    ],
)
def test_flushes(arguments: tuple[int, ...], result: int) -> None:
    """There is no TLB to see them in: the status, and how many repeats were done."""
    assert [result] == results_of(arguments)


# -- what CPUID allows


def limited(machine: HypervVm, function: int, **registers: int) -> None:
    """Take bits away from a leaf of the guest's CPUID, and have KVM enforce it."""
    leaves = []
    for leaf in supported_cpuid(True):
        if leaf.function == function:
            leaf = leaf.with_(**{name: getattr(leaf, name) & ~bits for name, bits in registers.items()})
        leaves.append(leaf)
    machine.set_cpuid(0, *leaves)
    machine.enable(0, uapi.KVM_CAP_HYPERV_ENFORCE_CPUID, 1)


@pytest.mark.parametrize(
    ("arguments", "function", "registers"),
    [
        ((HVCALL_POST_MESSAGE, INPUT), hv.HYPERV_CPUID_FEATURES, {"ebx": 1 << 4}),
        ((FAST_SIGNAL, CONNECTION), hv.HYPERV_CPUID_FEATURES, {"ebx": 1 << 5}),
        ((0x8001, INPUT), hv.HYPERV_CPUID_FEATURES, {"ebx": 1 << 20}),
        ((hv.HVCALL_RESET_DEBUG_SESSION, INPUT), hv.HYPERV_CPUID_FEATURES, {"ebx": 1 << 11}),
        ((HVCALL_SEND_IPI, INPUT), hv.HYPERV_CPUID_ENLIGHTENMENT_INFO, {"eax": 1 << 10}),
        ((HVCALL_SEND_IPI_EX, INPUT), hv.HYPERV_CPUID_ENLIGHTENMENT_INFO, {"eax": 1 << 11}),
        ((FLUSH, INPUT), hv.HYPERV_CPUID_ENLIGHTENMENT_INFO, {"eax": 1 << 2}),
        ((FLUSH_EX, INPUT), hv.HYPERV_CPUID_ENLIGHTENMENT_INFO, {"eax": 1 << 11}),
        ((hv.HVCALL_NOTIFY_LONG_SPIN_WAIT,), hv.HYPERV_CPUID_ENLIGHTENMENT_INFO, {"ebx": 0xFFF}),
    ],
    ids=["post", "signal", "extended", "debug", "ipi", "ipi-ex", "flush", "flush-ex", "spin"],
)
def test_calls_that_cpuid_does_not_offer(arguments: tuple[int, ...], function: int, registers: dict[str, int]) -> None:
    """KVM_CAP_HYPERV_ENFORCE_CPUID: HV_STATUS_ACCESS_DENIED; otherwise it does not matter what CPUID says."""

    async def main(enforced: bool) -> list[int]:
        machine = HypervVm()
        limited(machine, function, **registers)
        if not enforced:
            machine.enable(0, uapi.KVM_CAP_HYPERV_ENFORCE_CPUID, 0)
        return (await call(machine, arguments))[0]

    assert [HV_STATUS_ACCESS_DENIED] == fabric.run(main, True)
    assert [HV_STATUS_ACCESS_DENIED] != fabric.run(main, False)


@pytest.mark.parametrize(
    ("number", "registers"),
    [
        (hv.HV_X64_MSR_TIME_REF_COUNT, {"eax": 1 << 1}),
        (sint_msr(3), {"eax": 1 << 2}),
        (hv.HV_X64_MSR_STIMER0_CONFIG, {"eax": 1 << 3}),
        (hv.HV_X64_MSR_TPR, {"eax": 1 << 4}),
        (hv.HV_X64_MSR_GUEST_OS_ID, {"eax": 1 << 5}),
        (hv.HV_X64_MSR_VP_INDEX, {"eax": 1 << 6}),
        (hv.HV_X64_MSR_RESET, {"eax": 1 << 7}),
        (hv.HV_X64_MSR_REFERENCE_TSC, {"eax": 1 << 9}),
        (hv.HV_X64_MSR_APIC_FREQUENCY, {"eax": 1 << 11}),
        (hv.HV_X64_MSR_CRASH_P0 + 2, {"edx": 1 << 10}),
        (hv.HV_X64_MSR_SYNDBG_STATUS, {"edx": 1 << 11}),
    ],
    ids=lambda value: f"{value:#x}" if isinstance(value, int) else "",
)
def test_msrs_that_cpuid_does_not_offer(number: int, registers: dict[str, int]) -> None:
    """#GP when it is enforced; the VMM reads them all the same."""

    async def main(enforced: bool) -> bool:
        machine = HypervVm()
        limited(machine, hv.HYPERV_CPUID_FEATURES, **registers)
        if not enforced:
            machine.enable(0, uapi.KVM_CAP_HYPERV_ENFORCE_CPUID, 0)
        failed = []

        async def program(cpu: Any) -> None:
            try:
                await cpu.rdmsr(number)
            except GeneralProtection:
                failed.append(number)
            await done(cpu)

        await machine.run(program)
        assert machine.msr(number) is not None
        return bool(failed)

    assert fabric.run(main, True)
    assert not fabric.run(main, False)


# -- CPUID


def supported(fd: Any, room: int) -> list[KvmCpuidEntry2]:
    """KVM_GET_SUPPORTED_HV_CPUID with room for so many entries."""
    buffer = bytearray(KvmCpuid2(room).pack() + bytes(room * KvmCpuidEntry2.SIZE))
    fd.ioctl(ioctl.KVM_GET_SUPPORTED_HV_CPUID, buffer)
    count = KvmCpuid2.unpack(buffer).nent
    return [KvmCpuidEntry2.unpack(buffer, KvmCpuid2.SIZE + n * KvmCpuidEntry2.SIZE) for n in range(count)]


@pytest.mark.parametrize("room", [10, 20])
def test_supported_leaves(room: int) -> None:
    """Of the system and of a vCPU: the interface, and the features that are there."""
    machine = HypervVm()
    entries = supported(machine.host, room)

    assert entries == supported(machine.vcpus[0], room)
    leaves = {entry.function: entry for entry in entries}
    assert 10 == len(entries)
    vendor = leaves[hv.HYPERV_CPUID_VENDOR_AND_MAX_FUNCTIONS]
    assert b"Linux KVM Hv" == struct.pack("<3I", vendor.ebx, vendor.ecx, vendor.edx)
    assert b"Hv#1" == leaves[hv.HYPERV_CPUID_INTERFACE].eax.to_bytes(4, "little")
    features = leaves[hv.HYPERV_CPUID_FEATURES]
    assert (0xAAFF, 0x100830) == (features.eax, features.ebx)
    assert 1024 == leaves[hv.HYPERV_CPUID_IMPLEMENT_LIMITS].eax


def test_what_needs_the_local_apic() -> None:
    """Timers in direct mode and IPIs by hypercall are not offered to a vCPU whose local APIC is the VMM's."""
    machine = HypervVm(synic=0, irqchip="")
    of_system = {entry.function: entry for entry in supported(machine.host, 10)}
    of_vcpu = {entry.function: entry for entry in supported(machine.vcpus[0], 10)}

    features, advice = hv.HYPERV_CPUID_FEATURES, hv.HYPERV_CPUID_ENLIGHTENMENT_INFO
    assert 1 << 19 == of_system[features].edx ^ of_vcpu[features].edx
    assert 1 << 10 == of_system[advice].eax ^ of_vcpu[advice].eax


def test_too_short_an_array() -> None:
    """E2BIG, and the number of entries stays what it was."""
    machine = HypervVm()
    buffer = bytearray(KvmCpuid2(9).pack() + bytes(9 * KvmCpuidEntry2.SIZE))

    assert "E2BIG" == outcome(machine.host.ioctl, ioctl.KVM_GET_SUPPORTED_HV_CPUID, buffer)
    assert KvmCpuid2(9) == KvmCpuid2.unpack(buffer)


def test_a_host_without_it_does_not_know_the_call() -> None:
    """EINVAL, as of all unknown calls of these fds."""
    host = Host(Kvm("x86_64", hyperv=False))

    assert "EINVAL" == outcome(supported, host, 10)
    assert "EINVAL" == outcome(supported, host.create_vm().create_vcpu(0), 10)


# -- MSRs


def listed(host: Host) -> list[int]:
    """KVM_GET_MSR_INDEX_LIST."""
    buffer = bytearray(4 + 4 * 200)
    buffer[:4] = (200).to_bytes(4, "little")
    host.ioctl(ioctl.KVM_GET_MSR_INDEX_LIST, buffer)
    count = int.from_bytes(buffer[:4], "little")
    return [int.from_bytes(buffer[4 + 4 * n :][:4], "little") for n in range(count)]


def test_msrs_to_save() -> None:
    """The list has one of the SynIC's and one of the timers', for a VMM to know that they are there."""
    numbers = listed(Host(Kvm("x86_64")))
    ours = [number for number in numbers if number >> 12 == 0x40000]

    assert {hv.HV_X64_MSR_GUEST_OS_ID, hv.HV_X64_MSR_SCONTROL, hv.HV_X64_MSR_STIMER0_CONFIG} <= set(ours)
    assert not {hv.HV_X64_MSR_EOM, sint_msr(0), hv.HV_X64_MSR_STIMER0_COUNT, hv.HV_X64_MSR_EOI} & set(ours)
    assert [n for n in numbers if n >> 12 != 0x40000] == listed(Host(Kvm("x86_64", hyperv=False)))


@pytest.mark.parametrize(
    ("number", "value", "event"),
    [
        pytest.param(hv.HV_X64_MSR_RESET, 1, uapi.KVM_SYSTEM_EVENT_RESET, id="reset"),
        pytest.param(hv.HV_X64_MSR_RESET, 2, None, id="no-reset"),
        pytest.param(hv.HV_X64_MSR_CRASH_CTL, 1 << 63, uapi.KVM_SYSTEM_EVENT_CRASH, id="crash"),
        pytest.param(hv.HV_X64_MSR_CRASH_CTL, 1, None, id="no-crash"),
    ],
)
def test_a_guest_asks_for_its_end(number: int, value: int, event: int | None) -> None:
    """HV_X64_MSR_RESET and HV_X64_MSR_CRASH_CTL (TLFS, Guest Crash Enlightenment): KVM_EXIT_SYSTEM_EVENT."""

    async def main() -> None:
        machine = HypervVm()

        async def program(cpu: Any) -> None:
            await cpu.wrmsr(hv.HV_X64_MSR_CRASH_P0 + 4, 0xDEAD)
            await cpu.wrmsr(number, value)
            await done(cpu)

        vcpu = machine.vcpus[0]
        vcpu.load(program)
        await vcpu.run()
        reason = int.from_bytes(vcpu.run_area[uapi.KVM_RUN_EXIT_REASON :][:4], "little")
        if event is None:
            assert uapi.KVM_EXIT_IO == reason
        else:
            assert uapi.KVM_EXIT_SYSTEM_EVENT == reason
            assert event == uapi.KvmRunSystemEvent.unpack(vcpu.run_area, uapi.KVM_RUN_EXIT).type
            assert 0xDEAD == machine.msr(hv.HV_X64_MSR_CRASH_P0 + 4)

    simulate(main)


def test_the_vmm_says_what_a_crash_does() -> None:
    """It keeps the notify bit of what it writes; nothing happens by that."""
    machine = HypervVm()
    machine.set_msr(hv.HV_X64_MSR_CRASH_CTL, (1 << 64) - 1)

    assert 1 << 63 == machine.msr(hv.HV_X64_MSR_CRASH_CTL)


@pytest.mark.parametrize(
    ("number", "value", "by_guest", "taken_"),
    [
        pytest.param(hv.HV_X64_MSR_VP_INDEX, 5, True, False, id="index-guest"),
        pytest.param(hv.HV_X64_MSR_VP_INDEX, 1023, False, True, id="index"),
        pytest.param(hv.HV_X64_MSR_VP_INDEX, 1024, False, False, id="index-too-large"),
        pytest.param(hv.HV_X64_MSR_TSC_INVARIANT_CONTROL, 1, True, True, id="invariant"),
        pytest.param(hv.HV_X64_MSR_TSC_INVARIANT_CONTROL, 2, False, False, id="invariant-reserved"),
        pytest.param(hv.HV_X64_MSR_TSC_EMULATION_STATUS, 1, True, False, id="emulation-guest"),
        pytest.param(hv.HV_X64_MSR_TSC_EMULATION_STATUS, 1, False, True, id="emulation"),
        pytest.param(hv.HV_X64_MSR_REENLIGHTENMENT_CONTROL, 77, True, True, id="reenlightenment"),
        pytest.param(hv.HV_X64_MSR_VP_ASSIST_PAGE, INPUT | 1, True, True, id="assist"),
        pytest.param(hv.HV_X64_MSR_VP_ASSIST_PAGE, NOWHERE | 1, False, False, id="assist-nowhere"),
        pytest.param(hv.HV_X64_MSR_VP_RUNTIME, 1, True, False, id="runtime-guest"),
        pytest.param(hv.HV_X64_MSR_VP_RUNTIME, 77, False, True, id="runtime"),
    ],
)
def test_who_may_write_what(number: int, value: int, by_guest: bool, taken_: bool) -> None:
    """A value that is taken is read back."""

    async def main() -> bool:
        machine = HypervVm()
        answers = []

        async def program(cpu: Any) -> None:
            try:
                await cpu.wrmsr(number, value)
                answers.append(True)
            except GeneralProtection:
                answers.append(False)
            await done(cpu)

        if by_guest:
            await machine.run(program)
        else:
            answers.append(machine.set_msr(number, value))
        assert (value == machine.msr(number)) == taken_
        return answers[0]

    assert taken_ == simulate(main)


def test_a_guest_cannot_hide_the_invariant_tsc_again() -> None:
    """The VMM can."""

    async def main() -> None:
        machine = HypervVm()
        machine.set_msr(hv.HV_X64_MSR_TSC_INVARIANT_CONTROL, 1)

        async def program(cpu: Any) -> None:
            with pytest.raises(GeneralProtection):
                await cpu.wrmsr(hv.HV_X64_MSR_TSC_INVARIANT_CONTROL, 0)
            await done(cpu)

        await machine.run(program)
        assert machine.set_msr(hv.HV_X64_MSR_TSC_INVARIANT_CONTROL, 0)

    simulate(main)


def test_the_assist_page_is_a_paravirtual_eoi() -> None:
    """Its first word is cleared and is where KVM says that no EOI is needed; disabling takes that back."""
    machine = HypervVm()
    machine.write(INPUT, b"\xff" * 8)
    machine.set_msr(hv.HV_X64_MSR_VP_ASSIST_PAGE, INPUT | 1)

    assert bytes(4) + b"\xff" * 4 == machine.read(INPUT, 8)
    assert INPUT | 1 == machine.inside.vcpus[0].pv.pv_eoi
    machine.set_msr(hv.HV_X64_MSR_VP_ASSIST_PAGE, 0)
    assert 0 == machine.inside.vcpus[0].pv.pv_eoi


@pytest.mark.parametrize("x2apic", [False, True])
def test_fast_ways_to_the_local_apic(x2apic: bool) -> None:
    """TLFS, Local APIC MSR Accesses: EOI, ICR and TPR, in either mode; the upper halves of EOI and TPR are reserved."""

    async def main() -> None:
        machine = HypervVm(vcpus=2)
        if not x2apic:
            for n in (0, 1):
                machine.set_msr(0x1B, 0xFEE0_0000, n)  # x2APIC mode is left by turning the local APIC off
                machine.set_msr(0x1B, 0xFEE0_0800 | (0x100 if not n else 0), n)
        apic = machine.apic()
        apic.pend(0x61)
        assert 0x61 == apic.take()

        async def program(cpu: Any) -> None:
            await cpu.wrmsr(hv.HV_X64_MSR_EOI, 0)
            await cpu.wrmsr(hv.HV_X64_MSR_TPR, 0x20)
            assert 0x20 == await cpu.rdmsr(hv.HV_X64_MSR_TPR)
            to = 1 << 32 if x2apic else 1 << 56
            await cpu.wrmsr(hv.HV_X64_MSR_ICR, to | 0x71)
            assert to | 0x71 == await cpu.rdmsr(hv.HV_X64_MSR_ICR)
            for number, value in ((hv.HV_X64_MSR_EOI, 1 << 32), (hv.HV_X64_MSR_TPR, 1 << 32)):
                with pytest.raises(GeneralProtection):
                    await cpu.wrmsr(number, value)
            with pytest.raises(GeneralProtection):
                await cpu.wrmsr(hv.HV_X64_MSR_ICR, 1 << 20)
            with pytest.raises(GeneralProtection):
                await cpu.rdmsr(hv.HV_X64_MSR_EOI)
            await done(cpu)

        await machine.run(program)
        assert (0, 0x20, 1 << 0x71) == (apic.isr, apic.tpr, machine.apic(1).irr)

    simulate(main)


def test_an_eoi_by_msr_is_the_end_of_a_message() -> None:
    """As one by the local APIC's own register is."""

    async def main() -> list[int]:
        machine = HypervVm()
        machine.set_msr(sint_msr(2), 0x50)
        told: list[int] = []
        synic = machine.inside.vcpus[0].hyperv.synic
        synic.listeners[2] = [lambda: told.append(fabric.now())]
        synic.raise_sint(2)

        async def program(cpu: Any) -> None:
            async def handler(cpu: Any) -> None:
                await cpu.compute(100)
                await cpu.wrmsr(hv.HV_X64_MSR_EOI, 0)

            cpu.set_gate(0x50, handler)
            cpu.sti()
            await cpu.compute(1_000)
            await cpu.wrmsr(X2APIC_EOI, 0)
            await done(cpu)

        await machine.run(program)
        return told

    assert [100] == simulate(main)


# -- the synthetic debugger


@pytest.mark.spec("api.exit.hyperv")
def test_commands_to_the_debugger_are_the_vmms() -> None:
    """Type 3: CONTROL and PENDING_BUFFER exit with all of its registers; the status that the VMM writes for a command
    is what the guest reads."""

    async def main() -> None:
        machine = HypervVm()
        seen = []

        async def program(cpu: Any) -> None:
            await cpu.wrmsr(hv.HV_X64_MSR_SYNDBG_SEND_BUFFER, 0x1000)
            await cpu.wrmsr(hv.HV_X64_MSR_SYNDBG_CONTROL, 5)
            seen.append(await cpu.rdmsr(hv.HV_X64_MSR_SYNDBG_STATUS))
            await cpu.wrmsr(hv.HV_X64_MSR_SYNDBG_PENDING_BUFFER, 0x2000)
            seen.append(await cpu.rdmsr(hv.HV_X64_MSR_SYNDBG_STATUS))
            await done(cpu)

        machine.vcpus[0].load(program)
        exit_: KvmHypervExit = await machine.step()
        debug = HypervSyndbg.unpack(exit_.u)
        assert (3, hv.HV_X64_MSR_SYNDBG_CONTROL, 5, 0x1000) == (exit_.type, debug.msr, debug.control, debug.send_page)
        at = uapi.KVM_RUN_EXIT + KvmHypervExit.OFFSETS["u"] + HypervSyndbg.OFFSETS["status"]
        machine.vcpus[0].run_area[at : at + 8] = (9).to_bytes(8, "little")
        debug = HypervSyndbg.unpack((await machine.step()).u)
        assert (hv.HV_X64_MSR_SYNDBG_PENDING_BUFFER, 0x2000) == (debug.msr, debug.pending_page)
        machine.vcpus[0].run_area[at : at + 8] = (11).to_bytes(8, "little")
        assert None is await machine.step()
        assert [9, 9] == seen

    simulate(main)


def test_a_guest_without_a_debugger() -> None:
    """CPUID leaf 0x40000082 says whether there is one: its MSRs are #GP, its calls unknown."""

    async def main() -> list[int]:
        machine = HypervVm()
        machine.set_cpuid(0, *(leaf for leaf in supported_cpuid(True) if leaf.function < 0x4000_0080))

        async def program(cpu: Any) -> None:
            for number in (hv.HV_X64_MSR_SYNDBG_CONTROL, hv.HV_X64_MSR_SYNDBG_OPTIONS):
                with pytest.raises(GeneralProtection):
                    await cpu.rdmsr(number)
                with pytest.raises(GeneralProtection):
                    await cpu.wrmsr(number, 0)
            await done(cpu)

        await machine.run(program)
        return (await call(machine, (hv.HVCALL_RESET_DEBUG_SESSION, INPUT)))[0]

    assert [HV_STATUS_INVALID_HYPERCALL_CODE] == simulate(main)


@pytest.mark.parametrize(
    ("code", "options", "status"),
    [
        pytest.param(hv.HVCALL_POST_DEBUG_DATA, 0, HV_STATUS_OPERATION_DENIED, id="not-chosen"),
        pytest.param(hv.HVCALL_POST_DEBUG_DATA, 4, None, id="post"),
        pytest.param(hv.HVCALL_POST_DEBUG_DATA | HV_HYPERCALL_FAST, 4, HV_STATUS_INVALID_PARAMETER, id="fast"),
        pytest.param(hv.HVCALL_RESET_DEBUG_SESSION | HV_HYPERCALL_FAST, 4, None, id="reset"),
    ],
)
def test_the_debugger_by_hypercalls(code: int, options: int, status: int | None) -> None:
    """If the guest has chosen them (HV_X64_MSR_SYNDBG_OPTIONS), they are the VMM's."""

    async def main() -> None:
        machine = HypervVm()
        machine.set_msr(hv.HV_X64_MSR_SYNDBG_OPTIONS, options)
        results, exits = await call(machine, (code, INPUT))
        assert (status is None) == bool(exits)
        assert [status or 0] == results

    simulate(main)
