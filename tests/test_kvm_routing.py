"""KVM_SET_GSI_ROUTING: which tables are taken, and what they mean."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kvm_machine import DOORBELL, Arm, outcome

from fabric.kvm.routing import PinRoute, RoutingTable
from fabric.kvm.typed import msi_route, pin_route
from fabric.uapi import arm64 as arm
from fabric.uapi import ioctl as requests
from fabric.uapi import kvm as uapi


def entry(**members: Any) -> uapi.KvmIrqRoutingEntry:
    return uapi.KvmIrqRoutingEntry(**members)


@pytest.mark.spec("api.set-gsi-routing.rule.replaces")
def test_the_default_table_is_flat() -> None:
    """Initialising the GIC routes GSI n to pin n, for every SPI; a table replaces it in full."""
    machine = Arm()
    routing = machine.inside.routing

    assert 224 == len(routing)
    assert (PinRoute(0, 223),) == routing.routes(223)
    assert () == routing.routes(224)

    machine.vm.set_routes([])
    assert 0 == len(machine.inside.routing)


@pytest.mark.spec("api.set-gsi-routing", "api.set-gsi-routing.note.arch-list", "api.set-gsi-routing.rule.types")
def test_routing_needs_no_gic() -> None:
    """On arm64 the table may be set in any state of the VM; its entries are pins and messages."""
    machine = Arm(gic=False)
    machine.vm.set_routes([pin_route(4095, 987), msi_route(0, 0x1234, 5)])

    assert 2 == len(machine.inside.routing)


@pytest.mark.spec(
    "api.set-gsi-routing.EINVAL.gsi",
    "api.set-gsi-routing.EINVAL.pin",
    "api.set-gsi-routing.EINVAL.type",
    "api.set-gsi-routing.EINVAL.entry-flags",
    "api.set-gsi-routing.rule.atomic",
)
@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(pin_route(4096, 0), id="gsi"),
        pytest.param(pin_route(0, 988), id="pin"),
        pytest.param(pin_route(0, 0, irqchip=1), id="irqchip"),
        pytest.param(entry(type=0), id="type-0"),
        pytest.param(entry(type=uapi.KVM_IRQ_ROUTING_S390_ADAPTER), id="adapter"),
        pytest.param(entry(type=uapi.KVM_IRQ_ROUTING_HV_SINT), id="sint"),
        pytest.param(entry(type=99), id="type-99"),
        pytest.param(entry(type=uapi.KVM_IRQ_ROUTING_IRQCHIP, flags=1), id="pin-flags"),
        pytest.param(entry(type=uapi.KVM_IRQ_ROUTING_MSI, flags=2), id="msi-flags"),
    ],
)
def test_an_entry_that_is_refused(bad: uapi.KvmIrqRoutingEntry) -> None:
    """It is EINVAL wherever it stands, and the old table stays."""
    machine = Arm()

    assert "EINVAL" == outcome(machine.vm.set_routes, [pin_route(1, 1), bad])
    assert 224 == len(machine.inside.routing)


@pytest.mark.spec("api.set-gsi-routing.EINVAL.twice")
def test_one_gsi_twice() -> None:
    """With one irqchip a GSI has one route; a pin may have several GSIs."""
    machine = Arm()
    pin, msi = pin_route(3, 1), msi_route(3, 0x1000, 1)

    for pair in ([pin, pin], [pin, msi], [msi, pin], [msi, msi]):
        assert "EINVAL" == outcome(machine.vm.set_routes, pair)
    machine.vm.set_routes([pin_route(3, 1), pin_route(4, 1)])
    assert 4 == machine.inside.routing.gsi_of_pin(0, 1)


@pytest.mark.spec("api.set-gsi-routing.EINVAL.nr", "api.set-gsi-routing.EINVAL.flags")
def test_the_header_is_checked_before_the_entries_are_read() -> None:
    """Too many entries, or flags, are EINVAL though no entry follows; 4096 entries that are not there EFAULT."""
    machine = Arm()

    def head(nr: int, flags: int = 0) -> Any:
        table = bytearray(uapi.KvmIrqRouting(nr, flags).pack())
        return outcome(machine.kvm.ioctl, machine.vm.fd, requests.KVM_SET_GSI_ROUTING, table)

    assert ["EINVAL", "EINVAL", "EFAULT", 0] == [head(4097), head(0, 1), head(4096), head(0)]


def test_a_full_table() -> None:
    """4096 routes are taken."""
    machine = Arm()
    machine.vm.set_routes([msi_route(gsi, gsi << 12, gsi, 1) for gsi in range(4096)])

    assert 4096 == len(machine.inside.routing)


def test_the_same_entry_is_decoded_once() -> None:
    """A VMM that adds a route hands over all others again; they stay the objects they were."""
    machine = Arm()
    machine.vm.set_routes([msi_route(3, 0x1000, 1)])
    first = machine.inside.routing.routes(3)
    machine.vm.set_routes([msi_route(4, 0x1000, 2), msi_route(3, 0x1000, 1)])

    assert first[0] is machine.inside.routing.routes(3)[0]


@pytest.mark.spec("api.set-gsi-routing.ENOMEM.alloc")
def test_no_memory_for_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOMEM, and the old table stays."""

    def fail(*_args: Any) -> Any:
        raise MemoryError

    machine = Arm()
    with monkeypatch.context() as patch:
        patch.setattr(RoutingTable, "add", fail)
        assert "ENOMEM" == outcome(machine.vm.set_routes, [pin_route(1, 5)])

    assert (PinRoute(0, 1),) == machine.inside.routing.routes(1)


@given(pins=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), st.integers(0, 5)), max_size=12))
def test_only_inputs_of_different_irqchips_share_a_gsi(pins: list[tuple[int, int, int]]) -> None:
    """Whatever is added, a GSI has at most one route to an irqchip, and a refused one leaves no trace."""
    table = RoutingTable()
    model: dict[tuple[int, int], int] = {}
    for gsi, irqchip, pin in pins:
        if outcome(table.add, gsi, PinRoute(irqchip, pin)) == "EINVAL":
            assert (gsi, irqchip) in model
        else:
            model[gsi, irqchip] = pin

    assert len(model) == len(table)
    for gsi in range(6):
        wanted = {PinRoute(chip, pin) for (g, chip), pin in model.items() if g == gsi}
        assert wanted == set(table.routes(gsi))


@pytest.mark.spec("api.set-gsi-routing.EFAULT.header")
def test_a_header_that_cannot_be_read() -> None:
    """EFAULT, and the table stays."""
    machine = Arm()

    for argument in (bytearray(7), 8):
        assert "EFAULT" == outcome(machine.vm.ioctl, requests.KVM_SET_GSI_ROUTING, argument)
    assert 224 == len(machine.inside.routing)


@pytest.mark.spec("api.set-gsi-routing.rule.arm-limit")
def test_the_table_is_for_irqfds() -> None:
    """With GSI 8 routed to pin 9 an irqfd on GSI 8 raises SPI 41, and KVM_IRQ_LINE of SPI 40 still SPI 40."""
    machine = Arm()
    machine.vm.set_routes([pin_route(8, 9)])
    event = machine.kvm.eventfd()
    machine.vm.irqfd(event, 8)
    event.signal()
    assert 1 << 9 == machine.pending()

    machine.vm.irq_line(arm.irq_line(arm.KVM_ARM_IRQ_TYPE_SPI, 40), 1)
    assert 1 << 8 | 1 << 9 == machine.pending()


@pytest.mark.spec(
    "api.set-gsi-routing.rule.flag",
    "api.set-gsi-routing.rule.devid",
    "api.set-gsi-routing.rule.devid-cap",
    "api.set-gsi-routing.note.bdf",
)
def test_a_message_names_its_device() -> None:
    """KVM_MSI_VALID_DEVID says that ``devid`` counts, which an ITS needs: the route without it delivers nothing. For
    PCI it is bus, device and function in 16 bits, which is what "BFD" in the text means."""
    bus, device, function = 0, 1, 0
    machine = Arm(memory=True)
    machine.add_its()
    assert 1 == machine.vm.check_extension(uapi.KVM_CAP_MSI_DEVID)
    devid = bus << 8 | device << 3 | function
    without = entry(gsi=3, type=uapi.KVM_IRQ_ROUTING_MSI, u=msi_route(3, DOORBELL, 0, devid).u)
    machine.vm.set_routes([without, msi_route(4, DOORBELL, 0, devid), msi_route(5, DOORBELL, 0, devid + 1)])
    events = [machine.kvm.eventfd() for _ in range(3)]
    pending = []
    for gsi, event in zip((3, 5, 4), events, strict=True):
        machine.vm.irqfd(event, gsi)
        event.signal()
        pending.append(machine.lpi_pending())

    assert [False, False, True] == pending


@pytest.mark.spec("api.irq-line-status.rule.status")
def test_the_outcome_of_a_message() -> None:
    """Above 0 reached a vCPU, 0 was merged or blocked by the guest, below 0 ignored."""
    machine = Arm(memory=True)
    machine.add_its()
    machine.vm.set_routes([msi_route(4, DOORBELL, 0, 8), msi_route(5, DOORBELL, 9, 8)])
    inside = machine.inside

    assert [1, 0, -1, -1] == [
        inside.set_irq(4, True),
        inside.set_irq(5, True),
        inside.set_irq(4, False),
        inside.set_irq(9, True),
    ]


@pytest.mark.spec("api.irq-line-status.rule.sum")
@pytest.mark.parametrize(
    ("outcomes", "total"),
    [([], -1), ([-1], -1), ([0], 0), ([3], 3), ([-1, 0], 0), ([0, -1, 2], 2), ([1, 2, -1], 3), ([-1, -1], -1)],
)
def test_outcomes_of_several_routes_add_up(outcomes: list[int], total: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are not negative; -1 when all are, or there is no route."""
    machine = Arm()
    table = machine.inside.routing = RoutingTable()
    for irqchip in range(len(outcomes)):
        table.add(7, PinRoute(irqchip, 0))
    monkeypatch.setattr(machine.kvm.arch, "set_irq", lambda vm, route, *_: outcomes[route.irqchip])

    assert total == machine.inside.set_irq(7, True)
