"""The attribute tables of arm64 against the interface inventory: numbers, names, sizes and access of every row."""

from __future__ import annotations

import tomllib
from importlib.resources import files
from typing import Any

import pytest

from fabric.devices.attributes import AttrTable
from fabric.devices.registry import DEVICE_TYPES
from fabric.kvm.arm64_vcpu import ArmVcpuPart
from fabric.uapi import kvm as uapi

ROWS: dict[str, dict[str, Any]] = {
    row["id"]: row
    for file in files("fabric.conformance").joinpath("inventory").iterdir()
    if file.name.endswith(".toml")
    for row in tomllib.loads(file.read_text(encoding="utf-8")).get("attr", ())
}
TABLES: dict[str, AttrTable] = {
    "vcpu": ArmVcpuPart.attributes,
    "vgic-v2": DEVICE_TYPES["aarch64"][uapi.KVM_DEV_TYPE_ARM_VGIC_V2].attributes,
    "vgic-v3": DEVICE_TYPES["aarch64"][uapi.KVM_DEV_TYPE_ARM_VGIC_V3].attributes,
    "its": DEVICE_TYPES["aarch64"][uapi.KVM_DEV_TYPE_ARM_VGIC_ITS].attributes,
    "vfio": DEVICE_TYPES["aarch64"][uapi.KVM_DEV_TYPE_VFIO].attributes,
}


def case(mark: pytest.MarkDecorator) -> Any:
    return pytest.param(mark.args[0], id=mark.args[0], marks=mark)


@pytest.mark.parametrize(
    "id",
    [
        case(pytest.mark.spec("vcpu.pmu.irq")),
        case(pytest.mark.spec("vcpu.pmu.init")),
        case(pytest.mark.spec("vcpu.pmu.filter")),
        case(pytest.mark.spec("vcpu.pmu.set-pmu")),
        case(pytest.mark.spec("vcpu.timer.vtimer")),
        case(pytest.mark.spec("vcpu.timer.ptimer")),
        case(pytest.mark.spec("vcpu.pvtime.ipa")),
        case(pytest.mark.spec("vgic-v2.addr.dist")),
        case(pytest.mark.spec("vgic-v2.addr.cpu")),
        case(pytest.mark.spec("vgic-v2.dist-regs")),
        case(pytest.mark.spec("vgic-v2.cpu-regs")),
        case(pytest.mark.spec("vgic-v2.nr-irqs")),
        case(pytest.mark.spec("vgic-v2.ctrl.init")),
        case(pytest.mark.spec("vgic-v3.addr.dist")),
        case(pytest.mark.spec("vgic-v3.addr.redist")),
        case(pytest.mark.spec("vgic-v3.addr.redist-region")),
        case(pytest.mark.spec("vgic-v3.dist-regs")),
        case(pytest.mark.spec("vgic-v3.redist-regs")),
        case(pytest.mark.spec("vgic-v3.cpu-sysregs")),
        case(pytest.mark.spec("vgic-v3.nr-irqs")),
        case(pytest.mark.spec("vgic-v3.ctrl.init")),
        case(pytest.mark.spec("vgic-v3.ctrl.save-pending-tables")),
        case(pytest.mark.spec("vgic-v3.level-info")),
        case(pytest.mark.spec("its.addr.its")),
        case(pytest.mark.spec("its.ctrl.init")),
        case(pytest.mark.spec("its.ctrl.reset")),
        case(pytest.mark.spec("its.ctrl.save-tables")),
        case(pytest.mark.spec("its.ctrl.restore-tables")),
        case(pytest.mark.spec("its.its-regs")),
        case(pytest.mark.spec("vfio.group.add")),
        case(pytest.mark.spec("vfio.group.del")),
    ],
)
def test_an_attribute_is_that_of_the_inventory(id: str) -> None:
    """Group and attribute lead to the row with the id, which has the names of the header, the type, and the access.
    A family, whose number is an encoding, takes any number."""
    promised = ROWS[id]
    table = TABLES[id.split(".")[0]]
    row = table.find(promised["group_value"], promised.get("attr_value", 0x1234_5678))
    group = {group.number: group.name for group in table.groups}[promised["group_value"]]

    assert row is not None
    assert (id, promised["group"], promised["type"]) == (row.id, group, row.type)
    if "attr" in promised:
        assert promised["attr"] == row.name
    ways = [way for way, access in (("set", row.set), ("get", row.get)) if access is not None]
    assert promised["access"] == [*ways, "has"]


@pytest.mark.parametrize(
    "interface",
    [
        case(pytest.mark.spec("vcpu")),
        case(pytest.mark.spec("vgic-v2")),
        case(pytest.mark.spec("vgic-v3")),
        case(pytest.mark.spec("its")),
        case(pytest.mark.spec("vfio")),
    ],
)
def test_a_table_has_what_the_inventory_has_and_no_more(interface: str) -> None:
    """Besides the rows for any other attribute."""
    arm64 = {
        id
        for id, row in ROWS.items()
        if id.startswith(f"{interface}.") and set(row.get("architectures", ("arm64",))) & {"arm64", "all", "any"}
    }

    assert arm64 | {f"{interface}.any"} == {row.id for _, row in TABLES[interface].rows()} | {f"{interface}.any"}
