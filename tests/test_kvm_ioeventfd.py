"""ioeventfds: guest writes that ring a doorbell."""

from __future__ import annotations

import os
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from kvm_machine import Arm, outcome

import fabric
from fabric.channel import Channel, Doorbell
from fabric.kvm import Kvm
from fabric.kvm.ioeventfd import Doorbells
from fabric.uapi import ioctl as requests
from fabric.uapi import kvm as uapi

PIO = uapi.KVM_IOEVENTFD_FLAG_PIO
DEASSIGN = uapi.KVM_IOEVENTFD_FLAG_DEASSIGN


@pytest.mark.spec("api.ioeventfd.rule.datamatch", "api.ioeventfd.rule.any-length")
def test_which_writes_count() -> None:
    """The address must be the same, and width and value where the registration names them."""
    machine = Arm(gic=False)
    write = machine.inside.doorbells.write
    exact, any_value, any_width = (machine.kvm.eventfd() for _ in range(3))
    machine.vm.ioeventfd(exact, 0x1000, 4, datamatch=5)
    machine.vm.ioeventfd(any_value, 0x2000, 2)
    machine.vm.ioeventfd(any_width, 0x3000, 0)

    assert [True, False, False, False] == [
        write(0x1000, 4, 5), write(0x1000, 4, 6), write(0x1000, 2, 5), write(0x1004, 4, 5)
    ]  # fmt: skip
    assert [True, False, True, True] == [
        write(0x2000, 2, 9), write(0x2000, 4, 9), write(0x3000, 1, 0), write(0x3000, 8, 7)
    ]  # fmt: skip
    assert [1, 1, 2] == [event.read() for event in (exact, any_value, any_width)]


@pytest.mark.spec(
    "api.ioeventfd.EINVAL.len",
    "api.ioeventfd.EINVAL.wrap",
    "api.ioeventfd.EINVAL.flags",
    "api.ioeventfd.EINVAL.len0-match",
    "api.ioeventfd.EBADF.fd",
    "api.ioeventfd.EINVAL.not-eventfd",
)
def test_errors_of_assigning() -> None:
    """Widths are 0, 1, 2, 4, 8; no wrapping; known flags; no value to match without a width; an eventfd."""
    machine = Arm(gic=False)
    event = machine.kvm.eventfd()
    assign = machine.vm.ioeventfd

    assert "EINVAL" == outcome(assign, event, 0x1000, 3)
    assert "EINVAL" == outcome(assign, event, (1 << 64) - 2, 4)
    assert "EINVAL" == outcome(assign, event, 0x1000, 4, flags=16)
    assert "EINVAL" == outcome(assign, event, 0x1000, 0, datamatch=1)
    assert "EBADF" == outcome(assign, -1, 0x1000, 4)
    assert "EINVAL" == outcome(assign, machine.vm.fd, 0x1000, 4)
    assert 0 == len(machine.inside.doorbells)


@pytest.mark.spec("api.ioeventfd.EEXIST.collision")
def test_two_that_would_take_the_same_write() -> None:
    """They collide; those that differ in width, value, address or address space do not."""
    machine = Arm(gic=False)
    event, other = machine.kvm.eventfd(), machine.kvm.eventfd()
    assign = machine.vm.ioeventfd
    assign(event, 0x1000, 4, datamatch=5)

    assert "EEXIST" == outcome(assign, other, 0x1000, 4, datamatch=5)
    assert "EEXIST" == outcome(assign, other, 0x1000, 4)
    assert "EEXIST" == outcome(assign, other, 0x1000, 0)
    assign(other, 0x1000, 4, datamatch=6)
    assign(other, 0x1000, 2)
    assign(other, 0x1004, 4)
    assign(other, 0x1000, 4, flags=PIO)


@pytest.mark.spec("api.ioeventfd.EEXIST.collision")
def test_one_eventfd_may_have_several_doorbells() -> None:
    """Each rings it."""
    machine = Arm(gic=False)
    event = machine.kvm.eventfd()
    for queue in range(3):
        machine.vm.ioeventfd(event, 0x1000, 4, datamatch=queue)
        machine.inside.doorbells.write(0x1000, 4, queue)

    assert 3 == event.read()


@pytest.mark.spec("api.ioeventfd.ENOENT.deassign")
def test_deassigning_needs_all_that_was_assigned() -> None:
    """Eventfd, address, width and value; what is gone no longer takes writes."""
    machine = Arm(gic=False)
    event, other = machine.kvm.eventfd(), machine.kvm.eventfd()
    assign = machine.vm.ioeventfd
    assign(event, 0x1000, 4, datamatch=5)

    for arguments in (
        {"fd": other, "datamatch": 5},
        {"fd": event, "datamatch": 6},
        {"fd": event},
        {"fd": event, "datamatch": 5, "length": 8},
        {"fd": event, "datamatch": 5, "addr": 0x1004},
    ):
        call: dict[str, Any] = {"addr": 0x1000, "length": 4, "flags": DEASSIGN, **arguments}
        assert "ENOENT" == outcome(assign, **call)
    assign(event, 0x1000, 4, datamatch=5, flags=DEASSIGN)
    assert not machine.inside.doorbells.write(0x1000, 4, 5)
    assert "ENOENT" == outcome(assign, event, 0x1000, 4, datamatch=5, flags=DEASSIGN)


@pytest.mark.parametrize("kind", ["simulated", "real"])
def test_a_doorbell_of_a_closed_eventfd_rings_nobody(kind: str) -> None:
    """It still takes the write: the guest is not to notice."""
    machine = Arm(gic=False)
    event = machine.kvm.eventfd() if kind == "simulated" else os.eventfd(0)
    machine.vm.ioeventfd(event, 0x1000, 4)
    event.close() if isinstance(event, fabric.kvm.EventFd) else os.close(event)
    machine.host.api_version()

    assert machine.inside.doorbells.write(0x1000, 4, 1)


def test_a_real_eventfd_is_signalled() -> None:
    """Its owner reads the count."""
    machine = Arm(gic=False)
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    machine.vm.ioeventfd(fd, 0x1000, 4)
    machine.inside.doorbells.write(0x1000, 4, 1)

    assert 1 == os.eventfd_read(fd)
    os.close(fd)


def test_a_guest_write_wakes_the_backend() -> None:
    """A store to the doorbell does not leave the guest; the waiting task runs at that time."""

    async def main() -> list[Any]:
        machine = Arm()
        event = machine.kvm.eventfd()
        machine.vm.ioeventfd(event, 0x1000, 4)
        log: list[Any] = []

        async def guest(cpu: Any) -> None:
            await cpu.compute(300)
            await cpu.store(0x1000, 4, 1)
            await cpu.compute(100)
            await cpu.store(0x2000, 4, 1)

        async def backend() -> None:
            log.append((await event.wait(), fabric.now()))

        machine.vcpus[0].load(guest)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(backend)
            await machine.vcpus[0].run()
        run = uapi.KvmRunMmio.unpack(machine.vcpus[0].run_area[uapi.KVM_RUN_EXIT :])
        return [*log, run.phys_addr, fabric.now()]

    assert [(1, 300), 0x2000, 400] == fabric.run(main)


def test_doorbells_go_through_a_channel() -> None:
    """Taps see which doorbell was rung and with what; a dropped one rings nobody, and the write is taken."""
    machine = Arm(gic=False)
    first, event = machine.kvm.eventfd(), machine.kvm.eventfd()
    machine.vm.ioeventfd(first, 0x1000, 4)
    machine.vm.ioeventfd(event, 0x2000, 4)
    seen: list[Doorbell] = []
    bells = machine.inside.doorbells
    bells.channel.tap(seen.append)
    bells.channel.drop(1)

    assert [True, True] == [bells.write(0x2000, 4, 5), bells.write(0x2000, 4, 6)]
    assert [Doorbell(1, 5), Doorbell(1, 6)] == seen
    assert 1 == event.read()


@pytest.mark.spec("api.ioeventfd.rule.pio", "api.ioeventfd.rule.ccw")
def test_each_address_space_has_its_own() -> None:
    """Port and channel-I/O doorbells do not answer in memory."""
    machine = Arm(gic=False)
    event = machine.kvm.eventfd()
    for flags in (PIO, uapi.KVM_IOEVENTFD_FLAG_VIRTIO_CCW_NOTIFY):
        machine.vm.ioeventfd(event, 0x1000, 4, flags=flags)

    assert not machine.inside.doorbells.write(0x1000, 4, 1)
    assert [0, 1, 1] == [len(machine.inside.bus(name)) for name in ("mmio", "pio", "ccw")]


_REGISTRATION = st.tuples(
    st.sampled_from([0x10, 0x14]), st.sampled_from([0, 1, 2, 4, 8]), st.sampled_from([None, 0, 1])
)


@given(registrations=st.lists(_REGISTRATION, max_size=10), data=st.data())
def test_a_write_rings_at_most_one(registrations: list[tuple[int, int, int | None]], data: st.DataObject) -> None:
    """Whatever was registered: since what would match the same write is refused."""
    bells = Doorbells(Channel("test", Doorbell))
    kvm = Kvm("aarch64")
    events = []
    for addr, length, match in registrations:
        event = kvm.eventfd()
        if length or match is None:
            outcome(bells.assign, event.event, addr, length, match)
        events.append(event)
    addr = data.draw(st.sampled_from([0x10, 0x14]))
    size = data.draw(st.sampled_from([1, 2, 4, 8]))
    taken = bells.write(addr, size, data.draw(st.integers(0, 2)))

    assert int(taken) == sum(event.event.count for event in events)


def test_the_request_is_on_the_vm_fd_only() -> None:
    """vCPU and device fds do not know it."""
    machine = Arm()
    struct_ = uapi.KvmIoeventfd()

    assert "EINVAL" == outcome(machine.vcpus[0].ioctl, requests.KVM_IOEVENTFD, struct_)
    assert "ENOTTY" == outcome(machine.gic.ioctl, requests.KVM_IOEVENTFD, struct_)


@pytest.mark.spec("api.ioeventfd", "api.ioeventfd.EFAULT.struct")
def test_a_struct_that_cannot_be_read() -> None:
    """EFAULT, and nothing is registered."""
    machine = Arm(gic=False)
    request = bytearray(uapi.KvmIoeventfd(0, 0x1000, 4, int(machine.kvm.eventfd())).pack())

    assert "EFAULT" == outcome(machine.vm.ioctl, requests.KVM_IOEVENTFD, request[:-1])
    assert 0 == len(machine.inside.doorbells)
    assert 0 == machine.vm.ioctl(requests.KVM_IOEVENTFD, request)
    assert 1 == len(machine.inside.doorbells)


@pytest.mark.spec("api.ioeventfd.ENOSPC.bus-full")
def test_a_bus_that_is_full() -> None:
    """Doorbells take no room on it; but once in-kernel devices have filled it, nothing can be added."""
    machine = Arm(gic=False, io_bus_devices=2)
    for n in range(10):
        machine.vm.ioeventfd(machine.kvm.eventfd(), 0x1000 + 8 * n, 4)
    for base in (0x0808_0000, 0x080C_0000):
        its = machine.vm.create_device(uapi.KVM_DEV_TYPE_ARM_VGIC_ITS)
        its.set_attr(0, 4, base)

    assert "ENOSPC" == outcome(machine.vm.ioeventfd, machine.kvm.eventfd(), 0x2000, 4)
    assert "EEXIST" == outcome(machine.vm.ioeventfd, machine.kvm.eventfd(), 0x1000, 4)
    assert None is outcome(machine.vm.ioeventfd, machine.kvm.eventfd(), 0x2000, 4, flags=PIO)
