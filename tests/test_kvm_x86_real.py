"""One test against both: the true /dev/kvm of an x86 host, where there is one, and a simulated host.

No guest code is run. What depends on the host's hardware is not compared.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from typing import Any

import pytest
from x86_machine import SVR_ON, Pc, outcome

from fabric.devices.x86.lapic import SVR
from fabric.kvm import Kvm
from fabric.kvm.typed import Host, VcpuFd, VmFd, msi_route, pin_route
from fabric.uapi import ioctl as requests
from fabric.uapi import kvm as uapi
from fabric.uapi import x86
from fabric.uapi.x86 import (
    KvmClockData,
    KvmInterrupt,
    KvmLapicState,
    KvmMsrEntry,
    KvmMsrs,
    KvmPitConfig,
    KvmPitState2,
    KvmReinjectControl,
    KvmVcpuEvents,
)

MSI = 0xFEE0_0000
LOGICAL = 1 << 2
VALID_NMI, VALID_SIPI, VALID_SHADOW, VALID_SMM, VALID_PAYLOAD, VALID_TRIPLE = (1 << n for n in range(6))
TSC = (x86.KVM_VCPU_TSC_CTRL, x86.KVM_VCPU_TSC_OFFSET)


@pytest.fixture(params=["model", "real"])
def kvm(request: pytest.FixtureRequest) -> Any:
    if request.param == "model":
        return Kvm("x86_64")
    if platform.machine() != "x86_64":
        pytest.skip(f"/dev/kvm of this host is not that of x86_64 but of {platform.machine()}")
    try:
        return Kvm.real()
    except OSError as error:
        pytest.skip(f"no usable /dev/kvm: {error}")


@pytest.fixture
def host(kvm: Any) -> Iterator[Host]:
    with Host(kvm) as host:
        yield host


class Machine(Pc):
    """A VM of either."""

    def __init__(self, host: Host, vcpus: int = 1, irqchip: str = "whole", *, enabled: bool = True) -> None:
        self.host = host
        self.kvm = host.kvm
        self.vm: VmFd = host.create_vm()
        if irqchip == "whole":
            self.vm.ioctl(requests.KVM_CREATE_IRQCHIP)
        elif irqchip:
            self.enable(uapi.KVM_CAP_SPLIT_IRQCHIP, 24)
        self.vcpus: list[VcpuFd] = []
        for number in range(vcpus):
            self.add_vcpu(number)
        if irqchip and enabled:
            for number in range(vcpus):
                self.set_lapic({SVR: SVR_ON}, number)

    def close(self) -> None:
        for fd in (*self.vcpus, self.vm):
            fd.close()

    def get(self, request: int, struct: Any, vcpu: int | None = None) -> Any:
        """A call that fills a struct."""
        buffer = bytearray(struct.SIZE)
        fd: Any = self.vm if vcpu is None else self.vcpus[vcpu]
        fd.ioctl(request, buffer)
        return struct.unpack(buffer)

    def events(self) -> KvmVcpuEvents:
        found: KvmVcpuEvents = self.get(requests.KVM_GET_VCPU_EVENTS, KvmVcpuEvents, 0)
        return found

    def set_events(self, **fields: Any) -> object:
        """KVM_SET_VCPU_EVENTS of what is there with some members changed."""
        return outcome(self.vcpus[0].ioctl, requests.KVM_SET_VCPU_EVENTS, self.events().with_(**fields))

    def get_msr(self, index: int, vcpu: int = 0) -> int:
        buffer = bytearray(KvmMsrs(1).pack() + KvmMsrEntry(index).pack())
        assert 1 == self.vcpus[vcpu].ioctl(requests.KVM_GET_MSRS, buffer)
        return KvmMsrEntry.unpack(buffer[KvmMsrs.SIZE :]).data


# Capabilities

ALL = {
    "KVM_CAP_IRQCHIP": 1,
    "KVM_CAP_USER_MEMORY": 1,
    "KVM_CAP_MP_STATE": 1,
    "KVM_CAP_REINJECT_CONTROL": 1,
    "KVM_CAP_IRQ_ROUTING": 4096,
    "KVM_CAP_IRQ_INJECT_STATUS": 1,
    "KVM_CAP_IRQFD": 1,
    "KVM_CAP_PIT2": 1,
    "KVM_CAP_PIT_STATE2": 1,
    "KVM_CAP_IOEVENTFD": 1,
    "KVM_CAP_ADJUST_CLOCK": 14,
    "KVM_CAP_VCPU_EVENTS": 1,
    "KVM_CAP_ENABLE_CAP": 1,
    "KVM_CAP_GET_TSC_KHZ": 1,
    "KVM_CAP_MAX_VCPUS": 1024,
    "KVM_CAP_ONE_REG": 1,
    "KVM_CAP_KVMCLOCK_CTRL": 1,
    "KVM_CAP_SIGNAL_MSI": 1,
    "KVM_CAP_READONLY_MEM": 1,
    "KVM_CAP_IRQFD_RESAMPLE": 1,
    "KVM_CAP_DEVICE_CTRL": 1,
    "KVM_CAP_ENABLE_CAP_VM": 1,
    "KVM_CAP_IOEVENTFD_NO_LENGTH": 1,
    "KVM_CAP_CHECK_EXTENSION_VM": 1,
    "KVM_CAP_SPLIT_IRQCHIP": 1,
    "KVM_CAP_IOEVENTFD_ANY_LENGTH": 1,
    "KVM_CAP_VCPU_ATTRIBUTES": 1,
    "KVM_CAP_MAX_VCPU_ID": 4096,
    "KVM_CAP_IMMEDIATE_EXIT": 1,
    "KVM_CAP_SYS_ATTRIBUTES": 1,
    # Other architectures'.
    "KVM_CAP_VM_ATTRIBUTES": 0,
    "KVM_CAP_MSI_DEVID": 0,
    "KVM_CAP_ARM_PMU_V3": 0,
    "KVM_CAP_S390_IRQCHIP": 0,
    "KVM_CAP_IRQ_XICS": 0,
}


@pytest.mark.spec(
    "api.cap.irqchip",
    "api.cap.user-memory",
    "api.cap.irq-routing",
    "api.cap.irq-inject-status",
    "api.cap.irqfd",
    "api.cap.ioeventfd",
    "api.cap.enable-cap",
    "api.cap.max-vcpus",
    "api.cap.max-vcpu-id",
    "api.cap.signal-msi",
    "api.cap.readonly-mem",
    "api.cap.vm-attributes",
)
def test_capabilities(host: Host) -> None:
    """On the host's fd and on a VM's, where no device or option has a say."""
    machine = Machine(host, 0, "")

    for fd in (host, machine.vm):
        assert {name: fd.check_extension(getattr(uapi, name)) for name in ALL} == ALL
    machine.close()


@pytest.mark.spec("api.cap.x86-smm", "api.cap.multi-address-space")
def test_a_second_address_space_comes_with_smm(host: Host) -> None:
    """Else the capability is not there."""
    smm = host.check_extension(uapi.KVM_CAP_X86_SMM)

    assert 2 * smm == host.check_extension(uapi.KVM_CAP_MULTI_ADDRESS_SPACE)


def test_scaling_is_two_capabilities(host: Host) -> None:
    """Of vCPU and VM, both or none."""
    caps = uapi.KVM_CAP_TSC_CONTROL, uapi.KVM_CAP_VM_TSC_CONTROL

    assert 1 == len({host.check_extension(cap) for cap in caps})


@pytest.mark.spec("api.cap.max-vcpu-id.EINVAL.range", "api.cap.max-vcpu-id.EINVAL.again")
def test_the_limit_of_ids(host: Host) -> None:
    """At most 4096, once, before the vCPUs; the same again is no change."""
    machine = Machine(host, 0)
    cap = uapi.KVM_CAP_MAX_VCPU_ID
    answers = [outcome(machine.enable, cap, limit) for limit in (4097, 1 << 40, 8, 8, 9)]

    assert ["EINVAL", "EINVAL", 0, 0, "EINVAL"] == answers
    assert ["EINVAL", True] == [
        isinstance(a, VcpuFd) or a for a in (outcome(machine.vm.create_vcpu, n) for n in (8, 7))
    ]
    machine.close()


# Creation


@pytest.mark.spec("api.create-irqchip.EEXIST.already", "api.create-irqchip.EINVAL.vcpus")
def test_the_order_of_creation(host: Host) -> None:
    """Irqchip once and before the vCPUs; PIT once, and it wants the irqchip."""
    early = Machine(host, 0, "")
    pit = KvmPitConfig()
    answers = [
        outcome(early.vm.ioctl, requests.KVM_CREATE_PIT2, pit),
        outcome(early.vm.ioctl, requests.KVM_GET_PIT2, bytearray(KvmPitState2.SIZE)),
        outcome(early.vm.ioctl, requests.KVM_REINJECT_CONTROL, KvmReinjectControl()),
        outcome(early.vm.ioctl, requests.KVM_CREATE_IRQCHIP),
        outcome(early.vm.ioctl, requests.KVM_CREATE_IRQCHIP),
        outcome(early.enable, uapi.KVM_CAP_SPLIT_IRQCHIP, 24),
        outcome(early.vm.ioctl, requests.KVM_CREATE_PIT2, pit),
        outcome(early.vm.ioctl, requests.KVM_CREATE_PIT2, pit),
    ]
    assert ["ENOENT", "ENXIO", "ENXIO", 0, "EEXIST", "EEXIST", 0, "EEXIST"] == answers
    early.close()

    late = Machine(host, 1, "")
    answers = [
        outcome(late.vm.ioctl, requests.KVM_CREATE_IRQCHIP),
        outcome(late.enable, uapi.KVM_CAP_SPLIT_IRQCHIP, 24),
        outcome(late.vm.ioctl, requests.KVM_SET_BOOT_CPU_ID, 0),
    ]
    assert ["EINVAL", "EEXIST", "EBUSY"] == answers
    late.close()


def test_what_needs_an_irqchip(host: Host) -> None:
    """Lines, messages, local APICs, routes."""
    machine = Machine(host, 1, "")
    answers = [
        outcome(machine.vm.irq_line, 4, 1),
        outcome(machine.lapic),
        outcome(machine.chip, 2),
        outcome(machine.vm.set_routes, []),
        outcome(machine.vm.signal_msi, MSI, 0x31),
    ]

    assert ["ENXIO", "EINVAL", "ENXIO", "EINVAL", "EINVAL"] == answers
    machine.close()


# Local APICs, messages, lines


def test_the_local_apic_comes_back_as_it_was_set(host: Host) -> None:
    """Registers that only hold something, and IRR and ISR with their vectors."""
    machine = Machine(host)
    words = {
        0x80: 0x20,
        0xD0: 1 << 24,
        0xE0: 0xFFFF_FFFF,
        SVR: SVR_ON,
        0x320: 0x1_0031,
        0x350: 0x1_0000,
        0x210: 6,
        0x110: 1,
    }
    machine.set_lapic(words)
    page = machine.lapic()
    machine.set_lapic({})

    assert words == {offset: machine.word(offset) for offset in words}
    assert page == machine.lapic()
    machine.close()


def test_a_reset_local_apic(host: Host) -> None:
    """Off by SVR, all of the LVT masked but LINT0 of the boot processor, which takes the PIC's."""
    machine = Machine(host, 2, enabled=False)
    offsets = (0x20, 0x80, 0xD0, 0xE0, SVR, 0x320, 0x330, 0x340, 0x350, 0x360, 0x370)

    found = [[machine.word(offset, number) for offset in offsets] for number in range(2)]
    masked = 0x1_0000
    expected = [
        [number << 24, 0, 0, 0xFFFF_FFFF, 0xFF, masked, masked, masked, masked if number else 0x700, masked, masked]
        for number in range(2)
    ]
    assert expected == found
    machine.close()


@pytest.mark.parametrize(
    ("address", "data", "answer", "where"),
    [
        (0, 0x31, 1, [[0x31], []]),
        (1 << 12, 0x31, 1, [[], [0x31]]),
        (0xFF << 12, 0x31, 2, [[0x31], [0x31]]),
        (5 << 12, 0x31, "no", [[], []]),
        (0, 0x431, 1, [[], []]),  # an NMI, which is in no IRR
        (LOGICAL | 1 << 12, 0x31, 1, [[0x31], []]),
        (LOGICAL | 3 << 12, 0x31, 2, [[0x31], [0x31]]),
    ],
)
def test_a_message_arrives_in_irr(host: Host, address: int, data: int, answer: object, where: list[list[int]]) -> None:
    """At the CPU, or the CPUs, that it names; the answer is how many took it. Nobody is 0 or EPERM's number."""
    machine = Machine(host, 2)
    for number in range(2):
        machine.set_lapic({0xD0: 1 << 24 + number}, number)
    answered = outcome(machine.vm.signal_msi, MSI | address, data)

    assert answer == ("no" if answered in (0, "EPERM") else answered)
    assert where == [machine.pending(number) for number in range(2)]
    machine.close()


def test_a_message_twice(host: Host) -> None:
    """The second merges into the first, and counts all the same."""
    machine = Machine(host)

    assert [1, 1, 1] == [machine.vm.signal_msi(MSI, vector) for vector in (0x31, 0x31, 0x32)]
    assert [0x31, 0x32] == machine.pending()
    machine.close()


def test_the_status_of_a_line(host: Host) -> None:
    """-1 while it is masked everywhere, then as many as took it, also those where it is pending already."""
    machine = Machine(host)
    answers = [machine.line(20), machine.line(20, 0)]
    machine.set_entry(20, 0x41)
    answers += [machine.line(20), machine.line(20, 0), machine.line(20), machine.line(20, 0)]

    assert [-1, 1, 1] == [answers[0], answers[2], answers[4]]
    assert [0x41] == machine.pending()
    machine.close()


def test_a_level_line_is_sent_once_until_its_end(host: Host) -> None:
    """Remote IRR says that it has not been ended."""
    machine = Machine(host)
    machine.set_entry(20, 1 << 15 | 0x41)
    machine.line(20)

    assert [1 << 15 | 1 << 14 | 0x41, [0x41]] == [machine.chip(2).redirtbl[20], machine.pending()]
    machine.close()


# Routes


def test_routes_that_are_refused(host: Host) -> None:
    """A chip or pin that is not there, an unknown type, a GSI beyond the table, flags."""
    machine = Machine(host)
    bad = [
        pin_route(0, 24, 2),
        pin_route(0, 8, 0),
        pin_route(0, 0, 3),
        pin_route(4096, 0, 2),
        uapi.KvmIrqRoutingEntry(0, 99),
        uapi.KvmIrqRoutingEntry(0, uapi.KVM_IRQ_ROUTING_IRQCHIP, 1),
    ]
    good = [pin_route(0, 23, 2), pin_route(0, 7, 0), msi_route(4095, MSI, 0x31)]

    assert ["EINVAL"] * len(bad) == [outcome(machine.vm.set_routes, [route]) for route in bad]
    assert [None] * 3 == [outcome(machine.vm.set_routes, [route]) for route in good]
    assert "EINVAL" == outcome(machine.vm.set_routes, [msi_route(5, MSI, 1), pin_route(5, 5, 2)])
    machine.close()


def test_a_routed_line_is_a_message(host: Host) -> None:
    """KVM_IRQ_LINE_STATUS of a GSI with an MSI route: what the message got. The level 0 is none."""
    machine = Machine(host)
    machine.vm.set_routes([msi_route(40, MSI, 0x51)])

    assert [1, [0x51]] == [machine.line(40), machine.pending()]
    machine.close()


# The PIT


def test_the_pit_comes_back_as_it_was_set(host: Host) -> None:
    """A channel's count, mode and latches; the speaker's flag."""
    machine = Machine(host, 0)
    machine.vm.ioctl(requests.KVM_CREATE_PIT2, KvmPitConfig(1))
    state = machine.get(requests.KVM_GET_PIT2, KvmPitState2)
    fresh = [(channel.count, channel.mode, channel.gate) for channel in state.channels]
    channel = state.channels[1].with_(count=0x1234, mode=2, bcd=0, rw_mode=3, count_latched=3, latched_count=0x77)
    machine.vm.ioctl(
        requests.KVM_SET_PIT2, state.with_(channels=(state.channels[0], channel, state.channels[2]), flags=1)
    )
    again = machine.get(requests.KVM_GET_PIT2, KvmPitState2)

    assert [(0x1_0000, 0xFF, 1), (0x1_0000, 0xFF, 1), (0x1_0000, 0xFF, 0)] == fresh
    found = again.channels[1]
    assert (0x1234, 2, 3, 3, 0x77, 1) == (
        found.count,
        found.mode,
        found.rw_mode,
        found.count_latched,
        found.latched_count,
        again.flags,
    )
    machine.close()


# What waits for a vCPU


def test_events_of_a_new_vcpu(host: Host) -> None:
    """Nothing waits."""
    machine = Machine(host)

    assert KvmVcpuEvents(flags=VALID_NMI | VALID_SHADOW | VALID_SMM) == machine.events()
    machine.close()


def test_nmis_that_wait(host: Host) -> None:
    """Two at most; one while they are masked."""
    machine = Machine(host)
    counts = []
    for _ in range(3):
        machine.vcpus[0].ioctl(requests.KVM_NMI)
        counts.append(machine.events().nmi_pending)
    machine.set_events(nmi_masked=1, nmi_pending=0, flags=VALID_NMI)
    for _ in range(2):
        machine.vcpus[0].ioctl(requests.KVM_NMI)
        counts.append(machine.events().nmi_pending)

    assert [1, 2, 2, 1, 1] == counts
    machine.close()


def test_events_come_back_as_they_were_set(host: Host) -> None:
    """NMI, interrupt, exception; what a flag does not mark stays."""
    machine = Machine(host)
    assert 0 == machine.set_events(
        nmi_injected=1, nmi_masked=1, interrupt_injected=1, interrupt_nr=0x33, exception_injected=1, exception_nr=14,
        exception_has_error_code=1, exception_error_code=5, flags=0,
    )  # fmt: skip
    found = machine.events()

    assert (1, 1, 1, 0x33, 0) == (
        found.nmi_injected,
        found.nmi_masked,
        found.interrupt_injected,
        found.interrupt_nr,
        found.nmi_pending,
    )
    assert (1, 14, 1, 5) == (
        found.exception_injected,
        found.exception_nr,
        found.exception_has_error_code,
        found.exception_error_code,
    )
    machine.close()


@pytest.mark.parametrize(
    "fields",
    [
        {"flags": 1 << 6},
        {"flags": VALID_PAYLOAD},
        {"flags": VALID_TRIPLE},
        {"exception_injected": 1, "exception_nr": 32},
        {"exception_injected": 1, "exception_nr": 2},
    ],
)
def test_events_that_are_refused(host: Host, fields: dict[str, int]) -> None:
    """Unknown flags, flags of capabilities that are off, an exception that is none, the NMI as exception."""
    machine = Machine(host)

    assert "EINVAL" == machine.set_events(**fields)
    machine.close()


def test_an_error_at_the_end_leaves_the_rest_set(host: Host) -> None:
    """A triple fault without its capability is looked at last."""
    machine = Machine(host)

    assert "EINVAL" == machine.set_events(flags=VALID_TRIPLE, interrupt_injected=1, interrupt_nr=0x44)
    assert (1, 0x44) == (machine.events().interrupt_injected, machine.events().interrupt_nr)
    machine.close()


@pytest.mark.parametrize(("number", "told"), [(1, 1), (3, 0), (4, 0), (5, 1)])
def test_soft_exceptions_are_not_told_of(host: Host, number: int, told: int) -> None:
    """#BP and #OF, as the length of their instruction is not in the struct."""
    machine = Machine(host)
    machine.set_events(exception_injected=1, exception_nr=number)

    assert (told, number) == (machine.events().exception_injected, machine.events().exception_nr)
    machine.close()


def test_a_vector_being_injected_is_in_the_special_registers(host: Host) -> None:
    """Wherever the irqchip is; the lowest of those that are set is injected."""
    for irqchip in ("", "split", "whole"):
        machine = Machine(host, 1, irqchip)
        sregs = machine.get(requests.KVM_GET_SREGS, x86.KvmSregs, 0)
        machine.vcpus[0].ioctl(requests.KVM_SET_SREGS, sregs.with_(interrupt_bitmap=(0, 1 << 7 | 1 << 9, 0, 0)))
        found = machine.get(requests.KVM_GET_SREGS, x86.KvmSregs, 0).interrupt_bitmap
        assert ((0, 1 << 7, 0, 0), 71) == (found, machine.events().interrupt_nr)
        machine.close()


def test_registers_that_are_set_take_a_pending_exception_away(host: Host) -> None:
    """Not an injected one; which it was can still be read."""
    machine = Machine(host)
    machine.enable(uapi.KVM_CAP_EXCEPTION_PAYLOAD, 1)
    for pending in (0, 1):
        kind = {"exception_pending": pending, "exception_injected": 1 - pending}
        machine.set_events(flags=VALID_PAYLOAD, exception_nr=6, **kind)
        machine.vcpus[0].ioctl(requests.KVM_SET_REGS, machine.get(requests.KVM_GET_REGS, x86.KvmRegs, 0))
        found = machine.events()
        assert (1 - pending, 0, 6) == (found.exception_injected, found.exception_pending, found.exception_nr)
    machine.close()


def test_payloads_need_their_capability(host: Host) -> None:
    """With it a pending exception is told apart from an injected one."""
    machine = Machine(host)
    machine.enable(uapi.KVM_CAP_EXCEPTION_PAYLOAD, 1)
    fields = {"exception_pending": 1, "exception_nr": 1, "exception_has_payload": 1, "exception_payload": 7}
    assert 0 == machine.set_events(flags=VALID_PAYLOAD, **fields)
    found = machine.events()

    assert (0, 1, 1, 7) == (
        found.exception_injected,
        found.exception_pending,
        found.exception_has_payload,
        found.exception_payload,
    )
    assert found.flags & VALID_PAYLOAD
    machine.close()


@pytest.mark.parametrize(
    ("irqchip", "answers"),
    [("", [0, 0, "EINVAL"]), ("split", [0, "EEXIST", "EINVAL"]), ("whole", ["ENXIO", "ENXIO", "EINVAL"])],
)
def test_who_may_inject_a_vector(host: Host, irqchip: str, answers: list[object]) -> None:
    """KVM_INTERRUPT is for a PIC of the VMM's; with a split irqchip one waits at a time."""
    machine = Machine(host, 1, irqchip)
    call = machine.vcpus[0].ioctl

    assert answers == [outcome(call, requests.KVM_INTERRUPT, KvmInterrupt(vector)) for vector in (0x20, 0x21, 256)]
    machine.close()


def test_an_smi_waits(host: Host) -> None:
    """Where the CPU has system management mode; else the call is not known."""
    machine = Machine(host)
    answer = outcome(machine.vcpus[0].ioctl, requests.KVM_SMI)
    smm = host.check_extension(uapi.KVM_CAP_X86_SMM)

    assert (0 if smm else "ENOTTY", smm) == (answer, machine.events().smi_pending)
    machine.close()


# MP states


def test_mp_states(host: Host) -> None:
    """The boot processor runs, the other waits for its INIT; those that may be set come back."""
    machine = Machine(host, 2)
    assert [uapi.KVM_MP_STATE_RUNNABLE, uapi.KVM_MP_STATE_UNINITIALIZED] == [vcpu.mp_state for vcpu in machine.vcpus]
    found: list[object] = []
    for state in (uapi.KVM_MP_STATE_HALTED, uapi.KVM_MP_STATE_INIT_RECEIVED, uapi.KVM_MP_STATE_RUNNABLE):
        machine.vcpus[1].mp_state = state
        found.append(machine.vcpus[1].mp_state == state)
    found += [outcome(setattr, machine.vcpus[1], "mp_state", state) for state in (6, 7, 100)]

    assert [True] * 3 + ["EINVAL"] * 3 == found
    machine.close()


def test_a_vcpu_without_a_local_apic_runs(host: Host) -> None:
    """And cannot be made to wait."""
    machine = Machine(host, 2, "")

    assert uapi.KVM_MP_STATE_RUNNABLE == machine.vcpus[1].mp_state
    assert "EINVAL" == outcome(setattr, machine.vcpus[1], "mp_state", uapi.KVM_MP_STATE_HALTED)
    machine.close()


def test_an_init_shows_in_the_mp_state(host: Host) -> None:
    """KVM_GET_MP_STATE carries it out, and the SIPI after it."""
    machine = Machine(host, 2)
    machine.vm.signal_msi(MSI | 1 << 12, 5 << 8)
    states = [machine.vcpus[1].mp_state]
    machine.vm.signal_msi(MSI | 1 << 12, 6 << 8 | 0x9A)
    states.append(machine.vcpus[1].mp_state)

    assert [uapi.KVM_MP_STATE_INIT_RECEIVED, uapi.KVM_MP_STATE_RUNNABLE] == states
    machine.close()


# Clocks


def test_flags_of_the_clock(host: Host) -> None:
    """None before anything has run; all three once it is set and the TSCs agree. A VM without vCPUs has none."""
    empty = Machine(host, 0)
    empty.vm.ioctl(requests.KVM_SET_CLOCK, KvmClockData(5))
    machine = Machine(host, 2)
    flags = [machine.get(requests.KVM_GET_CLOCK, KvmClockData).flags]
    for number, offset in ((0, None), (1, 1 << 40), (0, 1 << 40)):
        if offset is not None:
            machine.vcpus[number].set_attr(*TSC, offset)
        machine.vm.ioctl(requests.KVM_SET_CLOCK, KvmClockData(5 << 30))
        flags.append(machine.get(requests.KVM_GET_CLOCK, KvmClockData).flags)

    assert 0 == empty.get(requests.KVM_GET_CLOCK, KvmClockData).flags
    assert [0, 14, 0, 14] == flags
    clock = machine.get(requests.KVM_GET_CLOCK, KvmClockData).clock
    assert 5 << 30 <= clock < 6 << 30
    machine.close()
    empty.close()


def test_flags_that_a_clock_has_not(host: Host) -> None:
    """EINVAL."""
    machine = Machine(host, 0)
    answers = [outcome(machine.vm.ioctl, requests.KVM_SET_CLOCK, KvmClockData(5, flags)) for flags in (1, 16, 14)]

    assert ["EINVAL", "EINVAL", 0] == answers
    machine.close()


def test_tscs_that_join(host: Host) -> None:
    """New vCPUs have one offset; writes to one after the other within a second join; an offset is kept."""
    machine = Machine(host, 2)

    def offsets() -> list[int]:
        return [vcpu.get_attr(*TSC) for vcpu in machine.vcpus]

    made = offsets()
    for number in range(2):
        machine.set_msr(x86.MSR_IA32_TSC, 1 << 50, number)
    written = offsets()
    if not any(written):
        pytest.skip("the vCPUs of this host read its TSC as it is")
    machine.set_msr(x86.MSR_IA32_TSC, 1 << 51, 1)
    apart = offsets()
    machine.set_msr(x86.MSR_IA32_TSC, 0, 0)
    zero = offsets()
    machine.vcpus[0].set_attr(*TSC, 77)

    assert [1, 1, 2, 1] == [len(set(pair)) for pair in (made, written, apart, zero)]
    assert written[0] == apart[0] != zero[0] == apart[1]
    assert [77, apart[1]] == offsets()
    machine.close()


def test_attributes(host: Host) -> None:
    """A vCPU has the offset and nothing else; a VM has none at all; the host's cannot be written."""
    machine = Machine(host)
    attr = uapi.KvmDeviceAttr(0, 0, 0, host.values.addr)
    calls = requests.KVM_SET_DEVICE_ATTR, requests.KVM_GET_DEVICE_ATTR, requests.KVM_HAS_DEVICE_ATTR
    answers = [[outcome(fd.ioctl, call, attr) for call in calls] for fd in (machine.vm, machine.vcpus[0])]

    assert [["ENOTTY"] * 3, [0, 0, 0]] == answers
    assert ["ENXIO"] * 3 == [outcome(machine.vcpus[0].ioctl, call, attr.with_(group=1)) for call in calls]
    assert "EINVAL" == outcome(host.ioctl, requests.KVM_SET_DEVICE_ATTR, attr)
    machine.close()


def test_frequencies(host: Host) -> None:
    """0 is the host's; 250 parts in a million are tolerated, rounded down; what is too slow is kept all the same."""
    machine = Machine(host)
    vcpu = machine.vcpus[0]
    khz = vcpu.ioctl(requests.KVM_GET_TSC_KHZ)
    lowest = khz * 999_750 // 1_000_000
    scaling = host.check_extension(uapi.KVM_CAP_TSC_CONTROL)
    found = []
    for wanted in (lowest, lowest - 1, khz + 1000, 0):
        found.append((outcome(vcpu.ioctl, requests.KVM_SET_TSC_KHZ, wanted), vcpu.ioctl(requests.KVM_GET_TSC_KHZ)))

    slow = 0 if scaling else "EINVAL"
    assert [(0, lowest), (slow, lowest - 1), (0, khz + 1000), (0, khz)] == found
    assert "EINVAL" == outcome(machine.vm.ioctl, requests.KVM_SET_TSC_KHZ, khz)
    assert khz == machine.vm.ioctl(requests.KVM_GET_TSC_KHZ)
    machine.close()


def test_a_guest_that_has_no_clock_cannot_be_told_that_it_was_stopped(host: Host) -> None:
    """EINVAL, until its page is enabled."""
    machine = Machine(host)
    answers = [outcome(machine.vcpus[0].ioctl, requests.KVM_KVMCLOCK_CTRL)]
    for value in (0x1000, 0x1001, 0):
        machine.set_msr(x86.MSR_KVM_SYSTEM_TIME_NEW, value)
        answers.append(outcome(machine.vcpus[0].ioctl, requests.KVM_KVMCLOCK_CTRL))

    assert ["EINVAL", "EINVAL", 0, "EINVAL"] == answers
    machine.close()


def test_an_init_takes_the_notes_away(host: Host) -> None:
    """Clock, stolen time, asynchronous page faults; polling stays as it was."""
    machine = Machine(host)
    values = {
        x86.MSR_KVM_SYSTEM_TIME_NEW: 0x1001,
        x86.MSR_KVM_STEAL_TIME: 0x1041,
        x86.MSR_KVM_ASYNC_PF_INT: 0x31,
        x86.MSR_KVM_PV_EOI_EN: 0x1004,
        x86.MSR_KVM_POLL_CONTROL: 0,
    }
    assert all(machine.set_msr(index, value) for index, value in values.items())
    machine.vm.signal_msi(MSI, 5 << 8)
    assert uapi.KVM_MP_STATE_RUNNABLE == machine.vcpus[0].mp_state

    assert [0] * 5 == [machine.get_msr(index) for index in values]
    assert "EINVAL" == outcome(machine.vcpus[0].ioctl, requests.KVM_KVMCLOCK_CTRL)
    machine.close()


def test_all_vcpus_have_one_wall_clock(host: Host) -> None:
    """The MSR is the VM's, under both of its numbers."""
    machine = Machine(host, 2)
    machine.set_msr(x86.MSR_KVM_WALL_CLOCK, 0xD000_0000)

    assert 0xD000_0000 == machine.get_msr(x86.MSR_KVM_WALL_CLOCK_NEW, 1)
    machine.close()


def test_a_clock_page_does_not_cross_a_page(host: Host) -> None:
    """The MSR takes the value, but the clock stays where it was, or nowhere."""
    machine = Machine(host)
    answers = []
    for value in (0x1FE3, 0x1FE1, 0x1FE3, 0, 0x1FE3):
        assert machine.set_msr(x86.MSR_KVM_SYSTEM_TIME_NEW, value)
        answers.append(outcome(machine.vcpus[0].ioctl, requests.KVM_KVMCLOCK_CTRL))

    assert ["EINVAL", 0, 0, "EINVAL", "EINVAL"] == answers
    machine.close()


def test_paravirtual_msrs(host: Host) -> None:
    """They hold what was written; reserved bits are refused, and notes where no memory is (not so the clock's)."""
    machine = Machine(host)
    taken = [
        machine.set_msr(*write)
        for write in (
            (x86.MSR_KVM_STEAL_TIME, 0x1041),
            (x86.MSR_KVM_STEAL_TIME, 0x1043),
            (x86.MSR_KVM_POLL_CONTROL, 0),
            (x86.MSR_KVM_POLL_CONTROL, 2),
            (x86.MSR_KVM_PV_EOI_EN, 0x1005),
            (x86.MSR_KVM_PV_EOI_EN, 0x1004),
            (x86.MSR_KVM_PV_EOI_EN, 0x1002),
            (x86.MSR_KVM_ASYNC_PF_EN, 0x1010),
            (x86.MSR_KVM_ASYNC_PF_EN, 0x1009),
            (x86.MSR_KVM_SYSTEM_TIME, 0x2001),
        )
    ]

    assert [True, False, True, False, False, True, False, False, False, True] == taken
    msrs = (
        x86.MSR_KVM_STEAL_TIME,
        x86.MSR_KVM_POLL_CONTROL,
        x86.MSR_KVM_PV_EOI_EN,
        x86.MSR_KVM_ASYNC_PF_EN,
        x86.MSR_KVM_SYSTEM_TIME_NEW,
    )
    assert [0x1041, 0, 0x1004, 0x1009, 0x2001] == [machine.get_msr(msr) for msr in msrs]
    machine.close()


def test_tsc_adjust_by_the_vmm(host: Host) -> None:
    """Without effect on a CPU whose CPUID has it not; kept by one that has, and the TSC does not move."""
    machine = Machine(host)
    offset = machine.vcpus[0].get_attr(*TSC)
    machine.set_msr(x86.MSR_IA32_TSC_ADJUST, 1000)
    found = [machine.get_msr(x86.MSR_IA32_TSC_ADJUST)]
    other = host.create_vm()
    vcpu = other.create_vcpu(0)
    leaves = x86.KvmCpuidEntry2(0, eax=7), x86.KvmCpuidEntry2(7, 0, 1, ebx=2)
    vcpu.ioctl(requests.KVM_SET_CPUID2, bytearray(x86.KvmCpuid2(2).pack() + b"".join(leaf.pack() for leaf in leaves)))
    machine.vcpus.append(vcpu)
    before = vcpu.get_attr(*TSC)
    machine.set_msr(x86.MSR_IA32_TSC_ADJUST, 1000, 1)
    found.append(machine.get_msr(x86.MSR_IA32_TSC_ADJUST, 1))

    assert [0, 1000] == found
    assert [offset, before] == [fd.get_attr(*TSC) for fd in machine.vcpus]
    machine.close()
    other.close()


def test_how_many_msrs_were_taken(host: Host) -> None:
    """Up to the first that is not there."""
    machine = Machine(host)
    entries = [KvmMsrEntry(index, 0, 1) for index in (x86.MSR_KVM_POLL_CONTROL, 0xDEAD_0000, x86.MSR_IA32_TSC)]
    buffer = KvmMsrs(3).pack() + b"".join(entry.pack() for entry in entries)

    for request in (requests.KVM_SET_MSRS, requests.KVM_GET_MSRS):
        assert 1 == machine.vcpus[0].ioctl(request, bytearray(buffer))
    machine.close()


def test_a_page_of_the_local_apic_has_its_size(host: Host) -> None:
    """1024 bytes."""
    machine = Machine(host)

    assert KvmLapicState.SIZE == 1024 == len(machine.lapic())
    machine.close()
