"""The GIC's interrupts: how they become pending, are accounted for, move, and come back after their end."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from gic_machine import CTRL, DIST_REGS, GICR_BASE, INIT, SAVE_PENDING_TABLES, GicMachine, refusal
from its_machine import FakeVm

from fabric.devices.arm import vgic_lpi
from fabric.devices.arm.vgic_v3 import VgicV3
from fabric.devices.arm.vgic_v3_state import VgicV3State

SPURIOUS = 1023
RAM = 0x8000_0000
CONFIG, PENDING = RAM, RAM + 0x1_0000


def take(machine: GicMachine, cpu: int = 0) -> int:
    """Acknowledge and end; the INTID."""
    interface = machine.vgic.cpus[cpu]
    intid: int = interface.acknowledge(1)
    interface.end_of_interrupt(1, intid)
    return intid


def lpi_machine(vcpus: int = 2) -> GicMachine:
    """With LPI tables in RAM, all LPIs enabled there with priority 0xa0."""
    machine = GicMachine(vcpus)
    machine.vm.memory.add_ram(RAM, 0x10_0000)
    machine.vm.memory.write(CONFIG, b"\xa1" * 0x1000)
    machine.vgic.propbaser = CONFIG | 0xF
    for cpu in machine.vgic.cpus:
        cpu.pendbaser = PENDING + 0x1_0000 * cpu.index
        cpu.lpis_enabled = True
    return machine


# -- accounting


def test_raised_while_pending_is_coalesced() -> None:
    """One delivery, however often it was raised before."""
    machine = GicMachine()
    irq = machine.lpi(8192)
    for _ in range(3):
        machine.vgic.pend_edge(irq)

    assert 8192 == take(machine)
    assert SPURIOUS == take(machine)
    statement = machine.check()
    assert (3, 1, 2, 0) == (statement.raised, statement.delivered, statement.coalesced, statement.pending)


def test_a_disabled_interrupt_stays_pending() -> None:
    """It is delivered when it is enabled."""
    machine = GicMachine()
    irq = machine.spi(32)
    machine.vgic.set_enabled(irq, False)
    machine.vgic.pend_edge(irq)
    assert SPURIOUS == take(machine)
    assert 1 == machine.check().pending

    machine.vgic.set_enabled(irq, True)

    assert 32 == take(machine)
    machine.check()


def test_a_line_that_goes_low_takes_its_interrupt_back() -> None:
    """Dropped, as "line lowered"; after it was taken the line may go low without that."""
    machine = GicMachine()
    irq = machine.spi(32, edge=False)
    machine.vgic.line_level(irq, True)
    machine.vgic.line_level(irq, False)
    assert {"line lowered": 1} == machine.check().dropped

    machine.vgic.line_level(irq, True)
    machine.cpu.acknowledge(1)
    machine.vgic.line_level(irq, False)
    machine.cpu.end_of_interrupt(1, 32)

    statement = machine.check()
    assert (2, 1, {"line lowered": 1}) == (statement.raised, statement.delivered, statement.dropped)


def test_a_line_still_high_at_the_end_is_another_interrupt() -> None:
    """Raised and delivered again, each time."""
    machine = GicMachine()
    machine.vgic.line_level(machine.spi(32, edge=False), True)

    assert [32, 32, 32] == [take(machine) for _ in range(3)]
    assert machine.cpu.line
    statement = machine.check()
    assert (4, 3, 1) == (statement.raised, statement.delivered, statement.pending)


def test_a_high_line_raised_again_is_coalesced() -> None:
    """Whether its interrupt waits or is active."""
    machine = GicMachine()
    irq = machine.spi(32, edge=False)
    machine.vgic.line_level(irq, True)
    machine.vgic.line_level(irq, True)
    machine.cpu.acknowledge(1)
    machine.vgic.line_level(irq, True)

    statement = machine.check()
    assert (3, 1, 2) == (statement.raised, statement.delivered, statement.coalesced)


@pytest.mark.parametrize("reason", ["cleared by the guest", "made edge-triggered"])
def test_what_is_cleared_is_dropped_by_name(reason: str) -> None:
    """A write to ICPENDR, and a trigger that no longer looks at the line."""
    machine = GicMachine()
    irq = machine.spi(32, edge=False)
    if reason == "made edge-triggered":
        machine.vgic.line_level(irq, True)
        machine.vgic.set_edge(irq, True)
    else:
        machine.write(0x204, 1)
        machine.write(0x284, 1)

    assert {reason: 1} == machine.check().dropped
    assert SPURIOUS == take(machine)


def test_the_latch_of_a_level_interrupt_lasts_until_its_end() -> None:
    """Seen on the recorded host: acknowledging does not clear it, ending does."""
    machine = GicMachine()
    irq = machine.spi(32, edge=False)
    machine.vgic.set_pending(irq)
    machine.cpu.acknowledge(1)
    assert irq.pending
    machine.cpu.end_of_interrupt(1, 32)

    assert not irq.pending
    assert SPURIOUS == take(machine)
    machine.check()


class Listener:
    """Notes what the controller tells."""

    def __init__(self) -> None:
        self.heard: list[tuple[Any, ...]] = []

    def pending(self, cpu: int, intid: int) -> None:
        self.heard.append(("pending", cpu, intid))

    def coalesced(self, cpu: int, intid: int) -> None:
        self.heard.append(("coalesced", cpu, intid))

    def acknowledged(self, cpu: int, intid: int) -> None:
        self.heard.append(("acknowledged", cpu, intid))

    def completed(self, cpu: int, intid: int) -> None:
        self.heard.append(("completed", cpu, intid))

    def dropped(self, cpu: int, intid: int, reason: str) -> None:
        self.heard.append(("dropped", cpu, intid, reason))


@pytest.mark.parametrize("intid", [8192, 40])
def test_a_listener_hears_of_each_stage(intid: int) -> None:
    """In order, with the vCPU and the INTID; it may start listening at any time."""
    machine = GicMachine(2)
    irq = machine.lpi(intid, cpu=1) if intid >= 8192 else machine.spi(intid, cpu=1)
    machine.vgic.events = listener = Listener()
    machine.vgic.pend_edge(irq)
    machine.vgic.pend_edge(irq)
    take(machine, cpu=1)
    machine.vgic.pend_edge(irq)
    machine.vgic.clear_pending(irq, "for a test")

    assert [
        ("pending", 1, intid),
        ("coalesced", 1, intid),
        ("acknowledged", 1, intid),
        ("completed", 1, intid),
        ("pending", 1, intid),
        ("dropped", 1, intid, "for a test"),
    ] == listener.heard


# -- the vCPU is told


def test_a_vcpu_is_kicked_when_something_can_be_taken() -> None:
    """Once, not for what comes on top, and not for what it cannot take yet."""
    machine = GicMachine()
    kicks = []
    machine.cpu.kick = lambda: kicks.append(machine.cpu.line)
    machine.vgic.pend_edge(machine.lpi(8192, priority=0xF0))
    assert [] == kicks
    machine.vgic.pend_edge(machine.lpi(8193, priority=0xE8))
    machine.vgic.pend_edge(machine.lpi(8194, priority=0x10))
    assert [True] == kicks

    machine.cpu.acknowledge(1)
    machine.vgic.pend_edge(machine.lpi(8195, priority=0x08))

    assert [True, True] == kicks


def test_moving_an_interrupt_takes_its_pending_state_along() -> None:
    """The old target, as it runs, has nothing left, and the new one is kicked."""
    machine = GicMachine(2)
    machine.vm.vcpus[0].running = True
    irq = machine.lpi(8192)
    machine.vgic.pend_edge(irq)

    machine.vgic.retarget(irq, machine.vgic.cpus[1])

    assert [False, True] == [cpu.line for cpu in machine.vgic.cpus]
    assert SPURIOUS == take(machine)
    assert 8192 == take(machine, cpu=1)
    machine.check()


def test_an_active_interrupt_moves_when_it_has_ended() -> None:
    """And what was raised meanwhile goes to the new target."""
    machine = GicMachine(2)
    machine.vm.vcpus[0].running = True
    irq = machine.spi(32)
    machine.vgic.pend_edge(irq)
    machine.cpu.acknowledge(1)
    machine.vgic.retarget(irq, machine.vgic.cpus[1])
    machine.vgic.pend_edge(irq)
    assert SPURIOUS == machine.vgic.cpus[1].acknowledge(1)

    machine.cpu.end_of_interrupt(1, 32)

    assert not machine.cpu.line
    assert 32 == take(machine, cpu=1)
    machine.check()


def test_without_a_target_it_waits() -> None:
    """Pending in the ledger, at no vCPU; the next event after it has one delivers it."""
    machine = GicMachine()
    irq = machine.spi(32)
    machine.vgic.retarget(irq, None)
    machine.vgic.pend_edge(irq)
    assert 1 == machine.check().pending

    machine.vgic.retarget(irq, machine.cpu)
    assert SPURIOUS == take(machine)
    machine.vgic.pend_edge(irq)

    assert 32 == take(machine)
    machine.check()


def test_raised_again_while_active_keeps_its_place() -> None:
    """Among equals it goes before what was queued after it was first."""
    machine = GicMachine()
    first, second = machine.lpi(8192), machine.lpi(8193)
    machine.vgic.pend_edge(first)
    machine.cpu.acknowledge(1)
    machine.vgic.pend_edge(second)
    machine.vgic.pend_edge(first)
    machine.cpu.end_of_interrupt(1, 8192)

    assert [8192, 8193] == [take(machine), take(machine)]
    machine.check()


@pytest.mark.parametrize("userspace", [False, True])
def test_raised_while_nothing_is_forwarded(userspace: bool) -> None:
    """Turning forwarding on does not deliver it; the next event on it does."""
    machine = GicMachine()
    irq = machine.spi(32)
    machine.write(0, 0)
    machine.vgic.pend_edge(irq)
    if userspace:
        machine.set(DIST_REGS, 0, 2)
    else:
        machine.write(0, 2)
    assert SPURIOUS == take(machine)

    machine.vgic.pend_edge(irq)

    assert 32 == take(machine)
    statement = machine.check()
    assert (2, 1, 1) == (statement.raised, statement.delivered, statement.coalesced)


def test_what_was_queued_outlives_a_switch_by_userspace() -> None:
    """Unless the vCPU ran while nothing was forwarded."""
    machine = GicMachine()
    irq = machine.spi(32)
    for run in (False, True):
        machine.vgic.pend_edge(irq)
        machine.set(DIST_REGS, 0, 0)
        assert SPURIOUS == take(machine)
        if run:
            machine.cpu.load()
        machine.set(DIST_REGS, 0, 2)
        assert (SPURIOUS if run else 32) == take(machine)
    machine.check()


@pytest.mark.parametrize("running", [0, 1])
def test_a_running_vcpu_lets_go_when_nothing_is_forwarded(running: int) -> None:
    """A switch by one vCPU's guest leaves the others' lists alone while they stand still."""
    machine = GicMachine(2)
    machine.vm.vcpus[running].running = True
    for cpu in (0, 1):
        machine.vgic.pend_edge(machine.spi(32 + cpu, cpu=cpu))
    machine.write(0, 0)
    machine.write(0, 2)

    assert [index != running for index in (0, 1)] == [cpu.line for cpu in machine.vgic.cpus]
    machine.check()


def test_a_stopped_vcpu_keeps_what_is_routed_elsewhere() -> None:
    """Nobody gets it, whatever happens to it, until that vCPU runs; routed back it is where it was."""
    machine = GicMachine(2)
    first, second = machine.spi(32), machine.spi(33)
    machine.vgic.pend_edge(first)
    machine.vgic.pend_edge(second)
    machine.vgic.retarget(first, machine.vgic.cpus[1])
    machine.vgic.pend_edge(first)
    assert [33, SPURIOUS] == [cpu.highest_pending(1) for cpu in machine.vgic.cpus]
    machine.vgic.retarget(first, machine.cpu)
    assert 32 == machine.cpu.highest_pending(1)
    machine.vgic.retarget(first, machine.vgic.cpus[1])
    machine.check()

    machine.cpu.load()

    assert [33, 32] == [cpu.highest_pending(1) for cpu in machine.vgic.cpus]
    machine.check()


def test_a_long_list_is_put_in_order_for_good() -> None:
    """When a vCPU runs with more on its list than list registers: equal priorities later on keep that order."""
    machine = GicMachine()
    irqs = [machine.spi(32 + n, priority=0xA0 - 8 * n) for n in range(5)]
    for irq in irqs[:4]:
        machine.vgic.pend_edge(irq)
    machine.cpu.load()
    for irq in irqs[:4]:
        machine.vgic.set_priority(irq, 0x80)
    assert 32 == machine.cpu.highest_pending(1)
    for n, irq in enumerate(irqs[:4]):
        machine.vgic.set_priority(irq, 0xA0 - 8 * n)
    machine.vgic.pend_edge(irqs[4])
    machine.cpu.load()
    machine.check()

    for irq in irqs:
        machine.vgic.set_priority(irq, 0x80)

    assert [36, 35, 34, 33, 32] == [take(machine) for _ in range(5)]
    machine.check()


@pytest.mark.parametrize("event", ["pend_edge", "activate"])
def test_an_active_interrupt_without_a_vcpu_joins_one_at_the_next_event(event: str) -> None:
    """Made active while it has no target; giving it one is no event, raising it is, and so is making it active."""
    machine = GicMachine()
    irq = machine.spi(32)
    machine.vgic.retarget(irq, None)
    machine.vgic.activate(irq)
    machine.vgic.retarget(irq, machine.cpu)
    assert 0 == machine.cpu.nr_active
    getattr(machine.vgic, event)(irq)
    machine.check()
    assert 1 == machine.cpu.nr_active
    machine.vgic.pend_edge(irq)
    assert SPURIOUS == take(machine)
    machine.vgic.deactivate(irq, ended=False)

    assert 32 == take(machine)
    machine.check()


def test_lowering_a_line_is_an_event() -> None:
    """It queues what is latched and was raised while nothing was forwarded."""
    machine = GicMachine()
    irq = machine.spi(32, edge=False)
    machine.write(0, 0)
    machine.vgic.line_level(irq, True)
    machine.vgic.set_pending(irq)
    machine.write(0, 2)
    assert SPURIOUS == take(machine)

    machine.vgic.line_level(irq, False)

    assert 32 == take(machine)
    machine.check()


def test_a_stopped_vcpu_keeps_places() -> None:
    """An interrupt that left and came back before the vCPU ran is where it was."""
    machine = GicMachine()
    first, second = machine.spi(32), machine.spi(33)
    machine.vgic.pend_edge(first)
    machine.vgic.pend_edge(second)
    machine.vgic.set_enabled(first, False)
    machine.vgic.set_enabled(first, True)
    assert 32 == machine.cpu.highest_pending(1)
    machine.vgic.set_enabled(first, False)
    machine.cpu.load()
    machine.vgic.set_enabled(first, True)

    assert 33 == machine.cpu.highest_pending(1)
    machine.check()


# -- resample notification


def test_the_end_of_a_level_spi_is_told_before_its_line_is_looked_at() -> None:
    """A resampler lowers the line and raises it again if it still has cause."""
    machine = GicMachine()
    irq = machine.spi(40, edge=False)
    told = []

    def resample() -> None:
        told.append(irq.active)
        machine.vgic.line_level(irq, False)

    machine.vgic.eoi_notifiers[40] = [resample]
    machine.vgic.line_level(irq, True)

    assert 40 == take(machine)
    assert [True] == told
    assert SPURIOUS == take(machine)
    machine.vgic.set_edge(irq, True)
    machine.vgic.pend_edge(irq)
    take(machine)
    assert [True] == told
    machine.check()


# -- injection


@pytest.mark.spec("vgic-v3.irq-line.EBUSY.not-initialised", "api.irq-line.EBUSY.arm-v3-uninit")
def test_no_injection_before_initialisation() -> None:
    """EBUSY, but an INTID that cannot be is EINVAL all the same."""
    machine = GicMachine(ready=False)
    assert errno.EBUSY == refusal(machine.vgic.inject_spi, 40, True)
    assert errno.EBUSY == refusal(machine.vgic.inject_ppi, 0, 20, True)
    assert errno.EINVAL == refusal(machine.vgic.inject_spi, 31, True)
    assert errno.EINVAL == refusal(machine.vgic.inject_ppi, 0, 15, True)
    machine.set(CTRL, INIT)
    assert 0 == refusal(machine.vgic.inject_spi, 40, True)


@pytest.mark.spec("api.irq-line.EINVAL.arm-id", "api.irq-line.EINVAL.arm-vcpu", "api.irq-line.note.spi-range")
@pytest.mark.parametrize(
    ("intid", "code"), [(31, errno.EINVAL), (32, 0), (95, 0), (96, errno.EINVAL), (8192, errno.EINVAL)]
)
def test_spis_end_with_the_number_of_interrupts(intid: int, code: int) -> None:
    """96 here."""
    assert code == refusal(GicMachine(nr_irqs=96).vgic.inject_spi, intid, True)


def test_an_lpi_that_exists_can_be_injected_like_an_spi() -> None:
    """KVM_IRQ_LINE finds it by its INTID."""
    machine = GicMachine()
    machine.lpi(8192)
    machine.vgic.inject_spi(8192, False)
    machine.vgic.inject_spi(8192, True)

    assert 8192 == take(machine)
    machine.check()


@pytest.mark.spec("api.irq-line.note.vcpu-number")
def test_a_ppi_is_looked_up_by_index_then_by_id() -> None:
    """With ids 0, 2, 1 the second and third vCPU swap; an id beyond the count is refused."""
    machine = GicMachine(3)
    for vcpu, vcpu_id in zip(machine.vm.vcpus, (0, 2, 1), strict=True):
        vcpu.vcpu_id = vcpu_id
    machine.vgic.inject_ppi(1, 20, True)
    assert [False, False, True] == [cpu.private[20].line for cpu in machine.vgic.cpus]

    machine.vm.vcpus[1].vcpu_id = 7

    assert errno.EINVAL == refusal(machine.vgic.inject_ppi, 1, 20, True)
    assert errno.EINVAL == refusal(machine.vgic.inject_ppi, 3, 20, True)


def test_the_line_of_an_in_kernel_device_is_its_own() -> None:
    """Injection from outside is taken and ignored."""
    machine = GicMachine()
    machine.cpu.private[27].owner = "arch timer"
    machine.vgic.inject_ppi(0, 27, True)

    assert not machine.cpu.private[27].line


# -- LPIs


def test_an_unmapped_lpi_stays_until_it_is_done() -> None:
    """One that waits at a vCPU is delivered; for the ITS it is gone at once, and can come back as it is."""
    machine = GicMachine()
    irq = machine.lpi(8192)
    machine.vgic.pend_edge(irq)
    machine.vgic.remove_lpi(irq)
    assert machine.vgic.lpi(8192) is None
    assert irq is machine.vgic.add_lpi(8192, None)
    machine.vgic.remove_lpi(irq)

    assert 8192 == take(machine)
    assert [] == list(machine.vgic.mapped_lpis())
    assert irq is not machine.vgic.add_lpi(8192, None)
    machine.check()


def test_an_unmapped_lpi_that_no_vcpu_has_is_dropped() -> None:
    """With its pending state."""
    machine = GicMachine()
    irq = machine.lpi(8192)
    machine.vgic.set_lpi_config(irq, False, 0xA0)
    machine.vgic.pend_edge(irq)

    machine.vgic.remove_lpi(irq)

    assert {"unmapped": 1} == machine.check().dropped
    assert {} == machine.vgic.lpis


def test_an_unmapped_lpi_that_was_done_is_not_found_by_its_number() -> None:
    """Not by GICR_INVLPIR, which would enable it again, and not by KVM_IRQ_LINE."""
    machine = lpi_machine()
    machine.vm.vcpus[0].running = True
    irq = machine.lpi(8192)
    machine.vgic.pend_edge(irq)
    machine.vgic.remove_lpi(irq)
    machine.vgic.set_lpi_config(irq, False, 0xA0)

    machine.write(0xA0, 8192, 8, base=GICR_BASE)

    assert SPURIOUS == take(machine)
    assert errno.EINVAL == refusal(machine.vgic.inject_spi, 8192, True)
    assert {"unmapped": 1} == machine.check().dropped


@pytest.mark.spec("vgic-v3.redist-regs.rule.disable-flushes")
def test_disabling_lpis_drops_those_queued_there() -> None:
    """Of that vCPU only, and not those that are disabled."""
    machine = lpi_machine()
    machine.vm.its_list.append(type("SomeIts", (), {"invalidate_cache": lambda self: None})())
    irqs = [machine.lpi(8192), machine.lpi(8193, cpu=1), machine.lpi(8194)]
    machine.vgic.set_lpi_config(irqs[2], False, 0)
    for irq in irqs:
        machine.vgic.pend_edge(irq)

    machine.write(0, 0, base=GICR_BASE)

    assert [False, True, True] == [irq.pending for irq in irqs]
    assert {"LPIs disabled": 1} == machine.check().dropped


def test_an_lpi_active_when_lpis_are_disabled_stays_active() -> None:
    """On no list then; raised again it waits for the end, as if nothing had happened."""
    machine = lpi_machine()
    machine.vm.its_list.append(type("SomeIts", (), {"invalidate_cache": lambda self: None})())
    irq = machine.lpi(8192)
    machine.vgic.pend_edge(irq)
    assert 8192 == machine.cpu.acknowledge(1)
    machine.write(0, 0, base=GICR_BASE)
    machine.write(0, 1, base=GICR_BASE)
    machine.check()
    machine.vgic.pend_edge(irq)
    assert SPURIOUS == machine.cpu.acknowledge(1)
    machine.check()
    machine.cpu.end_of_interrupt(1, 8192)

    assert 8192 == take(machine)
    machine.check()


@pytest.mark.spec("vgic-v3.redist-regs.rule.enable-reads-table")
@pytest.mark.parametrize("ptz", [False, True])
def test_enabling_lpis_reads_the_pending_table(ptz: bool) -> None:
    """Unless PENDBASER.PTZ says that it is all zeros."""
    machine = lpi_machine()
    irqs = [machine.lpi(8192), machine.lpi(8193), machine.lpi(8194, cpu=1)]
    machine.vm.memory.write_u8(PENDING + 1024, 0b101)
    machine.cpu.pendbaser |= ptz << 62

    vgic_lpi.load_pending(machine.vgic, machine.cpu)

    assert [not ptz, False, False] == [irq.pending for irq in irqs]
    machine.check()


@pytest.mark.spec(
    "vgic-v3.ctrl.save-pending-tables.rule.first-kb",
    "vgic-v3.ctrl.save-pending-tables.rule.bit-position",
    "vgic-v3.ctrl.save-pending-tables.rule.only-mapped",
    "vgic-v3.ctrl.save-pending-tables.rule.read-modify-write",
    "vgic-v3.ctrl.save-pending-tables.EFAULT.guest-ram",
)
def test_saving_pending_tables() -> None:
    """One bit for each LPI with a target, in that vCPU's table; other bits stay."""
    machine = lpi_machine()
    memory = machine.vm.memory
    irqs = [machine.lpi(8192), machine.lpi(8201), machine.lpi(8203, cpu=1)]
    for irq in irqs[1:]:
        machine.vgic.pend_edge(irq)
    memory.write_u8(PENDING + 1024, 0xFF)

    machine.set(CTRL, SAVE_PENDING_TABLES)

    assert bytes([0xFE, 0b10]) == memory.read(PENDING + 1024, 2)
    assert 0b1000 == memory.read_u8(PENDING + 0x1_0000 + 1025)
    assert bytes(1024) == memory.read(PENDING, 1024)

    machine.cpu.pendbaser = 0x1000_0000
    assert errno.EFAULT == refusal(machine.set, CTRL, SAVE_PENDING_TABLES)


@pytest.mark.spec("vgic-v3.reg.gicr.invlpir", "vgic-v3.reg.gicr.invallr")
def test_the_configuration_table_is_read_again_when_told() -> None:
    """GICR_INVLPIR names one LPI, GICR_INVALLR means all of its vCPU; a table that is not in RAM changes nothing."""
    machine = lpi_machine()
    irqs = [machine.lpi(8192), machine.lpi(8193), machine.lpi(8194, cpu=1)]
    machine.vm.memory.write(CONFIG, b"\x43\x40\x43")
    machine.write(0xA0, 8192, 8, base=GICR_BASE)
    assert [(True, 0x40), (True, 0xA0)] == [(irq.enabled, irq.priority) for irq in irqs[:2]]

    machine.write(0xB0, 0, 8, base=GICR_BASE)
    assert [(False, 0x40), (True, 0xA0)] == [(irq.enabled, irq.priority) for irq in irqs[1:]]

    machine.vgic.propbaser = 0x1000_0000
    machine.write(0xB0, 0, 8, base=GICR_BASE)
    assert (False, 0x40) == (irqs[1].enabled, irqs[1].priority)
    machine.check()


# -- state


def test_a_restored_gic_goes_on_where_the_other_was() -> None:
    """Same deliveries in the same order, with interrupts active, waiting, and in their places."""
    machine = GicMachine(2)
    for intid, priority in ((32, 0x80), (33, 0x40), (34, 0x80), (35, 0x80)):
        machine.vgic.pend_edge(machine.spi(intid, priority=priority))
    machine.vgic.line_level(machine.spi(36, edge=False), True)
    machine.vgic.pend_edge(machine.lpi(8192, cpu=1))
    machine.cpu.acknowledge(1)
    machine.vgic.pend_edge(machine.vgic.spis[1])
    state = machine.vgic.state()

    vm = FakeVm(2)
    copy = VgicV3.from_state(vm, state)  # type: ignore[arg-type]

    assert state == copy.state()
    assert 6 == vm.ledger.check().pending
    lives = []
    for vgic in (machine.vgic, copy):
        first = vgic.cpus[0]
        first.end_of_interrupt(1, 33)
        taken = []
        for cpu in (0, 0, 0, 0, 0, 1):
            taken.append(vgic.cpus[cpu].acknowledge(1))
            vgic.cpus[cpu].end_of_interrupt(1, taken[-1])
        lives.append(taken)
    assert [33, 32, 34, 35, 36, 8192] == lives[0] == lives[1]
    assert vm.mmio.find(GICR_BASE) is not None
    machine.check()
    copy._check()
    vm.ledger.check()


def test_a_state_of_another_version_or_machine_is_refused() -> None:
    """Rather than half restored."""
    with pytest.raises(ValueError, match="version of the GICv3 state must be 2, not 1"):
        VgicV3.from_state(FakeVm(0), VgicV3State(version=1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the state is of 0 vCPUs, and the VM has 2"):
        VgicV3.from_state(FakeVm(2), VgicV3State())  # type: ignore[arg-type]


def test_an_interrupt_shows_its_state() -> None:
    """In a debugger or a failed assertion."""
    machine = GicMachine()
    irq = machine.spi(40)
    machine.vgic.pend_edge(irq)

    assert "<WiredIrq 40 P-E priority 0xa0 -> 0>" == repr(irq)
    machine.vgic.retarget(irq, None)
    assert "<WiredIrq 40 P-E priority 0xa0 -> ->" == repr(irq)
