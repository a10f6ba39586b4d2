"""The irqchip of x86 VMs through its calls: creation, lines, state of the chips, routes, messages, irqfds."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from x86_guests import X86Vm, simulate
from x86_machine import Pc, outcome

from fabric.kvm.typed import msi_route, pin_route
from fabric.uapi import ioctl as requests
from fabric.uapi import kvm as uapi
from fabric.uapi.x86 import KvmIrqchip

MASTER, SLAVE, IOAPIC = 0, 1, 2
MASKED, LEVEL, REMOTE_IRR = 1 << 16, 1 << 15, 1 << 14
ADDRESS = 0xFEE0_0000
WIDE_IDS, NO_QUIRK = 1, 2


# -- creation


@pytest.mark.spec("api.create-irqchip", "api.create-irqchip.rule.x86", "api.cap.irqchip")
def test_create_irqchip() -> None:
    """KVM_CREATE_IRQCHIP: two PICs and an IOAPIC, and local APICs for the vCPUs that come."""
    pc = Pc()

    assert (0xF8, 0xDE) == (pc.chip(MASTER).elcr_mask, pc.chip(SLAVE).elcr_mask)
    assert (MASKED,) * 24 == pc.chip(IOAPIC).redirtbl
    assert 0xFEC0_0000 == pc.chip(IOAPIC).base_address
    assert 0x1FF == pc.word(0xF0)
    assert 1 == pc.vm.check_extension(uapi.KVM_CAP_IRQCHIP)


@pytest.mark.spec("api.create-irqchip.rule.x86", "api.create-irqchip.rule.x86-pins", "api.irq-line.rule.gsi")
@pytest.mark.parametrize("gsi", range(24))
def test_default_routes(gsi: int) -> None:
    """GSI n goes to IOAPIC pin n, and below 16 also to PIC pin n: of the master up to 7, then of the slave."""
    pc = Pc()
    pc.line(gsi)

    assert 1 << gsi == pc.chip(IOAPIC).irr
    expected = [0, 0]
    if gsi < 16:
        expected[gsi // 8] = 1 << gsi % 8
    if 8 <= gsi < 16:
        expected[0] = 1 << 2
    assert expected == [pc.chip(MASTER).irr, pc.chip(SLAVE).irr]


@pytest.mark.spec("api.create-irqchip.EEXIST.already", "api.cap.split-irqchip.EEXIST.too-late")
@pytest.mark.parametrize("irqchip", ["whole", "split"])
def test_one_irqchip(irqchip: str) -> None:
    """There is one, whole or split: EEXIST for either, with vCPUs or without."""
    for vcpus in (0, 1):
        pc = Pc(vcpus, irqchip=irqchip)
        assert "EEXIST" == outcome(pc.vm.ioctl, requests.KVM_CREATE_IRQCHIP)
        assert "EEXIST" == outcome(pc.enable, uapi.KVM_CAP_SPLIT_IRQCHIP, 24)


@pytest.mark.spec("api.create-irqchip.EINVAL.vcpus", "api.cap.split-irqchip.EEXIST.too-late")
def test_the_irqchip_comes_first() -> None:
    """After a vCPU KVM_CREATE_IRQCHIP is EINVAL, and a split one EEXIST."""
    pc = Pc(1, irqchip="")

    assert "EINVAL" == outcome(pc.vm.ioctl, requests.KVM_CREATE_IRQCHIP)
    assert "EEXIST" == outcome(pc.enable, uapi.KVM_CAP_SPLIT_IRQCHIP, 24)


@pytest.mark.spec("api.cap.split-irqchip")
def test_a_split_irqchip_is_local_apics_alone() -> None:
    """No PIC, no IOAPIC, no default routes; messages go to the local APICs."""
    pc = Pc(irqchip="split")

    assert 1 == pc.vm.signal_msi(ADDRESS, 0x41)
    assert [0x41] == pc.pending()
    assert "ENXIO" == outcome(pc.chip, MASTER)
    assert -1 == pc.line(4)
    assert 1 == pc.vm.check_extension(uapi.KVM_CAP_SPLIT_IRQCHIP)


@pytest.mark.spec("api.cap.split-irqchip.EINVAL.args")
def test_reserved_pins() -> None:
    """At most 4096; EINVAL comes before EEXIST."""
    pc = Pc(0, irqchip="")
    assert "EINVAL" == outcome(pc.enable, uapi.KVM_CAP_SPLIT_IRQCHIP, 4097)
    assert 0 == outcome(pc.enable, uapi.KVM_CAP_SPLIT_IRQCHIP, 4096)

    assert "EINVAL" == outcome(pc.enable, uapi.KVM_CAP_SPLIT_IRQCHIP, 4097)


@pytest.mark.spec("api.create-vcpu.rule.x86-id", "api.create-vcpu.rule.id-sparse")
def test_the_id_is_the_apic_id() -> None:
    """A vCPU's id is the id of its local APIC."""
    pc = Pc([0, 5, 3])

    assert [0, 5 << 24, 3 << 24] == [pc.word(0x20, n) for n in range(3)]
    assert 1 == pc.vm.signal_msi(ADDRESS | 5 << 12, 0x41)
    assert [[], [0x41], []] == [pc.pending(n) for n in range(3)]


@pytest.mark.spec("api.create-vcpu.EINVAL.x86-cap", "api.create-vcpu.EINVAL.id", "api.create-vcpu.EEXIST.duplicate")
def test_vcpu_ids() -> None:
    """Below KVM_CAP_MAX_VCPU_ID as it was set, and 4096 in any case; once each."""
    pc = Pc(0)
    pc.enable(uapi.KVM_CAP_MAX_VCPU_ID, 4)

    assert "EINVAL" == outcome(pc.vm.create_vcpu, 4)
    pc.vm.create_vcpu(3)
    assert "EEXIST" == outcome(pc.vm.create_vcpu, 3)
    plain = Pc(0)
    assert "EINVAL" == outcome(plain.vm.create_vcpu, 4096)
    plain.vm.create_vcpu(4095)


def fail(*_: Any, **__: Any) -> Any:
    raise MemoryError


@pytest.mark.parametrize(
    ("call", "allocated"),
    [
        pytest.param(
            lambda pc: pc.vm.ioctl(requests.KVM_CREATE_IRQCHIP),
            "fabric.kvm.x86_irqchip.X86Irqchip",
            marks=pytest.mark.spec("api.create-irqchip.ENOMEM.alloc"),
        ),
        pytest.param(
            lambda pc: pc.vm.ioctl(requests.KVM_CREATE_PIT2, bytearray(64)),
            "fabric.kvm.x86_pit.Pit",
            marks=pytest.mark.spec("api.create-pit2.ENOMEM.alloc"),
        ),
        *(
            pytest.param(
                lambda pc: pc.vm.create_vcpu(7), allocated, marks=pytest.mark.spec("api.create-vcpu.ENOMEM.alloc")
            )
            for allocated in ("fabric.kvm.x86.Lapic", "fabric.kvm.x86.X86VcpuPart", "fabric.kvm.vm_fd.VcpuFile")
        ),
        pytest.param(
            lambda pc: pc.lapic(),
            "fabric.devices.x86.lapic.Lapic.state",
            marks=pytest.mark.spec("api.get-lapic.ENOMEM.alloc"),
        ),
    ],
)
def test_an_allocation_that_fails(call: Any, allocated: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOMEM, and the state before; with memory the same call succeeds."""
    pc = Pc(0, irqchip="") if "Irqchip" in allocated else Pc()
    vm = pc.inside

    def state() -> Any:
        return len(vm.vcpus), vm.irqchip, vm.irqchip and (len(vm.irqchip.apics.apics), vm.irqchip.pit)

    before = state()
    with monkeypatch.context() as patch:
        patch.setattr(allocated, fail)
        assert "ENOMEM" == outcome(call, pc)
    assert before == state()

    call(pc)
    if "state" not in allocated:
        assert before != state()


# -- lines


@pytest.mark.spec("api.irq-line", "api.irq-line.rule.level", "api.irq-line-status", "api.irq-line.rule.result-ignored")
def test_irq_line() -> None:
    """1 raises, 0 lowers; KVM_IRQ_LINE does the same as KVM_IRQ_LINE_STATUS and does not say what became of it."""
    pc = Pc()
    pc.set_entry(20, 0x41)
    pc.vm.irq_line(20, 1)
    assert [0x41] == pc.pending()
    assert 1 << 20 == pc.inside.irqchip.ioapic.irr
    pc.vm.irq_line(20, 0)

    assert 0 == pc.inside.irqchip.ioapic.irr
    pc.check()


@pytest.mark.spec("api.irq-line-status.rule.status")
def test_status() -> None:
    """Below 0 masked, 0 merged, above 0 so many local APICs; 1 for a line that is lowered."""
    pc = Pc(3)
    assert -1 == pc.line(20)
    assert 1 == pc.line(20, 0)
    pc.set_entry(20, 0xFF << 56 | 0x41)

    assert 3 == pc.line(20)
    assert 0 == pc.line(20)
    pc.check()


@pytest.mark.spec("api.irq-line-status.rule.sum", "api.irq-line.rule.gsi")
def test_sums() -> None:
    """PIC and IOAPIC add up, negatives left out; -1 for a GSI without a route, whatever its number."""
    pc = Pc(2)
    pc.set_entry(5, 0xFF << 56 | 0x41)

    assert 3 == pc.line(5)
    assert 2 == pc.line(5, 0)
    assert 1 == pc.line(6)  # the IOAPIC's -1 is left out
    assert [-1, -1] == [pc.line(gsi) for gsi in (24, 0xFFFF_FFFF)]


@pytest.mark.spec("api.irq-line.rule.gsi")
def test_a_line_of_two_gsis_is_an_or() -> None:
    """Levels of different sources are ORed; all GSIs that the VMM drives are one source."""
    pc = Pc()
    pc.set_entry(20, LEVEL | 0x41)
    event, resample = pc.kvm.eventfd(0), pc.kvm.eventfd(0)
    pc.vm.irqfd(event, 20, resamplefd=resample)
    pc.line(20, 1)
    event.signal()
    pc.line(20, 0)

    assert 1 << 20 == pc.chip(IOAPIC).irr


@pytest.mark.spec("api.irq-line.note.polarity")
def test_polarity() -> None:
    """1 is asserted also where the entry says active low (KVM_CAP_IOAPIC_POLARITY_IGNORED)."""
    pc = Pc()
    pc.set_entry(20, 1 << 13 | 0x41)
    assert 1 == pc.line(20, 0)
    assert [] == pc.pending()
    pc.line(20, 1)

    assert [0x41] == pc.pending()
    assert 1 == pc.vm.check_extension(uapi.KVM_CAP_IOAPIC_POLARITY_IGNORED)


@pytest.mark.spec(
    "api.irq-line.EFAULT.struct",
    "api.irq-line-status.EFAULT.struct",
    "api.irq-line.ENXIO.no-irqchip",
    "api.irq-line-status.ENXIO.no-irqchip",
)
def test_line_errors() -> None:
    """EFAULT for a bad pointer, then ENXIO without an irqchip."""
    pc = Pc(irqchip="")

    for request in (requests.KVM_IRQ_LINE, requests.KVM_IRQ_LINE_STATUS):
        assert "EFAULT" == outcome(pc.vm.ioctl, request, 0x10)
        assert "ENXIO" == outcome(pc.vm.ioctl, request, uapi.KvmIrqLevel(1, 1))


# -- state of the chips


@pytest.mark.spec("api.get-irqchip", "api.set-irqchip", "api.get-irqchip.rule.chip-id")
def test_state_of_the_pics() -> None:
    """Each of them keeps all of its members; 0 is the master, 1 the slave."""
    pc = Pc()
    for chip in (MASTER, SLAVE):
        state = pc.chip(chip).with_(irq_base=0x30 + 8 * chip, imr=0xA5, isr=2, priority_add=3, special_mask=1)
        pc.set_chip(chip, state)

        assert state == pc.chip(chip)
    assert [0x30, 0x38] == [pc.chip(chip).irq_base for chip in (MASTER, SLAVE)]


@pytest.mark.spec("api.get-irqchip", "api.set-irqchip", "api.get-irqchip.rule.chip-id")
def test_state_of_the_ioapic() -> None:
    """Chip 2. Levels that wait send when the state is set."""
    pc = Pc()
    state = pc.chip(IOAPIC)
    entries = (LEVEL | 0x41, *state.redirtbl[1:])
    pc.set_chip(IOAPIC, state.with_(irr=1, id=3, ioregsel=0x10, redirtbl=entries))
    found = pc.chip(IOAPIC)

    assert (3, 0x10, 1, LEVEL | REMOTE_IRR | 0x41) == (found.id, found.ioregsel, found.irr, found.redirtbl[0])
    assert [0x41] == pc.pending()


def test_what_a_chip_does_not_fill_stays() -> None:
    """KVM_GET_IRQCHIP writes the chip's struct only; the rest of the union is the caller's."""
    pc = Pc()
    buffer = bytearray(KvmIrqchip(MASTER).pack()[:8] + b"\xa5" * 512)
    pc.vm.ioctl(requests.KVM_GET_IRQCHIP, buffer)

    assert b"\xa5" * 496 == bytes(buffer[24:])
    assert b"\xa5" not in bytes(buffer[:24])


@pytest.mark.spec(
    "api.get-irqchip.EFAULT.struct",
    "api.get-irqchip.ENXIO.none",
    "api.get-irqchip.EINVAL.chip",
    "api.set-irqchip.EFAULT.struct",
    "api.set-irqchip.ENXIO.none",
    "api.set-irqchip.EINVAL.chip",
)
@pytest.mark.parametrize("request_", [requests.KVM_GET_IRQCHIP, requests.KVM_SET_IRQCHIP])
def test_chip_errors(request_: int) -> None:
    """EFAULT, then ENXIO without PIC and IOAPIC, then EINVAL for a chip above 2."""
    whole, split, none = (Pc(0, irqchip=irqchip) for irqchip in ("whole", "split", ""))

    for pc in (whole, split, none):
        assert "EFAULT" == outcome(pc.vm.ioctl, request_, 0x10)
    for pc in (split, none):
        assert "ENXIO" == outcome(pc.vm.ioctl, request_, KvmIrqchip(3))
    assert "EINVAL" == outcome(whole.vm.ioctl, request_, KvmIrqchip(3))
    assert 0 == outcome(whole.vm.ioctl, request_, KvmIrqchip(2))


@pytest.mark.spec("api.set-irqchip.note.direction")
def test_the_direction_of_set_irqchip() -> None:
    """Its request number says that it reads, though it writes."""
    assert 2 == requests.KVM_SET_IRQCHIP >> 30
    assert 3 == requests.KVM_GET_IRQCHIP >> 30


# -- routes


@pytest.mark.spec("api.set-gsi-routing", "api.set-gsi-routing.rule.replaces", "api.set-gsi-routing.rule.types")
def test_routes_replace_the_table() -> None:
    """Pins of the three chips and messages; what is not in the new table is not routed."""
    pc = Pc()
    pc.vm.set_routes(
        [pin_route(1, 3, MASTER), pin_route(2, 4, SLAVE), pin_route(3, 5, IOAPIC), msi_route(4, ADDRESS, 0x41)]
    )
    for gsi in (1, 2, 3, 4):
        pc.line(gsi)

    assert (1 << 3 | 1 << 2, 1 << 4, 1 << 5) == tuple(pc.chip(chip).irr for chip in (MASTER, SLAVE, IOAPIC))
    assert [0x41] == pc.pending()
    assert -1 == pc.line(5)


@pytest.mark.spec("api.set-gsi-routing.EINVAL.no-irqchip")
def test_routes_need_an_irqchip() -> None:
    """EINVAL without one."""
    assert "EINVAL" == outcome(Pc(irqchip="").vm.set_routes, [])


@pytest.mark.spec("api.set-gsi-routing.EINVAL.pin", "api.set-gsi-routing.rule.atomic")
@pytest.mark.parametrize(("chip", "pins"), [(MASTER, 8), (SLAVE, 8), (IOAPIC, 24), (3, 0)])
def test_pins(chip: int, pins: int) -> None:
    """Eight a PIC, 24 the IOAPIC, no other chips; the old table stays."""
    pc = Pc()
    pc.vm.set_routes([pin_route(1, max(pins - 1, 0), chip if pins else IOAPIC)])

    assert "EINVAL" == outcome(pc.vm.set_routes, [pin_route(1, 0, IOAPIC), pin_route(2, pins, chip)])
    pc.line(1)
    assert any(pc.chip(number).irr for number in (MASTER, SLAVE, IOAPIC))
    assert -1 == pc.line(2)


@pytest.mark.spec("api.set-gsi-routing.EINVAL.split")
def test_no_pins_with_a_split_irqchip() -> None:
    """EINVAL: there is nothing to route to; messages can be."""
    pc = Pc(irqchip="split")

    assert "EINVAL" == outcome(pc.vm.set_routes, [pin_route(1, 1, IOAPIC)])
    pc.vm.set_routes([msi_route(1, ADDRESS, 0x41)])
    assert 1 == pc.line(1)


@pytest.mark.spec("api.set-gsi-routing.EINVAL.type")
def test_types_of_other_architectures() -> None:
    """An s390 adapter is no type of x86."""
    entry = uapi.KvmIrqRoutingEntry(1, uapi.KVM_IRQ_ROUTING_S390_ADAPTER)

    assert "EINVAL" == outcome(Pc().vm.set_routes, [entry])


@pytest.mark.spec("api.set-gsi-routing.EINVAL.twice")
def test_a_gsi_once_a_chip() -> None:
    """Twice to one chip, or a message with anything else: EINVAL; once to each chip is fine."""
    pc = Pc()
    pc.vm.set_routes([pin_route(1, 1, chip) for chip in (MASTER, SLAVE, IOAPIC)])

    assert "EINVAL" == outcome(pc.vm.set_routes, [pin_route(1, 1, IOAPIC), pin_route(1, 2, IOAPIC)])
    assert "EINVAL" == outcome(pc.vm.set_routes, [pin_route(1, 1, IOAPIC), msi_route(1, ADDRESS, 0x41)])


@pytest.mark.spec(
    "api.set-gsi-routing.rule.x2apic", "api.set-gsi-routing.EINVAL.x2apic-low", "api.cap.x2apic-api.rule.affects"
)
def test_routes_with_32_bit_ids() -> None:
    """Without the feature address_hi is ignored; with it 31:8 are of the destination, and 7:0 must be 0."""
    old, new = Pc([0, 0x105]), Pc([0, 0x105], x2apic_api=WIDE_IDS)
    address = 1 << 40 | ADDRESS | 5 << 12
    for pc in (old, new):
        pc.to_x2apic(1)
        pc.vm.set_routes([msi_route(1, address, 0x41)])
        pc.line(1)
    old.vm.set_routes([msi_route(1, address | 1 << 32, 0x41)])

    assert ([], [0x41]) == (old.pending(1), new.pending(1))
    assert "EINVAL" == outcome(new.vm.set_routes, [msi_route(1, address | 1 << 32, 0x41)])


# -- messages


@pytest.mark.spec("api.signal-msi", "api.signal-msi.rule.x86-dest", "api.cap.signal-msi")
def test_signal_msi() -> None:
    """Destination in 19:12, logical bit 2, vector 7:0, delivery mode 10:8, trigger 15; returns how many took it."""
    pc = Pc(3)

    assert 1 == pc.vm.signal_msi(ADDRESS | 2 << 12, 0x41)
    assert 3 == pc.vm.signal_msi(ADDRESS | 0xFF << 12, 1 << 15 | 0x51)
    assert 0 == pc.vm.signal_msi(ADDRESS | 9 << 12, 0x61)
    assert 1 == pc.vm.signal_msi(ADDRESS | 1 << 12, 4 << 8)
    assert [[0x51], [0x51], [0x41, 0x51]] == [pc.pending(n) for n in range(3)]
    assert 1 == pc.inside.vcpus[1].nmi_queued
    pc.check()


def test_signal_msi_logical() -> None:
    """Nobody in the map is 0; where all have to be asked, nobody is -1, which is EPERM."""
    pc = Pc(2)
    pc.set_lapic({0xD0: 1 << 24}, 0)
    pc.set_lapic({0xD0: 6 << 24}, 1)

    assert 1 == pc.vm.signal_msi(ADDRESS | 2 << 12 | 4, 0x41)
    assert [[], [0x41]] == [pc.pending(n) for n in range(2)]
    assert "EPERM" == outcome(pc.vm.signal_msi, ADDRESS | 0x40 << 12 | 4, 0x41)


@pytest.mark.spec("api.signal-msi.rule.x2apic", "api.signal-msi.EINVAL.x2apic-low", "api.cap.x2apic-api.rule.affects")
def test_signal_msi_with_32_bit_ids() -> None:
    """As in routes."""
    old, new = Pc([0, 0x105]), Pc([0, 0x105], x2apic_api=WIDE_IDS)
    address = 1 << 40 | ADDRESS | 5 << 12
    for pc in (old, new):
        pc.to_x2apic(1)
    old.vm.signal_msi(address | 1 << 32, 0x41)

    assert 1 == new.vm.signal_msi(address, 0x41)
    assert ([], [0x41]) == (old.pending(1), new.pending(1))
    assert "EINVAL" == outcome(new.vm.signal_msi, address | 1 << 32, 0x41)


@pytest.mark.spec(
    "api.signal-msi.EFAULT.struct",
    "api.signal-msi.EINVAL.no-irqchip",
    "api.signal-msi.EINVAL.flags",
    "api.signal-msi.note.x86-flag",
)
def test_signal_msi_errors() -> None:
    """EFAULT, EINVAL without local APICs, EINVAL for other flags than VALID_DEVID, which is taken and ignored."""
    pc, none = Pc(), Pc(irqchip="")

    assert "EFAULT" == outcome(none.vm.ioctl, requests.KVM_SIGNAL_MSI, 0x10)
    assert "EINVAL" == outcome(none.vm.signal_msi, ADDRESS, 0x41)
    assert "EINVAL" == outcome(pc.vm.ioctl, requests.KVM_SIGNAL_MSI, uapi.KvmMsi(ADDRESS, 0, 0x41, 2))
    assert 1 == pc.vm.signal_msi(ADDRESS, 0x41, devid=77)


# -- KVM_CAP_X2APIC_API


@pytest.mark.spec("api.cap.x2apic-api", "api.cap.x2apic-api.EINVAL.bits")
def test_x2apic_api_bits() -> None:
    """Bits 0 and 1 (and of Linux 6.18, 2 and 3: directed EOI); what is checked is what can be enabled."""
    pc = Pc(0, irqchip="split")

    assert 3 == pc.vm.check_extension(uapi.KVM_CAP_X2APIC_API) & 3
    for flags, expected in ((3, 0), (4, 0), (8, 0), (12, "EINVAL"), (16, "EINVAL"), (1 << 63, "EINVAL")):
        assert expected == outcome(pc.enable, uapi.KVM_CAP_X2APIC_API, flags)
    assert "EINVAL" == outcome(Pc(0).enable, uapi.KVM_CAP_X2APIC_API, 4)


@pytest.mark.spec("api.cap.x2apic-api.rule.quirk")
def test_the_broadcast_quirk() -> None:
    """0xff of a device is a broadcast in x2APIC mode too, but with bit 1."""
    old, new = Pc(2), Pc(2, x2apic_api=NO_QUIRK)
    for pc in (old, new):
        for n in range(2):
            pc.to_x2apic(n)

    assert 2 == old.vm.signal_msi(ADDRESS | 0xFF << 12, 0x41)
    assert 0 == new.vm.signal_msi(ADDRESS | 0xFF << 12, 0x41)


@pytest.mark.spec("api.cap.x2apic-api.rule.sticky")
def test_x2apic_api_is_sticky() -> None:
    """A later call with fewer bits takes none away; it counts also before the irqchip is made."""
    pc = Pc(0, irqchip="")
    pc.enable(uapi.KVM_CAP_X2APIC_API, 3)
    pc.enable(uapi.KVM_CAP_X2APIC_API, 0)
    pc.vm.ioctl(requests.KVM_CREATE_IRQCHIP)
    bus = pc.inside.irqchip.apics

    assert (True, True) == (bus.x2apic_format, bus.broadcast_quirk_disabled)


# -- irqfds


@pytest.mark.spec("api.irqfd", "api.irqfd.rule.pulse", "api.cap.irqfd")
def test_an_irqfd_is_a_pulse() -> None:
    """High and low: an edge is sent, a level is not held."""
    pc = Pc()
    pc.set_entry(20, 0x41)
    event = pc.kvm.eventfd(0)
    pc.vm.irqfd(event, 20)
    event.signal()

    assert [0x41] == pc.pending()
    assert 0 == pc.inside.irqchip.ioapic.irr
    assert 1 == pc.vm.check_extension(uapi.KVM_CAP_IRQFD)
    pc.check()


@pytest.mark.spec("api.irqfd.EINVAL.x86-irqchip", "api.cap.irqfd-resample")
def test_irqfds_need_an_irqchip() -> None:
    """EINVAL without one, and with RESAMPLE and a split one; deassigning is always 0."""
    none, split, whole = (Pc(irqchip=irqchip) for irqchip in ("", "split", "whole"))
    events = [pc.kvm.eventfd(0) for pc in (none, split, whole)]

    assert "EINVAL" == outcome(none.vm.irqfd, events[0], 1)
    assert "EINVAL" == outcome(split.vm.irqfd, events[1], 1, resamplefd=events[1])
    assert None is split.vm.irqfd(events[1], 1)
    assert None is whole.vm.irqfd(events[2], 1, resamplefd=events[2])
    assert None is none.vm.irqfd(events[0], 1, deassign=True)
    assert 1 == whole.vm.check_extension(uapi.KVM_CAP_IRQFD_RESAMPLE)


def _guest_entry(cpu: Any, pin: int, low: int) -> Any:
    """Write the low half of a redirection entry, as a guest does."""

    async def write() -> None:
        await cpu.store(0xFEC0_0000, 4, 0x10 + 2 * pin)
        await cpu.store(0xFEC0_0010, 4, low)

    return write()


@pytest.mark.spec("api.irqfd.rule.resample", "api.seq.irqfd-resample.3-end", "api.irqfd.rule.shared-resample")
def test_resampling() -> None:
    """The line stays up until the guest's EOI; then it is lowered and all resamplefds of the GSI are signalled."""

    async def main(vm: X86Vm) -> None:
        events = [(vm.kvm.eventfd(0), vm.kvm.eventfd(0)) for _ in range(2)]
        for event, resample in events:
            vm.vm.irqfd(event, 20, resamplefd=resample)
        vm.at(1000, events[0][0].signal)
        await vm.run()
        assert [1, 1] == [resample.read() for _, resample in events]
        assert 0 == vm.inside.irqchip.ioapic.irr
        assert vm.ledger.balanced

    async def guest(vm: X86Vm, cpu: Any) -> None:
        async def handler(inner: Any) -> None:
            vm.note(vm.inside.irqchip.ioapic.irr >> 20)
            await inner.store(0xFEE0_00B0, 4, 0)

        await cpu.store(0xFEE0_00F0, 4, 0x1FF)
        cpu.set_gate(0x41, handler)
        await _guest_entry(cpu, 20, LEVEL | 0x41)
        cpu.sti()
        await cpu.compute(5000)

    assert [1] == [what for _, what in simulate(main, guest) if what == 1]


@pytest.mark.parametrize("again", [False, True])
def test_a_level_that_was_served_while_masked(again: bool) -> None:
    """Unmasking a level with a resampler asks it first: nothing is sent unless somebody signals again."""

    async def main(vm: X86Vm) -> None:
        event, resample = vm.kvm.eventfd(0), vm.kvm.eventfd(0)
        vm.vm.irqfd(event, 20, resamplefd=resample)
        event.signal()
        vm.at(500, lambda: again and event.signal())
        await vm.run()
        assert 1 + again == resample.read()

    async def guest(vm: X86Vm, cpu: Any) -> None:
        async def handler(inner: Any) -> None:
            vm.note("taken")
            await _guest_entry(inner, 20, MASKED | LEVEL | 0x41)
            await inner.store(0xFEE0_00B0, 4, 0)

        await cpu.store(0xFEE0_00F0, 4, 0x1FF)
        cpu.set_gate(0x41, handler)
        await _guest_entry(cpu, 20, LEVEL | 0x41)
        cpu.sti()
        await cpu.compute(5000)

    assert again == any(what == "taken" for _, what in simulate(main, guest))


# -- in the order of the documents


@pytest.mark.spec(
    "api.seq.x86-irqchip",
    "api.seq.x86-irqchip.1-vm",
    "api.seq.x86-irqchip.2-irqchip",
    "api.seq.x86-irqchip.3-pit",
    "api.seq.x86-irqchip.4-x2apic",
    "api.seq.x86-irqchip.5-vcpus",
    "api.seq.x86-irqchip.6-routes",
)
def test_setting_up() -> None:
    """VM, irqchip, PIT, x2APIC API, vCPUs, routes with large ids."""
    pc = Pc(0, irqchip="")
    pc.vm.ioctl(requests.KVM_CREATE_IRQCHIP)
    pc.vm.ioctl(requests.KVM_CREATE_PIT2, bytearray(64))
    pc.enable(uapi.KVM_CAP_X2APIC_API, WIDE_IDS | NO_QUIRK)
    for vcpu_id in (0, 300):
        pc.add_vcpu(vcpu_id)
    for n in range(2):
        pc.to_x2apic(n)
        pc.set_lapic({0xF0: 0x1FF}, n)
    pc.vm.set_routes([msi_route(30, 1 << 40 | ADDRESS | 44 << 12, 0x41)])

    assert 1 == pc.line(30)
    assert [[], [0x41]] == [pc.pending(n) for n in range(2)]
    pc.check()


def test_a_struct_of_an_irq_line_status() -> None:
    """The status is in the place of the GSI, the level stays."""
    pc = Pc()
    buffer = bytearray(struct.pack("<II", 99, 1))
    pc.vm.ioctl(requests.KVM_IRQ_LINE_STATUS, buffer)

    assert (-1, 1) == struct.unpack("<iI", buffer)
