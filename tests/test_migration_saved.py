"""Saving and restoring: what goes wrong and how it is said, what a kernel does not keep, and whose an interrupt is."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from typing import Any

import attrs
import pytest
import trio
from engine_programs import here
from kvm_machine import DOORBELL, GITS_BASER, RAM, VALID, Arm, outcome
from migration_machines import DIST, REDIST, SYSREGS, blank, gicv2, gicv3, known

import fabric
from fabric.errors import ConfigError, KvmError, LedgerError
from fabric.migration import ArmState, ArmVm, MigrationError, Saved, play, restore, save
from fabric.migration.arm64 import RESTORE_GICV3, SAVE_GICV3
from fabric.migration.saved import NOT_KEPT
from fabric.trace.ledger import Ledger, LedgerStatement
from fabric.uapi import arm64 as arm
from fabric.uapi import ioctl as requests
from fabric.uapi import kvm as uapi

Program = Callable[[Any], Awaitable[object]]
MMIO = 0x0900_0000
"""Nobody's but the VMM's."""


def machine(*programs: Program, its: bool = False) -> ArmVm:
    """A machine with a GICv3 and a vCPU for each program; SPIs 32 to 47 are edges and reach vCPU 0."""
    made = Arm(len(programs), memory=True)
    made.set_gicd(0xC08, 0xAAAA_AAAA)
    made.set_gicd(0xC0C, 0)
    made.forward()
    if its:
        made.add_its()
    for vcpu, program in zip(made.vcpus, programs, strict=True):
        vcpu.load(program)
    return known(made)


def statement(vm: ArmVm) -> LedgerStatement:
    """The ledger of a VM."""
    found: LedgerStatement = vm.host.kvm.vm(vm.fd.fd).ledger.statement()
    return found


def drive(vm: ArmVm, spi: int, *levels: int) -> None:
    """KVM_IRQ_LINE; an edge by default."""
    for level in levels or (1, 0):
        vm.fd.irq_line(arm.KVM_ARM_IRQ_TYPE_SPI << arm.KVM_ARM_IRQ_TYPE_SHIFT | spi, level)


async def stop_at(at_ns: int, *vcpus: Any) -> None:
    """Run vCPUs until then."""
    with trio.move_on_at(at_ns / 1e9):
        async with trio.open_nursery() as nursery:
            for vcpu in vcpus:
                nursery.start_soon(vcpu.run)


async def idle(cpu: Any) -> None:
    """Nothing, for long."""
    await cpu.compute(1_000_000)


def taker(log: list[object], ns: int = 10) -> Program:
    """A guest that takes what comes, and notes it."""

    async def handler(cpu: Any) -> None:
        intid = cpu.iar1()
        log.append((fabric.now(), intid))
        await cpu.compute(ns)
        cpu.eoir1(intid)

    async def program(cpu: Any) -> None:
        cpu.set_vector(handler)
        cpu.unmask()
        await cpu.compute(1_000)
        await cpu.system_off()

    return program


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


# What a kernel does not keep, so that it is not kept here.


async def _moved(program: Program, before: Callable[[ArmVm], object], *, its: bool = False) -> ArmVm:
    """The machine that goes on, once it has run to its end: stopped at 100 ns, and ``before`` done to it then."""
    first, second = machine(program, its=its), blank()
    await stop_at(100, first.vcpus[0])
    before(first)
    restore(save(first), second)
    await second.vcpus[0].run()
    return second


def test_not_the_order_among_equals() -> None:
    """Registers have no room for who came first: interrupts of one priority are taken by number again."""

    async def main() -> None:
        log: list[object] = []

        def both(vm: ArmVm) -> None:
            drive(vm, 35)
            drive(vm, 33)

        await _moved(taker(log), both)
        stayed = machine(taker(log))
        here().timer(lambda: both(stayed)).arm(2_000)
        await stayed.vcpus[0].run()
        assert [33, 35, 35, 33] == [intid for _, intid in log]  # type: ignore[misc]

    fabric.run(main)


def test_not_the_physical_timer() -> None:
    """Linux 6.1 gives userspace no access to CNTP_*: it is off afterwards."""
    values: list[int] = []

    async def program(cpu: Any) -> None:
        await cpu.msr("CNTP_CTL_EL0", 3)
        await cpu.msr("CNTV_CTL_EL0", 3)
        await cpu.compute(200)
        values.extend([await cpu.mrs("CNTP_CTL_EL0") & 3, await cpu.mrs("CNTV_CTL_EL0") & 3])
        await cpu.system_off()

    async def main() -> None:
        await _moved(program, lambda vm: None)

    fabric.run(main)

    assert [0, 3] == values


def test_not_a_binary_point_that_is_hidden() -> None:
    """With ICC_CTLR_EL1.CBPR, ICC_BPR1_EL1 reads as the other one and cannot be written."""
    first, second = known(Arm(1, memory=True)), blank()
    first.controller.set_attr(SYSREGS, 0xC663, 6)  # ICC_BPR1_EL1
    first.controller.set_attr(SYSREGS, 0xC664, 0x8401)  # ICC_CTLR_EL1
    restore(save(first), second)
    for vm in (first, second):
        vm.controller.set_attr(SYSREGS, 0xC664, 0x8400)

    assert 6 == first.controller.get_attr(SYSREGS, 0xC663)
    assert 0 == second.controller.get_attr(SYSREGS, 0xC663)


def test_not_that_an_interrupt_was_stuck() -> None:
    """One that was raised before the distributor forwarded waits for the next event on it; restored, it is queued."""

    async def main() -> None:
        for moves in (False, True):
            log: list[object] = []
            made = Arm(1, memory=True)
            made.set_gicd(0xC08, 0xAAAA_AAAA)
            made.set_gicd(0x104, 0xFFFF_FFFF)
            made.set_sysreg(0xC230, 0xF0)
            made.set_sysreg(0xC667, 1)
            vm = known(made)
            made.vcpus[0].load(taker(log))
            drive(vm, 32)
            made.set_gicd(0, 2)
            if moves:
                target = blank()
                restore(save(vm), target)
                vm = target
            await vm.vcpus[0].run()
            assert moves == bool(log)

    fabric.run(main)


def test_not_where_an_interrupt_is_active() -> None:
    """An SPI that was sent elsewhere while vCPU 0 handles it is active there; afterwards it is where it goes to."""

    async def main() -> None:
        async def program(cpu: Any) -> None:
            cpu.iar1()
            await cpu.compute(1_000)

        first, second = machine(program, idle), blank()
        drive(first, 32)
        await stop_at(100, first.vcpus[0])
        first.controller.set_attr(DIST, 0x6100, 1)  # GICD_IROUTER32
        restore(save(first), second)
        holders = [vm.host.kvm.vm(vm.fd.fd).irqchip.spis[0].entry[3].index for vm in (first, second)]
        assert [0, 1] == holders
        assert 1 << 0 == second.controller.get_attr(DIST, 0x304, 4)

    fabric.run(main)


def test_not_the_translations_of_an_its() -> None:
    """A cached one takes an MSI that does not say that its device id is valid; the first one after is looked up."""
    first, second = known_its(), blank()
    assert 1 == first.fd.signal_msi(DOORBELL, 0, 8)
    restore(save(first), second)
    unsure = uapi.KvmMsi(DOORBELL & 0xFFFF_FFFF, DOORBELL >> 32, 0, 0, 8)

    assert 1 == outcome(first.fd.ioctl, requests.KVM_SIGNAL_MSI, unsure)
    assert "EINVAL" == outcome(second.fd.ioctl, requests.KVM_SIGNAL_MSI, unsure)
    assert 1 == second.fd.signal_msi(DOORBELL, 0, 8)
    assert 1 == outcome(second.fd.ioctl, requests.KVM_SIGNAL_MSI, unsure)


def known_its() -> ArmVm:
    """A machine with an ITS."""
    made = Arm(1, memory=True)
    made.add_its()
    return known(made)


def test_not_the_lines_of_a_gicv2() -> None:
    """They are saved as latches. A line that the VMM lowers afterwards leaves the interrupt pending."""
    first, second = gicv2(), blank(host_gic=2)
    restore(save(first), second)
    for vm in (first, second):
        drive(vm, 36, 0)
    pending = [vm.controller.get_attr(DIST, 0x204, 4) >> 4 & 1 for vm in (first, second)]

    assert [0, 1] == pending


def test_a_level_that_was_lowered_meanwhile_is_not_kept() -> None:
    """With a GICv3 the line is a line still: lowered in the new machine, the interrupt is gone."""
    made = Arm(1, memory=True)
    made.level_triggered()
    made.forward()
    first, second = known(made), blank()
    drive(first, 40, 1)
    restore(save(first), second)
    assert 1 == statement(second).pending
    drive(second, 40, 0)

    assert 0 == statement(second).pending
    assert {"line lowered": 1} == statement(second).dropped
    assert 0 == second.controller.get_attr(REDIST, 0x1_0200, 4)
