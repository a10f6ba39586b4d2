"""Channels: typed events from senders to one far end, with latency, taps and faults; nothing is lost unseen."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest
import trio
from engine_programs import here
from hypothesis import given
from hypothesis import strategies as st

import fabric
from fabric.channel import Channel, ChannelStatistics, Kick, Msi
from fabric.errors import KvmError
from fabric.trace.ledger import Ledger, LedgerStatement


def msi(number: int) -> Msi:
    """An event that can be told from others."""
    return Msi(0x0808_0040, number, 0)


class FarEnd:
    """A sink that notes what arrives and when."""

    def __init__(self) -> None:
        self.arrived: list[tuple[int, int]] = []

    def __call__(self, event: Msi) -> str:
        self.arrived.append((fabric.now(), event.data))
        return "taken"

    @property
    def numbers(self) -> list[int]:
        """What arrived, in order."""
        return [number for _, number in self.arrived]


def simulate(program: Callable[[Channel[Msi], FarEnd], Awaitable[object]], seed: int = 0, **options: Any) -> FarEnd:
    """Run ``program`` with a channel that is connected to a far end; returns that."""
    far = FarEnd()

    async def main() -> None:
        channel = Channel("test", Msi, engine=here(), **options)
        channel.connect(far)
        await program(channel, far)

    fabric.run(main, seed=seed)
    return far


# The plain way.


def test_a_plain_send_is_the_sink() -> None:
    """With a sink and nothing else in the way, sending is calling the sink, and returns what it returns."""
    far: list[Msi] = []
    channel = Channel("plain", Msi)
    channel.connect(far.append)

    assert channel.plain
    assert channel.send_nowait.__self__ is far  # type: ignore[attr-defined]

    channel.send_nowait(msi(1))

    assert [msi(1)] == far


def test_what_is_taken_away_restores_the_plain_way() -> None:
    """Taps, faults, holds and latency take the long way while they last; watchers hear of every change."""
    changes: list[bool] = []

    async def program(channel: Channel[Msi], far: FarEnd) -> None:
        channel.watchers.append(lambda: changes.append(channel.plain))
        for add, take_away in (
            (lambda: channel.tap(print), lambda remove: remove()),
            (channel.drop, lambda fault: fault.lift()),
            (channel.hold, lambda _: channel.release()),
            (lambda: setattr(channel, "latency_ns", 5), lambda _: setattr(channel, "latency_ns", 0)),
            (lambda: channel.fail(errno.EIO), lambda _: channel.clear_faults()),
        ):
            added = add()
            assert not channel.plain
            take_away(added)
            assert channel.plain
            assert "taken" == channel.send_nowait(msi(0))

    assert 5 == len(simulate(program).arrived)
    assert [False, True] * 5 == [plain for plain, _ in zip(changes, range(10), strict=False)]


def test_a_channel_has_one_far_end() -> None:
    """A second sink, a receiver beside a sink and a sink beside receivers are refused."""

    async def main() -> None:
        channel = Channel("c", Kick, engine=here())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(channel.receive)
            await fabric.sleep(1)
            with pytest.raises(ValueError, match="tasks that receive"):
                channel.connect(print)
            nursery.cancel_scope.cancel()
        channel.connect(lambda _: None)
        with pytest.raises(ValueError, match="has a sink already"):
            channel.connect(print)
        with pytest.raises(RuntimeError, match="has a sink"):
            await channel.receive()

    fabric.run(main)


def test_a_sink_gets_what_came_before_it() -> None:
    """Events wait for a far end; a sink that is connected late gets them first, in order."""
    far: list[Msi] = []
    channel = Channel("late", Msi)
    channel.send_nowait(msi(1))
    channel.send_nowait(msi(2))
    channel.connect(far.append)
    channel.send_nowait(msi(3))

    assert [msi(1), msi(2), msi(3)] == far


def test_the_long_way_checks_the_type() -> None:
    """An event of another type is the sender's mistake."""
    channel = Channel("typed", Msi)

    with pytest.raises(TypeError, match="carries Msi, not Kick"):
        channel.send_nowait(Kick(0))  # type: ignore[arg-type]


# Latency.


def test_latency_is_from_send_to_arrival() -> None:
    """Every event arrives exactly that much later, in the order they were sent."""

    async def program(channel: Channel[Msi], far: FarEnd) -> None:
        for number in range(3):
            channel.send_nowait(msi(number))
            channel.send_nowait(msi(number + 10))
            await fabric.sleep(3)
        await fabric.sleep(100)

    far = simulate(program, latency_ns=50)

    assert [(50, 0), (50, 10), (53, 1), (53, 11), (56, 2), (56, 12)] == far.arrived


@pytest.mark.parametrize("seed", range(5))
def test_a_seed_does_not_reorder_a_channel(seed: int) -> None:
    """Exploring orders of simultaneous events leaves those of one channel in order."""

    async def program(channel: Channel[Msi], far: FarEnd) -> None:
        for number in range(20):
            channel.send_nowait(msi(number))
        await fabric.sleep(100)

    assert list(range(20)) == simulate(program, seed, latency_ns=7).numbers


def test_send_waits_for_the_latency() -> None:
    """``await send`` comes back when the event has arrived."""

    async def program(channel: Channel[Msi], far: FarEnd) -> None:
        await channel.send(msi(1))
        assert 40 == fabric.now()
        assert [(40, 1)] == far.arrived

    simulate(program, latency_ns=40)


def test_an_arrival_comes_before_what_happens_at_its_instant() -> None:
    """A task that wakes at the nanosecond of an arrival finds it has arrived."""

    async def program(channel: Channel[Msi], far: FarEnd) -> None:
        async def looker() -> None:
            await fabric.sleep(40)
            assert [1] == far.numbers

        async with trio.open_nursery() as nursery:
            nursery.start_soon(looker)
            await fabric.sleep(10)
            channel.send_nowait(msi(1))

    simulate(program, latency_ns=30)


def test_a_new_latency_is_for_new_events() -> None:
    """What is under way arrives when it would have."""

    async def program(channel: Channel[Msi], far: FarEnd) -> None:
        channel.send_nowait(msi(1))
        channel.latency_ns = 10
        channel.send_nowait(msi(2))
        await fabric.sleep(100)

    assert [(10, 2), (50, 1)] == simulate(program, latency_ns=50).arrived


def test_a_late_event_knows_when_it_was_sent() -> None:
    """``on_origin`` hears the time of the send before an event arrives late, and None after it."""
    log: list[object] = []

    async def program(channel: Channel[Msi], far: FarEnd) -> None:
        channel.on_origin = log.append
        await fabric.sleep(5)
        channel.send_nowait(msi(1))
        await fabric.sleep(100)

    simulate(program, latency_ns=50)

    assert [5, None] == log


def test_a_sink_may_send_on() -> None:
    """What an arrival sends on the same channel is under way from then, whatever else is."""
    far: list[tuple[int, int]] = []

    async def main() -> None:
        channel = Channel("c", Msi, engine=here(), latency_ns=10)

        def bounce(event: Msi) -> None:
            far.append((fabric.now(), event.data))
            if event.data < 3:
                channel.send_nowait(msi(event.data + 1))

        channel.connect(bounce)
        channel.send_nowait(msi(0))
        await fabric.sleep(15)
        channel.send_nowait(msi(7))
        await fabric.sleep(100)

    fabric.run(main)

    assert [(10, 0), (20, 1), (25, 7), (30, 2), (40, 3)] == far


def test_an_error_of_the_sink_ends_the_run() -> None:
    """An arrival that raises is nobody's to catch; what else was under way at that instant is not lost."""
    far: list[int] = []

    async def main() -> None:
        channel = Channel("c", Msi, engine=here(), latency_ns=5)

        def sink(event: Msi) -> None:
            far.append(event.data)
            if event.data == 0:
                raise LookupError(event.data)

        channel.connect(sink)
        channel.send_nowait(msi(0))
        channel.send_nowait(msi(1))
        with trio.CancelScope(shield=True):
            await fabric.sleep(10)

    with pytest.raises(LookupError):
        fabric.run(main)

    assert [0, 1] == far


@pytest.mark.parametrize("latency", [-1, 1.5, "1", None])
def test_a_latency_is_an_int(latency: Any) -> None:
    """Int nanoseconds, 0 or more, and only where there is time."""
    with pytest.raises(ValueError, match="must be an int >= 0 ns"):
        Channel("c", Msi, latency_ns=latency)
    with pytest.raises(ValueError, match="no engine"):
        Channel("c", Msi, latency_ns=5)


# Taps.


def test_taps_see_every_send_before_any_fault() -> None:
    """Also what is dropped, held or refused; a removed tap sees nothing more."""
    seen: list[int] = []

    async def program(channel: Channel[Msi], far: FarEnd) -> None:
        remove = channel.tap(lambda event: seen.append(event.data))
        channel.send_nowait(msi(0))
        channel.drop(1)
        channel.send_nowait(msi(1))
        channel.fail(errno.EIO, 1)
        with pytest.raises(KvmError):
            channel.send_nowait(msi(2))
        channel.hold()
        channel.send_nowait(msi(3))
        remove()
        channel.send_nowait(msi(4))

    assert [0] == simulate(program).numbers
    assert [0, 1, 2, 3] == seen


# Faults.


def test_held_events_go_in_order_at_the_release() -> None:
    """Held events wait for the release and take the latency from there."""

    async def program(channel: Channel[Msi], far: FarEnd) -> None:
        channel.hold()
        channel.send_nowait(msi(1))
        await fabric.sleep(50)
        channel.send_nowait(msi(2))
        assert 2 == channel.statistics().held
        assert 2 == channel.release()
        channel.send_nowait(msi(3))
        await fabric.sleep(50)

    assert [(60, 1), (60, 2), (60, 3)] == simulate(program, latency_ns=10).arrived


def test_holds_nest() -> None:
    """Only the release of the last hold lets events go; a release without one is refused."""

    async def program(channel: Channel[Msi], far: FarEnd) -> None:
        channel.hold()
        channel.hold()
        channel.send_nowait(msi(1))
        assert 0 == channel.release()
        assert [] == far.numbers
        assert 1 == channel.release()
        assert [1] == far.numbers
        with pytest.raises(ValueError, match="is not held"):
            channel.release()

    simulate(program)


def test_a_release_keeps_the_order() -> None:
    """What the far end sends on the channel during a release comes after what was held; a hold stops it."""

    async def program(channel: Channel[Msi], far: FarEnd) -> None:
        far_end: list[int] = []
        other = Channel("other", Msi, engine=here())

        def sink(event: Msi) -> None:
            far_end.append(event.data)
            if event.data == 1:
                other.send_nowait(msi(9))
            if event.data == 3:
                other.hold()

        other.connect(sink)
        other.hold()
        for number in range(1, 5):
            other.send_nowait(msi(number))
        assert 3 == other.release()
        assert [1, 2, 3] == far_end
        assert 2 == other.release()
        assert [1, 2, 3, 4, 9] == far_end

    simulate(program)


def test_a_release_that_fails_keeps_the_rest() -> None:
    """When the far end raises, what is left stays held, for the next release."""
    far: list[int] = []
    channel = Channel("c", Msi)

    def sink(event: Msi) -> None:
        far.append(event.data)
        if event.data == 1:
            raise LookupError

    channel.connect(sink)
    channel.hold()
    for number in range(4):
        channel.send_nowait(msi(number))
    with pytest.raises(LookupError):
        channel.release()

    assert [0, 1] == far
    assert 2 == channel.release()
    assert [0, 1, 2, 3] == far


@pytest.mark.parametrize(
    ("inject", "expected"),
    [
        (lambda channel: channel.drop(2), [2, 3, 4]),
        (lambda channel: channel.drop(), []),
        (lambda channel: channel.duplicate(2), [0, 0, 1, 1, 2, 3, 4]),
        (lambda channel: (channel.duplicate(1), channel.duplicate(1)), [0, 0, 0, 1, 2, 3, 4]),
        (lambda channel: channel.delay(7, 2), [2, 3, 4, 0, 1]),
        (lambda channel: (channel.drop(1), channel.duplicate(1)), [1, 1, 2, 3, 4]),
        (lambda channel: channel.drop(1).lift(), [0, 1, 2, 3, 4]),
    ],
    ids=["drop 2", "drop all", "duplicate", "duplicate twice", "delay", "drop, then duplicate", "lifted"],
)
def test_a_fault_hits_the_next_events(inject: Callable[[Channel[Msi]], object], expected: list[int]) -> None:
    """Faults work in the order they were injected, on as many events as asked, and then are gone."""

    async def program(channel: Channel[Msi], far: FarEnd) -> None:
        inject(channel)
        for number in range(5):
            channel.send_nowait(msi(number))
        await fabric.sleep(100)

    assert expected == simulate(program).numbers


def test_a_delay_adds_to_the_latency() -> None:
    """Also for an event that is held meanwhile; delays add up."""

    async def program(channel: Channel[Msi], far: FarEnd) -> None:
        channel.delay(7, 2)
        channel.delay(100, 1)
        channel.send_nowait(msi(1))
        channel.hold()
        channel.send_nowait(msi(2))
        channel.send_nowait(msi(3))
        channel.release()
        await fabric.sleep(200)

    assert [(10, 3), (17, 2), (117, 1)] == simulate(program, latency_ns=10).arrived


def test_fail_refuses_with_an_errno() -> None:
    """The sender gets the errno, as from a real ioctl, and the far end nothing."""

    async def program(channel: Channel[Msi], far: FarEnd) -> None:
        channel.fail(errno.ENOSPC, 1)
        with pytest.raises(KvmError, match="channel test: injected ENOSPC") as caught:
            channel.send_nowait(msi(1))
        assert errno.ENOSPC == caught.value.errno
        channel.send_nowait(msi(2))

    assert [2] == simulate(program).numbers


def test_probabilities_are_drawn_from_the_seed() -> None:
    """A probability hits about that share of events, others with another seed, and the same with the same."""

    async def program(channel: Channel[Msi], far: FarEnd) -> None:
        channel.drop(probability=0.25)
        for number in range(1000):
            channel.send_nowait(msi(number))

    first, second = simulate(program, seed=1).numbers, simulate(program, seed=2).numbers

    assert 700 < len(first) < 800
    assert first == simulate(program, seed=1).numbers
    assert first != second


def test_a_count_is_of_hits() -> None:
    """With a probability, the fault lasts until it has hit as often as asked."""

    async def program(channel: Channel[Msi], far: FarEnd) -> None:
        fault = channel.drop(10, probability=0.1)
        for number in range(1000):
            channel.send_nowait(msi(number))
        assert 10 == fault.hits
        assert channel.plain

    assert 990 == len(simulate(program, seed=3).arrived)


@pytest.mark.parametrize(
    ("inject", "words"),
    [
        (lambda c: c.drop(0), "int >= 1"),
        (lambda c: c.drop(1.5), "int >= 1"),
        (lambda c: c.drop(probability=0), "probability"),
        (lambda c: c.drop(probability=1.1), "probability"),
        (lambda c: c.drop(probability=0.5), "no engine"),
        (lambda c: c.delay(5), "no engine"),
        (lambda c: c.fail(0), "must be an errno"),
        (lambda c: c.fail(99999), "must be an errno"),
    ],
)
def test_a_fault_that_cannot_be_is_refused(inject: Callable[[Any], object], words: str) -> None:
    """Counts, probabilities and errnos are checked when the fault is injected, and nothing is changed."""
    channel = Channel("c", Msi)
    channel.connect(lambda _: None)

    with pytest.raises(ValueError, match=words):
        inject(channel)

    assert channel.plain


def test_clearing_faults_releases_and_lifts() -> None:
    """Afterwards the channel works normally, and what was held has gone."""

    async def program(channel: Channel[Msi], far: FarEnd) -> None:
        channel.hold()
        channel.hold()
        channel.send_nowait(msi(1))
        channel.drop()
        channel.clear_faults()
        channel.send_nowait(msi(2))
        assert channel.plain

    assert [1, 2] == simulate(program).numbers


# Tasks at the far end.


def test_tasks_receive_in_turn() -> None:
    """Events go to receivers in the order they began to wait."""
    log: list[tuple[str, int]] = []

    async def main() -> None:
        channel = Channel("c", Msi, engine=here())

        async def receiver(name: str) -> None:
            async for event in channel:
                log.append((name, event.data))
                await fabric.sleep(10)

        async with trio.open_nursery() as nursery:
            for name in "abc":
                nursery.start_soon(receiver, name)
            await fabric.sleep(5)
            for number in range(4):
                channel.send_nowait(msi(number))
            await fabric.sleep(50)
            nursery.cancel_scope.cancel()

    fabric.run(main)

    assert [("a", 0), ("b", 1), ("c", 2), ("a", 3)] == log


def test_receive_nowait_takes_what_is_there() -> None:
    """An event or ``trio.WouldBlock``."""
    channel = Channel("c", Msi)
    channel.send_nowait(msi(1))

    assert msi(1) == channel.receive_nowait()
    with pytest.raises(trio.WouldBlock):
        channel.receive_nowait()


def test_waiting_needs_an_engine() -> None:
    """Without one nobody can wait, neither to receive nor to send."""
    channel = Channel("c", Msi)

    for wait in (channel.receive(), channel.send(msi(1))):
        with pytest.raises(RuntimeError, match="nobody can wait"):
            wait.send(None)


def test_a_cancelled_receiver_loses_no_event() -> None:
    """An event handed to a receiver that is cancelled at that instant is returned; one before stays."""
    got: list[int] = []

    async def main() -> None:
        channel = Channel("c", Msi, engine=here())
        scope = trio.CancelScope()

        async def receiver() -> None:
            with scope:
                got.append((await channel.receive()).data)
                got.append((await channel.receive()).data)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(receiver)
            await fabric.sleep(5)
            channel.send_nowait(msi(1))
            scope.cancel()
            await fabric.sleep(5)
            channel.send_nowait(msi(2))
        got.append((await channel.receive()).data)

    fabric.run(main)

    assert [1, 2] == got


def test_statistics_say_where_events_are() -> None:
    """Under way, held, queued; who waits; what faults have hit."""

    async def main() -> None:
        channel = Channel("c", Msi, engine=here(), latency_ns=10)
        channel.duplicate(1)
        channel.send_nowait(msi(1))
        assert ChannelStatistics("c", 2, 0, 0, 0, {"duplicate": 1}) == channel.statistics()
        await fabric.sleep(10)
        channel.hold()
        channel.send_nowait(msi(2))
        assert ChannelStatistics("c", 0, 1, 2, 0, {"duplicate": 1}) == channel.statistics()
        channel.receive_nowait()
        channel.receive_nowait()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(channel.receive)
            await fabric.sleep(1)
            assert 1 == channel.statistics().receivers_waiting
            channel.release()

    fabric.run(main)


# The ledger.


def test_what_a_channel_loses_is_dropped_for_a_reason() -> None:
    """A dropped event was raised and dropped, a refused one as well, one held or under way is pending."""
    ledger = Ledger()

    async def main() -> None:
        channel = Channel("c", Msi, engine=here(), latency_ns=10, ledger=ledger)

        def controller(event: Msi) -> None:
            ledger.raised += 1
            ledger.delivered += 1

        channel.connect(controller)
        channel.drop(1)
        channel.send_nowait(msi(1))
        channel.fail(errno.EIO, 1)
        with pytest.raises(KvmError):
            channel.send_nowait(msi(2))
        channel.send_nowait(msi(3))
        channel.hold()
        channel.send_nowait(msi(4))
        dropped = {"injected failure": 1, "injected fault": 1}
        assert LedgerStatement(4, 0, 0, 2, dropped) == ledger.check()
        channel.release()
        await fabric.sleep(20)
        assert LedgerStatement(4, 2, 0, 0, dropped) == ledger.check()

    fabric.run(main)


actions = st.one_of(
    st.tuples(st.just("send"), st.integers(1, 3)),
    st.tuples(st.just("advance"), st.integers(0, 20)),
    st.tuples(st.sampled_from(["drop", "duplicate", "fail"]), st.integers(1, 3), st.sampled_from([1.0, 0.5])),
    st.tuples(st.just("delay"), st.integers(0, 15)),
    st.tuples(st.just("latency"), st.integers(0, 15)),
    st.just(("hold",)),
    st.just(("release",)),
    st.just(("clear",)),
)


@given(st.lists(actions, max_size=30), st.integers(0, 3), st.booleans())
def test_nothing_is_lost_unseen(script: list[tuple[Any, ...]], seed: int, to_task: bool) -> None:
    """Whatever is sent and goes wrong: every event arrives, is on its way, held, or dropped and accounted for."""
    ledger = Ledger()
    arrived: Counter[int] = Counter()

    def controller(event: Msi) -> None:
        ledger.raised += 1
        ledger.delivered += 1
        arrived[event.data] += 1

    async def main() -> None:
        channel = Channel("c", Msi, engine=here(), ledger=ledger)
        sent = 0

        def check() -> None:
            statement = ledger.check()
            statistics = channel.statistics()
            waiting = statistics.in_flight + statistics.held + statistics.queued
            assert waiting == statement.pending
            copies = statistics.faults.get("duplicate", 0)
            lost = sum(statement.dropped.values())
            assert sent - lost <= arrived.total() + waiting <= sent - lost + copies

        async def receiver() -> None:
            async for event in channel:
                controller(event)

        async with trio.open_nursery() as nursery:
            if to_task:
                nursery.start_soon(receiver)
            else:
                channel.connect(controller)
            for action in script:
                match action:
                    case "send", count:
                        for _ in range(count):
                            sent += 1
                            with suppress(KvmError):
                                channel.send_nowait(msi(sent))
                    case "advance", ns:
                        await fabric.advance(ns)
                    case "fail", count, probability:
                        channel.fail(errno.EIO, count, probability=probability)
                    case "delay", ns:
                        channel.delay(ns, 2)
                    case "latency", ns:
                        channel.latency_ns = ns
                    case ("hold",):
                        channel.hold()
                    case ("release",):
                        with suppress(ValueError):  # it is not held
                            channel.release()
                    case ("clear",):
                        channel.clear_faults()
                    case kind, count, probability:
                        getattr(channel, kind)(count, probability=probability)
                await fabric.advance(0)
                check()
            channel.clear_faults()
            await fabric.advance(100)
            check()
            lost = ledger.statement().dropped
            assert sent == len(arrived) + sum(lost.values())
            assert 0 == ledger.statement().pending
            nursery.cancel_scope.cancel()

    fabric.run(main, seed=seed, pacing="manual")
