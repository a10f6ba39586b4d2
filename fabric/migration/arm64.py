"""The sequences that save and restore an arm64 machine, as the KVM documents have them.

:data:`SEQUENCES` has for each GIC version the steps of saving and of restoring. The order is the documents'; where they
leave it open, a comment at the step says what decided. What moves, what does not, and why: ``docs/migration.md``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fabric.migration import arm64_gicv2 as v2
from fabric.migration import arm64_gicv3 as v3
from fabric.migration import arm64_vm as machine
from fabric.migration.arm64_state import (
    VERSION,
    ArmState,
    Gicv2State,
    Gicv3State,
    ItsState,
    SlotState,
    VcpuState,
)
from fabric.migration.steps import Step

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fabric.migration.arm64_vm import ArmVm

SET, GET, HAS = "KVM_SET_DEVICE_ATTR", "KVM_GET_DEVICE_ATTR", "KVM_HAS_DEVICE_ATTR"

# -- saving: the same whatever the GIC ------------------------------------------------------------------------

_COMPLETE = Step(("api.run.rule.immediate",), "complete the exits of vCPUs", ("KVM_RUN",), machine.complete_exits)
_VCPUS = Step(
    ("api.get-one-reg", "vcpu.timer.vtimer", "vcpu.pvtime.ipa", "vcpu.pmu.irq"),
    "read the registers, power states and attributes of the vCPUs",
    ("KVM_GET_REG_LIST", "KVM_GET_ONE_REG", "KVM_GET_MP_STATE", "KVM_GET_VCPU_EVENTS", GET, HAS),
    machine.save_vcpus,
)
_WIRING = Step((), "note what KVM was told: machine type, routes, irqfds, lines", (), machine.save_wiring)
_GUESTS = Step((), "take the guests out of the vCPUs", (), machine.unload_guests)

SAVE_GICV3 = (
    Step(
        ("vgic-v3.seq.save.1-stop", "its.seq.save.1-stop"),
        "stop all vCPUs",
        ("KVM_GET_MP_STATE",),
        machine.check_stopped,
    ),
    # Before anything is read: completing an exit puts the vCPU's timers onto the CPU and may raise their lines.
    _COMPLETE,
    Step(
        ("vgic-v3.seq.save.2-pending", "its.seq.save.2-pending"),
        "write the pending bits of LPIs to guest memory",
        (SET,),
        v3.save_pending_tables,
    ),
    Step(
        ("vgic-v3.seq.save.3-its", "its.seq.save.3-tables"),
        "write the maps of the ITSs to guest memory",
        (SET,),
        v3.save_its_tables,
    ),
    Step(
        ("vgic-v3.seq.save.4-regs",),
        "read the registers and line levels of the GIC",
        (GET, "KVM_GET_ONE_REG"),
        v3.save_gic,
    ),
    Step(("its.seq.save.4-regs",), "read the registers of the ITSs", (GET,), v3.save_its),
    _VCPUS,
    Step(("vgic-v3.seq.save.5-ram", "its.seq.save.5-ram"), "copy guest memory", (), machine.save_memory),
    _WIRING,
    _GUESTS,
)

SAVE_GICV2 = (
    Step((), "stop all vCPUs", ("KVM_GET_MP_STATE",), machine.check_stopped),
    _COMPLETE,
    Step(
        ("vgic-v2.dist-regs", "vgic-v2.cpu-regs"),
        "read the registers of the GIC",
        (GET,),
        v2.save_gic,
    ),
    _VCPUS,
    Step((), "copy guest memory", (), machine.save_memory),
    _WIRING,
    _GUESTS,
)

SAVE_NO_GIC = (
    Step((), "stop all vCPUs", ("KVM_GET_MP_STATE",), machine.check_stopped),
    _COMPLETE,
    _VCPUS,
    Step((), "copy guest memory", (), machine.save_memory),
    _WIRING,
    _GUESTS,
)

# -- restoring ------------------------------------------------------------------------------------------------

_CREATE = Step(
    ("api.create-vm", "api.set-user-memory-region"),
    "create the VM and its memory slots",
    ("KVM_CREATE_VM", "KVM_SET_USER_MEMORY_REGION"),
    machine.create_vm,
    creates=True,
)
_CREATE_VCPUS = ("KVM_CREATE_VCPU", "KVM_ARM_VCPU_INIT", "KVM_ARM_VCPU_FINALIZE", "KVM_SET_ONE_REG")
_AFFINITIES = Step(
    ("api.set-one-reg",), "give the vCPUs their affinity", ("KVM_SET_ONE_REG",), machine.restore_affinities
)
_ATTRIBUTES = Step(
    ("vcpu.timer.vtimer", "vcpu.timer.ptimer", "vcpu.pmu.irq", "vcpu.pmu.init", "vcpu.pvtime.ipa"),
    "write the attributes of the vCPUs",
    (SET,),
    machine.restore_attributes,
    creates=True,
)
_REGISTERS = Step(
    ("api.set-one-reg",),
    "write the registers of the vCPUs",
    ("KVM_SET_ONE_REG", "KVM_SET_VCPU_EVENTS"),
    machine.restore_registers,
)
_TIMERS = Step(("api.set-one-reg",), "set counters and virtual timers", ("KVM_SET_ONE_REG",), machine.restore_timers)
_POWER = Step((), "set the power states of the vCPUs", ("KVM_SET_MP_STATE",), machine.restore_power)
_ROUTES = Step(("api.set-gsi-routing",), "set the routes", ("KVM_SET_GSI_ROUTING",), machine.restore_routes)
_IRQFDS = Step(("api.irqfd",), "make the irqfds anew", ("KVM_IRQFD",), machine.restore_irqfds)

RESTORE_GICV3 = (
    _CREATE,
    Step(("its.seq.restore.1-ram-and-vcpus",), "restore guest memory", (), machine.restore_memory),
    Step(
        ("vgic-v3.seq.restore.1-create-vcpus", "its.seq.restore.1-ram-and-vcpus"),
        "create and initialise all vCPUs",
        _CREATE_VCPUS,
        machine.create_vcpus,
        creates=True,
    ),
    _AFFINITIES,  # the GIC's attributes name vCPUs, and its routes targets, by affinity
    Step(
        ("vgic-v3.seq.restore.2-create-gic",), "create the GICv3", ("KVM_CREATE_DEVICE",), v3.create_gic, creates=True
    ),
    Step(("vgic-v3.seq.restore.3-create-its",), "create the ITSs", ("KVM_CREATE_DEVICE",), v3.create_its, creates=True),
    Step(("vgic-v3.seq.restore.4-nr-irqs",), "set the number of interrupts", (SET,), v3.set_nr_irqs, creates=True),
    Step(("vgic-v3.seq.restore.5-addresses",), "place the frames", (SET,), v3.place_frames, creates=True),
    Step(("vgic-v3.seq.restore.6-init",), "initialise the GIC", (SET,), v3.initialize, creates=True),
    Step(("vgic-v3.seq.restore.7-iidr",), "write GICD_IIDR", (SET,), v3.restore_iidr),
    Step(("vgic-v3.seq.restore.8-dist",), "write the distributor registers", (SET,), v3.restore_distributor),
    Step(
        ("vgic-v3.seq.restore.9-redist-baser",),
        "write GICR_PROPBASER and GICR_PENDBASER of every vCPU",
        (SET,),
        v3.restore_bases,
    ),
    Step(
        ("vgic-v3.seq.restore.10-redist", "its.seq.restore.2-redistributors"),
        "write the other redistributor registers",
        (SET,),
        v3.restore_redistributors,
    ),
    Step(("vgic-v3.seq.restore.11-sysregs",), "write the ICC registers of every vCPU", (SET,), v3.restore_interfaces),
    Step(("vgic-v3.seq.restore.12-levels",), "write the line levels", (SET,), v3.restore_lines),
    Step(
        ("vgic-v3.seq.restore.13-its", "its.seq.restore.3-address"),
        "place the ITSs",
        (SET,),
        v3.place_its,
        creates=True,
    ),
    Step(("its.seq.restore.4-cbaser",), "write GITS_CBASER", (SET,), v3.restore_its_queue),
    Step(
        ("its.seq.restore.5-other-regs",),
        "write the other ITS registers but GITS_CTLR",
        (SET,),
        v3.restore_its_registers,
    ),
    Step(("its.seq.restore.6-tables",), "load the maps from guest memory", (SET,), v3.restore_its_tables),
    Step(("its.seq.restore.7-ctlr",), "write GITS_CTLR", (SET,), v3.enable_its),
    _ATTRIBUTES,
    _REGISTERS,
    _TIMERS,
    _POWER,
    _ROUTES,  # initialising the GIC has replaced the routes
    _IRQFDS,
    Step(
        ("vgic-v3.seq.restore.14-run", "its.seq.restore.8-run"),
        "load the guests: the vCPUs may run",
        (),
        machine.load_guests,
    ),
)

RESTORE_GICV2 = (
    _CREATE,
    Step((), "restore guest memory", (), machine.restore_memory),
    Step(
        ("vgic-v2.seq.restore.1-create-vcpus",),
        "create and initialise all vCPUs",
        _CREATE_VCPUS,
        machine.create_vcpus,
        creates=True,
    ),
    Step(
        ("vgic-v2.seq.restore.2-create-device",),
        "create the GICv2",
        ("KVM_CREATE_DEVICE",),
        v2.create_gic,
        creates=True,
    ),
    Step(("vgic-v2.seq.restore.3-nr-irqs",), "set the number of interrupts", (SET,), v2.set_nr_irqs, creates=True),
    Step(("vgic-v2.seq.restore.4-addresses",), "place the frames", (SET,), v2.place_frames, creates=True),
    Step(("vgic-v2.seq.restore.5-init",), "initialise the GIC", (SET,), v2.initialize, creates=True),
    Step(("vgic-v2.seq.restore.6-iidr",), "write GICD_IIDR", (SET,), v2.restore_iidr),
    Step(("vgic-v2.seq.restore.7-dist",), "write the distributor registers", (SET,), v2.restore_distributor),
    Step(("vgic-v2.seq.restore.8-cpu",), "write the CPU interfaces", (SET,), v2.restore_interfaces),
    _ATTRIBUTES,
    _REGISTERS,
    _TIMERS,
    _POWER,
    _ROUTES,
    _IRQFDS,
    Step(("api.irq-line",), "drive the lines that are up", ("KVM_IRQ_LINE",), v2.drive_lines),
    Step(("vgic-v2.seq.restore.9-run",), "load the guests: the vCPUs may run", (), machine.load_guests),
)

RESTORE_NO_GIC = (
    _CREATE,
    Step((), "restore guest memory", (), machine.restore_memory),
    Step((), "create and initialise all vCPUs", _CREATE_VCPUS, machine.create_vcpus, creates=True),
    _ATTRIBUTES,
    _REGISTERS,
    _TIMERS,
    _POWER,
    Step((), "load the guests: the vCPUs may run", (), machine.load_guests),
)

SEQUENCES: dict[int, tuple[tuple[Step, ...], tuple[Step, ...]]] = {
    0: (SAVE_NO_GIC, RESTORE_NO_GIC),
    2: (SAVE_GICV2, RESTORE_GICV2),
    3: (SAVE_GICV3, RESTORE_GICV3),
}
"""GIC version to the steps of saving and of restoring; 0 is a VM without an in-kernel GIC."""


def gic_version(state: ArmState) -> int:
    """Which GIC a saved machine has: 2, 3, or 0 for none."""
    return 0 if state.gic is None else 2 if isinstance(state.gic, Gicv2State) else 3


# -- machines that exist already ------------------------------------------------------------------------------

_SET_UP: dict[type, tuple[str, ...]] = {
    SlotState: ("slot", "flags", "gpa", "size"),
    VcpuState: ("vcpu_id", "target", "features", "timer_irqs", "pmu_irq", "pvtime"),
    Gicv3State: ("nr_irqs", "distributor", "redistributors"),
    Gicv2State: ("nr_irqs", "distributor", "cpu_interface"),
    ItsState: ("base",),
}
"""What is decided when a machine is made, and no step of a restore changes."""


def differences(vm: ArmVm, state: ArmState) -> list[str]:
    """Why a saved machine cannot go on in ``vm``, which exists already: a sentence for each reason."""
    there = _set_up(vm)
    wanted, found = gic_version(state), gic_version(there)
    if wanted != found:
        return [f"the saved machine has {_GIC_NAMES[wanted]}, this one {_GIC_NAMES[found]}"]
    problems = []
    if state.machine_type != there.machine_type:
        problems.append(f"machine type: saved with {state.machine_type}, here {there.machine_type}")
    parts: tuple[tuple[str, Sequence[Any], Sequence[Any]], ...] = (
        ("memory slot", state.slots, there.slots),
        ("vCPU", state.vcpus, there.vcpus),
        ("GIC", [state.gic], [there.gic]),
        ("ITS", state.its, there.its),
    )
    for what, saved, here in parts:
        if len(saved) != len(here):
            problems.append(f"the saved machine has {len(saved)} {what}s, this one {len(here)}")
            continue
        for number, (one, other) in enumerate(zip(saved, here, strict=True)):
            for name in _SET_UP.get(type(one), ()):
                mine, its = getattr(one, name), getattr(other, name)
                if mine != its:
                    problems.append(f"{what} {number}, {name}: saved with {_shown(mine)}, here {_shown(its)}")
    return problems


def _shown(value: Any) -> str:
    """Addresses and sizes in hexadecimal."""
    if isinstance(value, tuple):
        return f"({', '.join(map(_shown, value))})"
    return hex(value) if isinstance(value, int) and value >> 12 else str(value)


_GIC_NAMES = {0: "no in-kernel GIC", 2: "a GICv2", 3: "a GICv3"}


def _set_up(vm: ArmVm) -> ArmState:
    found: dict[str, Any] = {}
    for step in SEQUENCES[vm.version][0]:
        if GET in step.ioctls:
            step.do(vm, found)
    machine.save_wiring(vm, found)
    slots = tuple(SlotState(s.slot, s.flags, s.guest_phys_addr, s.memory_size) for s in vm.slots)
    return ArmState(VERSION, slots=slots, **found)
