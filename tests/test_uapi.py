"""Layouts and numbers of the KVM interface: what a C compiler and the kernel's headers say."""

from __future__ import annotations

import ctypes
import importlib
import pkgutil
import struct
from typing import Annotated, Any, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fabric.uapi
from fabric.uapi import arm64, ioctl, kvm, mips, ppc, s390, x86
from fabric.uapi.codec import Array, Bits, CStruct, Word, cstruct, u8, u16, u32, u64, word

MODULES = [
    importlib.import_module(f"fabric.uapi.{module.name}")
    for module in pkgutil.iter_modules(fabric.uapi.__path__)
    if module.name not in ("codec", "usermem")
]
STRUCTS = sorted(
    {c for m in MODULES for c in vars(m).values() if isinstance(c, type) and issubclass(c, CStruct)} - {CStruct},
    key=lambda c: (c.__module__, c.__name__),
)
WORDS = sorted(
    {c for m in MODULES for c in vars(m).values() if isinstance(c, type) and issubclass(c, Word)} - {Word},
    key=lambda c: (c.__module__, c.__name__),
)


def name_of(cls: type) -> str:
    return f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}"


CTYPES = {
    "B": ctypes.c_uint8,
    "H": ctypes.c_uint16,
    "I": ctypes.c_uint32,
    "Q": ctypes.c_uint64,
    "b": ctypes.c_int8,
    "i": ctypes.c_int32,
    "q": ctypes.c_int64,
}
INTEGERS = {
    "B": st.integers(0, 255),
    "H": st.integers(0, (1 << 16) - 1),
    "I": st.integers(0, (1 << 32) - 1),
    "Q": st.integers(0, (1 << 64) - 1),
    "b": st.integers(-128, 127),
    "i": st.integers(-(1 << 31), (1 << 31) - 1),
    "q": st.integers(-(1 << 63), (1 << 63) - 1),
}


def members(cls: type[CStruct]) -> list[tuple[str, str | Array]]:
    """The declared members of a struct: name and ``struct`` code, or array."""
    hints = get_type_hints(cls, include_extras=True)
    return [(name, hints[name].__metadata__[0]) for name in cls.OFFSETS]


def as_ctypes(cls: type[CStruct]) -> type[ctypes.Structure]:
    """The same declaration, laid out by ctypes."""

    def kind(member: str | Array) -> Any:
        if isinstance(member, Array):
            element = member.element
            return (CTYPES[element] if isinstance(element, str) else as_ctypes(element)) * member.count
        return CTYPES[member] if member in CTYPES else ctypes.c_uint8 * int(member[:-1])

    return type(cls.__name__, (ctypes.Structure,), {"_fields_": [(n, kind(m)) for n, m in members(cls)]})


def values(cls: type[CStruct]) -> st.SearchStrategy[CStruct]:
    """Any value of a struct; arrays and byte strings are drawn as repetitions, as some are thousands long."""

    def repeated(element: st.SearchStrategy[Any], count: int) -> st.SearchStrategy[tuple[Any, ...]]:
        pattern = st.lists(element, min_size=1, max_size=4)
        return pattern.map(lambda elements: tuple((elements * count)[:count]))

    def member(kind: str | Array) -> st.SearchStrategy[Any]:
        if isinstance(kind, str):
            return INTEGERS[kind] if kind in INTEGERS else repeated(INTEGERS["B"], int(kind[:-1])).map(bytes)
        element = INTEGERS[kind.element] if isinstance(kind.element, str) else values(kind.element)
        return repeated(element, kind.count)

    return st.builds(cls, **{name: member(kind) for name, kind in members(cls)})


class TestStructs:
    @pytest.mark.parametrize("cls", STRUCTS, ids=name_of)
    def test_offsets_are_those_of_a_c_compiler(self, cls: type[CStruct]) -> None:
        """Size and offsets follow C's natural alignment; guest structures are tight and come out the same."""
        native = as_ctypes(cls)

        assert ctypes.sizeof(native) == cls.SIZE
        assert {name: getattr(native, name).offset for name, _ in members(cls)} == cls.OFFSETS

    @pytest.mark.parametrize(
        ("cls", "size"),
        [
            (kvm.KvmUserspaceMemoryRegion, 32),
            (kvm.KvmDirtyLog, 16),
            (kvm.KvmCreateDevice, 12),
            (kvm.KvmDeviceAttr, 24),
            (kvm.KvmEnableCap, 104),
            (kvm.KvmOneReg, 16),
            (kvm.KvmIrqLevel, 8),
            (kvm.KvmIrqRouting, 8),
            (kvm.KvmIrqRoutingEntry, 48),
            (kvm.KvmIrqRoutingS390Adapter, 32),
            (kvm.KvmMsi, 32),
            (kvm.KvmIrqfd, 32),
            (kvm.KvmIoeventfd, 64),
            (arm64.KvmVcpuInit, 32),
            (arm64.KvmArmDeviceAddr, 16),
            (arm64.KvmPmuEventFilter, 8),
            (arm64.PvtimeStolenTime, 16),
            (arm64.ItsCommand, 32),
            (arm64.KvmVcpuEvents, 64),
            (x86.KvmIrqchip, 520),
            (x86.KvmPicState, 16),
            (x86.KvmIoapicState, 216),
            (x86.KvmLapicState, 1024),
            (x86.KvmPitState2, 112),
            (x86.KvmClockData, 48),
            (x86.KvmVcpuEvents, 64),
            (x86.KvmSregs, 312),
            (x86.KvmHypervExit, 56),
            (x86.PvclockVcpuTimeInfo, 32),
            (ppc.KvmPpcXiveEq, 64),
            (ppc.KvmCreateSpaprTce, 16),
            (ppc.KvmCreateSpaprTce64, 32),
            (s390.KvmS390Irq, 72),
            (s390.KvmS390AisReq, 4),
            (s390.KvmS390VmTodClock, 16),
            (s390.KvmS390VmCpuProcessor, 2064),
            (s390.KvmS390VmCpuMachine, 4112),
            (s390.KvmS390VmCpuSubfunc, 2048),
        ],
    )
    def test_size(self, cls: type[CStruct], size: int) -> None:
        """Sizes are those of the header."""
        assert size == cls.SIZE
        assert size == len(cls().pack())

    @pytest.mark.parametrize("cls", STRUCTS, ids=name_of)
    @settings(max_examples=15)  # times a hundred layouts
    @given(data=st.data())
    def test_round_trip(self, cls: type[CStruct], data: st.DataObject) -> None:
        """Every value comes back as it was packed, from any offset."""
        value = data.draw(values(cls))

        assert value == cls.unpack(b"\xff" * 3 + value.pack() + b"\xff", 3)

    def test_members_default_to_zero(self) -> None:
        """As in a C initializer, what is not named is zero."""
        assert bytes(32) == kvm.KvmMsi().pack()

    def test_bytes_on_the_wire(self) -> None:
        """Members go to their places in the host's byte order."""
        packed = kvm.KvmMsi(address_lo=0x08090040, data=5, flags=1, devid=3).pack()

        assert struct.pack("=IIIII12x", 0x08090040, 0, 5, 1, 3) == packed

    def test_guest_structures_have_the_guests_byte_order(self) -> None:
        """Arm structures in guest memory are little-endian on any host."""
        assert (
            bytes.fromhex("0000000000000000 0807060504030201")
            == arm64.PvtimeStolenTime(stolen_time=0x0102030405060708).pack()
        )

    def test_nested_structs_are_aligned(self) -> None:
        """An array of structs starts and strides as C lays it out."""

        @cstruct
        class Inner(CStruct):
            wide: u64 = 0
            narrow: u8 = 0

        globals()["Inner"] = Inner  # annotations are looked up in the module

        @cstruct
        class Outer(CStruct):
            first: u16 = 0
            inner: Annotated[tuple[Inner, ...], Array(Inner, 2)] = (Inner(), Inner())
            last: u32 = 0

        assert {"first": 0, "inner": 8, "last": 40} == Outer.OFFSETS
        assert 48 == Outer.SIZE
        value = Outer(1, (Inner(2, 3), Inner(4, 5)), 6)
        assert value == Outer.unpack(value.pack())

    def test_short_data_is_refused(self) -> None:
        """A struct is unpacked from all of its bytes or not at all."""
        with pytest.raises(ValueError, match="KvmMsi must have 32 bytes, not 31"):
            kvm.KvmMsi.unpack(bytes(31))

    @pytest.mark.parametrize(
        "value",
        [
            kvm.KvmMsi(data=1 << 32),
            kvm.KvmMsi(pad=bytes(13)),
            kvm.KvmIoeventfd(fd=1 << 31),
            kvm.KvmEnableCap(args=(1, 2, 3)),
        ],
        ids=["wide", "long-bytes", "signed", "short-array"],
    )
    def test_a_value_that_does_not_fit_is_refused(self, value: CStruct) -> None:
        """Nothing is cut off silently."""
        with pytest.raises(ValueError, match=type(value).__name__):
            value.pack()

    def test_routes_have_a_class_by_type(self) -> None:
        """The union of a routing entry is unpacked by its type."""
        msi = kvm.KvmIrqRoutingMsi(address_lo=0x08090040, data=7, devid=8)
        entry = kvm.KvmIrqRoutingEntry(5, kvm.KVM_IRQ_ROUTING_MSI, kvm.KVM_MSI_VALID_DEVID, u=msi.pack())

        again = kvm.KvmIrqRoutingEntry.unpack(entry.pack())

        assert msi == kvm.ROUTE_CLASSES[again.type].unpack(again.u)


class TestWords:
    @pytest.mark.parametrize("cls", WORDS, ids=name_of)
    @settings(max_examples=15)  # times a hundred layouts
    @given(data=st.data())
    def test_round_trip(self, cls: type[Word], data: st.DataObject) -> None:
        """The bits in fields survive, the bits in none are dropped."""
        value = data.draw(st.integers(0, (1 << cls.WIDTH) - 1))
        kept = sum(bits.mask for bits in cls.FIELDS.values())

        assert value & kept == cls.unpack(value).pack()

    def test_fields_are_in_their_places(self) -> None:
        """A REDIST_REGION value has count, base, flags and index at 63:52, 51:16, 15:12 and 11:0."""
        region = arm64.VgicV3RedistRegion(count=0x123, base=0x80A, flags=4, index=0x567)

        assert 0x123_00000080A_4_567 == region.pack()

    def test_a_field_that_does_not_fit_is_refused(self) -> None:
        """A value wider than its field would change the next one."""
        with pytest.raises(ValueError, match=r"ArmIrqLine\.irq_type must fit 4 bits, not 0x10"):
            arm64.ArmIrqLine(irq_type=16).pack()

    def test_a_word_too_wide_is_refused(self) -> None:
        """A word has its width."""
        with pytest.raises(ValueError, match="ArmIrqLine must be an unsigned 32-bit value"):
            arm64.ArmIrqLine.unpack(1 << 32)

    def test_overlapping_fields_are_refused(self) -> None:
        """A declaration with two fields on one bit is a mistake."""

        class Broken(Word):
            high: Annotated[int, Bits(7, 4)] = 0
            low: Annotated[int, Bits(4, 0)] = 0

        with pytest.raises(ValueError, match=r"Broken\.low"):
            word(8)(Broken)


class TestIoctls:
    @pytest.mark.parametrize(
        ("name", "number"),
        [
            ("KVM_GET_API_VERSION", 0xAE00),
            ("KVM_CREATE_VM", 0xAE01),
            ("KVM_CREATE_VCPU", 0xAE41),
            ("KVM_SET_USER_MEMORY_REGION", 0x4020AE46),
            ("KVM_GET_DIRTY_LOG", 0x4010AE42),
            ("KVM_IRQ_LINE_STATUS", 0xC008AE67),
            ("KVM_GET_IRQCHIP", 0xC208AE62),
            ("KVM_SET_IRQCHIP", 0x8208AE63),
            ("KVM_SIGNAL_MSI", 0x4020AEA5),
            ("KVM_IOEVENTFD", 0x4040AE79),
            ("KVM_CREATE_DEVICE", 0xC00CAEE0),
            ("KVM_HAS_DEVICE_ATTR", 0x4018AEE3),
            ("KVM_ENABLE_CAP", 0x4068AEA3),
            ("KVM_ARM_VCPU_INIT", 0x4020AEAE),
            ("KVM_ARM_PREFERRED_TARGET", 0x8020AEAF),
            ("KVM_GET_LAPIC", 0x8400AE8E),
            ("KVM_CREATE_SPAPR_TCE_64", 0x4020AEA8),
        ],
    )
    def test_number(self, name: str, number: int) -> None:
        """Numbers are asm-generic: direction, size, 0xae, number."""
        assert number == getattr(ioctl, name)

    @pytest.mark.parametrize(
        ("request_number", "cls"),
        [
            (ioctl.KVM_SET_USER_MEMORY_REGION, kvm.KvmUserspaceMemoryRegion),
            (ioctl.KVM_GET_DIRTY_LOG, kvm.KvmDirtyLog),
            (ioctl.KVM_CLEAR_DIRTY_LOG, kvm.KvmClearDirtyLog),
            (ioctl.KVM_CREATE_DEVICE, kvm.KvmCreateDevice),
            (ioctl.KVM_SET_DEVICE_ATTR, kvm.KvmDeviceAttr),
            (ioctl.KVM_ENABLE_CAP, kvm.KvmEnableCap),
            (ioctl.KVM_GET_ONE_REG, kvm.KvmOneReg),
            (ioctl.KVM_GET_MP_STATE, kvm.KvmMpState),
            (ioctl.KVM_IRQ_LINE, kvm.KvmIrqLevel),
            (ioctl.KVM_SET_GSI_ROUTING, kvm.KvmIrqRouting),
            (ioctl.KVM_SIGNAL_MSI, kvm.KvmMsi),
            (ioctl.KVM_IRQFD, kvm.KvmIrqfd),
            (ioctl.KVM_IOEVENTFD, kvm.KvmIoeventfd),
            (ioctl.KVM_ARM_VCPU_INIT, arm64.KvmVcpuInit),
            (ioctl.KVM_ARM_SET_DEVICE_ADDR, arm64.KvmArmDeviceAddr),
            (ioctl.KVM_GET_VCPU_EVENTS, arm64.KvmVcpuEvents),
            (ioctl.KVM_GET_VCPU_EVENTS, x86.KvmVcpuEvents),
            (ioctl.KVM_GET_IRQCHIP, x86.KvmIrqchip),
            (ioctl.KVM_GET_LAPIC, x86.KvmLapicState),
            (ioctl.KVM_GET_PIT, x86.KvmPitState),
            (ioctl.KVM_CREATE_PIT2, x86.KvmPitConfig),
            (ioctl.KVM_GET_PIT2, x86.KvmPitState2),
            (ioctl.KVM_GET_CLOCK, x86.KvmClockData),
            (ioctl.KVM_GET_MSRS, x86.KvmMsrs),
            (ioctl.KVM_GET_CPUID2, x86.KvmCpuid2),
            (ioctl.KVM_GET_REGS, x86.KvmRegs),
            (ioctl.KVM_GET_SREGS, x86.KvmSregs),
            (ioctl.KVM_CREATE_SPAPR_TCE, ppc.KvmCreateSpaprTce),
            (ioctl.KVM_CREATE_SPAPR_TCE_64, ppc.KvmCreateSpaprTce64),
            (ioctl.KVM_S390_IRQ, s390.KvmS390Irq),
        ],
    )
    def test_the_number_has_the_size_of_the_struct(self, request_number: int, cls: type[CStruct]) -> None:
        """Bits 29:16 of a request are the size of its argument."""
        assert cls.SIZE == request_number >> 16 & 0x3FFF

    def test_every_request_has_a_name(self) -> None:
        """Messages name requests; names that share a number are both given."""
        assert "KVM_SIGNAL_MSI" == ioctl.request_name(ioctl.KVM_SIGNAL_MSI)
        assert "KVM_ARM_SET_DEVICE_ADDR or KVM_GET_ONE_REG" == ioctl.request_name(ioctl.KVM_GET_ONE_REG)
        assert "0xdeadbeef" == ioctl.request_name(0xDEADBEEF)


class TestRegisterIds:
    @pytest.mark.spec("api.reg.icp-state", "api.reg.vp-state", "api.reg.mips-kscratch1", "api.reg.mips-kscratch6")
    @pytest.mark.parametrize(
        ("reg_id", "number", "size"),
        [
            (ppc.KVM_REG_PPC_ICP_STATE, 0x103000000000008C, 8),
            (ppc.KVM_REG_PPC_VP_STATE, 0x104000000000008D, 16),
            (mips.KVM_REG_MIPS_CP0_KSCRATCH1, 0x70300000000100FA, 8),
            (mips.KVM_REG_MIPS_CP0_KSCRATCH6, 0x70300000000100FF, 8),
        ],
    )
    def test_id(self, reg_id: int, number: int, size: int) -> None:
        """An id is architecture, size and register."""
        assert (number, size) == (reg_id, kvm.reg_size(reg_id))


class TestArm64:
    @pytest.mark.spec("api.reg.timer-cval", "api.reg.timer-cval.note.swapped")
    def test_timer_ids_are_exchanged(self) -> None:
        """TIMER_CVAL has the encoding of the counter, TIMER_CNT that of the compare value."""
        assert 0x603000000013DF19 == arm64.KVM_REG_ARM_TIMER_CTL
        assert 0x603000000013DF02 == arm64.KVM_REG_ARM_TIMER_CVAL
        assert 0x603000000013DF1A == arm64.KVM_REG_ARM_TIMER_CNT

    @pytest.mark.spec("api.set-one-reg.rule.size")
    @pytest.mark.parametrize(("reg_id", "size"), [(arm64.KVM_REG_ARM_TIMER_CTL, 8), (arm64.arm64_core_reg(0, 4), 4)])
    def test_register_size_is_in_the_id(self, reg_id: int, size: int) -> None:
        """Bits 55:52 of a register id are the logarithm of its size."""
        assert size == kvm.reg_size(reg_id)

    def test_core_register_ids(self) -> None:
        """Core registers are named by their offset in 4-byte units: x0 and pc."""
        assert 0x6030000000100000 == arm64.arm64_core_reg(0)
        assert 0x6030000000100040 == arm64.arm64_core_reg(256)

    @pytest.mark.spec("api.irq-line.rule.arm-layout-2")
    def test_irq_line_names_vcpus_above_255(self) -> None:
        """The vCPU number is 256 * vcpu2_index + vcpu_index."""
        assert 0x1201_001B | 1 << 24 == arm64.irq_line(3, 27, vcpu=257)

    @pytest.mark.parametrize(
        ("vcpu_id", "mpidr"), [(0, 0x80000000), (15, 0x8000000F), (16, 0x80000100), (511, 0x80001F0F)]
    )
    def test_mpidr_of_a_vcpu(self, vcpu_id: int, mpidr: int) -> None:
        """Sixteen vCPUs share an Aff1 value, as an SGI names at most sixteen targets in a group."""
        assert mpidr == arm64.mpidr_for_vcpu_id(vcpu_id)

    @given(st.integers(0, (1 << 32) - 1))
    def test_affinity_round_trip(self, affinity: int) -> None:
        """Aff3 is at 39:32 of MPIDR_EL1, whose bit 31 is one, and at 31:24 of the affinity number."""
        mpidr = arm64.affinity_to_mpidr(affinity) | arm64.MPIDR_RES1

        assert affinity == arm64.mpidr_to_affinity(mpidr)
        assert affinity << 32 | 0x100 == arm64.vgic_reg_attr(mpidr, 0x100)
