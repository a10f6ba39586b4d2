"""Simulated eventfds, and how real ones are known, looked at and let go."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import pytest
import trio
from kvm_machine import Arm, outcome

import fabric
from fabric.kvm import Kvm
from fabric.uapi import ioctl as requests


@pytest.fixture
def real() -> Iterator[list[int]]:
    """Real eventfds, closed at the end unless the test closed them."""
    fds: list[int] = []
    yield fds
    for fd in fds:
        try:
            os.close(fd)
        except OSError:
            continue


# -- simulated


def test_an_eventfd_counts() -> None:
    """Signals add up, a read takes all and leaves nothing to read."""
    event = Kvm("aarch64").eventfd(2)
    event.signal()
    event.write(3)

    assert 6 == event.read()
    with pytest.raises(BlockingIOError):
        event.read()


def test_an_eventfd_is_an_int() -> None:
    """It packs into structs and compares as its number."""
    event = Kvm("aarch64").eventfd()

    assert int(event) == struct.unpack("I", struct.pack("I", event))[0]


def test_write_has_the_limits_of_an_eventfd() -> None:
    """All ones are EINVAL, a count beyond 2**64 - 2 would block: EAGAIN. A signal stops at the limit."""
    event = Kvm("aarch64").eventfd()
    event.write((1 << 64) - 2)

    assert "EINVAL" == outcome(event.write, (1 << 64) - 1)
    assert "EAGAIN" == outcome(event.write, 1)
    event.signal()
    assert (1 << 64) - 2 == event.read()


def test_a_closed_eventfd_is_ebadf() -> None:
    """For its methods and wherever it is named; kvm.close closes it as well."""
    machine = Arm()
    one, other = machine.kvm.eventfd(1), machine.kvm.eventfd()
    one.close()
    machine.kvm.close(other)

    for event in (one, other):
        assert "EBADF" == outcome(event.read)
        assert "EBADF" == outcome(event.signal)
        assert "EBADF" == outcome(event.close)
        assert "EBADF" == outcome(machine.kvm.close, event)
        assert "EBADF" == outcome(machine.vm.irqfd, event, 3)


def test_an_eventfd_of_one_host_is_taken_by_another() -> None:
    """Eventfds belong to the process, as real ones do."""
    event = Kvm("aarch64").eventfd()
    machine = Arm()
    machine.vm.irqfd(event, 3)
    event.signal()

    assert 1 << 3 == machine.pending()


def test_wait_parks_until_the_count_is_not_zero() -> None:
    """A task wakes at the signal's time with the whole count, which is consumed."""

    async def main() -> list[object]:
        kvm = Kvm("aarch64")
        event = kvm.eventfd(1)
        log: list[object] = [await event.wait(), fabric.now()]

        async def backend() -> None:
            log.extend((await event.wait(), fabric.now()))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(backend)
            await fabric.sleep(500)
            event.signal()
            event.signal(2)
        return [*log, outcome(event.read)]

    assert [1, 0, 3, 500, "EAGAIN"] == fabric.run(main)


def test_a_cancelled_wait_loses_no_count() -> None:
    """What was signalled while nobody took it is there for the next."""

    async def main() -> int:
        event = Kvm("aarch64").eventfd()
        with trio.move_on_after(1e-6):
            await event.wait()
        event.signal()
        return await event.wait()

    assert 1 == fabric.run(main)


def test_waiting_needs_a_simulation() -> None:
    """Outside one there is nothing to wait with."""
    with pytest.raises(RuntimeError, match="inside a simulation"):
        Kvm("aarch64").eventfd().wait().send(None)


# -- real


def test_a_signal_is_seen_at_the_next_ioctl(real: list[int]) -> None:
    """Before each ioctl, whichever it is, counts are consumed and injected."""
    machine = Arm()
    real.append(os.eventfd(0, os.EFD_NONBLOCK))
    machine.vm.irqfd(real[0], 3)
    os.eventfd_write(real[0], 5)
    machine.host.api_version()

    assert 1 << 3 == machine.pending()
    assert "EAGAIN" == outcome(os.eventfd_read, real[0])


def test_a_blocking_eventfd_never_blocks(real: list[int]) -> None:
    """Nothing is read from an eventfd that was not signalled."""
    machine = Arm()
    real.append(os.eventfd(0))
    machine.vm.irqfd(real[0], 3)
    for _ in range(3):
        machine.host.api_version()

    assert 0 == machine.pending()


def test_only_irqfds_are_consumed(real: list[int]) -> None:
    """The counts of other eventfds, resample and doorbell ones included, stay their owner's."""
    machine = Arm()
    real += [os.eventfd(7, os.EFD_NONBLOCK) for _ in range(4)]
    machine.vm.irqfd(real[0], 3, resamplefd=real[1])
    machine.vm.ioeventfd(real[2], 0x1000, 4)
    for _ in range(3):
        machine.host.api_version()

    assert [7, 7, 7] == [os.eventfd_read(fd) for fd in real[1:]]


def test_a_semaphore_counts_down_by_one_a_signal(real: list[int]) -> None:
    """Each signal injects once and takes one, as in the kernel."""
    machine = Arm()
    real.append(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_SEMAPHORE))
    machine.vm.irqfd(real[0], 3)
    os.eventfd_write(real[0], 3)
    for _ in range(3):
        machine.host.api_version()

    assert 1 == machine.ledger.raised
    assert [1, 1, "EAGAIN"] == [outcome(os.eventfd_read, real[0]) for _ in range(3)]


def test_signals_are_seen_around_sleep_and_advance(real: list[int]) -> None:
    """At the start and at the end of each, and nowhere in between."""
    real.append(os.eventfd(0, os.EFD_NONBLOCK))
    fd = real[0]

    async def main(wait: object) -> list[int]:
        machine = Arm()
        machine.vm.irqfd(fd, 3)
        vgic = machine.inside.irqchip
        seen = []

        def look() -> None:
            seen.append(int(vgic.spis[3].pending))

        os.eventfd_write(fd, 1)
        look()
        fabric.clock.current_engine().timer(look).arm(50)  # type: ignore[union-attr]
        await wait(100)  # type: ignore[operator]
        vgic.clear_pending(vgic.spis[3], "test")
        fabric.clock.current_engine().timer(lambda: os.eventfd_write(fd, 1)).arm(150)  # type: ignore[union-attr]
        await wait(100)  # type: ignore[operator]
        look()
        return seen

    assert [0, 1, 1] == fabric.run(main, fabric.sleep)
    assert [0, 1, 1] == fabric.run(main, fabric.advance, pacing="manual")


def test_closing_ends_the_irqfd(real: list[int]) -> None:
    """After os.close the irqfd is gone at the next ioctl: its resample line is lowered."""
    machine = Arm()
    machine.level_triggered()
    fd, resample = os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK)
    real.append(resample)
    machine.vm.irqfd(fd, 3, resamplefd=resample)
    os.eventfd_write(fd, 1)

    assert 1 << 3 == machine.lines()

    os.close(fd)
    assert 0 == machine.lines()
    assert 0 == len(machine.inside.irqfds)


def test_a_reused_number_is_another_eventfd(real: list[int]) -> None:
    """The number of a closed eventfd that names a new one is not the irqfd, and may become one itself."""
    machine = Arm()
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    machine.vm.irqfd(fd, 3)
    os.close(fd)
    real.append(os.eventfd(4, os.EFD_NONBLOCK))

    assert fd == real[0]
    assert 0 == machine.pending()
    assert 4 == os.eventfd_read(fd)

    machine.vm.irqfd(fd, 5)
    os.eventfd_write(fd, 1)
    assert 1 << 5 == machine.pending()


def test_a_reused_number_within_one_ioctl_gap(real: list[int]) -> None:
    """KVM_IRQFD itself notices that the number is another eventfd now: no EBUSY."""
    machine = Arm()
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    machine.vm.irqfd(fd, 3)
    os.close(fd)
    real.append(os.eventfd(0, os.EFD_NONBLOCK))

    assert None is outcome(machine.vm.irqfd, real[0], 3)
    assert 1 == len(machine.inside.irqfds)


def test_a_number_reused_by_a_file_that_is_no_eventfd(real: list[int]) -> None:
    """It is left alone, and is EINVAL where an eventfd is wanted."""
    machine = Arm()
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    machine.vm.irqfd(fd, 3)
    os.close(fd)
    reader, writer = os.pipe()
    real += [reader, writer]
    os.write(writer, b"12345678")

    assert fd == reader
    machine.host.api_version()
    assert b"12345678" == os.read(reader, 8)
    assert "EINVAL" == outcome(machine.vm.irqfd, reader, 3)


def test_no_duplicate_is_kept() -> None:
    """The last close of the caller is the last close: its number is free again at once."""
    machine = Arm()
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    before = set(os.listdir("/proc/self/fd"))
    machine.vm.irqfd(fd, 3)
    after = set(os.listdir("/proc/self/fd"))
    os.close(fd)

    links = [os.readlink(f"/proc/self/fd/{name}") for name in after - before if os.path.exists(f"/proc/self/fd/{name}")]
    assert "anon_inode:[eventfd]" not in links


def test_a_duplicate_of_the_caller_is_the_same_eventfd(real: list[int]) -> None:
    """It is EBUSY under any of its numbers, and can be untied by any."""
    machine = Arm()
    real.append(os.eventfd(0, os.EFD_NONBLOCK))
    real.append(os.dup(real[0]))
    machine.vm.irqfd(real[0], 3)

    assert "EBUSY" == outcome(machine.vm.irqfd, real[1], 4)

    os.eventfd_write(real[1], 1)
    assert 1 << 3 == machine.pending()
    machine.vm.irqfd(real[1], 3, deassign=True)
    assert 0 == len(machine.inside.irqfds)


def test_a_hangup_leaves_a_duplicate_alone(real: list[int]) -> None:
    """With the number closed the irqfd is gone, though a duplicate is open and is signalled."""
    machine = Arm()
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    real.append(os.dup(fd))
    machine.vm.irqfd(fd, 3)
    os.close(fd)
    os.eventfd_write(real[0], 6)
    real.append(os.eventfd(0))  # takes the number, and would block

    assert fd == real[1]
    assert 0 == machine.pending()
    machine.vm.irqfd(fd, 4)
    assert 0 == machine.pending()
    assert 6 == os.eventfd_read(real[0])


def test_request_names_are_in_messages() -> None:
    """An fd that does not know a request says which."""
    machine = Arm()

    with pytest.raises(OSError, match="KVM_GET_PIT2"):
        machine.host.ioctl(requests.KVM_GET_PIT2)
