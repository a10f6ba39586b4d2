"""Guests that are taken out of one vCPU and go on in another."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
from engine_programs import here
from kvm_machine import Arm, outcome

import fabric
from fabric.errors import KvmError
from fabric.uapi import kvm as uapi
from fabric.uapi.kvm import KvmRunMmio
from fabric.vcpu import Costs, Guest, Vcpu

DEVICE = 0x0900_0000
"""Guest physical address that nobody but the VMM claims."""
GICD = 0x0800_0000
SPI = 32

Body = Callable[["Two", Any], Awaitable[object]]


class Two:
    """Two VMs of one vCPU each whose SPIs are edges, and a log of what the guest does."""

    def __init__(self, costs: Costs | None = None) -> None:
        self.log: list[tuple[int, object]] = []
        self.first, self.second = Arm(), Arm()
        for arm in (self.first, self.second):
            arm.set_gicd(0xC08, 0xAAAA_AAAA)
            arm.forward()
            if costs is not None:
                arm.kvm.vcpu(arm.vcpus[0].fd).costs = costs

    def note(self, what: object) -> None:
        """Log ``what`` with the time."""
        self.log.append((fabric.now(), what))

    def vcpu(self, arm: Arm) -> Any:
        """The vCPU behind the fd."""
        return arm.kvm.vcpu(arm.vcpus[0].fd)

    def load(self, body: Body) -> None:
        """The guest: ``body``, then SYSTEM_OFF."""

        async def program(cpu: Any) -> None:
            await body(self, cpu)
            self.note("end")
            await cpu.system_off()

        self.first.vcpus[0].load(program)

    async def run(self, arm: Arm) -> object:
        """KVM_RUN: 0 or the name of the errno."""
        try:
            return await arm.vcpus[0].run()
        except KvmError as error:
            return errno.errorcode[error.errno or 0]

    async def stop(self, at_ns: int, how: str) -> None:
        """Run the first VM until then."""
        if how == "cancelled":
            with trio.move_on_at(at_ns / 1e9):
                await self.run(self.first)
        else:
            here().timer(self.vcpu(self.first).interrupt).arm(at_ns)
            assert "EINTR" == await self.run(self.first)
        assert at_ns == fabric.now()

    def move(self, source: Arm | None = None, target: Arm | None = None) -> None:
        """From the first VM to the second."""
        guest = (source or self.first).vcpus[0].unload()
        assert isinstance(guest, Guest)
        (target or self.second).vcpus[0].load(guest)

    async def handler(self, cpu: Any) -> None:
        """Acknowledge, work for 20 ns, end."""
        intid = cpu.iar1()
        self.note(("taken", intid))
        await cpu.compute(20)
        cpu.eoir1(intid)


def pulse(arm: Arm, spi: int = SPI) -> None:
    """An edge."""
    for level in (1, 0):
        arm.vm.irq_line(1 << 24 | spi, level)


async def masked(two: Two, cpu: Any) -> None:
    await cpu.compute(100)


async def unmasked(two: Two, cpu: Any) -> None:
    cpu.set_vector(two.handler)
    cpu.unmask()
    await cpu.compute(100)


async def halted(two: Two, cpu: Any) -> None:
    await cpu.wait_for_interrupt(100)


async def handling(two: Two, cpu: Any) -> None:
    async def handler(cpu: Any) -> None:
        await cpu.mrs("ICC_IAR1_EL1")
        await cpu.compute(60)
        cpu.mask()

    cpu.set_vector(handler)
    cpu.unmask()
    pulse(two.first)
    await cpu.compute(40)


async def exiting(two: Two, cpu: Any) -> None:
    two.note(await cpu.load(GICD + 8, 4))  # GICD_IIDR


async def hypercall(two: Two, cpu: Any) -> None:
    two.note(await cpu.hvc(0x8400_0000))  # PSCI_VERSION


PLACES = [
    pytest.param(masked, 150, id="masked-compute"),
    pytest.param(unmasked, 150, id="compute"),
    pytest.param(handling, 200, id="injection"),  # 50 for that, 60 for the handler, 40 for what it interrupted
    pytest.param(exiting, 150, id="kernel-exit"),
    pytest.param(hypercall, 150, id="hypercall"),
    pytest.param(halted, 100, id="wfi"),
]
"""What the guest is in, and when it is through if it was out of KVM_RUN for 50 ns: a halt ends at its time."""


@pytest.mark.parametrize("how", ["cancelled", "EINTR"])
@pytest.mark.parametrize(("body", "end"), PLACES)
def test_a_guest_goes_on_in_another_vcpu(body: Body, end: int, how: str) -> None:
    """From wherever it was stopped, for the time that was left, also when it goes back and forth."""

    async def main() -> list[tuple[int, object]]:
        two = Two(Costs(exit_ns=100, injection_ns=50 if body is handling else 0))
        two.load(body)
        await two.stop(30, how)
        await fabric.sleep(50)
        two.move()
        two.move(two.second, two.first)
        two.move()
        assert 0 == await two.run(two.second)
        return two.log

    assert end == next(at for at, what in fabric.run(main) if what == "end")


def test_it_sees_the_vcpu_it_is_on_and_no_other() -> None:
    """Registers, frames, interrupts, time that is owed: all are the new vCPU's, in frames that were suspended, too."""

    async def body(two: Two, cpu: Any) -> None:
        async def handler(cpu: Any) -> None:
            intid = cpu.iar1()
            two.note(intid)
            await cpu.compute(20)
            cpu.eoir1(intid)

        cpu.set_vector(handler)
        cpu.unmask()
        await cpu.compute(60)
        two.note(await cpu.mrs("CNTVCT_EL0"))
        two.note(await cpu.load(GICD + 0x6180, 4))  # GICD_IROUTER48

    async def main() -> list[tuple[int, object]]:
        two = Two()
        two.load(body)
        here().timer(lambda: pulse(two.first)).arm(10)
        await two.stop(15, "EINTR")
        two.second.set_gicd(0x6180, 7)
        active = two.first.gicd(0x304)
        two.second.set_gicd(0x304, active)
        two.second.set_sysreg(0xC648, two.first.gic.get_attr(6, 0xC648))  # ICC_AP1R0_EL1
        two.move()
        # What happens to the vCPU it left does not reach it any more.
        pulse(two.first, SPI + 1)
        here().timer(lambda: pulse(two.first, SPI + 2)).arm(20)
        here().timer(lambda: pulse(two.second, SPI + 3)).arm(40)
        assert 0 == await two.run(two.second)
        assert 0 == two.second.gicd(0x304)
        assert active == two.first.gicd(0x304)
        return two.log

    assert [(10, SPI), (40, SPI + 3), (100, 6), (100, 7), (100, "end")] == fabric.run(main)


@pytest.mark.parametrize("how", ["cancelled", "EINTR"])
def test_an_access_is_answered_where_the_guest_is(how: str) -> None:
    """A guest that was moved while the host handled its exit reads and writes the frames of the new VM."""

    async def body(two: Two, cpu: Any) -> None:
        two.note(await cpu.load(GICD + 0x6180, 4))  # GICD_IROUTER48
        await cpu.store(GICD + 0x6188, 4, 5)

    async def main() -> list[tuple[int, object]]:
        two = Two(Costs(exit_ns=100))
        two.load(body)
        await two.stop(30, how)
        two.second.set_gicd(0x6180, 7)
        two.move()
        here().timer(two.vcpu(two.second).interrupt).arm(150)
        assert "EINTR" == await two.run(two.second)
        two.move(two.second, two.first)
        assert 0 == await two.run(two.first)
        assert (5, 0) == (two.first.gicd(0x6188), two.second.gicd(0x6188))
        return two.log

    assert [(100, 7), (200, "end")] == fabric.run(main)


def test_an_interrupt_that_came_at_the_stop_is_taken_on_the_new_vcpu() -> None:
    """A masked halt whose line rose when its KVM_RUN was cancelled does not run on while it is moved."""

    async def body(two: Two, cpu: Any) -> None:
        await cpu.wait_for_interrupt()
        two.note(("acknowledged", cpu.iar1()))

    async def main() -> list[tuple[int, object]]:
        two = Two()
        two.load(body)
        with trio.CancelScope() as scope:
            here().timer(lambda: (scope.cancel(), pulse(two.first))).arm(30)
            await two.run(two.first)
        pulse(two.first)
        pulse(two.second)
        await fabric.sleep(10)
        two.move()
        assert [] == two.log
        assert 0 == await two.run(two.second)
        return two.log

    assert [(40, ("acknowledged", SPI)), (40, "end")] == fabric.run(main)


@pytest.mark.parametrize("how", ["cancelled", "EINTR"])
def test_a_guest_that_waits_for_a_physical_cpu(how: str) -> None:
    """It is runnable, and its wait so far counts as stolen; on a host with room it goes on at once."""

    async def main() -> list[tuple[int, object]]:
        two = Two()
        host = fabric.vcpu.Host(here(), 1)
        hog = Arm()
        for arm in (two.first, hog):
            arm.kvm.vcpu(arm.vcpus[0].fd).share(host)

        async def busy(cpu: Any) -> None:
            await cpu.compute(1_000)

        hog.vcpus[0].load(busy)
        two.load(masked)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hog.vcpus[0].run)
            await fabric.sleep(10)
            await two.stop(40, how)
            two.move()
            assert 30 == two.vcpu(two.first).stolen_ns
            assert 0 == await two.run(two.second)
            nursery.cancel_scope.cancel()
        return two.log

    assert [(140, "end")] == fabric.run(main)


def test_time_owed_is_paid_where_the_guest_goes_on() -> None:
    """What ending an interrupt costs passes with the next thing that takes time, wherever that is."""

    async def body(two: Two, cpu: Any) -> None:
        await cpu.compute(10)
        cpu.eoir1(1023)
        two.vcpu(two.first).interrupt()
        await cpu.compute(10)

    async def main() -> list[tuple[int, object]]:
        two = Two(Costs(eoi_ns=7))
        two.load(body)
        assert "EINTR" == await two.run(two.first)
        two.move()
        assert 0 == await two.run(two.second)
        return two.log

    assert [(27, "end")] == fabric.run(main)


def test_an_access_that_exited_has_to_be_completed_first() -> None:
    """What it reads is in the run area, which stays behind: immediate_exit makes a register of it, which moves."""

    async def body(two: Two, cpu: Any) -> None:
        two.note(await cpu.load(DEVICE, 4))

    async def main() -> list[tuple[int, object]]:
        two = Two()
        two.load(body)
        assert 0 == await two.run(two.first)
        vcpu = two.first.vcpus[0]
        data = uapi.KVM_RUN_EXIT + 8
        assert DEVICE == KvmRunMmio.unpack(bytes(vcpu.run_area[uapi.KVM_RUN_EXIT :][: KvmRunMmio.SIZE])).phys_addr
        vcpu.run_area[data : data + 4] = (77).to_bytes(4, "little")
        assert "EBUSY" == outcome(vcpu.unload)
        vcpu.run_area[uapi.KVM_RUN_IMMEDIATE_EXIT] = 1
        assert "EINTR" == await two.run(two.first)
        two.move()
        assert 0 == await two.run(two.second)
        return two.log

    assert [(0, 77), (0, "end")] == fabric.run(main)


def test_a_guest_that_has_not_begun_begins_on_the_new_vcpu() -> None:
    """So does one whose program returned, when the vCPU is powered on; the old vCPU has no guest any more."""

    async def main() -> list[tuple[int, object]]:
        two = Two()

        async def program(cpu: Any) -> None:
            two.note("begins")
            await cpu.compute(10)

        two.first.vcpus[0].load(program)
        two.move()
        with pytest.raises(RuntimeError, match="vCPU 0 has no program"):
            await two.run(two.first)
        assert None is two.first.vcpus[0].unload()
        with trio.move_on_at(50e-9):
            await two.run(two.second)
        two.move(two.second, two.first)
        two.vcpu(two.first).power_on()
        with trio.move_on_at(100e-9):
            await two.run(two.first)
        return two.log

    assert [(0, "begins"), (50, "begins")] == fabric.run(main)


def test_reset_closes_a_guest_that_was_loaded() -> None:
    """KVM_ARM_VCPU_INIT begins the program anew, also one that came from elsewhere in the middle of it."""

    async def main() -> list[tuple[int, object]]:
        two = Two()

        async def program(cpu: Any) -> None:
            try:
                two.note("begins")
                await cpu.compute(100)
            finally:
                two.log.append((0, "ended"))

        two.first.vcpus[0].load(program)
        await two.stop(10, "EINTR")
        two.move()
        two.second.vcpus[0].init(two.second.features)
        with trio.move_on_at(20e-9):
            await two.run(two.second)
        return two.log[:3]

    assert [(0, "begins"), (0, "ended"), (10, "begins")] == fabric.run(main)


def test_one_guest_a_vcpu() -> None:
    """A vCPU that has one takes no other; one inside KVM_RUN gives its away neither."""

    async def main() -> None:
        two = Two()
        two.load(masked)
        here().timer(lambda: results.append(outcome(two.first.vcpus[0].unload))).arm(5)
        await two.stop(10, "EINTR")
        two.move()
        assert "EBUSY" == outcome(two.second.vcpus[0].load, masked)
        await two.run(two.second)

    results: list[object] = []
    fabric.run(main)

    assert ["EBUSY"] == results


def test_a_guest_that_failed_cannot_go_on() -> None:
    """Its exception is named."""

    async def body(two: Two, cpu: Any) -> None:
        raise ArithmeticError("a bug of the guest")

    async def main() -> None:
        two = Two()
        two.load(body)
        with pytest.raises(ArithmeticError):
            await two.run(two.first)
        with pytest.raises(RuntimeError, match=r"the guest of vCPU 0 has failed: ArithmeticError\('a bug"):
            two.first.vcpus[0].unload()

    fabric.run(main)


def test_a_guest_that_waits_for_something_else_stays() -> None:
    """What is not in its CPU's registers cannot be moved. EINTR, which it takes in its next wait, helps."""

    async def body(two: Two, cpu: Any) -> None:
        await fabric.sleep(100)
        await cpu.compute(10)

    async def main() -> list[tuple[int, object]]:
        two = Two()
        two.load(body)
        with trio.move_on_at(50e-9):
            await two.run(two.first)
        assert "EBUSY" == outcome(two.first.vcpus[0].unload)
        await two.stop(55, "EINTR")
        two.move()
        await two.run(two.second)
        return two.log

    assert [(60, "end")] == fabric.run(main)  # a sleep that is not the CPU's ended when its KVM_RUN did


def test_a_guest_is_of_an_architecture() -> None:
    """It knows registers that another does not have."""

    async def main() -> None:
        two = Two()
        two.load(masked)
        guest = two.first.vcpus[0].unload()
        with pytest.raises(ValueError, match="a guest of Arm64Cpu cannot run on Cpu"):
            Vcpu(two.second.inside, 1, 1, here()).load(guest)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="not 5"):
            two.second.vcpus[0].load(5)  # type: ignore[arg-type]

    fabric.run(main)


def test_the_account_follows_the_guests() -> None:
    """What is pending when the last guest leaves is in the ledger no longer, and is again when one comes back."""

    async def main() -> None:
        two = Two()
        two.load(masked)
        pulse(two.first)
        pulse(two.first)
        assert (2, 1, 1) == (two.first.ledger.raised, two.first.ledger.coalesced, two.first.ledger.pending)
        two.move()
        assert (1, 1, 0) == (two.first.ledger.raised, two.first.ledger.coalesced, two.first.ledger.pending)
        pulse(two.first, SPI + 1)  # nobody's
        assert 1 == two.first.ledger.raised
        two.move(two.second, two.first)
        assert (3, 1, 2) == (two.first.ledger.raised, two.first.ledger.coalesced, two.first.ledger.pending)
        two.move()
        for fd in (two.first.vcpus[0].fd, two.first.gic.fd, two.first.vm.fd):
            two.first.kvm.close(fd)
        statement = two.first.kvm.statement()
        assert (1, 1, 0, {}) == (statement.raised, statement.coalesced, statement.pending, statement.dropped)

    fabric.run(main)
