"""Structs and packed words of `fabric.uapi` against the layouts of the interface inventory, field by field."""

from __future__ import annotations

import importlib
import re
import tomllib
from importlib.resources import files
from struct import calcsize
from typing import Any, get_type_hints

import pytest

from fabric.conformance.places import class_name
from fabric.uapi import arm64
from fabric.uapi.codec import Array, CStruct, Word

spec = pytest.mark.spec

LAYOUTS: dict[str, dict[str, Any]] = {
    row["id"]: row
    for row in tomllib.loads(
        files("fabric.conformance").joinpath("inventory", "layouts.toml").read_text(encoding="utf-8")
    )["layout"]
}
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
    case(spec("layout.vgic-v2-reg-attr")),
    case(spec("layout.vgic-v3-reg-attr")),
    case(spec("layout.vgic-v3-sysreg-attr")),
    case(spec("layout.vgic-v3-level-info-attr")),
    case(spec("layout.vgic-v3-redist-region")),
    case(spec("layout.gicv2-apr")),
    case(spec("layout.gicv2-pmr")),
    case(spec("layout.gicd-iidr")),
    case(spec("layout.lpi-config")),
    case(spec("layout.lpi-pending")),
    case(spec("layout.its-dte")),
    case(spec("layout.its-cte")),
    case(spec("layout.its-ite")),
    case(spec("layout.its-l1-entry")),
    case(spec("layout.gits-baser")),
    case(spec("layout.gits-cbaser")),
    case(spec("layout.its-command")),
    case(spec("layout.arm-irq-line")),
    case(spec("layout.arm-device-addr-id")),
    case(spec("layout.arm-vm-type")),
    case(spec("layout.kvm-arm-device-addr")),
    case(spec("layout.kvm-vcpu-init")),
    case(spec("layout.kvm-pmu-event-filter")),
    case(spec("layout.pvtime-stolen-time")),
    case(spec("layout.xics-source")),
    case(spec("layout.xics-icp-state")),
    case(spec("layout.mpic-ivpr")),
    case(spec("layout.mpic-msiir")),
    case(spec("layout.xive-source")),
    case(spec("layout.xive-source-config")),
    case(spec("layout.xive-eq-id")),
    case(spec("layout.kvm-ppc-xive-eq")),
    case(spec("layout.xive-eq-entry")),
    case(spec("layout.xive-vp-state")),
    case(spec("layout.kvm-vfio-spapr-tce")),
    case(spec("layout.kvm-create-spapr-tce")),
    case(spec("layout.kvm-create-spapr-tce-64")),
    case(spec("layout.kvm-s390-irq")),
    case(spec("layout.kvm-s390-io-info")),
    case(spec("layout.kvm-s390-ext-info")),
    case(spec("layout.kvm-s390-mchk-info")),
    case(spec("layout.kvm-s390-pgm-info")),
    case(spec("layout.kvm-s390-prefix-info")),
    case(spec("layout.kvm-s390-extcall-info")),
    case(spec("layout.kvm-s390-emerg-info")),
    case(spec("layout.kvm-s390-stop-info")),
    case(spec("layout.s390-irq-io-type")),
    case(spec("layout.s390-io-int-word")),
    case(spec("layout.kvm-s390-io-adapter")),
    case(spec("layout.kvm-s390-io-adapter-req")),
    case(spec("layout.kvm-s390-ais-req")),
    case(spec("layout.kvm-s390-ais-all")),
    case(spec("layout.s390-clear-io-word")),
    case(spec("layout.s390-adapter-indicators")),
    case(spec("layout.kvm-s390-vm-cpu-processor")),
    case(spec("layout.kvm-s390-vm-cpu-machine")),
    case(spec("layout.kvm-s390-vm-cpu-feat")),
    case(spec("layout.kvm-s390-vm-cpu-subfunc")),
    case(spec("layout.kvm-s390-vm-tod-clock")),
    case(spec("layout.kvm-create-device")),
    case(spec("layout.kvm-device-attr")),
    case(spec("layout.kvm-enable-cap")),
    case(spec("layout.kvm-one-reg")),
    case(spec("layout.kvm-userspace-memory-region")),
    case(spec("layout.kvm-dirty-log")),
    case(spec("layout.kvm-irq-level")),
    case(spec("layout.kvm-irq-routing")),
    case(spec("layout.kvm-irq-routing-entry")),
    case(spec("layout.kvm-irq-routing-irqchip")),
    case(spec("layout.kvm-irq-routing-msi")),
    case(spec("layout.kvm-irq-routing-s390-adapter")),
    case(spec("layout.kvm-irq-routing-hv-sint")),
    case(spec("layout.kvm-irq-routing-xen-evtchn")),
    case(spec("layout.kvm-msi")),
    case(spec("layout.kvm-irqfd")),
    case(spec("layout.kvm-ioeventfd")),
    case(spec("layout.kvm-lapic-state")),
    case(spec("layout.kvm-irqchip")),
    case(spec("layout.kvm-pic-state")),
    case(spec("layout.kvm-ioapic-state")),
    case(spec("layout.ioapic-redirect")),
    case(spec("layout.x86-msi-address-lo")),
    case(spec("layout.x86-msi-address-hi")),
    case(spec("layout.kvm-pit-config")),
    case(spec("layout.kvm-pit-channel-state")),
    case(spec("layout.kvm-pit-state2")),
    case(spec("layout.kvm-reinject-control")),
    case(spec("layout.kvm-clock-data")),
    case(spec("layout.kvm-hyperv-exit")),
    case(spec("layout.hyperv-synic")),
    case(spec("layout.hyperv-hcall")),
    case(spec("layout.hyperv-syndbg")),
    case(spec("layout.pvclock-wall-clock")),
    case(spec("layout.pvclock-vcpu-time-info")),
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
