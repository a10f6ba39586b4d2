"""What a real kernel does not keep when a machine is saved and restored, so that it is not kept here either."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from engine_programs import here
from kvm_machine import DOORBELL, Arm, outcome
from migration_machines import (
    DIST,
    REDIST,
    SYSREGS,
    Program,
    blank,
    drive,
    gicv2,
    idle,
    known,
    machine,
    statement,
    stop_at,
    taker,
)

import fabric
from fabric.migration import ArmVm, restore, save
from fabric.uapi import ioctl as requests
from fabric.uapi import kvm as uapi


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
