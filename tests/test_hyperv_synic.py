"""The synthetic interrupt controller. Rules: TLFS, Virtual Interrupts and Inter-Partition Communication; what is KVM's
own by the KVM API document."""

from __future__ import annotations

import os
from typing import Any

import pytest
from hyperv_machine import (
    EVENTS,
    MESSAGES,
    NOWHERE,
    X2APIC_EOI,
    HypervVm,
    done,
    sint_msr,
    timer_msrs,
)
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from kvm_machine import outcome

import fabric
from fabric.kvm.typed import msi_route, sint_route
from fabric.uapi import hyperv as hv
from fabric.uapi import kvm as uapi
from fabric.uapi.hyperv import (
    HV_SYNIC_SINT_AUTO_EOI,
    HV_SYNIC_SINT_MASKED,
    HV_X64_MSR_EOM,
    HV_X64_MSR_SCONTROL,
    HV_X64_MSR_SIEFP,
    HV_X64_MSR_SIMP,
    HV_X64_MSR_SINT0,
    HV_X64_MSR_SVERSION,
    HvMessage,
)
from fabric.uapi.x86 import HypervSynic
from fabric.vcpu.x86_cpu import GeneralProtection

SYNIC, SYNIC2 = uapi.KVM_CAP_HYPERV_SYNIC, uapi.KVM_CAP_HYPERV_SYNIC2
SINTS = [HV_X64_MSR_SINT0 + n for n in range(16)]
VECTOR = 0x50
GSI = 40


async def refused(access: Any) -> bool:
    """Whether an access of a guest's is #GP."""
    try:
        await access
    except GeneralProtection:
        return True
    return False


# -- enabling


@pytest.mark.spec("api.cap.hyperv", "api.cap.hyperv-synic")
def test_the_host_offers_it() -> None:
    """The capabilities are 1, on the system and on a VM."""
    machine = HypervVm()
    for cap in (uapi.KVM_CAP_HYPERV, uapi.KVM_CAP_HYPERV_TIME, SYNIC, SYNIC2, uapi.KVM_CAP_HYPERV_EVENTFD):
        assert (1, 1) == (machine.host.check_extension(cap), machine.vm.check_extension(cap))


@pytest.mark.spec("api.cap.hyperv-synic")
@pytest.mark.parametrize(
    ("irqchip", "cap", "arg", "flags", "answer"),
    [
        pytest.param("whole", SYNIC, 0, 0, None, id="whole"),
        pytest.param("split", SYNIC, 0, 0, None, id="split"),
        pytest.param("", SYNIC, 0, 0, "EINVAL", id="no-irqchip"),
        pytest.param("whole", SYNIC, 1, 0, None, id="argument-unused"),
        pytest.param("whole", SYNIC2, 0, 0, None, id="second"),
        pytest.param("whole", SYNIC2, 1, 0, "EINVAL", id="second-argument"),
        pytest.param("whole", SYNIC, 0, 1, "EINVAL", id="flags"),
    ],
)
def test_enabling(irqchip: str, cap: int, arg: int, flags: int, answer: str | None) -> None:
    """Per vCPU, with local APICs in the kernel; the second capability takes no argument, and no flags are known."""
    machine = HypervVm(synic=0, irqchip=irqchip)

    assert answer == outcome(machine.enable, 0, cap, arg, flags)


def test_reset_values() -> None:
    """All 0, but the version, which is 1, and the sources, which are masked (TLFS, SynIC MSRs)."""
    machine = HypervVm(synic=0)
    before = machine.msr(HV_X64_MSR_SCONTROL)
    machine.enable(0, SYNIC)

    assert (0, 1) == (before, machine.msr(HV_X64_MSR_SCONTROL))
    assert [0, 0, 0] == [machine.msr(n) for n in (HV_X64_MSR_SIEFP, HV_X64_MSR_SIMP, HV_X64_MSR_EOM)]
    assert 1 == machine.msr(HV_X64_MSR_SVERSION)
    assert [HV_SYNIC_SINT_MASKED] * 16 == [machine.msr(n) for n in SINTS]
    assert [0] * 8 == [machine.msr(n) for timer in range(4) for n in timer_msrs(timer)]


@pytest.mark.parametrize("number", [HV_X64_MSR_SCONTROL, HV_X64_MSR_SIMP, HV_X64_MSR_EOM, SINTS[3], *timer_msrs(1)])
def test_before_it_is_enabled_a_vmm_can_only_write_zeros(number: int) -> None:
    """So that it can restore every MSR of a machine that does not use it; reading works."""
    machine = HypervVm(synic=0)

    assert (True, False) == (machine.set_msr(number, 0), machine.set_msr(number, 1))
    assert 0 == machine.msr(number)


def test_a_guest_needs_the_controller_and_hyper_v_in_its_cpuid() -> None:
    """Otherwise the MSRs are not there; timers of a vCPU without a SynIC read as 0."""

    async def vmm(offered: bool, synic: int) -> dict[str, bool]:
        machine = HypervVm(offered=offered, synic=synic)
        seen: dict[str, bool] = {}

        async def program(cpu: Any) -> None:
            seen["read"] = await refused(cpu.rdmsr(sint_msr(2)))
            seen["write"] = await refused(cpu.wrmsr(sint_msr(2), HV_SYNIC_SINT_MASKED))
            seen["end"] = await refused(cpu.wrmsr(HV_X64_MSR_EOM, 0))
            seen["timer"] = await refused(cpu.rdmsr(timer_msrs(0)[0]))
            seen["time"] = await refused(cpu.rdmsr(hv.HV_X64_MSR_TIME_REF_COUNT))
            await done(cpu)

        await machine.run(program)
        return seen

    assert not any(fabric.run(vmm, True, SYNIC).values())
    assert {"read", "write", "end"} == {name for name, failed in fabric.run(vmm, True, 0).items() if failed}
    assert all(fabric.run(vmm, False, SYNIC).values())


# -- registers


@pytest.mark.parametrize(
    ("value", "guest", "vmm"),
    [
        pytest.param(16, True, True, id="lowest"),
        pytest.param(255, True, True, id="highest"),
        pytest.param(15, False, True, id="too-low"),
        pytest.param(15 | HV_SYNIC_SINT_MASKED, True, True, id="masked"),
        pytest.param(0, False, True, id="zero"),
    ],
)
def test_vectors_below_16_are_refused(value: int, guest: bool, vmm: bool) -> None:
    """TLFS, SINTx Registers: #GP; but not of a masked source, and not to a VMM, which may zero it."""
    machine = HypervVm()

    async def main() -> bool:
        machine = HypervVm()
        answers = []

        async def program(cpu: Any) -> None:
            answers.append(not await refused(cpu.wrmsr(sint_msr(1), value)))
            await done(cpu)

        await machine.run(program)
        return answers[0]

    assert guest == fabric.run(main)
    assert vmm == machine.set_msr(sint_msr(1), value)


def test_the_version_is_the_vmms() -> None:
    """TLFS, SVERSION Register: a write of the guest's is #GP."""

    async def main() -> None:
        machine = HypervVm()

        async def program(cpu: Any) -> None:
            assert await refused(cpu.wrmsr(HV_X64_MSR_SVERSION, 1))
            await done(cpu)

        await machine.run(program)
        assert machine.set_msr(HV_X64_MSR_SVERSION, 2)
        assert 2 == machine.msr(HV_X64_MSR_SVERSION)

    fabric.run(main)


@pytest.mark.spec("api.exit.hyperv")
def test_what_the_guest_sets_up_the_vmm_is_told() -> None:
    """Writes of SCONTROL, SIEFP and SIMP exit, with the values that all three have then; no other MSR's do."""

    async def main() -> list[Any]:
        machine = HypervVm()

        async def program(cpu: Any) -> None:
            await cpu.wrmsr(sint_msr(4), VECTOR)
            await cpu.wrmsr(HV_X64_MSR_SIEFP, EVENTS | 1)
            await cpu.wrmsr(HV_X64_MSR_SIMP, MESSAGES | 1)
            await cpu.wrmsr(HV_X64_MSR_SCONTROL, 0)
            await cpu.wrmsr(HV_X64_MSR_EOM, 0)
            await done(cpu)

        return await machine.run(program)

    assert [
        HypervSynic(HV_X64_MSR_SIEFP, 0, 1, EVENTS | 1, 0),
        HypervSynic(HV_X64_MSR_SIMP, 0, 1, EVENTS | 1, MESSAGES | 1),
        HypervSynic(HV_X64_MSR_SCONTROL, 0, 0, EVENTS | 1, MESSAGES | 1),
    ] == fabric.run(main)


@pytest.mark.spec("api.exit.hyperv")
def test_what_the_vmm_sets_up_it_knows() -> None:
    """KVM_SET_MSRS of the same MSRs is followed by no exit."""

    async def main() -> list[Any]:
        machine = HypervVm()
        assert machine.set_msr(HV_X64_MSR_SIMP, MESSAGES | 1)
        return await machine.run(done)

    assert [] == fabric.run(main)


@pytest.mark.parametrize(
    ("cap", "by_guest", "enabled", "cleared"),
    [
        pytest.param(SYNIC, True, 1, True, id="guest"),
        pytest.param(SYNIC, True, 0, False, id="guest-disabled"),
        pytest.param(SYNIC, False, 1, False, id="vmm"),
        pytest.param(SYNIC2, True, 1, False, id="second"),
    ],
)
@pytest.mark.parametrize("number", [HV_X64_MSR_SIMP, HV_X64_MSR_SIEFP])
def test_pages_are_cleared(cap: int, by_guest: bool, enabled: int, cleared: bool, number: int) -> None:
    """When a guest enables one, unless the VMM has chosen KVM_CAP_HYPERV_SYNIC2; restoring leaves it as it is."""

    async def main() -> bytes:
        machine = HypervVm(synic=cap)
        machine.write(MESSAGES, b"\xff" * 0x1000)

        async def program(cpu: Any) -> None:
            await cpu.wrmsr(number, MESSAGES | enabled)
            await done(cpu)

        if by_guest:
            await machine.run(program)
        else:
            assert machine.set_msr(number, MESSAGES | enabled)
        return machine.read(MESSAGES, 0x1000)

    assert (bytes(0x1000) if cleared else b"\xff" * 0x1000) == fabric.run(main)


@pytest.mark.parametrize(("cap", "fails"), [(SYNIC, True), (SYNIC2, False)])
def test_a_page_where_there_is_no_memory(cap: int, fails: bool) -> None:
    """It cannot be cleared, so that a guest's write is #GP, and nothing has changed."""

    async def main() -> tuple[bool, int | None]:
        machine = HypervVm(synic=cap)
        answers = []

        async def program(cpu: Any) -> None:
            answers.append(await refused(cpu.wrmsr(HV_X64_MSR_SIMP, NOWHERE | 1)))
            await done(cpu)

        await machine.run(program)
        return answers[0], machine.msr(HV_X64_MSR_SIMP)

    assert (fails, 0 if fails else NOWHERE | 1) == fabric.run(main)


# -- routes to SINTs


def routed(**options: Any) -> HypervVm:
    """A VM whose GSI 40 is SINT 2 of its first vCPU, on vector 0x50."""
    machine = HypervVm(**options)
    machine.set_msr(sint_msr(2), VECTOR)
    machine.vm.set_routes([sint_route(GSI, 0, 2)])
    return machine


@pytest.mark.spec("api.set-gsi-routing.rule.types", "api.cap.hyperv-synic")
@pytest.mark.parametrize("irqchip", ["whole", "split"])
def test_a_route_raises_the_vector_of_the_source(irqchip: str) -> None:
    """As an edge of the local APIC of its vCPU; KVM_IRQ_LINE_STATUS counts who took it, lowering does nothing."""
    machine = routed(vcpus=2, irqchip=irqchip)

    assert 1 == machine.line(GSI)
    assert -1 == machine.line(GSI, 0)
    assert (1 << VECTOR, 0) == (machine.apic(0).irr, machine.apic(1).irr)
    assert 0 == machine.apic(0).tmr
    machine.inside.ledger.check()


@pytest.mark.parametrize(
    ("vp", "sint", "value", "status"),
    [
        pytest.param(0, 2, VECTOR, 1, id="there"),
        pytest.param(0, 2, VECTOR | HV_SYNIC_SINT_MASKED, -1, id="masked"),
        pytest.param(0, 2, VECTOR | hv.HV_SYNIC_SINT_POLLING, 1, id="polling-is-not-known"),
        pytest.param(0, 16, VECTOR, -1, id="no-such-source"),
        pytest.param(2, 2, VECTOR, -1, id="no-such-processor"),
        pytest.param(1, 2, VECTOR, -1, id="not-enabled"),
    ],
)
def test_status_of_a_source(vp: int, sint: int, value: int, status: int) -> None:
    """-1 where there is none to raise; every interrupt is accounted for."""
    machine = HypervVm(vcpus=2, synic=0)
    machine.enable(0, SYNIC)
    machine.set_msr(sint_msr(2), value)
    machine.vm.set_routes([sint_route(GSI, vp, sint)])

    assert status == machine.line(GSI)
    statement = machine.inside.ledger.check()
    assert (1, 1 if status == 1 else 0) == (statement.raised, statement.pending)


def test_a_local_apic_that_is_off_takes_nothing() -> None:
    """The interrupt is lost (TLFS, SynIC Messages: when the APIC is software-disabled)."""
    machine = routed()
    machine.set_msr(0x1B, 0xFEE0_0900)
    machine.apic().write(0xF0, 0xFF)

    assert 0 == machine.line(GSI)
    assert {"no local APIC took it": 1} == machine.inside.ledger.check().dropped


def test_a_route_names_a_virtual_processor() -> None:
    """By its index, HV_X64_MSR_VP_INDEX, which is the order of creation until the VMM sets it."""
    machine = HypervVm(vcpus=2)
    for n in (0, 1):
        machine.set_msr(sint_msr(2), VECTOR + n, n)
    machine.set_msr(hv.HV_X64_MSR_VP_INDEX, 7, 0)
    machine.set_msr(hv.HV_X64_MSR_VP_INDEX, 0, 1)
    machine.vm.set_routes([sint_route(GSI, 0, 2), sint_route(GSI + 1, 7, 2)])
    machine.line(GSI)
    machine.line(GSI + 1)

    assert (1 << VECTOR, 1 << VECTOR + 1) == (machine.apic(0).irr, machine.apic(1).irr)


@pytest.mark.parametrize("real", [False, True], ids=["simulated", "real"])
def test_irqfds(real: bool) -> None:
    """A signal of an irqfd with such a route raises the source."""
    machine = routed()
    fd: Any = os.eventfd(0, os.EFD_NONBLOCK) if real else machine.kvm.eventfd()
    machine.vm.irqfd(fd, GSI)
    if real:
        os.eventfd_write(fd, 1)
        machine.msr(HV_X64_MSR_SIMP)  # looks at eventfds, as every call does
        os.close(fd)
    else:
        fd.signal()

    assert 1 << VECTOR == machine.apic().irr


# -- the end of an interrupt, or of a message


class Told:
    """A VM whose GSI 40 has a resample irqfd: what the guest's ends tell the VMM."""

    def __init__(self, value: int = VECTOR, *, synic_first: bool = True, route_first: bool = True) -> None:
        self.machine = machine = HypervVm(synic=0)
        if synic_first:
            machine.enable(0, SYNIC)
        if route_first:
            machine.vm.set_routes([sint_route(GSI, 0, 2)])
        self.trigger, self.resample = machine.kvm.eventfd(), machine.kvm.eventfd()
        machine.vm.irqfd(self.trigger, GSI, resamplefd=self.resample)
        if not route_first:
            machine.vm.set_routes([sint_route(GSI, 0, 2)])
        if not synic_first:
            machine.enable(0, SYNIC)
        machine.set_msr(sint_msr(2), value)

    @property
    def times(self) -> int:
        """How often since it was last asked."""
        return count_of(self.resample)


def count_of(fd: Any) -> int:
    """The count of an eventfd, which is 0 then."""
    try:
        return int(fd.read())
    except BlockingIOError:
        return 0


def test_the_end_of_the_interrupt_is_told() -> None:
    """The guest's EOI of the source's vector signals the resample irqfd of the GSI that is routed to it."""
    told = Told()
    told.trigger.signal()
    apic = told.machine.apic()

    assert VECTOR == apic.take()
    assert 0 == told.times
    apic.eoi()
    assert 1 == told.times


@pytest.mark.parametrize("route_first", [False, True])
def test_the_end_of_the_message_is_told(route_first: bool) -> None:
    """So does EOM, whatever is in service."""
    told = Told(route_first=route_first)

    assert told.machine.set_msr(HV_X64_MSR_EOM, 0)
    assert 1 == told.times


def test_a_synic_enabled_after_its_route_tells_nothing() -> None:
    """KVM notes which GSI a source has when the routes are set, for the SynICs there are; setting them again helps."""
    told = Told(synic_first=False)
    told.machine.set_msr(HV_X64_MSR_EOM, 0)
    before = told.times
    told.machine.vm.set_routes([sint_route(GSI, 0, 2)])
    told.machine.set_msr(HV_X64_MSR_EOM, 0)

    assert (0, 1) == (before, told.times)


def test_another_route_of_the_gsi_ends_it() -> None:
    """The GSI has another end then, or none."""
    told = Told()
    told.machine.vm.set_routes([msi_route(GSI, 0xFEE0_0000, 0x60)])
    told.machine.set_msr(HV_X64_MSR_EOM, 0)

    assert 0 == told.times


def test_of_two_gsis_the_last_is_told() -> None:
    """A source has one GSI: that of the highest number."""
    told = Told()
    told.machine.vm.set_routes([sint_route(GSI, 0, 2), sint_route(GSI - 1, 0, 2)])
    told.machine.set_msr(HV_X64_MSR_EOM, 0)
    assert 1 == told.times
    told.machine.vm.set_routes([sint_route(GSI, 0, 2), sint_route(GSI + 1, 0, 2)])
    told.machine.set_msr(HV_X64_MSR_EOM, 0)
    assert 0 == told.times


def test_an_interrupt_with_auto_eoi_is_never_in_service() -> None:
    """TLFS, SINTx Registers: it ends when it is taken. Only EOM tells that the guest is done with the message."""
    told = Told(VECTOR | HV_SYNIC_SINT_AUTO_EOI)
    told.trigger.signal()
    apic = told.machine.apic()

    assert VECTOR == apic.take()
    assert (0, 0, 0) == (apic.isr, apic.ppr, told.times)
    told.machine.set_msr(HV_X64_MSR_EOM, 0)
    assert 1 == told.times
    told.machine.inside.ledger.check()


def test_auto_eoi_goes_with_the_source() -> None:
    """A vector that no unmasked source has with AutoEOI any more is in service as all others."""
    told = Told(VECTOR | HV_SYNIC_SINT_AUTO_EOI)
    told.machine.set_msr(sint_msr(3), VECTOR)
    told.machine.set_msr(sint_msr(2), VECTOR | HV_SYNIC_SINT_AUTO_EOI | HV_SYNIC_SINT_MASKED)
    told.machine.vm.set_routes([sint_route(GSI, 0, 3)])
    told.machine.line(GSI)
    told.machine.apic().take()

    assert 1 << VECTOR == told.machine.apic().isr


def test_an_init_leaves_it_alone() -> None:
    """The SynIC is not reset with the local APIC that it extends."""
    told = Told()
    told.machine.apic().reset(init=True)

    assert VECTOR == told.machine.msr(sint_msr(2))
    assert told.machine.apic().synic_ends == 1 << VECTOR


def test_a_message_of_the_vmms() -> None:
    """End to end: the guest names its page (exit), the VMM posts a message and raises the source, the guest reads it,
    frees the slot and ends the interrupt, and the VMM is told."""

    async def main() -> list[Any]:
        machine = HypervVm()
        machine.vm.set_routes([sint_route(GSI, 0, 2)])
        trigger, resample = machine.kvm.eventfd(), machine.kvm.eventfd()
        machine.vm.irqfd(trigger, GSI, resamplefd=resample)
        seen: list[Any] = []

        async def receive(cpu: Any) -> None:
            slot = MESSAGES + 2 * hv.HV_MESSAGE_SIZE
            seen.append((await cpu.load(slot, 4), await cpu.load(slot + 16, 4)))
            await cpu.store(slot, 4, hv.HVMSG_NONE)
            await cpu.wrmsr(X2APIC_EOI, 0)

        async def program(cpu: Any) -> None:
            cpu.set_gate(VECTOR, receive)
            await cpu.wrmsr(sint_msr(2), VECTOR)
            await cpu.wrmsr(HV_X64_MSR_SIMP, MESSAGES | 1)
            cpu.sti()
            await cpu.compute(1000)
            await done(cpu)

        machine.vcpus[0].load(program)
        exit_ = await machine.step()
        assert MESSAGES | 1 == exit_.msg_page
        machine.post(2, HvMessage(1, 4, payload=b"ABCD"))
        trigger.signal()
        assert None is await machine.step()
        seen.append(resample.read())
        return seen

    assert [(1, int.from_bytes(b"ABCD", "little")), 1] == fabric.run(main)


# -- against a second model


class SynicMachine(RuleBasedStateMachine):
    """Sources, the local APIC behind them, and ends, against sets and lists."""

    @initialize()
    def start(self) -> None:
        self.machine = HypervVm(synic=SYNIC)
        self.machine.vm.set_routes([sint_route(GSI + n, 0, n) for n in range(4)])
        self.resample = [self.machine.kvm.eventfd() for _ in range(4)]
        for n, fd in enumerate(self.resample):
            self.machine.vm.irqfd(self.machine.kvm.eventfd(), GSI + n, resamplefd=fd)
        self.sources = [HV_SYNIC_SINT_MASKED] * 4
        self.waiting: set[int] = set()
        self.service: list[int] = []
        self.told = [0] * 4
        self.seen = [0] * 4

    def _vector(self, n: int) -> int | None:
        return None if self.sources[n] & HV_SYNIC_SINT_MASKED else self.sources[n] & 0xFF

    @rule(
        n=st.integers(0, 3),
        vector=st.sampled_from([0x30, 0x31, 0x50, 0x51, 0xF0]),
        flags=st.sampled_from([0, 0, HV_SYNIC_SINT_MASKED, HV_SYNIC_SINT_AUTO_EOI]),
    )
    def set_source(self, n: int, vector: int, flags: int) -> None:
        assert self.machine.set_msr(sint_msr(n), vector | flags)
        self.sources[n] = vector | flags

    @rule(n=st.integers(0, 3))
    def raise_source(self, n: int) -> None:
        vector = self._vector(n)
        assert (-1 if vector is None else 1) == self.machine.line(GSI + n)
        if vector is not None:
            self.waiting.add(vector)

    @rule()
    def take(self) -> None:
        best = max(self.waiting, default=0)
        running = max(self.service, default=0)
        expected = best if best >> 4 > running >> 4 else None
        assert expected == self.machine.apic().take()
        if expected is not None:
            self.waiting.discard(expected)
            if not any(self._vector(n) == expected and self.sources[n] & HV_SYNIC_SINT_AUTO_EOI for n in range(4)):
                self.service.append(expected)

    @rule()
    def end(self) -> None:
        self.machine.apic().eoi()
        if self.service:
            vector = max(self.service)
            self.service.remove(vector)
            for n in range(4):
                self.told[n] += self._vector(n) == vector

    @rule()
    def end_of_message(self) -> None:
        assert self.machine.set_msr(HV_X64_MSR_EOM, 0)
        self.told = [count + 1 for count in self.told]

    @invariant()
    def agrees(self) -> None:
        apic = self.machine.apic()
        assert sum(1 << vector for vector in self.waiting) == apic.irr
        assert sum(1 << vector for vector in self.service) == apic.isr
        for n, fd in enumerate(self.resample):
            self.seen[n] += count_of(fd)
        assert self.told == self.seen
        self.machine.inside.ledger.check()
        self.machine.inside.vcpus[0].hyperv.synic._check()
        apic._check()

    def teardown(self) -> None:
        if hasattr(self, "machine"):
            self.machine.vm.close()


TestSynic = SynicMachine.TestCase
TestSynic.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


# -- a host without it


@pytest.mark.spec("api.cap.hyperv")
def test_a_host_without_hyper_v() -> None:
    """Nothing of it is there: no capability, no routes, no calls, no MSRs."""
    machine = HypervVm(synic=0, offered=False, hyperv=False)

    assert 0 == machine.vm.check_extension(uapi.KVM_CAP_HYPERV)
    assert 0 == machine.vm.check_extension(SYNIC2)
    assert "EINVAL" == outcome(machine.enable, 0, SYNIC)
    assert "EINVAL" == outcome(machine.enable, 0, uapi.KVM_CAP_HYPERV_ENFORCE_CPUID, 1)
    assert "EINVAL" == outcome(machine.vm.set_routes, [sint_route(GSI, 0, 2)])
    assert "ENOTTY" == outcome(machine.connect, 1, machine.kvm.eventfd())
    assert (None, False) == (machine.msr(HV_X64_MSR_SIMP), machine.set_msr(HV_X64_MSR_SIMP, 0))
