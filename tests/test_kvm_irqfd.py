"""irqfds: signals become interrupts, by pin and by message, edge and level."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import trio
from kvm_machine import DOORBELL, Arm, outcome

import fabric
from fabric.kvm import irqfd
from fabric.kvm.typed import msi_route, pin_route
from fabric.uapi import ioctl as requests
from fabric.uapi import kvm as uapi


@pytest.fixture(params=["simulated", "real"])
def eventfd(request: pytest.FixtureRequest) -> Iterator[Callable[[Arm], Any]]:
    """Makes eventfds; every rule holds for simulated and for real ones."""
    fds: list[int] = []

    class Real(int):
        def signal(self) -> None:
            os.eventfd_write(self, 1)

        def read(self) -> int:
            return os.eventfd_read(self)

        def close(self) -> None:
            os.close(self)

    def make(machine: Arm, initval: int = 0) -> Any:
        if request.param == "simulated":
            return machine.kvm.eventfd(initval)
        fds.append(os.eventfd(initval, os.EFD_NONBLOCK))
        return Real(fds[-1])

    yield make
    for fd in fds:
        outcome(os.close, fd)


EventFds = Callable[..., Any]


@pytest.mark.spec("api.irqfd", "api.irqfd.rule.arm-spi", "api.irqfd.note.arm-before")
def test_a_signal_raises_the_spi_of_its_gsi(eventfd: EventFds) -> None:
    """GSI n is pin n by default, and pin n is SPI 32 + n; the count is consumed."""
    machine = Arm()
    event = eventfd(machine)
    machine.vm.irqfd(event, 7)
    event.signal()

    assert 1 << 7 == machine.pending()
    assert "EAGAIN" == outcome(event.read)


@pytest.mark.spec("api.irqfd.rule.pulse")
def test_a_signal_is_an_edge(eventfd: EventFds) -> None:
    """Each makes the interrupt pending once more: the line is not seen to stay up."""
    machine = Arm()
    event = eventfd(machine)
    machine.vm.irqfd(event, 7)
    for _ in range(2):
        event.signal()
        assert 1 << 7 == machine.pending()
        machine.set_gicd(0x200 + 4, 0)  # what userspace writes is the latch

    assert 0 == machine.pending()
    assert 2 == machine.ledger.raised


def test_a_level_line_stays_up(eventfd: EventFds) -> None:
    """Without a resampler nobody lowers the line of a level-triggered SPI; a later signal merges."""
    machine = Arm()
    machine.level_triggered()
    event = eventfd(machine)
    machine.vm.irqfd(event, 7)
    event.signal()

    assert 1 << 7 == machine.lines()

    event.signal()
    machine.host.api_version()
    assert (2, 1) == (machine.ledger.raised, machine.ledger.coalesced)


@pytest.mark.spec("api.irqfd.rule.already-set")
def test_an_eventfd_signalled_before_fires_once(eventfd: EventFds) -> None:
    """As a pulse, and its count stays; the next signal counts as one."""
    machine = Arm()
    machine.level_triggered()
    event = eventfd(machine, 3)
    machine.vm.irqfd(event, 7)

    assert (1, {"line lowered": 1}) == (machine.ledger.raised, machine.ledger.dropped)
    assert 0 == machine.lines()
    assert 3 == event.read()

    event.signal()
    assert 1 << 7 == machine.lines()


def test_a_count_that_stays_is_consumed_with_the_next_signal(eventfd: EventFds) -> None:
    """The signal takes all there is."""
    machine = Arm()
    event = eventfd(machine, 3)
    machine.vm.irqfd(event, 7)
    event.signal()
    machine.host.api_version()

    assert "EAGAIN" == outcome(event.read)


@pytest.mark.spec("api.irqfd.EBUSY.in-use", "api.irqfd.EAGAIN.not-ready", "api.irqfd.EINVAL.flags")
def test_errors_of_assigning(eventfd: EventFds) -> None:
    """One irqfd an eventfd and VM; the GIC must be there and initialised; flags are known ones."""
    machine = Arm(init=False)
    event = eventfd(machine)

    assert "EAGAIN" == outcome(machine.vm.irqfd, event, 3)
    assert "EAGAIN" == outcome(machine.vm.irqfd, -1 & 0xFFFF_FFFF, 3)
    assert "EINVAL" == outcome(machine.vm.ioctl, requests.KVM_IRQFD, uapi.KvmIrqfd(event, 3, 4))

    machine.gic.set_attr(4, 0)
    machine.vm.irqfd(event, 3)
    assert "EBUSY" == outcome(machine.vm.irqfd, event, 3)
    assert "EBUSY" == outcome(machine.vm.irqfd, event, 4)


@pytest.mark.spec("api.irqfd.EBADF.fd", "api.irqfd.EINVAL.not-eventfd")
def test_what_is_no_eventfd() -> None:
    """Closed numbers are EBADF, other files EINVAL, in both places and when deassigning."""
    machine = Arm()
    event = machine.kvm.eventfd()
    closed = 0xFFFF_FFFF

    for bad, name in ((closed, "EBADF"), (1 << 29, "EBADF"), (machine.gic.fd, "EINVAL"), (0, "EINVAL")):
        assert name == outcome(machine.vm.irqfd, bad, 3)
        assert name == outcome(machine.vm.irqfd, bad, 3, deassign=True)
        assert name == outcome(machine.vm.irqfd, event, 3, resamplefd=bad)
    assert 0 == len(machine.inside.irqfds)


@pytest.mark.spec("api.irqfd.rule.deassign-none")
def test_deassigning(eventfd: EventFds) -> None:
    """It needs eventfd and GSI of the assignment; without a match it succeeds and does nothing."""
    machine = Arm()
    event, other = eventfd(machine), eventfd(machine)
    machine.vm.irqfd(event, 7)
    machine.vm.irqfd(event, 6, deassign=True)
    machine.vm.irqfd(other, 7, deassign=True)
    event.signal()

    assert 1 << 7 == machine.pending()

    machine.vm.irqfd(event, 7, deassign=True)
    event.signal()
    machine.host.api_version()
    assert 1 == event.read()
    assert 1 == machine.ledger.raised


@pytest.mark.spec("api.irqfd.rule.hangup")
def test_closing_the_eventfd_ends_the_irqfd(eventfd: EventFds) -> None:
    """Nothing of it is left in the VM."""
    machine = Arm()
    event = eventfd(machine)
    machine.vm.irqfd(event, 7)
    event.close()
    machine.host.api_version()

    assert 0 == len(machine.inside.irqfds)


def test_the_newest_vm_gets_the_signals(eventfd: EventFds) -> None:
    """An eventfd may be tied in several VMs; the one that came last consumes, and hands back when it goes."""
    machine = Arm()
    event = eventfd(machine)
    machine.vm.irqfd(event, 7)
    other = Arm()
    other.vm.irqfd(event, 5)
    event.signal()
    other.host.api_version()

    if isinstance(event, fabric.kvm.EventFd):
        assert (0, 1 << 5) == (machine.pending(), other.pending())
    other.vm.irqfd(event, 5, deassign=True)
    event.signal()
    assert 1 << 7 == machine.pending() & 1 << 7


# -- resampling


@pytest.mark.spec(
    "api.irqfd.rule.resample",
    "api.seq.irqfd-resample",
    "api.seq.irqfd-resample.1-assign",
    "api.seq.irqfd-resample.2-signal",
    "api.seq.irqfd-resample.3-end",
    "api.seq.irqfd-resample.4-again",
)
def test_a_round_of_a_level_interrupt(eventfd: EventFds) -> None:
    """A signal raises the line; the guest's EOI lowers it and signals the resample eventfd; and again."""

    async def main() -> list[Any]:
        machine = Arm()
        machine.level_triggered()
        machine.forward()
        event, resample = eventfd(machine), eventfd(machine)
        machine.vm.irqfd(event, 7, resamplefd=resample)
        log: list[Any] = []

        async def guest(cpu: Any) -> None:
            for _ in range(2):
                log.append(await cpu.mrs("ICC_IAR1_EL1"))
                log.append(machine.lines_inside())
                await cpu.msr("ICC_EOIR1_EL1", 39)
                log.append(machine.lines_inside())
                await cpu.store(0x1000, 4, 0)

        machine.lines_inside = lambda: machine.inside.irqchip.spis[7].line  # type: ignore[attr-defined]
        machine.vcpus[0].load(guest)
        for _ in range(2):
            event.signal()
            await machine.vcpus[0].run()
            log.append(resample.read())
        return log

    assert [39, True, False, 1] * 2 == fabric.run(main)


@pytest.mark.spec("api.irqfd.rule.shared-resample")
def test_all_resample_eventfds_of_a_gsi_are_signalled(eventfd: EventFds) -> None:
    """They share the line; it is lowered by the end of interrupt, or when the last irqfd goes."""
    machine = Arm()
    machine.level_triggered()
    pairs = [(eventfd(machine), eventfd(machine)) for _ in range(2)]
    for event, resample in pairs:
        machine.vm.irqfd(event, 7, resamplefd=resample)
    pairs[0][0].signal()
    machine.host.api_version()
    (ended,) = machine.inside.irqchip.eoi_notifiers[39]
    ended()

    assert 0 == machine.lines()
    assert [1, 1] == [resample.read() for _, resample in pairs]

    pairs[1][0].signal()
    assert 1 << 7 == machine.lines()
    machine.vm.irqfd(pairs[0][0], 7, deassign=True)
    assert 1 << 7 == machine.lines()
    machine.vm.irqfd(pairs[1][0], 7, deassign=True)
    assert 0 == machine.lines()
    assert [] == machine.inside.irqchip.eoi_notifiers[39]


def test_devices_that_share_a_level_interrupt() -> None:
    """End to end: a device keeps the line up until the guest has served it, and lowers or raises it after each EOI.

    Two devices share an SPI. At the guest's EOI the line is lowered and both are told; one that has work left signals
    again, so the guest is interrupted until there is none, and then no more.
    """

    async def main() -> tuple[list[Any], Any]:
        machine = Arm()
        machine.level_triggered()
        machine.forward()
        log: list[Any] = []
        work = {"disk": 2, "net": 1}
        quiet = trio.Event()

        async def device(name: str, event: Any, resample: Any) -> None:
            event.signal()
            while True:
                await resample.wait()
                log.append((fabric.now(), name, work[name]))
                if work[name]:
                    event.signal()

        async def guest(cpu: Any) -> None:
            while any(work.values()):
                await cpu.wait_for_interrupt()
                intid = await cpu.mrs("ICC_IAR1_EL1")
                await cpu.compute(100)
                served = next(name for name, left in work.items() if left)
                work[served] -= 1
                log.append((intid, served))
                await cpu.msr("ICC_EOIR1_EL1", intid)
            await cpu.compute(10_000)
            log.append(await cpu.mrs("ICC_IAR1_EL1"))
            quiet.set()

        machine.vcpus[0].load(guest)
        async with trio.open_nursery() as nursery:
            for name in work:
                event, resample = machine.kvm.eventfd(), machine.kvm.eventfd()
                machine.vm.irqfd(event, 7, resamplefd=resample)
                nursery.start_soon(device, name, event, resample)
            nursery.start_soon(machine.vcpus[0].run)
            await quiet.wait()
            assert 0 == machine.inside.irqchip.spis[7].line
            nursery.cancel_scope.cancel()
        machine.kvm.check()
        return [entry[-2:] if isinstance(entry, tuple) else entry for entry in log], machine.ledger

    log, ledger = fabric.run(main)
    served = [(39, "disk"), ("disk", 1), ("net", 1), (39, "disk"), ("disk", 0), ("net", 1), (39, "net")]
    assert [*served, ("disk", 0), ("net", 0), 1023] == log
    assert (3, 0, {}) == (ledger.delivered, ledger.pending, ledger.dropped)


def test_a_refused_resampler_lowers_the_line(eventfd: EventFds) -> None:
    """An eventfd that is in use is EBUSY; a resampler made for nothing goes, and as the last of its GSI lowers it."""
    machine = Arm()
    machine.level_triggered()
    event, resample, other = eventfd(machine), eventfd(machine), eventfd(machine)
    machine.vm.irqfd(event, 7)
    event.signal()
    assert 1 << 7 == machine.lines()
    assert "EBUSY" == outcome(machine.vm.irqfd, event, 8, resamplefd=resample)
    assert 1 << 7 == machine.lines()
    assert "EBUSY" == outcome(machine.vm.irqfd, event, 7, resamplefd=resample)
    assert 0 == machine.lines()

    machine.vm.irqfd(other, 7, resamplefd=resample)
    other.signal()
    assert "EBUSY" == outcome(machine.vm.irqfd, event, 7, resamplefd=resample)
    assert 1 << 7 == machine.lines(), "another irqfd still resamples it"


@pytest.mark.spec("api.irqfd.ENOMEM.alloc")
def test_no_memory_for_an_irqfd(monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOMEM, and the eventfd is free for another attempt."""

    def fail(*_args: Any) -> Any:
        raise MemoryError

    machine = Arm()
    event = machine.kvm.eventfd()
    with monkeypatch.context() as patch:
        patch.setattr(irqfd, "Irqfd", fail)
        assert "ENOMEM" == outcome(machine.vm.irqfd, event, 7)
    assert 0 == len(machine.inside.irqfds)
    event.signal()
    assert (0, 1) == (machine.pending(), event.read())
    machine.vm.irqfd(event, 7)


@pytest.mark.spec("api.irqfd.rule.resample-close")
def test_closing_the_resample_eventfd_ends_nothing(eventfd: EventFds) -> None:
    """The irqfd goes on, and the end of the interrupt just signals nobody."""
    machine = Arm()
    machine.level_triggered()
    event, resample = eventfd(machine), eventfd(machine)
    machine.vm.irqfd(event, 7, resamplefd=resample)
    resample.close()
    event.signal()

    assert 1 << 7 == machine.lines()

    (ended,) = machine.inside.irqchip.eoi_notifiers[39]
    ended()
    assert 0 == machine.lines()
    assert 1 == len(machine.inside.irqfds)


def test_resampling_follows_the_routes() -> None:
    """The end of an interrupt is told to the GSI that is routed to its pin now; of two, to the last."""
    machine = Arm()
    event, resample = machine.kvm.eventfd(), machine.kvm.eventfd()
    machine.vm.irqfd(event, 7, resamplefd=resample)
    notifiers = machine.inside.irqchip.eoi_notifiers

    def told() -> list[int]:
        return sorted(intid for intid, functions in notifiers.items() if functions)

    assert [39] == told()
    machine.vm.set_routes([pin_route(7, 20)])
    assert [52] == told()
    machine.vm.set_routes([pin_route(7, 20), pin_route(8, 20)])
    assert [] == told()
    machine.vm.set_routes([pin_route(8, 20), pin_route(7, 20)])
    assert [52] == told()


# -- routes and messages


@pytest.mark.spec("api.irqfd.rule.arm-msi")
def test_a_message_becomes_an_lpi(eventfd: EventFds) -> None:
    """An MSI route goes through the ITS."""
    machine = Arm(memory=True)
    machine.add_its()
    machine.vm.set_routes([msi_route(3, DOORBELL, 0, 8)])
    event = eventfd(machine)
    machine.vm.irqfd(event, 3)
    event.signal()
    machine.host.api_version()

    assert machine.lpi_pending()
    assert (1, 1) == (machine.ledger.raised, machine.ledger.pending)


@pytest.mark.spec("api.irqfd.rule.arm-no-route", "api.irqfd.note.fails-how")
@pytest.mark.parametrize(
    ("routes", "reason"),
    [
        pytest.param([], "no route", id="none"),
        pytest.param([pin_route(3, 900)], "no such input", id="pin"),
        pytest.param([msi_route(3, DOORBELL, 1, 8)], "unmapped event", id="event"),
        pytest.param([msi_route(3, DOORBELL, 0, 9)], "unmapped device", id="device"),
        pytest.param([msi_route(3, DOORBELL, 0)], "MSI without a device id", id="devid"),
        pytest.param([msi_route(3, 0x5000, 0, 8)], "no ITS at the MSI address", id="address"),
    ],
)
def test_what_reaches_nothing_is_lost_without_a_sign(routes: list[Any], reason: str) -> None:
    """The signaller sees no error; the ledger has the reason."""
    machine = Arm(memory=True)
    machine.add_its()
    event = machine.kvm.eventfd()
    machine.vm.set_routes(routes)
    machine.vm.irqfd(event, 3)
    event.signal()

    assert (1, {reason: 1}) == (machine.ledger.raised, machine.ledger.dropped)
    machine.kvm.check()


@pytest.mark.spec("api.set-gsi-routing.rule.irqfd-follow")
def test_irqfds_follow_the_table(eventfd: EventFds) -> None:
    """A new table counts from the next signal on."""
    machine = Arm()
    event = eventfd(machine)
    machine.vm.irqfd(event, 3)
    machine.vm.set_routes([pin_route(3, 9)])
    event.signal()

    assert 1 << 9 == machine.pending()


def test_a_kept_signal_function_follows_too() -> None:
    """Code may keep ``event.signal``, before the irqfd is assigned even."""
    machine = Arm()
    event = machine.kvm.eventfd()
    signal = event.signal
    machine.vm.irqfd(event, 3)
    machine.vm.set_routes([pin_route(3, 9)])
    signal()

    assert 1 << 9 == machine.pending()

    machine.vm.irqfd(event, 3, deassign=True)
    signal()
    assert 1 == event.read()


# -- channels


def test_faults_on_the_line_channel_hit_irqfds() -> None:
    """What is dropped on the way to the controller is accounted for; lifting the fault restores the short way."""
    machine = Arm()
    event = machine.kvm.eventfd()
    machine.vm.irqfd(event, 3)
    machine.inside.lines.drop(1)
    event.signal()
    event.signal()

    assert 1 << 3 == machine.pending()
    assert (2, {"injected fault": 1}) == (machine.ledger.raised, machine.ledger.dropped)
    assert machine.inside.lines.plain


def test_faults_on_the_message_channel_hit_irqfds_and_ioctls() -> None:
    """A held message is pending in the ledger until it is released."""
    machine = Arm(memory=True)
    machine.add_its()
    machine.vm.set_routes([msi_route(3, DOORBELL, 0, 8)])
    event = machine.kvm.eventfd()
    machine.vm.irqfd(event, 3)
    seen: list[Any] = []
    machine.inside.msis.tap(seen.append)
    machine.inside.msis.hold()
    event.signal()

    assert 1 == machine.vm.signal_msi(DOORBELL, 0, 8)
    assert (2, 2, False) == (machine.ledger.raised, machine.ledger.pending, machine.lpi_pending())

    machine.inside.msis.release()
    assert (2, 1, 1) == (machine.ledger.raised, machine.ledger.pending, machine.ledger.coalesced)
    assert 2 == len(seen)


def test_a_late_message_may_find_the_its_disabled() -> None:
    """It is lost and accounted for; nobody is left to get the error."""

    async def main() -> Any:
        machine = Arm(memory=True)
        machine.add_its()
        machine.inside.msis.latency_ns = 100
        machine.vm.signal_msi(DOORBELL, 0, 8)
        machine.its.set_attr(8, 0, 0)
        await fabric.sleep(200)
        return machine.ledger

    assert {"ITS disabled": 1} == fabric.run(main).dropped
