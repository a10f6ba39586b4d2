"""Structs and packed words of `fabric.uapi` against the layouts of the interface inventory, field by field."""

from __future__ import annotations

import importlib
import re
import tomllib
from importlib.resources import files
from struct import calcsize
from typing import Any, get_type_hints

import pytest
from kvm_machine import CONFIG, PENDING, RAM, Arm

from fabric.conformance.places import class_name
from fabric.devices.arm.vgic_its_commands import COMMANDS
from fabric.uapi import arm64
from fabric.uapi.codec import Array, CStruct, Word


def inventory(name: str) -> dict[str, Any]:
    """A file of the inventory."""
    return tomllib.loads(files("fabric.conformance").joinpath("inventory", name).read_text(encoding="utf-8"))


LAYOUTS: dict[str, dict[str, Any]] = {row["id"]: row for row in inventory("layouts.toml")["layout"]}
CLASSES: dict[str, Any] = {}
for _module in ("kvm", "arm64", "x86", "ppc", "s390"):
    CLASSES |= vars(importlib.import_module(f"fabric.uapi.{_module}"))

BYTE_ORDER = {"host": "@", "little": "<", "big": ">"}
NAMELESS = re.compile(r"(reserved|unused|zero|ignored|hole|pad|padding|tail_padding|res)\d*")
"""What an inventory field is called that has no meaning; a class may leave it out."""


def nameless(name: str) -> bool:
    return NAMELESS.fullmatch(name) is not None


def case(mark: pytest.MarkDecorator) -> Any:
    """A layout by its id."""
    return pytest.param(mark.args[0], id=mark.args[0], marks=mark)


CASES = [
    case(pytest.mark.spec("layout.vgic-v2-reg-attr")),
    case(pytest.mark.spec("layout.vgic-v3-reg-attr")),
    case(pytest.mark.spec("layout.vgic-v3-sysreg-attr")),
    case(pytest.mark.spec("layout.vgic-v3-level-info-attr")),
    case(pytest.mark.spec("layout.vgic-v3-redist-region")),
    case(pytest.mark.spec("layout.gicv2-apr")),
    case(pytest.mark.spec("layout.gicv2-pmr")),
    case(pytest.mark.spec("layout.gicd-iidr")),
    case(pytest.mark.spec("layout.lpi-config")),
    case(pytest.mark.spec("layout.lpi-pending")),
    case(pytest.mark.spec("layout.its-dte")),
    case(pytest.mark.spec("layout.its-cte")),
    case(pytest.mark.spec("layout.its-ite")),
    case(pytest.mark.spec("layout.its-l1-entry")),
    case(pytest.mark.spec("layout.gits-baser")),
    case(pytest.mark.spec("layout.gits-cbaser")),
    case(pytest.mark.spec("layout.its-command")),
    case(pytest.mark.spec("layout.arm-irq-line")),
    case(pytest.mark.spec("layout.arm-device-addr-id")),
    case(pytest.mark.spec("layout.arm-vm-type")),
    case(pytest.mark.spec("layout.kvm-arm-device-addr")),
    case(pytest.mark.spec("layout.kvm-vcpu-init")),
    case(pytest.mark.spec("layout.kvm-pmu-event-filter")),
    case(pytest.mark.spec("layout.pvtime-stolen-time")),
    case(pytest.mark.spec("layout.xics-source")),
    case(pytest.mark.spec("layout.xics-icp-state")),
    case(pytest.mark.spec("layout.mpic-ivpr")),
    case(pytest.mark.spec("layout.mpic-msiir")),
    case(pytest.mark.spec("layout.xive-source")),
    case(pytest.mark.spec("layout.xive-source-config")),
    case(pytest.mark.spec("layout.xive-eq-id")),
    case(pytest.mark.spec("layout.kvm-ppc-xive-eq")),
    case(pytest.mark.spec("layout.xive-eq-entry")),
    case(pytest.mark.spec("layout.xive-vp-state")),
    case(pytest.mark.spec("layout.kvm-vfio-spapr-tce")),
    case(pytest.mark.spec("layout.kvm-create-spapr-tce")),
    case(pytest.mark.spec("layout.kvm-create-spapr-tce-64")),
    case(pytest.mark.spec("layout.kvm-s390-irq")),
    case(pytest.mark.spec("layout.kvm-s390-io-info")),
    case(pytest.mark.spec("layout.kvm-s390-ext-info")),
    case(pytest.mark.spec("layout.kvm-s390-mchk-info")),
    case(pytest.mark.spec("layout.kvm-s390-pgm-info")),
    case(pytest.mark.spec("layout.kvm-s390-prefix-info")),
    case(pytest.mark.spec("layout.kvm-s390-extcall-info")),
    case(pytest.mark.spec("layout.kvm-s390-emerg-info")),
    case(pytest.mark.spec("layout.kvm-s390-stop-info")),
    case(pytest.mark.spec("layout.s390-irq-io-type")),
    case(pytest.mark.spec("layout.s390-io-int-word")),
    case(pytest.mark.spec("layout.kvm-s390-io-adapter")),
    case(pytest.mark.spec("layout.kvm-s390-io-adapter-req")),
    case(pytest.mark.spec("layout.kvm-s390-ais-req")),
    case(pytest.mark.spec("layout.kvm-s390-ais-all")),
    case(pytest.mark.spec("layout.s390-clear-io-word")),
    case(pytest.mark.spec("layout.s390-adapter-indicators")),
    case(pytest.mark.spec("layout.kvm-s390-vm-cpu-processor")),
    case(pytest.mark.spec("layout.kvm-s390-vm-cpu-machine")),
    case(pytest.mark.spec("layout.kvm-s390-vm-cpu-feat")),
    case(pytest.mark.spec("layout.kvm-s390-vm-cpu-subfunc")),
    case(pytest.mark.spec("layout.kvm-s390-vm-tod-clock")),
    case(pytest.mark.spec("layout.kvm-create-device")),
    case(pytest.mark.spec("layout.kvm-device-attr")),
    case(pytest.mark.spec("layout.kvm-enable-cap")),
    case(pytest.mark.spec("layout.kvm-one-reg")),
    case(pytest.mark.spec("layout.kvm-userspace-memory-region")),
    case(pytest.mark.spec("layout.kvm-dirty-log")),
    case(pytest.mark.spec("layout.kvm-irq-level")),
    case(pytest.mark.spec("layout.kvm-irq-routing")),
    case(pytest.mark.spec("layout.kvm-irq-routing-entry")),
    case(pytest.mark.spec("layout.kvm-irq-routing-irqchip")),
    case(pytest.mark.spec("layout.kvm-irq-routing-msi")),
    case(pytest.mark.spec("layout.kvm-irq-routing-s390-adapter")),
    case(pytest.mark.spec("layout.kvm-irq-routing-hv-sint")),
    case(pytest.mark.spec("layout.kvm-irq-routing-xen-evtchn")),
    case(pytest.mark.spec("layout.kvm-msi")),
    case(pytest.mark.spec("layout.kvm-irqfd")),
    case(pytest.mark.spec("layout.kvm-ioeventfd")),
    case(pytest.mark.spec("layout.kvm-lapic-state")),
    case(pytest.mark.spec("layout.kvm-irqchip")),
    case(pytest.mark.spec("layout.kvm-pic-state")),
    case(pytest.mark.spec("layout.kvm-ioapic-state")),
    case(pytest.mark.spec("layout.ioapic-redirect")),
    case(pytest.mark.spec("layout.x86-msi-address-lo")),
    case(pytest.mark.spec("layout.x86-msi-address-hi")),
    case(pytest.mark.spec("layout.kvm-pit-config")),
    case(pytest.mark.spec("layout.kvm-pit-channel-state")),
    case(pytest.mark.spec("layout.kvm-pit-state2")),
    case(pytest.mark.spec("layout.kvm-reinject-control")),
    case(pytest.mark.spec("layout.kvm-clock-data")),
    case(pytest.mark.spec("layout.kvm-hyperv-exit")),
    case(pytest.mark.spec("layout.hyperv-synic")),
    case(pytest.mark.spec("layout.hyperv-hcall")),
    case(pytest.mark.spec("layout.hyperv-syndbg")),
    case(pytest.mark.spec("layout.pvclock-wall-clock")),
    case(pytest.mark.spec("layout.pvclock-vcpu-time-info")),
]


def test_every_layout_has_a_case() -> None:
    """The list above is the inventory's."""
    assert list(LAYOUTS) == [case.values[0] for case in CASES]


@pytest.mark.parametrize("id", CASES)
def test_a_layout_is_that_of_the_inventory(id: str) -> None:
    """Names, places and sizes of all fields, the size of the whole, and the byte order."""
    layout, cls = LAYOUTS[id], CLASSES[class_name(id)]
    if layout["kind"] == "struct":
        check_struct(layout, cls)
    else:
        check_word(layout, cls)


def check_word(layout: dict[str, Any], cls: type[Word]) -> None:
    fields = {field["name"]: (field["hi"], field["lo"]) for field in layout["fields"]}
    known = {name: (bits.hi, bits.lo) for name, bits in cls.FIELDS.items()}

    assert layout["bits"] == cls.WIDTH
    assert known == {name: place for name, place in fields.items() if name in known or not nameless(name)}


def check_struct(layout: dict[str, Any], cls: type[CStruct]) -> None:
    hints = get_type_hints(cls, include_extras=True)
    known = {name: (at, size(hints[name].__metadata__[0])) for name, at in cls.OFFSETS.items()}
    fields = {field["name"]: (field["at"], field["size"]) for field in layout["fields"]}

    assert layout["size"] == cls.SIZE
    assert BYTE_ORDER[layout["endian"]] == cls.STRUCT.format[0]
    assert known == {name: place for name, place in fields.items() if name in known or not nameless(name)}


def size(member: str | Array) -> int:
    """Bytes of a declared member."""
    if isinstance(member, str):
        return calcsize(member)
    return member.count * (calcsize(member.element) if isinstance(member.element, str) else member.element.SIZE)


@pytest.mark.spec("layout.arm-irq-line.rule.vcpu")
@pytest.mark.parametrize(
    ("vcpu", "word"), [(0, 0x0100_0020), (255, 0x01FF_0020), (256, 0x1100_0020), (511, 0x11FF_0020)]
)
def test_the_vcpu_of_an_interrupt_line_is_in_two_fields(vcpu: int, word: int) -> None:
    """256 times the upper plus the lower one."""
    line = arm64.ArmIrqLine.unpack(arm64.irq_line(arm64.KVM_ARM_IRQ_TYPE_SPI, 32, vcpu))

    assert word == line.pack()
    assert vcpu == 256 * line.vcpu2_index + line.vcpu_index


@pytest.mark.spec("layout.vgic-v3-redist-region.rule.base-in-place")
def test_the_base_of_a_redistributor_region_is_in_its_place() -> None:
    """The value masked is the address."""
    region = arm64.VgicV3RedistRegion(count=7, base=0x80A_0000 >> 16, index=3)

    assert 0x80A_0000 == region.pack() & 0x000F_FFFF_FFFF_0000


@pytest.mark.spec("layout.gicd-iidr.note.values")
def test_the_values_of_iidr_are_those_of_the_kernel() -> None:
    """Product "K", implementer Arm; the revision says what userspace may rely on."""
    iidr = arm64.GicdIidr(
        product=arm64.GICD_IIDR_PRODUCT_ID_KVM,
        revision=arm64.KVM_VGIC_IMP_REV_LATEST,
        implementer=arm64.GICD_IIDR_IMPLEMENTER_ARM,
    )

    assert 0x4B00_343B == iidr.pack()


@pytest.mark.spec("layout")
def test_every_word_and_struct_of_the_inventory_has_a_class() -> None:
    """By its name."""
    assert [] == [id for id in LAYOUTS if class_name(id) not in CLASSES]


@pytest.mark.spec("layout.its-command.rule.fields")
def test_fields_of_its_commands() -> None:
    """Opcode, and word and bits of every field, by command."""
    promised = {
        row["id"]: (row["opcode"], row["fields"].replace("target RDbase", "RDbase2").lower())
        for row in inventory("arm-vgic-its.toml")["command"]
    }

    def place(field: Any) -> str:
        return f"w{field.word}[{field.hi}]" if field.hi == field.lo else f"w{field.word}[{field.hi}:{field.lo}]"

    assert promised == {
        command.id: (command.opcode, ", ".join(f"{field.name} {place(field)}" for field in command.fields).lower())
        for command in COMMANDS
    }


@pytest.mark.spec("layout.lpi-config.note.architecture")
def test_a_byte_of_the_lpi_configuration_table() -> None:
    """As the GIC architecture has it: priority in bits 7:2, enable in bit 0; bit 1 is no part of either."""
    machine = Arm(memory=True)
    machine.add_its()
    lpi = machine.inside.irqchip.lpis[8192]
    seen = []
    for byte in (0xA1, 0xA3, 0xA2, 0x09):
        machine.user.write(machine.ram + CONFIG - RAM, bytes([byte]))
        machine.command("INV", DeviceID=8, EventID=0)
        config = arm64.LpiConfig.unpack(byte)
        assert (lpi.priority, lpi.enabled) == (config.priority << 2, bool(config.enable))
        seen.append((lpi.priority, lpi.enabled))

    assert [(0xA0, True), (0xA0, True), (0xA0, False), (0x08, True)] == seen


@pytest.mark.spec("layout.lpi-pending.rule.first-kib", "layout.lpi-pending.rule.size")
def test_the_pending_table_of_all_lpis() -> None:
    """8 KiB for 16 bits of ids, of which saving leaves the first, for ids below 8192, alone; LPI n is bit n mod 8 of
    byte n div 8."""
    machine = Arm(memory=True)
    table = machine.ram + PENDING - RAM
    machine.user.write(table + 0x2000, b"\xee" * 8)
    machine.add_its()
    machine.command("MAPTI", DeviceID=8, EventID=1, pINTID=65535, ICID=0)
    for event in (0, 1):
        machine.command("INT", DeviceID=8, EventID=event)
    machine.user.write(table, b"\xff" * 0x400)
    machine.gic.set_attr(arm64.KVM_DEV_ARM_VGIC_GRP_CTRL, arm64.KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES)

    saved = machine.user.read(table, 0x2008)
    assert b"\xff" * 0x400 == saved[:0x400]
    assert {0x400: 1 << 8192 % 8, 0x1FFF: 1 << 65535 % 8} == {
        at: byte for at, byte in enumerate(saved[:0x2000]) if byte and at >= 0x400
    }
    assert b"\xee" * 8 == saved[0x2000:]
