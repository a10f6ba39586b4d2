"""Dirty rings, on a host that has them: which pages a vCPU wrote, and what becomes of the bitmaps."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from kvm_machine import RAM, Arm, outcome

import fabric
from fabric.uapi import ioctl as requests
from fabric.uapi import kvm as uapi
from fabric.uapi.kvm import KvmDirtyGfn

RING = 4096
SLOT, SIZE = 3, 0x10_0000
CAP = uapi.KVM_CAP_DIRTY_LOG_RING_ACQ_REL
AT = uapi.KVM_DIRTY_LOG_PAGE_OFFSET * uapi.PAGE_SIZE


def enable(machine: Arm, size: int = RING) -> Any:
    return outcome(machine.vm.ioctl, requests.KVM_ENABLE_CAP, uapi.KvmEnableCap(CAP, 0, (size, 0, 0, 0)))


def reset(machine: Arm) -> Any:
    return outcome(machine.vm.ioctl, requests.KVM_RESET_DIRTY_RINGS)


class Ringed(Arm):
    """A VM with a dirty ring, a slot that is logged, and a vCPU that runs ``program``."""

    def __init__(self, program: Callable[[Any], Awaitable[object]], size: int = RING) -> None:
        super().__init__(0, gic=False, dirty_ring=True)
        assert 0 == enable(self, size)
        self.vcpus = [self.vm.create_vcpu(0)]
        self.vcpus[0].init()
        self.vcpus[0].load(program)
        self.vm.set_memory(SLOT, RAM, SIZE, self.user.map(SIZE), uapi.KVM_MEM_LOG_DIRTY_PAGES)
        self.ring = self.kvm.mmap(self.vcpus[0].fd, size, AT)

    def entries(self, count: int) -> list[KvmDirtyGfn]:
        """The first entries."""
        return [KvmDirtyGfn.unpack(self.ring, KvmDirtyGfn.SIZE * n) for n in range(count)]

    def collect(self, *numbers: int) -> None:
        """Tell the kernel that userspace has these entries."""
        for number in numbers:
            self.ring[KvmDirtyGfn.SIZE * number] |= uapi.KVM_DIRTY_GFN_F_RESET

    @property
    def reason(self) -> int:
        """kvm_run.exit_reason."""
        return int(self.vcpus[0].run_area[uapi.KVM_RUN_EXIT_REASON])


def dirty(page: int) -> KvmDirtyGfn:
    return KvmDirtyGfn(uapi.KVM_DIRTY_GFN_F_DIRTY, SLOT, page)


@pytest.mark.spec("api.get-dirty-log.ENXIO.ring")
def test_a_vm_with_rings_has_no_bitmaps() -> None:
    """KVM_GET_DIRTY_LOG and KVM_CLEAR_DIRTY_LOG are ENXIO, whatever the slot; without rings they are not."""
    with_rings, without = (Arm(0, gic=False, dirty_ring=True) for _ in range(2))
    enable(with_rings)
    answers = []
    for machine in (with_rings, without):
        machine.vm.set_memory(SLOT, RAM, SIZE, machine.user.map(SIZE), uapi.KVM_MEM_LOG_DIRTY_PAGES)
        clear = uapi.KvmClearDirtyLog(SLOT, 64, 0, machine.host.values.addr)
        answers.append(
            [
                outcome(machine.vm.dirty_log, 0xFFFF, 1),
                outcome(machine.vm.ioctl, requests.KVM_GET_DIRTY_LOG, uapi.KvmDirtyLog(SLOT, 0, 8)),
                outcome(machine.vm.ioctl, requests.KVM_CLEAR_DIRTY_LOG, clear),
            ]
        )

    assert [["ENXIO", "ENXIO", "ENXIO"], ["EINVAL", "EFAULT", 0]] == answers


@pytest.mark.parametrize(
    ("size", "answer"),
    [
        (0, "EINVAL"),
        (2048, "EINVAL"),
        (4096, 0),
        (6000, "EINVAL"),
        (1 << 20, 0),
        (1 << 21, "E2BIG"),
    ],
)
def test_sizes_of_rings(size: int, answer: Any) -> None:
    """A power of two, from a page up to what the capability says."""
    machine = Arm(0, gic=False, dirty_ring=True)

    assert 1 << 20 == machine.vm.check_extension(CAP)
    assert answer == enable(machine, size)


def test_rings_are_enabled_once_and_before_vcpus() -> None:
    """EINVAL else; on a host without them nothing of it is there."""
    machine, populated, without = (Arm(n, gic=False, dirty_ring=ring) for n, ring in ((0, True), (1, True), (0, False)))

    assert [0, "EINVAL"] == [enable(machine), enable(machine)]
    assert "EINVAL" == enable(populated)
    assert (0, "EINVAL", "EINVAL") == (without.vm.check_extension(CAP), enable(without), reset(without))


def test_pages_go_into_the_ring_of_who_writes_them() -> None:
    """Once each, until userspace has collected them and the rings were reset."""

    async def program(cpu: Any) -> None:
        while True:
            for address in (RAM + 0x5000, RAM + 0x5008, RAM + 0x2FFC, RAM):
                await cpu.store(address, 8, 1)
            await cpu.load(0, 4)

    async def main() -> None:
        machine = Ringed(program)
        await machine.vcpus[0].run()
        assert [dirty(5), dirty(2), dirty(3), dirty(0), KvmDirtyGfn()] == machine.entries(5)
        assert 0 == reset(machine)

        machine.collect(0, 1, 3)
        assert 2 == reset(machine)  # in order: the third was not collected
        assert [0, 0, 1, 3] == [entry.flags for entry in machine.entries(4)]
        await machine.vcpus[0].run()
        assert [dirty(5), dirty(2), KvmDirtyGfn()] == machine.entries(7)[4:]

    fabric.run(main)


def test_what_no_vcpu_writes_is_lost() -> None:
    """A device's write outside of KVM_RUN is in no ring, and its page is not told later either."""

    async def program(cpu: Any) -> None:
        await cpu.store(RAM, 8, 1)
        await cpu.load(0, 4)

    async def main() -> None:
        machine = Ringed(program)
        machine.inside.memory.write(RAM, b"x")
        await machine.vcpus[0].run()
        assert [KvmDirtyGfn()] == machine.entries(1)

    fabric.run(main)


def test_a_full_ring_ends_the_run() -> None:
    """64 entries before its end; nothing runs until some were reset, and the guest goes on where it was."""

    async def program(cpu: Any) -> None:
        for page in range(200):
            await cpu.store(RAM + 4096 * page, 8, page)
            await cpu.compute(1)
        await cpu.system_off()

    async def main() -> None:
        machine = Ringed(program)
        for _ in range(2):
            assert 0 == await machine.vcpus[0].run()
            assert uapi.KVM_EXIT_DIRTY_RING_FULL == machine.reason
            assert 192 == sum(entry.flags for entry in machine.entries(256))
        machine.collect(*range(192))
        assert 192 == reset(machine)
        assert 0 == await machine.vcpus[0].run()
        assert uapi.KVM_EXIT_SYSTEM_EVENT == machine.reason
        assert [dirty(page) for page in range(192, 200)] == machine.entries(200)[192:]

    fabric.run(main)


def test_a_signal_is_still_a_signal() -> None:
    """EINTR of a vCPU whose ring has room; immediate_exit also with a full one."""

    async def program(cpu: Any) -> None:
        await cpu.compute(1000)
        for page in range(200):
            await cpu.store(RAM + 4096 * page, 8, page)
        await cpu.compute(1000)

    async def main() -> list[Any]:
        machine = Ringed(program)
        vcpu = machine.vcpus[0]
        inside = machine.kvm.vcpu(vcpu.fd)

        async def run() -> Any:
            try:
                return await vcpu.run(), machine.reason
            except OSError as error:
                return error.errno

        machine.kvm.engine.timer(inside.interrupt, name="signal").arm(100)
        answers = [await run(), await run()]
        vcpu.run_area[uapi.KVM_RUN_IMMEDIATE_EXIT] = 1
        return [*answers, await run()]

    assert [4, (0, uapi.KVM_EXIT_DIRTY_RING_FULL), 4] == fabric.run(main)


def test_what_can_be_mapped() -> None:
    """The run area at page 0, the ring at page 64, as far as it goes; no ring without."""
    machine = Ringed(lambda cpu: cpu.system_off())
    fd = machine.vcpus[0].fd

    assert (8192, 4096) == (len(machine.kvm.mmap(fd, 8192)), len(machine.ring))
    assert ["EINVAL", "EINVAL"] == [
        outcome(machine.kvm.mmap, fd, length, at) for length, at in ((8192, AT), (4096, AT + 4096))
    ]
    plain = Arm(1, gic=False)
    assert "EINVAL" == outcome(plain.kvm.mmap, plain.vcpus[0].fd, 4096, AT)
