"""KVM_SET_GSI_ROUTING: which tables are taken, and what they mean."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kvm_machine import Arm, outcome

from fabric.kvm.routing import PinRoute, RoutingTable
from fabric.kvm.typed import msi_route, pin_route
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


def test_routing_needs_no_gic() -> None:
    """On arm64 the table may be set in any state of the VM."""
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
