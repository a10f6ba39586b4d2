"""VGICv3 as a device: creation, addresses, initialisation, first run, and the errors of its attributes."""

from __future__ import annotations

import errno
import itertools

import pytest
from gic_machine import (
    ADDR,
    CPU_SYSREGS,
    CTRL,
    DIST,
    DIST_REGS,
    GICD_BASE,
    GICR_BASE,
    GICR_SIZE,
    INIT,
    LEVEL_INFO,
    NR_IRQS,
    REDIST,
    REDIST_REGION,
    REDIST_REGS,
    SAVE_PENDING_TABLES,
    GicMachine,
    refusal,
)
from its_machine import FakeVm

from fabric.devices.arm.vgic_v3 import VgicV3

UNSET = 0xFFFF_FFFF_FFFF_FFFF
PMR = 0xC230


def region(index: int, base: int, count: int, flags: int = 0) -> int:
    """A value of KVM_VGIC_V3_ADDR_TYPE_REDIST_REGION."""
    return count << 52 | base | flags << 12 | index


# -- creation


@pytest.mark.spec("vgic-v3.create.EEXIST.already", "vgic-v3.create.rule.one-per-vm")
def test_a_vm_has_one_gic() -> None:
    """The second is refused."""
    machine = GicMachine(ready=False)

    assert errno.EEXIST == refusal(VgicV3.create, machine.vm)


@pytest.mark.spec("vgic-v3.create.EBUSY.has-run", "vgic-v3.create.EBUSY.vcpu-running")
@pytest.mark.parametrize("state", ["has_run", "running"])
def test_no_gic_once_a_vcpu_ran(state: str) -> None:
    """It would come too late."""
    vm = FakeVm(2)
    setattr(vm.vcpus[1], state, True)

    assert errno.EBUSY == refusal(VgicV3.create, vm)


@pytest.mark.spec("vgic-v3.create.E2BIG.too-many-vcpus")
def test_no_gic_for_more_than_512_vcpus() -> None:
    """The model's limit."""
    assert errno.E2BIG == refusal(VgicV3.create, FakeVm(513))
    assert 0 == refusal(VgicV3.create, FakeVm(512))


@pytest.mark.spec("vgic-v3.create.ENODEV.host-cannot")
def test_a_host_with_gicv2_has_no_gicv3() -> None:
    """The device type is then not registered."""
    assert VgicV3.supported({"host_gic": 3})
    assert not VgicV3.supported({"host_gic": 2})


@pytest.mark.spec("vgic-v3.create-vcpu.EBUSY.initialised", "vgic-v3.ctrl.init.rule.freeze-vcpus")
def test_no_vcpu_after_initialisation() -> None:
    """KVM_CREATE_VCPU is busy."""
    machine = GicMachine()

    assert errno.EBUSY == refusal(machine.add_vcpu)


@pytest.mark.spec("vgic-v3.create-vcpu.EINVAL.too-many")
def test_vcpu_ids_end_at_512() -> None:
    """The id counts, not how many there are."""
    machine = GicMachine(ready=False)

    assert errno.EINVAL == refusal(machine.add_vcpu, 512)
    assert 0 == refusal(machine.add_vcpu, 511)


# -- addresses


@pytest.mark.spec("vgic-v3.addr.dist.rule.unset-read", "vgic-v3.addr.redist.rule.unset-read")
def test_an_address_not_set_reads_all_ones() -> None:
    """Distributor and redistributors alike."""
    machine = GicMachine(ready=False)

    assert UNSET == machine.get(ADDR, DIST)
    assert UNSET == machine.get(ADDR, REDIST)


@pytest.mark.parametrize(
    ("kind", "base", "code"),
    [
        pytest.param(DIST, 0x0800_1000, errno.EINVAL, id="dist-misaligned"),
        pytest.param(DIST, 0xFFFF_FFFF_FFFF_0000, errno.EINVAL, id="dist-wraps"),
        pytest.param(DIST, 1 << 36, errno.E2BIG, id="dist-beyond"),
        pytest.param(DIST, (1 << 36) - 0x1_0000, 0, id="dist-last-place"),
        pytest.param(REDIST, 0x0800_1000, errno.EINVAL, id="redist-misaligned"),
        pytest.param(REDIST, 0xFFFF_FFFF_FFFF_0000, errno.EINVAL, id="redist-wraps"),
        pytest.param(REDIST, 1 << 36, errno.E2BIG, id="redist-beyond"),
        pytest.param(REDIST, (1 << 36) - GICR_SIZE, errno.E2BIG, id="redist-second-beyond"),
        pytest.param(REDIST, (1 << 36) - 2 * GICR_SIZE, 0, id="redist-last-place"),
        pytest.param(0, GICD_BASE, errno.ENXIO, id="gicv2-address-type"),
        pytest.param(4, GICD_BASE, errno.ENXIO, id="its-address-type"),
    ],
)
@pytest.mark.spec(
    "vgic-v3.addr.dist.EINVAL.align",
    "vgic-v3.addr.dist.EINVAL.wrap",
    "vgic-v3.addr.dist.E2BIG.ipa-range",
    "vgic-v3.addr.dist.ENXIO.unsupported",
    "vgic-v3.addr.redist.EINVAL.align",
    "vgic-v3.addr.redist.EINVAL.wrap",
    "vgic-v3.addr.redist.E2BIG.ipa-range",
    "vgic-v3.addr.redist.ENXIO.unsupported",
    "vgic-v3.addr.redist-region.ENXIO.unsupported",
)
def test_where_frames_may_lie(kind: int, base: int, code: int) -> None:
    """64 KiB aligned and inside the guest's address space, the whole run of two vCPUs included."""
    machine = GicMachine(2, ready=False, ipa_bits=36)

    assert code == refusal(machine.set, ADDR, kind, base)
    if not code:
        assert base == machine.get(ADDR, kind)


@pytest.mark.spec("vgic-v3.addr.dist.EEXIST.already-set", "vgic-v3.addr.redist.EEXIST.already-set")
@pytest.mark.parametrize("kind", [DIST, REDIST])
def test_an_address_is_set_once(kind: int) -> None:
    """Also not to the same value, and before anything else is looked at."""
    machine = GicMachine(ready=False)
    machine.set(ADDR, kind, GICD_BASE)

    assert errno.EEXIST == refusal(machine.set, ADDR, kind, GICD_BASE)
    assert errno.EEXIST == refusal(machine.set, ADDR, kind, 0x1001)


@pytest.mark.spec(
    "vgic-v3.addr.dist.EFAULT.user-ptr",
    "vgic-v3.addr.redist.EFAULT.user-ptr",
    "vgic-v3.addr.redist-region.EFAULT.user-ptr",
    "vgic-v3.dist-regs.EFAULT.user-ptr",
    "vgic-v3.redist-regs.EFAULT.user-ptr",
    "vgic-v3.cpu-sysregs.EFAULT.user-ptr",
    "vgic-v3.nr-irqs.EFAULT.user-ptr",
    "vgic-v3.level-info.EFAULT.user-ptr",
)
@pytest.mark.parametrize(
    ("group", "attr"),
    [
        (ADDR, DIST),
        (ADDR, REDIST),
        (ADDR, REDIST_REGION),
        (NR_IRQS, 0),
        (DIST_REGS, 0x104),
        (REDIST_REGS, 0x14),
        (CPU_SYSREGS, PMR),
        (LEVEL_INFO, 32),
    ],
)
def test_a_bad_pointer_faults(group: int, attr: int) -> None:
    """Nothing can be read or written there."""
    machine = GicMachine(ready=group != ADDR)

    assert errno.EFAULT == refusal(machine.set, group, attr, size=0)
    assert errno.EFAULT == refusal(machine.get, group, attr, size=0)


def test_the_value_of_an_unknown_address_is_fetched_before_it_is_refused() -> None:
    """EFAULT wins over ENXIO when setting."""
    machine = GicMachine(ready=False)

    assert errno.EFAULT == refusal(machine.set, ADDR, 9, size=0)
    assert errno.ENXIO == refusal(machine.get, ADDR, 9, size=0)


@pytest.mark.spec(
    "vgic-v3.addr.redist-region.EINVAL.count",
    "vgic-v3.addr.redist-region.EINVAL.flags",
    "vgic-v3.addr.redist-region.EINVAL.wrap",
    "vgic-v3.addr.redist-region.EINVAL.index",
    "vgic-v3.addr.redist-region.EINVAL.redist-overlap",
    "vgic-v3.addr.redist-region.E2BIG.ipa-range",
    "vgic-v3.addr.redist-region.EEXIST.already-set",
    "vgic-v3.addr.redist-region.note.index-truncated",
)
@pytest.mark.parametrize(
    ("value", "code"),
    [
        pytest.param(region(1, 0x20_0000, 0), errno.EINVAL, id="count-0"),
        pytest.param(region(1, 0x20_0000, 1, flags=2), errno.EINVAL, id="flags"),
        pytest.param(region(1, 0xF_FFFF_FFFF_0000, 4095), errno.E2BIG, id="far-out"),
        pytest.param(region(0, 0x20_0000, 1), errno.EINVAL, id="index-used"),
        pytest.param(region(2, 0x20_0000, 1), errno.EINVAL, id="index-skipped"),
        pytest.param(region(1, 0x12_0000, 1), errno.EINVAL, id="overlap-behind"),
        pytest.param(region(1, 0x0E_0000, 2), errno.EINVAL, id="overlap-before"),
        pytest.param(region(1, 1 << 36, 1), errno.E2BIG, id="beyond"),
        pytest.param(region(1, (1 << 36) - GICR_SIZE, 2), errno.E2BIG, id="second-beyond"),
        pytest.param(region(1, 0x14_0000, 1), 0, id="behind"),
        pytest.param(region(257, 0x14_0000, 1), 0, id="index-257-is-1"),
    ],
)
def test_a_second_region(value: int, code: int) -> None:
    """Regions are numbered from 0 in order of registration, do not overlap, and have a count."""
    machine = GicMachine(2, ready=False, ipa_bits=36)
    machine.set(ADDR, REDIST_REGION, region(0, 0x10_0000, 2))

    assert code == refusal(machine.set, ADDR, REDIST_REGION, value)


@pytest.mark.spec("vgic-v3.addr.redist-region.rule.get-by-index", "vgic-v3.addr.redist-region.ENOENT.no-region")
def test_a_region_is_read_by_its_index() -> None:
    """The index is in the buffer before; the legacy attribute reads the base of region 0."""
    machine = GicMachine(2, ready=False)
    machine.set(ADDR, REDIST_REGION, region(0, 0x10_0000, 1))
    machine.set(ADDR, REDIST_REGION, region(1, 0x20_0000, 3))

    assert region(1, 0x20_0000, 3) == machine.get(ADDR, REDIST_REGION, 1)
    assert errno.ENOENT == refusal(machine.get, ADDR, REDIST_REGION, 2)
    assert 0x10_0000 == machine.get(ADDR, REDIST)


@pytest.mark.spec(
    "vgic-v3.addr.redist.EINVAL.mixed",
    "vgic-v3.addr.redist-region.EINVAL.mixed",
    "vgic-v3.addr.redist-region.note.mix-hole",
)
def test_mixing_both_ways_of_placing() -> None:
    """Legacy after region is refused; region after legacy only by its index, so that 1 passes."""
    machine = GicMachine(ready=False)
    machine.set(ADDR, REDIST_REGION, region(0, 0x10_0000, 1))
    assert errno.EINVAL == refusal(machine.set, ADDR, REDIST, 0x20_0000)

    machine = GicMachine(ready=False)
    machine.set(ADDR, REDIST, 0x10_0000)
    assert errno.EINVAL == refusal(machine.set, ADDR, REDIST_REGION, region(0, 0x20_0000, 1))
    assert 0 == refusal(machine.set, ADDR, REDIST_REGION, region(1, 0x20_0000, 1))


@pytest.mark.spec(
    "vgic-v3.addr.redist.EINVAL.dist-overlap",
    "vgic-v3.addr.redist-region.EINVAL.dist-overlap",
    "vgic-v3.addr.dist.rule.no-overlap-check-yet",
    "vgic-v3.first-run.EINVAL.overlap",
)
def test_overlap_with_the_distributor() -> None:
    """Found when redistributors are placed; the distributor set last, only by the first run."""
    machine = GicMachine(2, ready=False)
    machine.set(ADDR, DIST, 0x10_0000)
    assert errno.EINVAL == refusal(machine.set, ADDR, REDIST, 0x0E_0000)
    assert errno.EINVAL == refusal(machine.set, ADDR, REDIST_REGION, region(0, 0x0E_0000, 2))
    assert errno.ENOENT == refusal(machine.get, ADDR, REDIST_REGION, 0)

    machine = GicMachine(2, ready=False)
    machine.set(ADDR, REDIST, 0x0E_0000)
    machine.set(ADDR, DIST, 0x10_0000)
    machine.set(CTRL, INIT)
    assert errno.EINVAL == refusal(machine.vgic.first_run)


@pytest.mark.spec("vgic-v3.create-vcpu.EINVAL.redist-place", "vgic-v3.addr.redist.rule.size-now")
def test_a_legacy_run_grows_into_the_distributor() -> None:
    """It is measured by the vCPUs there are: the one that no longer fits is refused."""
    machine = GicMachine(0, ready=False)
    machine.set(ADDR, DIST, 0x10_0000)
    machine.set(ADDR, REDIST, 0x0C_0000)
    machine.add_vcpu()
    machine.add_vcpu()
    machine.add_vcpu()

    assert errno.EINVAL == refusal(machine.add_vcpu)


@pytest.mark.spec(
    "vgic-v3.addr.redist-region.rule.fill-order",
    "vgic-v3.addr.redist-region.rule.later-vcpus",
    "vgic-v3.addr.redist-region.rule.last-bit",
    "vgic-v3.first-run.ENXIO.no-redist",
    "vgic-v3.addr.redist.rule.fills-in-vcpu-order",
)
def test_regions_fill_in_order() -> None:
    """vCPUs take places as they are created; one without waits for a region. Last ends each run."""
    machine = GicMachine(2, ready=False)
    machine.set(ADDR, DIST, GICD_BASE)
    machine.set(ADDR, REDIST_REGION, region(0, 0x10_0000, 2))
    machine.add_vcpu()
    machine.set(CTRL, INIT)
    assert errno.ENXIO == refusal(machine.vgic.first_run)
    machine.set(ADDR, REDIST_REGION, region(1, 0x20_0000, 2))
    assert 0 == refusal(machine.vgic.first_run)

    typers = [machine.read(8, base=base) for base in (0x10_0000, 0x12_0000, 0x20_0000)]

    assert [0x000, 0x110, 0x210] == typers
    assert machine.vm.mmio.find(0x22_0000) is None


def test_last_is_not_set_where_the_next_region_follows() -> None:
    """Two adjoining regions are one run for the guest."""
    machine = GicMachine(2, ready=False)
    machine.set(ADDR, REDIST_REGION, region(0, 0x10_0000, 1))
    machine.set(ADDR, REDIST_REGION, region(1, 0x12_0000, 1))

    assert [0x000, 0x110] == [machine.read(8, base=base) for base in (0x10_0000, 0x12_0000)]


# -- number of interrupts, initialisation, first run


@pytest.mark.spec("vgic-v3.nr-irqs.EINVAL.range", "vgic-v3.nr-irqs.note.max-1024")
@pytest.mark.parametrize(
    ("count", "code"),
    [(32, errno.EINVAL), (63, errno.EINVAL), (64, 0), (65, errno.EINVAL), (992, 0), (1024, errno.EINVAL)],
)
def test_number_of_interrupts(count: int, code: int) -> None:
    """A multiple of 32 from 64 to 992."""
    machine = GicMachine(ready=False)

    assert code == refusal(machine.set, NR_IRQS, 0, count)


@pytest.mark.spec(
    "vgic-v3.nr-irqs.EBUSY.already-set", "vgic-v3.nr-irqs.rule.default", "vgic-v3.nr-irqs.rule.read-before"
)
def test_the_number_is_set_once() -> None:
    """32 before, 256 if initialised without; then fixed. The attribute number does not matter."""
    machine = GicMachine(ready=False)
    assert 32 == machine.get(NR_IRQS, 77)
    machine.set(CTRL, INIT)
    assert 256 == machine.get(NR_IRQS, 0)
    assert errno.EBUSY == refusal(machine.set, NR_IRQS, 0, 128)

    machine = GicMachine(ready=False)
    machine.set(NR_IRQS, 0, 64)
    assert errno.EBUSY == refusal(machine.set, NR_IRQS, 0, 64)
    assert errno.EINVAL == refusal(machine.set, NR_IRQS, 0, 33)


@pytest.mark.spec("vgic-v3.ctrl.init.rule.default-routing", "vgic-v3.ctrl.init.rule.addr-ignored")
def test_initialising_installs_the_flat_routing_table() -> None:
    """One pin for each SPI, once; the pointer is not looked at."""
    machine = GicMachine(ready=False)
    pins: list[int] = []
    machine.vm.set_default_routing = pins.append  # type: ignore[assignment, method-assign]

    machine.set(CTRL, INIT, size=0)
    machine.set(CTRL, INIT, size=0)

    assert [224] == pins


@pytest.mark.spec("vgic-v3.create.rule.vcpu-order-free")
def test_vcpus_may_come_before_or_after_the_gic() -> None:
    """Either way they have their interface and their redistributor."""
    early, late = GicMachine(2, ready=False), GicMachine(0, ready=False)
    for machine in (early, late):
        machine.set(ADDR, REDIST, GICR_BASE)
        machine.set(ADDR, DIST, GICD_BASE)
    late.add_vcpu()
    late.add_vcpu()
    for machine in (early, late):
        machine.set(CTRL, INIT)

    assert early.vgic.state() == late.vgic.state()
    assert 0 == refusal(early.vgic.first_run) == refusal(late.vgic.first_run)


@pytest.mark.spec(
    "vgic-v3.ctrl.init.rule.idempotent",
    "vgic-v3.ctrl.init.ENXIO.read",
    "vgic-v3.ctrl.save-pending-tables.ENXIO.read",
)
def test_initialising_again_does_nothing() -> None:
    """And the attribute cannot be read."""
    machine = GicMachine()
    spis = machine.vgic.spis

    assert 0 == refusal(machine.set, CTRL, INIT)
    assert spis is machine.vgic.spis
    assert errno.ENXIO == refusal(machine.get, CTRL, INIT)
    assert errno.ENXIO == refusal(machine.get, CTRL, SAVE_PENDING_TABLES)


@pytest.mark.spec("vgic-v3.any.ENXIO.unknown")
@pytest.mark.parametrize(("group", "attr"), [(2, 0), (8, 0), (9, 0), (CTRL, 1), (CTRL, 4), (ADDR, 4)])
def test_unknown_attributes(group: int, attr: int) -> None:
    """Groups of other devices, and attributes that CTRL and ADDR do not have."""
    machine = GicMachine()

    assert errno.ENXIO == machine.has(group, attr)
    assert errno.ENXIO == refusal(machine.get, group, attr)
    assert errno.ENXIO == refusal(machine.set, group, attr)


@pytest.mark.spec(
    "vgic-v3.first-run.ENXIO.no-dist",
    "vgic-v3.first-run.EBUSY.not-initialised",
    "vgic-v3.ctrl.init.rule.mandatory",
)
def test_the_first_run_needs_addresses_then_initialisation() -> None:
    """What is missing comes out in that order."""
    machine = GicMachine(ready=False)
    assert errno.ENXIO == refusal(machine.vgic.first_run)
    machine.set(ADDR, REDIST, GICR_BASE)
    assert errno.ENXIO == refusal(machine.vgic.first_run)
    machine.set(ADDR, DIST, GICD_BASE)
    assert errno.EBUSY == refusal(machine.vgic.first_run)
    assert machine.vm.mmio.find(GICD_BASE) is None

    machine.set(CTRL, INIT)
    machine.vgic.first_run()
    machine.vgic.first_run()

    assert machine.vm.mmio.find(GICD_BASE) is not None


@pytest.mark.spec(
    "vgic-v3.dist-regs.EBUSY.not-initialised",
    "vgic-v3.redist-regs.EBUSY.not-initialised",
    "vgic-v3.cpu-sysregs.EBUSY.not-initialised",
    "vgic-v3.level-info.EBUSY.not-initialised",
    "vgic-v3.dist-regs.EBUSY.vcpu-running",
    "vgic-v3.redist-regs.EBUSY.vcpu-running",
    "vgic-v3.cpu-sysregs.EBUSY.vcpu-running",
    "vgic-v3.level-info.EBUSY.vcpu-running",
    "vgic-v3.ctrl.save-pending-tables.EBUSY.vcpu-running",
    "vgic-v3.ctrl.save-pending-tables.ENXIO.not-configured",
)
@pytest.mark.parametrize(
    ("group", "attr", "before"),
    [
        (DIST_REGS, 0x104, errno.EBUSY),
        (REDIST_REGS, 0x14, errno.EBUSY),
        (CPU_SYSREGS, PMR, errno.EBUSY),
        (LEVEL_INFO, 32, errno.EBUSY),
        (CTRL, SAVE_PENDING_TABLES, errno.ENXIO),
    ],
)
def test_registers_need_an_initialised_gic_and_vcpus_that_stand_still(group: int, attr: int, before: int) -> None:
    """EBUSY (saving pending tables before initialisation: ENXIO)."""
    machine = GicMachine(ready=False)
    assert before == refusal(machine.set, group, attr)
    machine.set(CTRL, INIT)
    assert 0 == refusal(machine.set, group, attr)

    machine.vm.vcpus[0].running = True

    assert errno.EBUSY == refusal(machine.set, group, attr)
    if group != CTRL:
        assert errno.EBUSY == refusal(machine.get, group, attr)


@pytest.mark.spec(
    "vgic-v3.redist-regs.EINVAL.mpidr",
    "vgic-v3.cpu-sysregs.EINVAL.mpidr",
    "vgic-v3.level-info.EINVAL.mpidr",
    "vgic-v3.dist-regs.rule.mpidr-ignored",
    "vgic-v3.redist-regs.rule.affinity",
)
@pytest.mark.parametrize(
    ("group", "attr", "code"),
    [
        (REDIST_REGS, 0x14, errno.EINVAL),
        (CPU_SYSREGS, PMR, errno.EINVAL),
        (LEVEL_INFO, 32, errno.EINVAL),
        (DIST_REGS, 0x104, 0),
    ],
)
def test_the_affinity_names_a_vcpu(group: int, attr: int, code: int) -> None:
    """Aff3.Aff2.Aff1.Aff0 in the upper half; the distributor has no use for it."""
    machine = GicMachine(2)

    assert 0 == refusal(machine.get, group, 1 << 32 | attr)
    assert code == refusal(machine.get, group, 2 << 32 | attr)
    assert code == refusal(machine.set, group, 1 << 56 | attr)


@pytest.mark.spec("vgic-v3.dist-regs.EINVAL.no-vcpu")
def test_distributor_registers_need_a_vcpu() -> None:
    """On whose behalf they are accessed."""
    machine = GicMachine(0, ready=False)

    assert errno.EINVAL == refusal(machine.get, DIST_REGS, 0)
    assert errno.EINVAL == refusal(machine.set, DIST_REGS, 0)
    assert errno.EINVAL == machine.has(DIST_REGS, 0)


def test_affinity_is_that_of_the_moment() -> None:
    """A vCPU whose affinity is changed is found by the new one."""
    machine = GicMachine(2)
    machine.get(REDIST_REGS, 1 << 32 | 0x14)

    machine.vm.vcpus[1].mpidr = 0x100

    assert 0 == refusal(machine.get, REDIST_REGS, 0x100 << 32 | 0x14)
    assert errno.EINVAL == refusal(machine.get, REDIST_REGS, 1 << 32 | 0x14)


def test_handlers_raise_only_what_their_rows_list() -> None:
    """Every attribute of the table, in every state, with good and bad pointers."""
    attrs = (0, 2, 3, 5, 8, 0x13, 0x104, PMR, 0xC664, 0xC645, 0x400, 1 << 32, 5 << 32)
    seen: set[tuple[str, int]] = set()
    table = VgicV3.attributes
    for ready, (group, row) in itertools.product((False, True), table.rows()):
        allowed = {0, *row.errors, *table.unknown.values()}
        for attr in attrs if row.number is None else (row.number,):
            if table.find(group.number, attr) is not row:
                continue
            for value, size in itertools.product((0, 0x1000, 0x10_0000, 1 << 52 | 0x20_0000, UNSET), (0, 8)):
                machine = GicMachine(2, ready=ready)
                for code in (
                    refusal(machine.set, group.number, attr, value, size=size),
                    refusal(machine.get, group.number, attr, value, size=size),
                    machine.has(group.number, attr),
                ):
                    seen.add((row.id, code))
                    assert code in allowed
    assert {("vgic-v3.nr-irqs", errno.EINVAL), ("vgic-v3.any", errno.ENXIO)} <= seen
