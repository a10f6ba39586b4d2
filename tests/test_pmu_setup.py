"""Setting up the PMU of an arm64 vCPU: event filters, which of the host's PMUs, the order of it all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from engine_programs import here
from hypothesis import given
from hypothesis import strategies as st
from kvm_machine import Arm, outcome
from pmu_machine import FEATURES, INIT, IRQ, PPI, SET_PMU, PmuMachine, counters, simulate, start

import fabric
from fabric.kvm.typed import VcpuFd
from fabric.uapi import arm64 as arm
from fabric.uapi import ioctl as requests
from fabric.uapi import kvm as uapi
from fabric.vcpu import Host
from fabric.vcpu.pmu import CPU_CYCLES, EVENTS, INST_RETIRED, LD_RETIRED, EventFilter

PMU = arm.KVM_ARM_VCPU_PMU_V3_CTRL
ALLOW, DENY = arm.KVM_PMU_EVENT_ALLOW, arm.KVM_PMU_EVENT_DENY


def on(**options: Any) -> Callable[[], PmuMachine]:
    """A machine on a host with these options."""
    return lambda: PmuMachine(**options)


# -- filters


@pytest.mark.spec("vcpu.pmu.filter.rule.first-policy")
@pytest.mark.parametrize(
    ("action", "allowed"),
    [
        pytest.param(ALLOW, {CPU_CYCLES, INST_RETIRED}, id="allow"),
        pytest.param(DENY, set(EVENTS) - {CPU_CYCLES, INST_RETIRED}, id="deny"),
    ],
)
def test_the_first_filter_decides_about_the_rest(action: int, allowed: set[int]) -> None:
    """ALLOW first: all else is denied; DENY first: all else is allowed. PMCEID_EL0 follows, and so does counting."""

    def make() -> PmuMachine:
        machine = PmuMachine(setup=False)
        machine.filter(CPU_CYCLES, 1, action)
        machine.filter(INST_RETIRED, 1, action)
        machine.set_up()
        return machine

    async def body(_machine: PmuMachine, cpu: Any) -> list[Any]:
        await start(cpu, CPU_CYCLES, INST_RETIRED, LD_RETIRED, 0x4004)
        await cpu.load(0x0800_0000, 4)
        await cpu.compute(160)
        return [await cpu.mrs("PMCEID0_EL0"), *await counters(cpu, 4)]

    common, *counted = simulate(body, make=make)[0]
    counts = {CPU_CYCLES: 160, INST_RETIRED: 160, LD_RETIRED: 1, 0x4004: 10}
    assert [n if event in allowed else 0 for event, n in counts.items()] == counted
    assert sum(1 << (e & 0x1F) + (32 if e & 0x4000 else 0) for e in allowed if e & ~0x4000 < 32) == common


@pytest.mark.spec("vcpu.pmu.filter.rule.cancel", "vcpu.pmu.filter.rule.empty", "vcpu.pmu.filter.rule.vm-wide")
def test_later_filters() -> None:
    """They override for their range and leave the default; an empty one is a policy; any vCPU sets all vCPUs'."""

    def allowed(*filters: tuple[int, int, int]) -> list[bool]:
        machine = PmuMachine(2, setup=False)
        for n, (base, count, action) in enumerate(filters):
            machine.filter(base, count, action, n % 2)
        events = machine.vcpu(0).pmu.filter
        assert events is machine.vcpu(1).pmu.filter
        return [events.allows(event) for event in (0x10, CPU_CYCLES, 0x12, 0xFFFF)]

    assert [True] * 4 == allowed()
    assert [False] * 4 == allowed((CPU_CYCLES, 1, ALLOW), (CPU_CYCLES, 1, DENY))
    assert [True] * 4 == allowed((CPU_CYCLES, 1, DENY), (CPU_CYCLES, 1, ALLOW))
    assert [True, False, True, True] == allowed((0x10, 3, DENY), (0x10, 1, ALLOW), (0x12, 1, ALLOW))
    assert [False] * 4 == allowed((CPU_CYCLES, 0, ALLOW))
    assert [True] * 4 == allowed((0, 0, DENY))
    assert [False, False, False, True] == allowed((0xFFFF, 1, ALLOW))


@given(
    filters=st.lists(st.tuples(st.integers(0, 1023), st.integers(0, 1024), st.booleans()), max_size=6),
    event=st.integers(0, 1023),
)
def test_a_filter_is_the_last_word_on_its_range(filters: list[tuple[int, int, bool]], event: int) -> None:
    """The last filter with the event in its range counts, else the opposite of the first one's action."""
    events = EventFilter(10)
    expected = not filters[0][2] if filters else True
    for base, count, allow in filters:
        events.apply(base, min(count, 1024 - base), allow)
        if base <= event < base + count:
            expected = allow

    assert expected == events.allows(event)


@pytest.mark.spec("vcpu.pmu.filter.rule.cycles")
def test_the_cycle_counter_is_filtered_by_its_event() -> None:
    """By CPU_CYCLES, 0x11."""

    def make() -> PmuMachine:
        machine = PmuMachine(setup=False)
        machine.filter(CPU_CYCLES, 1, DENY)
        machine.set_up()
        return machine

    async def body(_machine: PmuMachine, cpu: Any) -> list[int]:
        await start(cpu, INST_RETIRED)
        await cpu.compute(10)
        return [*await counters(cpu, 1), await cpu.mrs("PMCCNTR_EL0")]

    assert [10, 0] == simulate(body, make=make)[0]


def test_narrow_event_numbers() -> None:
    """PMUv3 of Armv8.0 has 10 bits of them: the upper ones are not looked at, and the extended events are not there."""

    async def body(_machine: PmuMachine, cpu: Any) -> list[int]:
        await start(cpu, 0x4000 | CPU_CYCLES, 0x4004)
        await cpu.compute(100)
        return [
            *await counters(cpu, 2),
            await cpu.mrs("PMCEID0_EL0") >> 32,
            await cpu.mrs("ID_AA64DFR0_EL1") >> 8 & 0xF,
        ]

    assert [100, 0, 0, 1] == simulate(body, make=on(pmu_event_bits=10))[0]


@pytest.mark.spec("vcpu.pmu.filter.ENOMEM.alloc")
def test_a_filter_needs_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOMEM without memory for the bitmap; no filter is set then."""

    def no_memory(*_: object) -> None:
        raise MemoryError

    machine = PmuMachine(setup=False)
    monkeypatch.setattr(EventFilter, "apply", no_memory)

    assert "ENOMEM" == outcome(machine.filter, CPU_CYCLES, 1, DENY)
    assert machine.vcpu().pmu.filter.bits is None


# -- which PMU


@pytest.mark.spec("vcpu.pmu.set-pmu.rule.vm-wide", "vcpu.pmu.set-pmu.rule.placement")
def test_a_chosen_pmu_binds_the_vm_to_its_cpus() -> None:
    """On a physical CPU without it KVM_RUN ends with KVM_EXIT_FAIL_ENTRY, the reason and the CPU; elsewhere it runs."""

    async def main() -> list[Any]:
        machine = PmuMachine(3, setup=False, pmu_ids=(8, 9), pmu_cpus={8: (0, 1), 9: (2,)})
        machine.vcpus[0].set_attr(PMU, SET_PMU, 9)
        seen = []
        for number in (0, 2):
            machine.set_up(number)

            async def program(cpu: Any) -> None:
                await cpu.compute(10)
                await cpu.system_off()

            machine.vcpus[number].load(program)
            for _ in range(2 - number // 2):
                await machine.run(number)
                details = bytes(machine.vcpus[number].run_area[uapi.KVM_RUN_EXIT :][:16])
                seen.append((machine.exit_reason(number), details if number == 0 else None))
        return seen

    fail = uapi.KvmRunFailEntry(arm.KVM_EXIT_FAIL_ENTRY_CPU_UNSUPPORTED, 0).pack().ljust(16, b"\0")
    assert [
        (uapi.KVM_EXIT_FAIL_ENTRY, fail),
        (uapi.KVM_EXIT_FAIL_ENTRY, fail),
        (uapi.KVM_EXIT_SYSTEM_EVENT, None),
    ] == fabric.run(main)


def test_a_vcpu_moves_on_to_a_cpu_with_its_pmu() -> None:
    """With a scheduler an entry fails, before anything leaves the guest, until the vCPU comes to another CPU."""

    async def main() -> list[Any]:
        machine = PmuMachine(setup=False, pmu_ids=(8, 9), pmu_cpus={9: (1,)})
        machine.vcpus[0].set_attr(PMU, SET_PMU, 9)
        machine.set_up()
        host = Host(here(), 2)
        machine.vcpu().share(host)

        async def program(cpu: Any) -> None:
            await cpu.store(0x0900_0000, 4, 1)
            await cpu.compute(100)
            await cpu.system_off()

        machine.vcpus[0].load(program)
        seen = []
        for number in range(3):
            if number == 1:
                host._free.remove(0)  # another VM has it from now on
            await machine.run()
            seen.append((machine.exit_reason(), fabric.now()))
        return seen

    assert [
        (uapi.KVM_EXIT_FAIL_ENTRY, 0),
        (uapi.KVM_EXIT_MMIO, 0),
        (uapi.KVM_EXIT_SYSTEM_EVENT, 100),
    ] == fabric.run(main)


@pytest.mark.spec(
    "vcpu.pmu.irq.ENODEV.no-host-pmu",
    "vcpu.pmu.init.ENODEV.no-host-pmu",
    "vcpu.pmu.filter.ENODEV.no-host-pmu",
    "vcpu.pmu.set-pmu.ENODEV.no-host-pmu",
)
@pytest.mark.parametrize("attr", range(4))
def test_no_pmu_where_the_vmm_runs(attr: int) -> None:
    """The first PMU call looks for the PMU of the physical CPU that it is made on; a host may have others only."""
    machine = PmuMachine(setup=False, pmu_ids=(8,), pmu_cpus={8: (1,)})

    assert "ENODEV" == outcome(machine.vcpus[0].set_attr, PMU, attr, 8)


@pytest.mark.spec("vcpu.pmu.init.rule.needed")
def test_a_pmu_that_is_not_initialised_keeps_a_vcpu_from_running() -> None:
    """EINVAL until KVM_ARM_VCPU_PMU_V3_INIT."""
    machine = PmuMachine(setup=False)
    vcpu = machine.vcpus[0]
    vcpu.run_area[uapi.KVM_RUN_IMMEDIATE_EXIT] = 1

    assert "EINVAL" == outcome(vcpu.ioctl, requests.KVM_RUN)
    machine.set_up()
    assert "EINTR" == outcome(vcpu.ioctl, requests.KVM_RUN)


@pytest.mark.spec(
    "vcpu.seq.pmu-setup",
    "vcpu.seq.pmu-setup.1-features",
    "vcpu.seq.pmu-setup.2-gic",
    "vcpu.seq.pmu-setup.3-set-pmu",
    "vcpu.seq.pmu-setup.4-filter",
    "vcpu.seq.pmu-setup.5-irq",
    "vcpu.seq.pmu-setup.6-init",
    "vcpu.seq.pmu-setup.7-run",
)
@pytest.mark.parametrize(
    "skipped", [None, "features", "gic", "irq", "init"], ids=lambda step: f"without {step}" if step else "all steps"
)
def test_setting_up_a_pmu(skipped: str | None) -> None:
    """In this order it succeeds and the vCPU counts; without a step that is not optional it ends in an error."""

    def steps() -> VcpuFd:
        machine = Arm(0, init=False, pmu_ids=(8, 9))
        vcpu = machine.vm.create_vcpu(0)
        vcpu.init(FEATURES if skipped != "features" else FEATURES[:1])
        if skipped != "gic":
            machine.gic.set_attr(arm.KVM_DEV_ARM_VGIC_GRP_CTRL, arm.KVM_DEV_ARM_VGIC_CTRL_INIT)
        vcpu.set_attr(PMU, SET_PMU, 9)
        vcpu.set_attr(PMU, 2, arm.KvmPmuEventFilter(INST_RETIRED, 1, DENY))
        if skipped != "irq":
            vcpu.set_attr(PMU, IRQ, PPI)
        if skipped != "init":
            vcpu.set_attr(PMU, INIT)
        return vcpu

    async def main() -> list[int]:
        vcpu = steps()
        seen: list[int] = []

        async def program(cpu: Any) -> None:
            await start(cpu, CPU_CYCLES, INST_RETIRED)
            await cpu.compute(10)
            seen.extend(await counters(cpu, 2))
            await cpu.system_off()

        vcpu.load(program)
        await vcpu.run()
        return seen

    expected = {None: [10, 0], "features": "ENODEV", "gic": "ENODEV", "irq": "ENXIO", "init": "EINVAL"}
    assert expected[skipped] == outcome(fabric.run, main)
