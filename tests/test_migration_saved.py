"""Saving and restoring: what goes wrong and how it is said, and whose an interrupt is."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import trio
from engine_programs import here
from kvm_machine import DOORBELL, GITS_BASER, RAM, VALID, Arm
from migration_machines import DIST, blank, drive, gicv2, gicv3, idle, known, machine, statement, stop_at, taker

import fabric
from fabric.errors import ConfigError, KvmError, LedgerError
from fabric.migration import ArmState, ArmVm, MigrationError, Saved, play, restore, save
from fabric.migration.arm64 import RESTORE_GICV3, SAVE_GICV3
from fabric.migration.saved import NOT_KEPT
from fabric.trace.ledger import Ledger, LedgerStatement
from fabric.uapi import arm64 as arm
from fabric.uapi import kvm as uapi

MMIO = 0x0900_0000
"""Nobody's but the VMM's."""


# Errors.


@pytest.mark.spec("vgic-v3.seq.save.1-stop", "its.seq.save.1-stop")
def test_a_machine_that_runs_cannot_be_saved() -> None:
    """The step and the vCPU are named; the guest goes on."""

    async def main() -> None:
        vm = machine(idle)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vm.vcpus[0].run)
            await fabric.sleep(10)
            with pytest.raises(
                MigrationError, match=r"stop all vCPUs \(vgic-v3.seq.save.1-stop.*vCPU 0 is inside"
            ) as it:
                save(vm)
            assert errno.EINTR == it.value.errno
            assert vm.host.kvm.vcpu(vm.vcpus[0].fd).running
            nursery.cancel_scope.cancel()

    fabric.run(main)


def test_a_vm_that_died_cannot_be_saved() -> None:
    """A first run that finds the GIC without its frames kills the VM; that is said by the first step."""

    async def main() -> None:
        made = Arm(1, memory=True, gic=False)
        made.gic = made.vm.create_device(uapi.KVM_DEV_TYPE_ARM_VGIC_V3)
        made.vcpus[0].load(idle)
        with pytest.raises(KvmError):
            await made.vcpus[0].run()
        with pytest.raises(MigrationError, match=r"stop all vCPUs .*vm0 is dead") as it:
            save(known(made))
        assert errno.EIO == it.value.errno

    fabric.run(main)


def test_a_guest_that_failed_cannot_be_saved() -> None:
    """Nobody could go on with it. The guests of the other vCPUs stay where they are."""

    async def buggy(cpu: Any) -> None:
        raise ArithmeticError("a bug of the guest")

    async def main() -> None:
        vm = machine(idle, buggy)
        with pytest.raises(ArithmeticError):
            await vm.vcpus[1].run()
        with pytest.raises(RuntimeError, match="the guest of vCPU 1 has failed: ArithmeticError"):
            save(vm)
        assert vm.vcpus[0].unload() is not None

    fabric.run(main)


def test_a_guest_that_cannot_be_moved() -> None:
    """It waits for something outside of its CPU: the step is named, and all guests stay."""

    async def outside(cpu: Any) -> None:
        await fabric.sleep(100)

    async def main() -> None:
        vm = machine(idle, outside)
        await stop_at(50, *vm.vcpus)
        with pytest.raises(
            MigrationError, match=r"take the guests out .*the guest of vCPU 1 waits for something"
        ) as it:
            save(vm)
        assert errno.EBUSY == it.value.errno
        await stop_at(60, vm.vcpus[0])

    fabric.run(main)


def test_tables_that_are_nowhere_cannot_be_saved() -> None:
    """The step that writes them says so."""
    made = Arm(1, memory=True)
    made.add_its()
    made.its.set_attr(arm.KVM_DEV_ARM_VGIC_GRP_ITS_REGS, 0, 0)
    made.its.set_attr(arm.KVM_DEV_ARM_VGIC_GRP_ITS_REGS, GITS_BASER, VALID | RAM - 0x10_0000)

    with pytest.raises(MigrationError, match=r"maps of the ITSs .*vgic-v3.seq.save.3-its") as it:
        save(known(made))
    assert errno.EINVAL == it.value.errno


def test_a_restore_into_another_machine_names_every_difference() -> None:
    """Before anything is written."""
    saved = save(gicv3())
    other = known(Arm(3, memory=True))
    before = other.controller.get_attr(DIST, 0, 4)

    with pytest.raises(ConfigError) as it:
        restore(saved, other)
    assert [
        "the saved machine has 2 vCPUs, this one 3",
        "GIC 0, nr_irqs: saved with 96, here 256",
        "the saved machine has 1 ITSs, this one 0",
    ] == it.value.problems
    assert before == other.controller.get_attr(DIST, 0, 4)


def test_a_restore_into_a_machine_with_another_gic() -> None:
    """A GICv2's state means nothing to a GICv3, or to none."""
    saved = save(gicv2())

    with pytest.raises(ConfigError, match="the saved machine has a GICv2, this one a GICv3"):
        restore(saved, known(Arm(2, memory=True)))
    with pytest.raises(ConfigError, match="the saved machine has a GICv2, this one no in-kernel GIC"):
        restore(saved, known(Arm(2, memory=True, gic=False)))


def test_what_is_set_up_differently_is_named() -> None:
    """Features, memory, attributes: for each what was saved and what is there."""
    saved = save(known(Arm(1, memory=True)))
    made = Arm(1, memory=True)
    made.vcpus[0].set_attr(arm.KVM_ARM_VCPU_TIMER_CTRL, arm.KVM_ARM_VCPU_TIMER_IRQ_VTIMER, 25)
    other = known(made)
    other.machine_type = 40
    other.slots = [attrs.evolve(other.slots[0], guest_phys_addr=RAM + 0x1000)]
    other.inits = [arm.KvmVcpuInit(5, (4, *[0] * 6))]

    with pytest.raises(ConfigError) as it:
        restore(saved, other)
    assert [
        "machine type: saved with 0, here 40",
        "memory slot 0, gpa: saved with 0x80000000, here 0x80001000",
        "vCPU 0, features: saved with (0, 0, 0, 0, 0, 0, 0), here (4, 0, 0, 0, 0, 0, 0)",
        "vCPU 0, timer_irqs: saved with (27, 30), here (25, 30)",
    ] == it.value.problems


def test_a_state_of_another_version() -> None:
    """Is refused, whatever is in it."""
    saved = save(known(Arm(1, memory=True)))
    later = attrs.evolve(saved, state=attrs.evolve(saved.state, version=2))

    with pytest.raises(ConfigError, match="the state has version 2, and this is version 1"):
        restore(later, blank())


def test_a_host_that_cannot_have_the_machine() -> None:
    """The step that the kernel refuses is named: no GICv2, no such address width."""
    with pytest.raises(
        MigrationError, match=r"create the GICv2 \(vgic-v2.seq.restore.2-create-device\): .*no device"
    ) as it:
        restore(save(gicv2()), blank(host_gic=3))
    assert errno.ENODEV == it.value.errno

    wide = Arm(1, memory=True)
    vm = known(wide)
    vm.machine_type = 48
    with pytest.raises(MigrationError, match=r"create the VM and its memory slots .*40, not 48"):
        restore(save(vm), blank(ipa_bits=40))


# The guests, when something went wrong.


def test_guests_of_a_failed_restore_go_elsewhere() -> None:
    """They are still in what was saved; so are the interrupts, which the account has once."""

    async def main() -> None:
        log: list[object] = []
        first = machine(taker(log))
        await stop_at(100, first.vcpus[0])
        drive(first, 32)
        saved = save(first)
        failing, second = blank(), blank()
        broken = attrs.evolve(saved, state=attrs.evolve(saved.state, irqfds=((5000, False), (1, True), (2, False))))
        failing.host.kvm.eventfd = None
        with pytest.raises(TypeError):
            restore(broken, failing)
        restore(saved, second)
        await stop_at(5_000, second.vcpus[0])
        assert [(100, 32)] == log
        first.close()
        failing.close()
        total = sum((vm.host.kvm.statement() for vm in (first, failing, second)), LedgerStatement())
        assert LedgerStatement(raised=1, delivered=1) == total

    fabric.run(main)


def test_guests_can_go_back() -> None:
    """A migration that is given up leaves a machine that goes on as if nothing had been."""

    async def main() -> None:
        log: list[object] = []
        vm = machine(taker(log))
        await stop_at(100, vm.vcpus[0])
        drive(vm, 32)
        saved = save(vm)
        assert LedgerStatement() == statement(vm)
        vm.vcpus[0].load(saved.guests[0])
        assert LedgerStatement(raised=1, pending=1) == statement(vm)
        await vm.vcpus[0].run()
        assert [(100, 32)] == log
        assert 1_010 == fabric.now()

    fabric.run(main)


# Whose an interrupt is.


def test_an_interrupt_is_in_one_account() -> None:
    """What is pending goes along with the guests; what was delivered stays; the sum is that of one machine."""

    async def main() -> None:
        log: list[object] = []
        first, second = machine(taker(log)), blank()
        here().timer(lambda: drive(first, 33)).arm(50)
        await stop_at(55, first.vcpus[0])
        drive(first, 32)
        drive(first, 32)
        saved = save(first)
        assert 1 == saved.pending
        assert LedgerStatement(raised=2, delivered=1, coalesced=1) == statement(first)
        restore(saved, second)
        assert LedgerStatement(raised=1, pending=1) == statement(second)
        first.close()
        assert LedgerStatement(raised=2, delivered=1, coalesced=1) == first.host.kvm.statement()
        await second.vcpus[0].run()
        assert [(50, 33), (60, 32)] == log
        assert LedgerStatement(raised=1, delivered=1) == statement(second)

    fabric.run(main)


def test_a_copy_without_guests_has_an_account_of_its_own() -> None:
    """Both VMs have the interrupt pending then, and both count it."""
    first = known(Arm(1, memory=True))
    drive(first, 32)
    saved = save(first)
    copy = blank()
    restore(saved, copy)

    assert None is saved.pending
    assert statement(first) == statement(copy) == LedgerStatement(raised=1, pending=1)


def test_a_state_from_a_file_starts_guests_anew() -> None:
    """What they were in is not in the file; the interrupt controller is."""

    async def main() -> None:
        log: list[object] = []
        first, second = machine(taker(log)), blank()
        await stop_at(100, first.vcpus[0])
        drive(first, 32)
        state = ArmState.from_json(save(first).state.to_json())
        restore(Saved(state), second)
        second.vcpus[0].load(taker(log))
        await second.vcpus[0].run()
        assert [(100, 32)] == log
        assert 1_110 == fabric.now()
        assert LedgerStatement(raised=1, delivered=1) == statement(second)

    fabric.run(main)


def test_what_the_kernel_loses_is_dropped_by_name() -> None:
    """An LPI whose collection is mapped nowhere is pending, and in no vCPU's table."""

    async def main() -> None:
        first, second = machine(idle, its=True), blank()
        first.fd.signal_msi(DOORBELL, 0, 8)
        first.host.kvm.device(first.its[0].fd).collections[0].rdbase = None
        first.host.kvm.vm(first.fd.fd).irqchip.lpis[8192].target = None
        saved = save(first)
        restore(saved, second)
        assert LedgerStatement(raised=1, dropped={NOT_KEPT: 1}) == statement(second)
        assert statement(second).balanced

    fabric.run(main)


def test_an_interrupt_too_many_is_an_error() -> None:
    """A restore cannot invent one unnoticed."""
    ledger = Ledger()
    ledger.add_pending_probe(lambda: 2)

    with pytest.raises(LedgerError, match="1 interrupts were handed over, and 2 are pending where they came to"):
        ledger.take_over(1, NOT_KEPT)


def test_what_travels_stays_behind() -> None:
    """A message that a channel holds is not in the machine yet: it stays in the first account, and ends with it."""

    async def main() -> None:
        first, second = machine(idle, its=True), blank()
        first.host.kvm.vm(first.fd.fd).msis.hold()
        first.fd.signal_msi(DOORBELL, 0, 8)
        saved = save(first)
        restore(saved, second)
        assert LedgerStatement(raised=1, pending=1) == statement(first)
        first.close()
        assert LedgerStatement(raised=1, dropped={"vm closed": 1}) == first.host.kvm.statement()
        assert LedgerStatement() == statement(second)

    fabric.run(main)


# Steps with time between them.


def test_steps_may_take_time() -> None:
    """Who plays them decides; a guest loses that time, and its counter stands still meanwhile."""

    async def program(cpu: Any) -> None:
        await cpu.compute(1_000)
        counters.append(await cpu.mrs("CNTVCT_EL0") * 16)
        await cpu.system_off()

    counters: list[int] = []

    async def main() -> None:
        first, second = machine(program), blank()
        await stop_at(160, first.vcpus[0])
        found: dict[str, Any] = {}
        for _ in play(SAVE_GICV3, first, found):
            pass
        await fabric.sleep(10_000)
        second.guests = first.guests
        for step in play(RESTORE_GICV3, second, ArmState(1, **found)):
            await fabric.sleep(100 if step.ioctls else 0)
        since = fabric.now()
        await second.vcpus[0].run()
        assert since + 840 == fabric.now()

    fabric.run(main)
    (counter,) = counters

    # It was 160 ns when saved; from when it was set there were four steps more, and what the guest had to compute.
    assert (160 + 400 + 840) // 16 == counter // 16


def test_an_access_in_the_middle_of_a_save() -> None:
    """The load's value is in the run area when the machine is stopped; the save makes a register of it."""
    values: list[int] = []

    async def program(cpu: Any) -> None:
        values.append(await cpu.load(MMIO, 4))
        await cpu.system_off()

    async def main() -> None:
        first, second = machine(program), blank()
        await first.vcpus[0].run()
        data = uapi.KVM_RUN_EXIT + 8
        first.vcpus[0].run_area[data : data + 4] = (77).to_bytes(4, "little")
        restore(save(first), second)
        assert 0 == first.vcpus[0].run_area[uapi.KVM_RUN_IMMEDIATE_EXIT]
        await second.vcpus[0].run()

    fabric.run(main)

    assert [77] == values


def listen(vm: ArmVm, log: list[tuple[object, ...]]) -> None:
    """Note what the interrupt controller tells."""

    class Listener:
        def __getattr__(self, name: str) -> Callable[..., None]:
            if name not in ("pending", "coalesced", "acknowledged", "completed", "dropped"):
                raise AttributeError(name)
            return lambda *details: log.append((fabric.now(), name, *details))

    vm.host.kvm.vm(vm.fd.fd).listen(Listener())


def test_an_lpi_that_is_being_handled_ends() -> None:
    """It has no active state; still its end is one, as its priority was restored."""
    log: list[tuple[object, ...]] = []

    async def main() -> None:
        seen: list[object] = []
        first, second = machine(taker(seen, 50), its=True), blank()
        first.fd.signal_msi(DOORBELL, 0, 8)
        await stop_at(20, first.vcpus[0])
        restore(save(first), second)
        listen(second, log)
        await second.vcpus[0].run()
        assert [(0, 8192)] == seen

    fabric.run(main)

    assert [(50, "completed", 0, 8192)] == log


@pytest.mark.parametrize("version", [2, 3])
def test_a_timer_that_is_due_raises_its_interrupt_once(version: int) -> None:
    """Its line was restored, or latched; that the timer drives it again is nothing new."""
    log: list[tuple[object, ...]] = []

    async def program(cpu: Any) -> None:
        await cpu.msr("CNTV_CVAL_EL0", 0)
        await cpu.msr("CNTV_CTL_EL0", 1)
        await cpu.compute(200)

    async def main() -> None:
        made = Arm(1, memory=True, gic=False, host_gic=version)
        if version == 2:
            made.gic = made.vm.create_device(uapi.KVM_DEV_TYPE_ARM_VGIC_V2)
            made.gic.set_attr(0, arm.KVM_VGIC_V2_ADDR_TYPE_DIST, 0x0800_0000)
            made.gic.set_attr(0, arm.KVM_VGIC_V2_ADDR_TYPE_CPU, 0x0801_0000)
            made.gic.set_attr(4, 0)
        else:
            made = Arm(1, memory=True)
        made.vcpus[0].load(program)
        first, second = known(made), blank(host_gic=version)
        first.gic_version = version
        await stop_at(100, first.vcpus[0])
        restore(save(first), second)
        listen(second, log)
        assert LedgerStatement(raised=1, pending=1) == statement(second)
        with trio.move_on_at(150e-9):
            await second.vcpus[0].run()
        assert LedgerStatement(raised=1, pending=1) == statement(second)

    fabric.run(main)

    assert [] == log
