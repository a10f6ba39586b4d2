"""A GICv3 saved and restored through ``Kvm.ioctl``, step by step as the documents ask for it."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from kvm_gic import (
    CTRL,
    GICD,
    LEVEL_INFO,
    LPI,
    NOTHING,
    RESTORE,
    SAVE_PENDING_TABLES,
    SAVE_TABLES,
    GicVm,
    first_run,
    run_guests,
)
from kvm_machine import outcome

import fabric
from fabric.uapi import arm64 as arm


def prepared() -> GicVm:
    """A guest in the middle of things: interrupts of all kinds pending, active, high, for vCPUs with sparse ids."""
    vm = GicVm((0, 17))
    vm.set_dist(8, 0x4B00_243B)
    vm.boot()
    vm.set_dist(0xC08, 0)  # SPIs 32 to 47 are level-triggered
    vm.set_dist(0x6000 + 8 * 64, 0x101)
    vm.set_dist(0x84, 0xFFFF_FF7F)  # SPI 39 in group 0
    vm.line(32, 1)
    vm.line(56, 1)
    vm.line(64, 1)
    vm.set_dist(0x204, vm.dist(0x204) | 1 << 9)
    vm.vm.irq_line(arm.irq_line(arm.KVM_ARM_IRQ_TYPE_PPI, 20), 1)
    vm.set_redist(0, 0x1_0414, 0x70)
    vm.set_redist(17, 0x1_0200, 1 << 5)
    vm.set_redist(17, 0x1_0404, 0x7800)
    vm.set_dist(0x308, 1 << 8)  # SPI 72 is active on vCPU 0
    vm.set_sysreg(0, "AP1R0", 1 << (0x48 >> 3))
    vm.set_sysreg(17, "BPR1", 4)
    vm.set_sysreg(17, "CTLR", 0x8402)
    for event in (0, 1, 3):
        vm.msi(event)
    return vm


async def life(vm: GicVm) -> list[Any]:
    """What the guest has before it, from here on."""

    async def guest(cpu: Any) -> list[Any]:
        state = [await cpu.mrs(f"ICC_{name}_EL1") for name in ("RPR", "PMR", "BPR1", "CTLR", "AP1R0")]
        if state[0] == 0x48:
            await cpu.msr("ICC_EOIR1_EL1", 72)
        return [state, [await take(cpu) for _ in range(6)]]

    return await run_guests(vm, guest)


async def take(cpu: Any) -> int:
    """Take one interrupt and end it, with DIR where the end is split."""
    intid = int(await cpu.mrs("ICC_IAR1_EL1"))
    await cpu.msr("ICC_EOIR1_EL1", intid)
    await cpu.msr("ICC_DIR_EL1", intid)
    return intid


def moved(save_without: str = "", steps: tuple[str, ...] = RESTORE) -> tuple[GicVm, GicVm]:
    """A guest, and what a migration makes of it."""
    source, destination = prepared(), GicVm(ready=False)
    destination.restore(source.save(leave_out=save_without), steps)
    return source, destination


def without(step: str) -> tuple[str, ...]:
    return tuple(other for other in RESTORE if other != step)


def late(step: str, after: str) -> tuple[str, ...]:
    steps = list(without(step))
    steps.insert(steps.index(after) + 1, step)
    return tuple(steps)


@pytest.mark.spec("vgic-v3.seq.restore", "vgic-v3.seq.save", "vgic-v3.seq.restore.14-run")
def test_a_migrated_guest_goes_on_as_if_nothing_had_happened() -> None:
    """All registers read the same, and it takes the same interrupts in the same order."""

    async def main() -> tuple[Any, Any]:
        source, destination = moved()
        assert source.registers() == destination.registers()
        assert [1, 1] == [vm.msi(2) for vm in (source, destination)]
        return await life(source), await life(destination)

    stayed, went = fabric.run(main)
    assert stayed == went
    assert [32, 32, 32, 32, 32, 32] == stayed[0][1]
    assert [64, 5, LPI + 1, LPI + 3, NOTHING, NOTHING] == stayed[1][1]


@pytest.mark.parametrize(
    ("steps", "differs"),
    [
        pytest.param(late("its", "redist")[:-1], "redist", marks=pytest.mark.spec("vgic-v3.seq.restore.3-create-its")),
        pytest.param(without("nr-irqs"), "dist", marks=pytest.mark.spec("vgic-v3.seq.restore.4-nr-irqs")),
        pytest.param(without("iidr"), "iidr", marks=pytest.mark.spec("vgic-v3.seq.restore.7-iidr")),
        pytest.param(without("dist"), "dist", marks=pytest.mark.spec("vgic-v3.seq.restore.8-dist")),
        pytest.param(
            late("baser", "redist")[:-1], "baser", marks=pytest.mark.spec("vgic-v3.seq.restore.9-redist-baser")
        ),
        pytest.param(without("redist"), "redist", marks=pytest.mark.spec("vgic-v3.seq.restore.10-redist")),
        pytest.param(without("sysregs"), "sysregs", marks=pytest.mark.spec("vgic-v3.seq.restore.11-sysregs")),
        pytest.param(without("levels"), "levels", marks=pytest.mark.spec("vgic-v3.seq.restore.12-levels")),
        pytest.param(without("its-state"), "its", marks=pytest.mark.spec("vgic-v3.seq.restore.13-its")),
    ],
)
def test_a_restore_without_a_step_or_with_one_too_late(steps: tuple[str, ...], differs: str) -> None:
    """The registers that it is about read something else than before."""
    source, destination = moved(steps=steps)

    assert source.registers()[differs] != destination.registers()[differs]


@pytest.mark.parametrize(
    ("steps", "code"),
    [
        pytest.param(late("vcpus", "init"), "EBUSY", marks=pytest.mark.spec("vgic-v3.seq.restore.6-init")),
        pytest.param(without("init"), "EBUSY", marks=pytest.mark.spec("vgic-v3.seq.restore.6-init")),
        pytest.param(without("vcpus"), "EINVAL", marks=pytest.mark.spec("vgic-v3.seq.restore.1-create-vcpus")),
    ],
)
def test_a_restore_that_cannot_go_on(steps: tuple[str, ...], code: str) -> None:
    """vCPUs come before the GIC is initialised, and registers after it."""
    assert code == outcome(moved, steps=steps)


@pytest.mark.spec("vgic-v3.seq.restore.1-create-vcpus")
def test_other_ids_are_other_affinities() -> None:
    """Redistributors are restored by affinity, which follows from the id: with other ids they are not found."""
    saved = prepared().save()
    destination = GicVm((0, 1))

    assert "EINVAL" == outcome(destination.restore_redist, saved)


@pytest.mark.spec("vgic-v3.seq.restore.2-create-gic", "vgic-v3.seq.restore.5-addresses")
def test_without_a_gic_or_its_addresses() -> None:
    """No interrupt can be raised without a GIC, and no vCPU run while it has no addresses."""
    without_gic = GicVm(ready=False)
    without_gic.add_vcpus((0, 17))
    assert "ENXIO" == outcome(without_gic.line, 40, 1)

    _, destination = moved(steps=tuple(step for step in RESTORE if step not in ("addresses", "its-state")))
    assert "ENXIO" == first_run(destination)


@pytest.mark.parametrize(
    ("step", "lost"),
    [
        pytest.param("pending", {"pending"}, marks=pytest.mark.spec("vgic-v3.seq.save.2-pending")),
        pytest.param("tables", {"pending", "mapped"}, marks=pytest.mark.spec("vgic-v3.seq.save.3-its")),
        pytest.param("ram", {"pending", "mapped"}, marks=pytest.mark.spec("vgic-v3.seq.save.5-ram")),
        ("", set()),
    ],
)
def test_what_a_save_without_a_step_loses(step: str, lost: set[str]) -> None:
    """LPIs that were pending, or what the ITS maps; both with RAM that is copied before the tables are in it."""
    _, destination = moved(save_without=step)
    lpis = destination.inside.irqchip.lpis

    assert lost == {
        name
        for name, kept in (
            ("pending", [irq for irq in lpis.values() if irq.pending]),
            ("mapped", lpis),
        )
        if not kept
    }


@pytest.mark.spec("vgic-v3.seq.save.1-stop")
def test_nothing_can_be_saved_while_a_vcpu_runs() -> None:
    """EBUSY for pending tables, ITS tables, registers of all kinds and line levels."""

    async def main() -> list[Any]:
        vm = prepared()

        async def guest(cpu: Any) -> None:
            await cpu.compute(1000)

        vm.vcpus[1].load(guest)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vm.vcpus[1].run)
            await fabric.sleep(500)
            answers = [
                outcome(vm.gic.set_attr, CTRL, SAVE_PENDING_TABLES),
                outcome(vm.its.set_attr, CTRL, SAVE_TABLES),
                outcome(vm.dist, 0),
                outcome(vm.redist, 0, 0),
                outcome(vm.sysreg, 0, "PMR"),
                outcome(vm.gic.get_attr, LEVEL_INFO, 32, 4),
            ]
            nursery.cancel_scope.cancel()
        return answers

    assert ["EBUSY"] * 6 == fabric.run(main)


@pytest.mark.spec("vgic-v3.seq.save.4-regs")
def test_latch_and_line_are_saved_apart() -> None:
    """ISPENDR has the latches and LEVEL_INFO the lines: both together are what the guest reads in ISPENDR."""

    async def guest(cpu: Any) -> int:
        return int(await cpu.load(GICD + 0x204, 4))

    async def main() -> tuple[int, ...]:
        vm = prepared()
        latches, lines = vm.dist(0x204), vm.gic.get_attr(LEVEL_INFO, 32, 4)
        return latches, lines, (await run_guests(vm, guest))[0]

    latches, lines, seen = fabric.run(main)
    assert (1 << 9 | 1 << 24, 1) == (latches, lines)
    assert latches | lines == seen
