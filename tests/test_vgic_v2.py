"""VGICv2 as a device: creation, addresses, initialisation, first run, injection, and the errors of its attributes."""

from __future__ import annotations

import errno

import pytest
from gic_machine import ADDR, CTRL, DIST_REGS, INIT, NR_IRQS, SAVE_PENDING_TABLES, refusal
from gicv2_machine import (
    CPU,
    CPU_REGS,
    DIR,
    DIST,
    GICC_BASE,
    GICD_BASE,
    ICFGR,
    ISENABLER,
    ISPENDR,
    ITARGETSR,
    Gicv2Machine,
)
from its_machine import FakeVcpu, FakeVm

from fabric.devices.arm.vgic_v2 import VgicV2
from fabric.devices.attributes import Attr, Group

UNSET = 0xFFFF_FFFF_FFFF_FFFF
TYPER = 4
REDIST_REGION = 5

# -- creation


@pytest.mark.spec("vgic-v2", "vgic-v2.create", "vgic-v2.create.EEXIST.already", "vgic-v2.create.rule.one-per-vm")
def test_a_vm_has_one_gic() -> None:
    """The second is refused."""
    machine = Gicv2Machine(ready=False)

    assert machine.vgic is machine.vm.irqchip
    assert errno.EEXIST == refusal(VgicV2.create, machine.vm)


@pytest.mark.spec("vgic-v2.create.EBUSY.has-run", "vgic-v2.create.EBUSY.vcpu-running")
@pytest.mark.parametrize("state", ["has_run", "running"])
def test_no_gic_once_a_vcpu_ran(state: str) -> None:
    """It would come too late."""
    vm = FakeVm(2)
    setattr(vm.vcpus[1], state, True)

    assert errno.EBUSY == refusal(VgicV2.create, vm)


@pytest.mark.spec("vgic-v2.create.EEXIST.already", "vgic-v2.create.EBUSY.has-run", "vgic-v2.create.EBUSY.vcpu-running")
def test_of_several_reasons_the_first_counts() -> None:
    """A vCPU that runs, then a GIC that is there, then a vCPU that has run."""
    machine = Gicv2Machine(ready=False)
    machine.vm.vcpus[0].has_run = True
    assert errno.EEXIST == refusal(VgicV2.create, machine.vm)
    machine.vm.vcpus[0].running = True
    assert errno.EBUSY == refusal(VgicV2.create, machine.vm)


@pytest.mark.spec("vgic-v2.create.E2BIG.too-many-vcpus")
def test_no_gic_for_more_than_eight_vcpus() -> None:
    """The model's limit: an SGI names its targets in eight bits, and its sender in three."""
    assert errno.E2BIG == refusal(VgicV2.create, FakeVm(9))
    assert 0 == refusal(VgicV2.create, FakeVm(8))


@pytest.mark.spec("vgic-v2.create.ENODEV.host-cannot")
@pytest.mark.parametrize(
    ("options", "offered"),
    [
        pytest.param({"host_gic": 2}, True, id="gicv2"),
        pytest.param({"host_gic": 3}, False, id="gicv3"),
        pytest.param({"host_gic": 3, "gicv2_compat": True}, True, id="gicv3-with-gicv"),
        pytest.param({"host_gic": 0, "gicv2_compat": True}, False, id="none"),
    ],
)
def test_what_hosts_offer_it(options: dict[str, int], offered: bool) -> None:
    """One with a GICv2, or with a GICv3 that has the frame of a GICv2 for guests."""
    assert offered == VgicV2.supported(options)


@pytest.mark.spec("vgic-v2.create.rule.vcpu-order-free")
def test_vcpus_may_come_before_and_after() -> None:
    """Until the GIC is initialised."""
    machine = Gicv2Machine(1, ready=False)
    machine.add_vcpu()
    machine.place()
    machine.run()

    assert [0, 1] == [cpu.index for cpu in machine.vgic.cpus]
    assert [1, 2] == [machine.gicd(ITARGETSR, size=1, cpu=n) for n in (0, 1)]


@pytest.mark.spec("vgic-v2.create-vcpu", "vgic-v2.create-vcpu.EBUSY.initialised", "vgic-v2.ctrl.init.rule.freeze-vcpus")
def test_no_vcpu_after_initialisation() -> None:
    """KVM_CREATE_VCPU is busy."""
    machine = Gicv2Machine(ready=False)
    machine.set(CTRL, INIT)

    assert errno.EBUSY == refusal(machine.add_vcpu)


@pytest.mark.spec("vgic-v2.create-vcpu.EINVAL.too-many")
def test_vcpu_ids_end_at_eight() -> None:
    """The id counts, not how many there are; before initialisation, else it is busy."""
    machine = Gicv2Machine(ready=False)

    assert errno.EINVAL == refusal(machine.add_vcpu, 8)
    assert 0 == refusal(machine.add_vcpu, 7)


# -- addresses


@pytest.mark.spec("vgic-v2.addr.dist.rule.unset-read", "vgic-v2.addr.cpu.rule.unset-read")
def test_an_address_not_set_reads_all_ones() -> None:
    """Distributor and CPU interface alike."""
    machine = Gicv2Machine(ready=False)

    assert UNSET == machine.get(ADDR, DIST) == machine.get(ADDR, CPU)


@pytest.mark.parametrize(
    ("kind", "base", "code"),
    [
        pytest.param(DIST, 0x0800_0800, errno.EINVAL, id="dist-misaligned"),
        pytest.param(DIST, 0xFFFF_FFFF_FFFF_F000, errno.EINVAL, id="dist-wraps"),
        pytest.param(DIST, 0xFFFF_FFFF_FFFF_E000, errno.E2BIG, id="dist-below-the-end-of-64-bits"),
        pytest.param(DIST, 1 << 36, errno.E2BIG, id="dist-beyond"),
        pytest.param(DIST, (1 << 36) - 0x1000, 0, id="dist-last-place"),
        pytest.param(CPU, 0x0801_0FFF, errno.EINVAL, id="cpu-misaligned"),
        pytest.param(CPU, 0xFFFF_FFFF_FFFF_E000, errno.EINVAL, id="cpu-wraps"),
        pytest.param(CPU, (1 << 36) - 0x1000, errno.E2BIG, id="cpu-second-page-beyond"),
        pytest.param(CPU, (1 << 36) - 0x2000, 0, id="cpu-last-place"),
        pytest.param(2, GICD_BASE, errno.ENXIO, id="gicv3-distributor"),
        pytest.param(3, GICD_BASE, errno.ENXIO, id="gicv3-redistributors"),
        pytest.param(4, GICD_BASE, errno.ENXIO, id="its"),
        pytest.param(REDIST_REGION, GICD_BASE, errno.ENXIO, id="gicv3-region"),
        pytest.param(1 << 32, GICD_BASE, errno.ENXIO, id="all-of-the-number-counts"),
    ],
)
@pytest.mark.spec(
    "vgic-v2.addr.dist",
    "vgic-v2.addr.dist.EINVAL.align",
    "vgic-v2.addr.dist.EINVAL.wrap",
    "vgic-v2.addr.dist.E2BIG.ipa-range",
    "vgic-v2.addr.dist.ENXIO.unsupported",
    "vgic-v2.addr.cpu",
    "vgic-v2.addr.cpu.EINVAL.align",
    "vgic-v2.addr.cpu.EINVAL.wrap",
    "vgic-v2.addr.cpu.E2BIG.ipa-range",
    "vgic-v2.addr.cpu.ENXIO.unsupported",
    "vgic-v2.addr.cpu.note.size",
)
def test_where_frames_may_lie(kind: int, base: int, code: int) -> None:
    """4 KiB aligned and inside the guest's address space, the distributor with 4 KiB, the CPU interface with 8."""
    machine = Gicv2Machine(2, ready=False, ipa_bits=36)

    assert code == refusal(machine.set, ADDR, kind, base)
    if code == errno.ENXIO:
        assert errno.ENXIO == machine.has(ADDR, kind) == refusal(machine.get, ADDR, kind)
    else:
        assert (UNSET if code else base) == machine.get(ADDR, kind)
        assert 0 == machine.has(ADDR, kind)


@pytest.mark.spec("vgic-v2.addr.dist.EEXIST.already-set", "vgic-v2.addr.cpu.EEXIST.already-set")
@pytest.mark.parametrize("kind", [DIST, CPU])
def test_an_address_is_set_once(kind: int) -> None:
    """Also not to the same, and that goes before what is wrong with the new one."""
    machine = Gicv2Machine(ready=False)
    machine.place()
    base = machine.get(ADDR, kind)

    assert [errno.EEXIST] * 3 == [refusal(machine.set, ADDR, kind, addr) for addr in (base, 0x1000, 1)]
    assert base == machine.get(ADDR, kind)


@pytest.mark.spec(
    "vgic-v2.addr.dist.EFAULT.user-ptr",
    "vgic-v2.addr.cpu.EFAULT.user-ptr",
    "vgic-v2.nr-irqs.EFAULT.user-ptr",
    "vgic-v2.dist-regs.EFAULT.user-ptr",
    "vgic-v2.cpu-regs.EFAULT.user-ptr",
)
@pytest.mark.parametrize(
    ("group", "attr", "size"), [(ADDR, DIST, 7), (ADDR, CPU, 7), (NR_IRQS, 0, 3), (DIST_REGS, 0, 3), (CPU_REGS, 0, 3)]
)
def test_a_buffer_that_is_too_short(group: int, attr: int, size: int) -> None:
    """EFAULT in both directions, and nothing changes."""
    machine = Gicv2Machine(ready=False)

    assert errno.EFAULT == refusal(machine.set, group, attr, 1, size=size)
    assert not machine.vgic.initialized
    assert errno.EFAULT == refusal(machine.get, group, attr, size=size)
    assert (UNSET, UNSET) == (machine.get(ADDR, DIST), machine.get(ADDR, CPU))


@pytest.mark.spec("vgic-v2.addr.dist.ENXIO.unsupported", "vgic-v2.any", "vgic-v2.any.ENXIO.unknown")
@pytest.mark.parametrize("kind", [2, 3, 4, REDIST_REGION, 6])
def test_an_unknown_address_type_is_noticed_after_the_value_is_fetched(kind: int) -> None:
    """Setting touches user memory first; reading only for the type that takes an index."""
    machine = Gicv2Machine(ready=False)

    assert errno.EFAULT == refusal(machine.set, ADDR, kind, size=7)
    assert (errno.EFAULT if kind == REDIST_REGION else errno.ENXIO) == refusal(machine.get, ADDR, kind, size=7)


@pytest.mark.spec("vgic-v2.addr.cpu.rule.shared", "vgic-v2.addr.cpu.note.size")
def test_one_cpu_interface_frame_for_all() -> None:
    """Each vCPU meets its own; GICC_DIR is in the second page."""
    machine = Gicv2Machine(2)
    machine.gicc(4, 0x80, cpu=1)

    assert (0xF0, 0x80) == (machine.gicc(4), machine.gicc(4, cpu=1))
    assert machine.vm.mmio.find(GICC_BASE + DIR) is not None
    assert machine.vm.mmio.find(GICC_BASE + 0x2000) is None


# -- number of interrupts


@pytest.mark.spec(
    "vgic-v2.nr-irqs",
    "vgic-v2.nr-irqs.EINVAL.range",
    "vgic-v2.nr-irqs.rule.read-before",
    "vgic-v2.nr-irqs.note.max-1024",
)
@pytest.mark.parametrize("count", [0, 32, 63, 65, 1019, 1020, 1024, 64, 96, 992])
def test_how_many_interrupts_there_may_be(count: int) -> None:
    """A multiple of 32 from 64 to 992; 32 is what is read before, and the attribute number does not matter."""
    machine = Gicv2Machine(ready=False)
    good = count in (64, 96, 992)

    assert 32 == machine.get(NR_IRQS, 0)
    assert (0 if good else errno.EINVAL) == refusal(machine.set, NR_IRQS, 77, count)
    assert (count if good else 32) == machine.get(NR_IRQS, 1 << 63)
    assert 0 == machine.has(NR_IRQS, 12345)


@pytest.mark.spec("vgic-v2.nr-irqs.EBUSY.already-set", "vgic-v2.nr-irqs.EBUSY.ready", "vgic-v2.nr-irqs.EINVAL.range")
@pytest.mark.parametrize("how", ["set", "init", "register", "run"])
def test_the_number_is_fixed_once(how: str) -> None:
    """By setting it, by initialisation of any kind, by the first run; a bad number is bad all the same."""
    machine = Gicv2Machine(ready=False)
    if how == "set":
        machine.set(NR_IRQS, 0, 64)
    elif how == "init":
        machine.set(CTRL, INIT)
    elif how == "register":
        machine.get(DIST_REGS, 0)
    else:
        machine.place()
        machine.vgic.first_run()

    assert errno.EBUSY == refusal(machine.set, NR_IRQS, 0, 64)
    assert errno.EINVAL == refusal(machine.set, NR_IRQS, 0, 65)


@pytest.mark.spec("vgic-v2.nr-irqs.rule.default")
def test_there_are_256_by_default() -> None:
    """From initialisation on."""
    machine = Gicv2Machine(ready=False)
    machine.set(CTRL, INIT)

    assert 256 == machine.get(NR_IRQS, 0)
    assert 7 == machine.get(DIST_REGS, TYPER) & 0x1F


# -- initialisation


@pytest.mark.spec(
    "vgic-v2.ctrl.init",
    "vgic-v2.ctrl.init.rule.idempotent",
    "vgic-v2.ctrl.init.rule.addresses-not-needed",
    "vgic-v2.ctrl.init.rule.addr-ignored",
    "vgic-v2.ctrl.init.ENXIO.not-configured",
)
def test_initialisation_asks_for_nothing() -> None:
    """No addresses (ENXIO is for the first run), no parameter; the second time it does nothing."""
    machine = Gicv2Machine(ready=False)

    assert 0 == refusal(machine.set, CTRL, INIT, size=0)
    irq = machine.spi(40)
    assert 0 == refusal(machine.set, CTRL, INIT, 0xDEAD, size=8)
    assert irq is machine.vgic.spis[8]


@pytest.mark.spec("vgic-v2.ctrl.init.ENODEV.no-vcpu")
def test_initialisation_without_vcpus() -> None:
    """The document says ENODEV; the kernel initialises, and no vCPU can come any more."""
    machine = Gicv2Machine(0, ready=False)

    assert 0 == refusal(machine.set, CTRL, INIT)
    assert errno.EBUSY == refusal(machine.add_vcpu)
    assert errno.EINVAL == refusal(machine.get, DIST_REGS, 0)
    machine.vgic.inject_spi(40, True)
    assert 1 == machine.check().pending


@pytest.mark.spec("vgic-v2.ctrl.init.rule.default-routing")
def test_initialisation_installs_the_flat_routes() -> None:
    """A pin for each SPI."""
    installed: list[int] = []
    machine = Gicv2Machine(ready=False)
    machine.vm.set_default_routing = installed.append  # type: ignore[method-assign]
    machine.set(NR_IRQS, 0, 96)
    machine.set(CTRL, INIT)
    machine.set(CTRL, INIT)

    assert [64] == installed


@pytest.mark.spec(
    "vgic-v2.ctrl.init.EBUSY.creating-vcpu",
    "vgic-v2.dist-regs.EBUSY.creating-vcpu",
    "vgic-v2.cpu-regs.EBUSY.creating-vcpu",
)
def test_no_initialisation_while_a_vcpu_is_created() -> None:
    """Also not by itself: one that the VM knows and that has no CPU interface yet would be left out."""
    machine = Gicv2Machine(ready=False)
    machine.vm.vcpus.append(FakeVcpu(1))

    answers = [refusal(machine.set, CTRL, INIT), refusal(machine.get, DIST_REGS, 0), refusal(machine.get, CPU_REGS, 0)]

    assert [errno.EBUSY] * 3 == answers
    machine.vgic.vcpu_created(machine.vm.vcpus[1])
    assert 0 == refusal(machine.set, CTRL, INIT)


@pytest.mark.spec(
    "vgic-v2.ctrl.init.rule.optional",
    "vgic-v2.dist-regs.rule.lazy-init",
    "vgic-v2.irq-line.rule.lazy-init",
)
@pytest.mark.parametrize("how", ["read", "write", "cpu-read", "spi", "ppi", "run"])
def test_it_initialises_by_itself(how: str) -> None:
    """At the first register access, injection or run; asking whether a register exists is none."""
    machine = Gicv2Machine(ready=False)
    machine.has(DIST_REGS, 0)
    assert not machine.vgic.initialized

    match how:
        case "read":
            machine.get(DIST_REGS, 0)
        case "write":
            machine.set(DIST_REGS, 0, 0)
        case "cpu-read":
            machine.get(CPU_REGS, 0)
        case "spi":
            machine.vgic.inject_spi(40, True)
        case "ppi":
            machine.vgic.inject_ppi(0, 20, False)
        case "run":
            machine.place()
            machine.vgic.first_run()

    assert machine.vgic.initialized
    assert 256 == machine.get(NR_IRQS, 0)


@pytest.mark.spec("vgic-v2.ctrl.init.ENXIO.read", "vgic-v2.any.ENXIO.unknown")
@pytest.mark.parametrize(
    ("group", "attr"),
    [
        pytest.param(CTRL, 1, id="its-save-tables"),
        pytest.param(CTRL, SAVE_PENDING_TABLES, id="save-pending-tables"),
        pytest.param(CTRL, 4, id="its-reset"),
        pytest.param(5, 0, id="redist-regs"),
        pytest.param(6, 0xC230, id="cpu-sysregs"),
        pytest.param(7, 0, id="level-info"),
        pytest.param(8, 0, id="its-regs"),
        pytest.param(9, 0, id="group-9"),
        pytest.param(0xFFFF_FFFF, 0, id="last-group"),
    ],
)
def test_unknown_attributes(group: int, attr: int) -> None:
    """ENXIO whatever is done; and what initialises cannot be read."""
    machine = Gicv2Machine(ready=False)

    assert [errno.ENXIO] * 3 == [
        refusal(machine.set, group, attr, size=8),
        refusal(machine.get, group, attr, size=8),
        machine.has(group, attr),
    ]
    assert (errno.ENXIO, 0) == (refusal(machine.get, CTRL, INIT), machine.has(CTRL, INIT))


# -- first run


@pytest.mark.spec("vgic-v2.first-run", "vgic-v2.first-run.ENXIO.no-address")
@pytest.mark.parametrize("missing", [DIST, CPU])
def test_a_run_needs_both_addresses(missing: int) -> None:
    """ENXIO, and nothing answers."""
    machine = Gicv2Machine(ready=False)
    machine.set(ADDR, 1 - missing, GICD_BASE)

    assert errno.ENXIO == refusal(machine.vgic.first_run)
    assert machine.vm.mmio.find(GICD_BASE) is None


@pytest.mark.spec("vgic-v2.first-run.EINVAL.overlap", "vgic-v2.addr.dist.rule.no-overlap-check-yet")
@pytest.mark.parametrize(
    ("dist", "cpu", "code"),
    [
        pytest.param(0x1000, 0x1000, errno.EINVAL, id="same"),
        pytest.param(0x2000, 0x1000, errno.EINVAL, id="in-the-second-page"),
        pytest.param(0x3000, 0x1000, 0, id="behind"),
        pytest.param(0x0, 0x1000, 0, id="before"),
    ],
)
def test_the_first_run_finds_an_overlap(dist: int, cpu: int, code: int) -> None:
    """Setting the addresses does not."""
    machine = Gicv2Machine(ready=False)
    assert [0, 0] == [refusal(machine.set, ADDR, DIST, dist), refusal(machine.set, ADDR, CPU, cpu)]

    assert code == refusal(machine.vgic.first_run)
    assert (not code) == (machine.vm.mmio.find(dist) is not None)
    assert code == refusal(machine.vgic.first_run)


# -- injection


@pytest.mark.spec("vgic-v2.irq-line", "vgic-v2.irq-line.rule.level")
def test_lines_and_edges() -> None:
    """A level-triggered interrupt follows its line; an edge-triggered one latches each high and ignores lows."""
    machine = Gicv2Machine()
    machine.user(DIST_REGS, ICFGR + 8, 0xAAAA_AAA8)  # SPI 32 is level-triggered
    for intid in (32, 33, 33):
        machine.vgic.inject_spi(intid, True)
    assert 0b11 == machine.gicd(ISPENDR + 4)
    for intid in (32, 33):
        machine.vgic.inject_spi(intid, False)

    assert 0b10 == machine.gicd(ISPENDR + 4)
    statement = machine.check()
    assert (3, 1, 1, {"line lowered": 1}) == (
        statement.raised, statement.coalesced, statement.pending, statement.dropped
    )  # fmt: skip


@pytest.mark.spec("vgic-v2.irq-line.rule.owned")
def test_the_line_of_an_in_kernel_device_is_its_own() -> None:
    """What userspace injects there is dropped without a sign."""
    machine = Gicv2Machine()
    machine.cpu.private[27].owner = object()
    machine.spi(40).owner = object()

    machine.vgic.inject_ppi(0, 27, True)
    machine.vgic.inject_spi(40, True)

    assert 0 == machine.check().raised


@pytest.mark.spec("vgic-v2.irq-line.rule.lazy-init")
def test_there_must_be_such_an_interrupt() -> None:
    """EINVAL after initialisation took place, for SPIs beyond the number and what is no PPI before."""
    machine = Gicv2Machine(ready=False)
    assert [errno.EINVAL] * 3 == [
        refusal(machine.vgic.inject_spi, 31, True),
        refusal(machine.vgic.inject_ppi, 0, 15, True),
        refusal(machine.vgic.inject_ppi, 1, 16, True),
    ]
    assert not machine.vgic.initialized

    assert errno.EINVAL == refusal(machine.vgic.inject_spi, 256, True)
    assert machine.vgic.initialized


# -- register attributes


@pytest.mark.spec(
    "vgic-v2.dist-regs.EINVAL.vcpu-index",
    "vgic-v2.cpu-regs.EINVAL.vcpu-index",
    "vgic-v2.dist-regs.note.vcpu-index-is-id",
    "vgic-v2.cpu-regs.note.vcpu-index-is-id",
)
@pytest.mark.parametrize("group", [DIST_REGS, CPU_REGS])
def test_registers_go_by_the_id_of_a_vcpu(group: int) -> None:
    """The document says index; bits above are ignored, and that goes before a bad pointer and initialisation."""
    machine = Gicv2Machine(1, ready=False)
    machine.add_vcpu(5)
    assert [errno.EINVAL] * 3 == [
        refusal(machine.get, group, 1 << 32, size=0),
        refusal(machine.set, group, 1 << 32, size=0),
        machine.has(group, 1 << 32),
    ]
    assert not machine.vgic.initialized

    assert 0 == machine.get(group, 0xABCD_EF05_0000_0000)
    assert 0 == machine.has(group, 5 << 32)


@pytest.mark.spec("vgic-v2.dist-regs.EBUSY.vcpu-running", "vgic-v2.cpu-regs.EBUSY.vcpu-running")
@pytest.mark.parametrize("group", [DIST_REGS, CPU_REGS])
def test_registers_want_vcpus_to_stand_still(group: int) -> None:
    """Any of them; asking whether a register exists does not."""
    machine = Gicv2Machine(2)
    machine.stop()
    machine.vm.vcpus[1].running = True

    assert [errno.EBUSY] * 2 == [refusal(machine.get, group, 0), refusal(machine.set, group, 0)]
    assert errno.EFAULT == refusal(machine.set, group, 0, size=0)
    assert 0 == machine.has(group, 0)


@pytest.mark.spec(
    "vgic-v2.dist-regs",
    "vgic-v2.dist-regs.ENXIO.has-align",
    "vgic-v2.dist-regs.ENXIO.no-register",
    "vgic-v2.dist-regs.note.enxio-only-has",
    "vgic-v2.cpu-regs",
    "vgic-v2.cpu-regs.ENXIO.has-align",
    "vgic-v2.cpu-regs.ENXIO.no-register",
    "vgic-v2.cpu-regs.note.enxio-only-has",
)
@pytest.mark.parametrize(("group", "there"), [(DIST_REGS, 0x100), (CPU_REGS, 0xD0)])
def test_where_there_is_no_register(group: int, there: int) -> None:
    """Only the has-test says ENXIO: reading gives zero, and writing does nothing."""
    machine = Gicv2Machine(ready=False)

    assert 0 == machine.has(group, there)
    for offset in (there + 1, there + 2, 0xF80, 0xFFC, 0x1000, 0xFFFF_FFFC):
        assert errno.ENXIO == machine.has(group, offset)
        assert 0 == refusal(machine.set, group, offset, 0xFFFF_FFFF)
        assert 0 == machine.get(group, offset)


@pytest.mark.spec("vgic-v2.dist-regs.note.has-before-init")
def test_before_initialisation_there_are_32_interrupts() -> None:
    """So the has-test finds no registers of SPIs, and the first real access does."""
    machine = Gicv2Machine(ready=False)
    registers = (ISENABLER + 4, 0x420, ITARGETSR + 32, ICFGR + 8)

    assert [errno.ENXIO] * 4 == [machine.has(DIST_REGS, register) for register in registers]
    assert 0xAAAA_AAAA == machine.get(DIST_REGS, ICFGR + 8)
    assert [0] * 4 == [machine.has(DIST_REGS, register) for register in registers]


def test_handlers_keep_to_their_errors() -> None:
    """No attribute answers with an errno that its row does not list, on whatever is there and however it is called."""

    def answers(group: Group, row: Attr, machine: Gicv2Machine) -> set[int]:
        number = row.number if row.number is not None else 0xFFFF_FFFF
        calls = [
            (op, args, size)
            for op in (machine.set, machine.get)
            for args in ((0,), (0x1000,), (1 << 44,), (0xFFFF_FFFF_FFFF_F000,))
            for size in (0, 8)
        ]
        seen = {refusal(op, group.number, number, *(args if op == machine.set else ()), size=size)
                for op, args, size in calls}  # fmt: skip
        return {code for code in seen if code not in (0, errno.ENXIO)}

    for group, row in VgicV2.attributes.rows():
        for machine in (Gicv2Machine(ready=False), Gicv2Machine(0, ready=False), Gicv2Machine(2)):
            assert answers(group, row, machine) <= set(row.errors)
