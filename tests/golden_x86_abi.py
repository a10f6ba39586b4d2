"""KVM x86 uapi: request numbers, constants and struct codecs for the golden vectors.

A codec turns the bytes of an ioctl argument into a plain dict ("fields") and back.
Rules, the same for every struct:

* a field that is absent from a dict is zero;
* byte arrays (padding, reserved) are lower-case hex strings, absent when all zero;
* decode() is only used for a buffer when encode(decode(b)) == b, so fields lose nothing.

Nothing here talks to a kernel.
"""

import struct

# ---------------------------------------------------------------- request numbers

_DIR = {"": 0, "W": 1, "R": 2, "RW": 3}


def _ioc(direction, nr, size):
    return (_DIR[direction] << 30) | (size << 16) | (0xAE << 8) | nr


# name: (direction, nr, size, how the argument is passed, struct name or None, kernel writes it)
#   how: "int" = by value, "ptr" = pointer to a buffer, "none" = argument ignored (0 passed)
_T = {
    # system fd
    "KVM_GET_API_VERSION": ("", 0x00, 0, "int", None, False),
    "KVM_CREATE_VM": ("", 0x01, 0, "int", None, False),
    "KVM_GET_MSR_INDEX_LIST": ("RW", 0x02, 4, "ptr", "msr_list", True),
    "KVM_CHECK_EXTENSION": ("", 0x03, 0, "int", None, False),
    "KVM_GET_VCPU_MMAP_SIZE": ("", 0x04, 0, "int", None, False),
    "KVM_GET_SUPPORTED_CPUID": ("RW", 0x05, 8, "ptr", "cpuid2", True),
    # vm fd
    "KVM_CREATE_VCPU": ("", 0x41, 0, "int", None, False),
    "KVM_SET_USER_MEMORY_REGION": ("W", 0x46, 32, "ptr", "user_memory_region", False),
    "KVM_SET_TSS_ADDR": ("", 0x47, 0, "int", None, False),
    "KVM_CREATE_IRQCHIP": ("", 0x60, 0, "int", None, False),
    "KVM_IRQ_LINE": ("W", 0x61, 8, "ptr", "irq_level", False),
    "KVM_GET_IRQCHIP": ("RW", 0x62, 520, "ptr", "irqchip", True),
    "KVM_SET_IRQCHIP": ("R", 0x63, 520, "ptr", "irqchip", False),
    "KVM_CREATE_PIT": ("", 0x64, 0, "int", None, False),
    "KVM_GET_PIT": ("RW", 0x65, 72, "ptr", "pit_state", True),
    "KVM_SET_PIT": ("R", 0x66, 72, "ptr", "pit_state", False),
    "KVM_IRQ_LINE_STATUS": ("RW", 0x67, 8, "ptr", "irq_level", True),
    "KVM_ASSIGN_PCI_DEVICE": ("R", 0x69, 64, "ptr", None, False),
    "KVM_SET_GSI_ROUTING": ("W", 0x6A, 8, "ptr", "irq_routing", False),
    "KVM_ASSIGN_DEV_IRQ": ("W", 0x70, 64, "ptr", None, False),
    "KVM_REINJECT_CONTROL": ("", 0x71, 0, "ptr", "reinject_control", False),
    "KVM_ASSIGN_SET_MSIX_NR": ("W", 0x73, 8, "ptr", None, False),
    "KVM_IRQFD": ("W", 0x76, 32, "ptr", "irqfd", False),
    "KVM_CREATE_PIT2": ("W", 0x77, 64, "ptr", "pit_config", False),
    "KVM_SET_BOOT_CPU_ID": ("", 0x78, 0, "int", None, False),
    "KVM_IOEVENTFD": ("W", 0x79, 64, "ptr", "ioeventfd", False),
    "KVM_SET_CLOCK": ("W", 0x7B, 48, "ptr", "clock_data", False),
    "KVM_GET_CLOCK": ("R", 0x7C, 48, "ptr", "clock_data", True),
    "KVM_GET_PIT2": ("R", 0x9F, 112, "ptr", "pit_state2", True),
    "KVM_SET_PIT2": ("W", 0xA0, 112, "ptr", "pit_state2", False),
    "KVM_SET_TSC_KHZ": ("", 0xA2, 0, "int", None, False),
    "KVM_GET_TSC_KHZ": ("", 0xA3, 0, "int", None, False),
    "KVM_SIGNAL_MSI": ("W", 0xA5, 32, "ptr", "msi", False),
    "KVM_ARM_SET_DEVICE_ADDR": ("W", 0xAB, 16, "ptr", None, False),
    "KVM_HYPERV_EVENTFD": ("W", 0xBD, 24, "ptr", None, False),
    "KVM_XEN_HVM_SET_ATTR": ("W", 0xC9, 72, "ptr", None, False),
    # device fd (also vm, vcpu and system fds)
    "KVM_CREATE_DEVICE": ("RW", 0xE0, 12, "ptr", "create_device", True),
    "KVM_SET_DEVICE_ATTR": ("W", 0xE1, 24, "ptr", "device_attr", False),
    "KVM_GET_DEVICE_ATTR": ("W", 0xE2, 24, "ptr", "device_attr", False),
    "KVM_HAS_DEVICE_ATTR": ("W", 0xE3, 24, "ptr", "device_attr", False),
    # vcpu fd
    "KVM_GET_REGS": ("R", 0x81, 144, "ptr", "regs", True),
    "KVM_GET_SREGS": ("R", 0x83, 312, "ptr", "sregs", True),
    "KVM_SET_SREGS": ("W", 0x84, 312, "ptr", "sregs", False),
    "KVM_INTERRUPT": ("W", 0x86, 4, "ptr", "interrupt", False),
    "KVM_GET_MSRS": ("RW", 0x88, 8, "ptr", "msrs", True),
    "KVM_SET_MSRS": ("W", 0x89, 8, "ptr", "msrs", False),
    "KVM_GET_LAPIC": ("R", 0x8E, 1024, "ptr", "lapic_state", True),
    "KVM_SET_LAPIC": ("W", 0x8F, 1024, "ptr", "lapic_state", False),
    "KVM_SET_CPUID2": ("W", 0x90, 8, "ptr", "cpuid2", False),
    "KVM_GET_CPUID2": ("RW", 0x91, 8, "ptr", "cpuid2", True),
    "KVM_GET_MP_STATE": ("R", 0x98, 4, "ptr", "mp_state", True),
    "KVM_SET_MP_STATE": ("W", 0x99, 4, "ptr", "mp_state", False),
    "KVM_NMI": ("", 0x9A, 0, "int", None, False),
    "KVM_GET_VCPU_EVENTS": ("R", 0x9F, 64, "ptr", "vcpu_events", True),
    "KVM_SET_VCPU_EVENTS": ("W", 0xA0, 64, "ptr", "vcpu_events", False),
    "KVM_ENABLE_CAP": ("W", 0xA3, 104, "ptr", "enable_cap", False),
    "KVM_GET_ONE_REG": ("W", 0xAB, 16, "ptr", None, False),
    "KVM_KVMCLOCK_CTRL": ("", 0xAD, 0, "int", None, False),
    "KVM_ARM_VCPU_INIT": ("W", 0xAE, 32, "ptr", None, False),
    "KVM_SMI": ("", 0xB7, 0, "int", None, False),
}

NR = {name: _ioc(t[0], t[1], t[2]) for name, t in _T.items()}
HOW = {name: t[3] for name, t in _T.items()}
STRUCT_OF = {name: t[4] for name, t in _T.items()}
WRITES = {name: t[5] for name, t in _T.items()}


# ---------------------------------------------------------------- codecs


class Codec:
    """Fixed-layout struct: fields are (name, fmt); fmt is a struct letter, ("hex", n),
    a Codec (nested), or (Codec, n) / (letter, n) for arrays."""

    def __init__(self, *fields):
        self.fields = []
        off = 0
        for name, fmt in fields:
            size = self._size(fmt)
            self.fields.append((name, fmt, off, size))
            off += size
        self.size = off

    @staticmethod
    def _size(fmt):
        if isinstance(fmt, str):
            return struct.calcsize("<" + fmt)
        if isinstance(fmt, Codec):
            return fmt.size
        kind, n = fmt
        if kind == "hex":
            return n
        return Codec._size(kind) * n

    def offset(self, path):
        """(offset, size) of a dotted field path; array elements are numbers."""
        head, _, rest = path.partition(".")
        for name, fmt, off, size in self.fields:
            if name != head:
                continue
            if isinstance(fmt, tuple) and fmt[0] != "hex" and rest:
                index, _, rest = rest.partition(".")
                each = Codec._size(fmt[0])
                off += int(index) * each
                fmt, size = fmt[0], each
            if rest:
                sub, size = fmt.offset(rest)
                off += sub
            return off, size
        raise KeyError(path)

    @staticmethod
    def _dec(fmt, raw):
        if isinstance(fmt, str):
            return struct.unpack("<" + fmt, raw)[0]
        if isinstance(fmt, Codec):
            return fmt.decode(raw)
        kind, n = fmt
        if kind == "hex":
            return raw.hex() if any(raw) else None
        each = Codec._size(kind)
        out = [Codec._dec(kind, raw[i * each : (i + 1) * each]) for i in range(n)]
        while out and not out[-1]:
            out.pop()
        return out

    @staticmethod
    def _enc(fmt, value):
        if isinstance(fmt, str):
            return struct.pack("<" + fmt, value or 0)
        if isinstance(fmt, Codec):
            return fmt.encode(value or {})
        kind, n = fmt
        if kind == "hex":
            return bytes.fromhex(value or "").ljust(n, b"\0")
        value = list(value or [])
        return b"".join(Codec._enc(kind, value[i] if i < len(value) else None) for i in range(n))

    def decode(self, raw):
        out = {}
        for name, fmt, off, size in self.fields:
            value = self._dec(fmt, raw[off : off + size])
            if value:
                out[name] = value
        return out

    def encode(self, fields):
        known = {name for name, *_ in self.fields}
        unknown = set(fields) - known
        if unknown:
            raise KeyError(f"unknown fields {sorted(unknown)}")
        return b"".join(self._enc(fmt, fields.get(name)) for name, fmt, *_ in self.fields)


class Flex:
    """Header codec, then an array "entries" as long as it is (the count field in the header
    is explicit, so a vector can make the two disagree)."""

    def __init__(self, header, entry):
        self.header, self.entry = header, entry

    def offset(self, path):
        if path.startswith("entries."):
            index, _, rest = path[len("entries.") :].partition(".")
            sub, size = self.entry.offset(rest)
            return self.header.size + int(index) * self.entry.size + sub, size
        return self.header.offset(path)

    def decode(self, raw):
        out = self.header.decode(raw[: self.header.size])
        body = raw[self.header.size :]
        if len(body) % self.entry.size:
            raise ValueError("ragged")
        out["entries"] = [
            self.entry.decode(body[i : i + self.entry.size]) for i in range(0, len(body), self.entry.size)
        ]
        return out

    def encode(self, fields):
        head = {k: v for k, v in fields.items() if k != "entries"}
        return self.header.encode(head) + b"".join(self.entry.encode(e) for e in fields.get("entries", []))


class RouteEntry:
    """kvm_irq_routing_entry; the union is decoded by type, or kept as hex ("u")."""

    size = 48
    head = Codec(("gsi", "I"), ("type", "I"), ("flags", "I"), ("pad", "I"))
    kinds = {
        1: ("irqchip", Codec(("irqchip", "I"), ("pin", "I"), ("tail", ("hex", 24)))),
        2: (
            "msi",
            Codec(
                ("address_lo", "I"),
                ("address_hi", "I"),
                ("data", "I"),
                ("devid", "I"),
                ("tail", ("hex", 16)),
            ),
        ),
        4: ("hv_sint", Codec(("vcpu", "I"), ("sint", "I"), ("tail", ("hex", 24)))),
    }

    def offset(self, path):
        return self.head.offset(path)

    def decode(self, raw):
        out = self.head.decode(raw[:16])
        kind = self.kinds.get(out.get("type", 0))
        if kind:
            out[kind[0]] = kind[1].decode(raw[16:])
        elif any(raw[16:]):
            out["u"] = raw[16:].hex()
        return out

    def encode(self, f):
        head = {k: f[k] for k in ("gsi", "type", "flags", "pad") if k in f}
        for name, codec in self.kinds.values():
            if name in f:
                return self.head.encode(head) + codec.encode(f[name])
        return self.head.encode(head) + bytes.fromhex(f.get("u", "")).ljust(32, b"\0")


PIC = Codec(
    *[
        (n, "B")
        for n in (
            "last_irr irr imr isr priority_add irq_base read_reg_select poll special_mask "
            "init_state auto_eoi rotate_on_auto_eoi special_fully_nested_mode init4 elcr elcr_mask"
        ).split()
    ]
)
IOAPIC_HEAD = Codec(("base_address", "Q"), ("ioregsel", "I"), ("id", "I"), ("irr", "I"), ("pad", "I"))
RTE_DEFAULT = 0x10000


class Irqchip:
    """kvm_irqchip. {"chip_id", "pad", "pic": {...}} for chips 0/1, {"ioapic": {..., "redirtbl":
    {"pin": "0x.."}}} for chip 2 (pins not named hold 0x10000), "raw" hex for any other chip;
    "tail": hex of whatever follows the used part of the 512-byte union."""

    size = 520
    head = Codec(("chip_id", "I"), ("pad", "I"))

    def offset(self, path):
        base = 8
        if path.startswith("pic."):
            off, size = PIC.offset(path[4:])
            return base + off, size
        if path.startswith("ioapic.redirtbl."):
            return base + 24 + 8 * int(path.rsplit(".", 1)[1]), 8
        if path.startswith("ioapic."):
            off, size = IOAPIC_HEAD.offset(path[7:])
            return base + off, size
        return self.head.offset(path)

    def decode(self, raw):
        out = self.head.decode(raw[:8])
        body = raw[8:]
        chip = out.get("chip_id", 0)
        if chip in (0, 1):
            out["pic"] = PIC.decode(body[:16])
            used = 16
        elif chip == 2:
            io = IOAPIC_HEAD.decode(body[:24])
            table = struct.unpack("<24Q", body[24:216])
            io["redirtbl"] = {str(i): hex(v) for i, v in enumerate(table) if v != RTE_DEFAULT}
            out["ioapic"] = io
            used = 216
        else:
            if any(body):
                out["raw"] = body.hex()
            return out
        if any(body[used:]):
            out["tail"] = body[used:].hex()
        return out

    def encode(self, f):
        head = self.head.encode({k: f[k] for k in ("chip_id", "pad") if k in f})
        if "pic" in f:
            body = PIC.encode(f["pic"])
        elif "ioapic" in f:
            io = dict(f["ioapic"])
            rtes = io.pop("redirtbl", {})
            table = [RTE_DEFAULT] * 24
            for pin, value in rtes.items():
                table[int(pin)] = int(value, 16)
            body = IOAPIC_HEAD.encode(io) + struct.pack("<24Q", *table)
        else:
            body = bytes.fromhex(f.get("raw", ""))
        body += bytes.fromhex(f.get("tail", ""))
        return head + body.ljust(512, b"\0")


LAPIC_REGS = {
    "id": 0x20, "lvr": 0x30, "tpr": 0x80, "apr": 0x90, "ppr": 0xA0, "eoi": 0xB0, "rrd": 0xC0,
    "ldr": 0xD0, "dfr": 0xE0, "svr": 0xF0, "esr": 0x280, "lvtcmci": 0x2F0, "icr": 0x300,
    "icr2": 0x310, "lvtt": 0x320, "lvtthmr": 0x330, "lvtpc": 0x340, "lvt0": 0x350,
    "lvt1": 0x360, "lvterr": 0x370, "tmict": 0x380, "tmcct": 0x390, "tdcr": 0x3E0,
    "selfipi": 0x3F0,
}  # fmt: skip
LAPIC_BITMAPS = {"isr": 0x100, "tmr": 0x180, "irr": 0x200}


class Lapic:
    """kvm_lapic_state: named 32-bit registers, isr/tmr/irr as sorted vector lists, and
    "raw": {"0xoff": u32} for any other non-zero word."""

    size = 1024

    def offset(self, path):
        if path in LAPIC_REGS:
            return LAPIC_REGS[path], 4
        name, _, word = path.partition(".")
        return LAPIC_BITMAPS[name] + 16 * int(word), 4

    def decode(self, raw):
        words = {i: struct.unpack_from("<I", raw, i)[0] for i in range(0, 1024, 4)}
        out = {}
        for name, off in LAPIC_REGS.items():
            value = words.pop(off)
            if value:
                out[name] = value
        for name, base in LAPIC_BITMAPS.items():
            vectors = []
            for k in range(8):
                value = words.pop(base + 16 * k)
                vectors += [32 * k + b for b in range(32) if value >> b & 1]
            if vectors:
                out[name] = vectors
        rest = {hex(off): v for off, v in words.items() if v}
        if rest:
            out["raw"] = rest
        return out

    def encode(self, f):
        raw = bytearray(1024)
        for name, value in f.items():
            if name in LAPIC_REGS:
                struct.pack_into("<I", raw, LAPIC_REGS[name], value)
            elif name in LAPIC_BITMAPS:
                for v in value:
                    off = LAPIC_BITMAPS[name] + 16 * (v >> 5)
                    (old,) = struct.unpack_from("<I", raw, off)
                    struct.pack_into("<I", raw, off, old | 1 << (v & 31))
            elif name == "raw":
                for off, v in value.items():
                    struct.pack_into("<I", raw, int(off, 16), v)
            else:
                raise KeyError(name)
        return bytes(raw)


_PIT_CHANNEL = Codec(
    ("count", "I"),
    ("latched_count", "H"),
    *[
        (n, "B")
        for n in (
            "count_latched status_latched status read_state write_state write_latch rw_mode mode bcd gate"
        ).split()
    ],
    ("count_load_time", "q"),
)
_SEG = Codec(
    ("base", "Q"),
    ("limit", "I"),
    ("selector", "H"),
    *[(n, "B") for n in "type present dpl db s l g avl unusable padding".split()],
)
_DT = Codec(("base", "Q"), ("limit", "H"), ("padding", ("hex", 6)))

CODECS = {
    "irq_level": Codec(("irq", "I"), ("level", "I")),
    "irqchip": Irqchip(),
    "lapic_state": Lapic(),
    "irq_routing": Flex(Codec(("nr", "I"), ("flags", "I")), RouteEntry()),
    "msi": Codec(
        ("address_lo", "I"),
        ("address_hi", "I"),
        ("data", "I"),
        ("flags", "I"),
        ("devid", "I"),
        ("pad", ("hex", 12)),
    ),
    "irqfd": Codec(("fd", "I"), ("gsi", "I"), ("flags", "I"), ("resamplefd", "I"), ("pad", ("hex", 16))),
    "ioeventfd": Codec(
        ("datamatch", "Q"),
        ("addr", "Q"),
        ("len", "I"),
        ("fd", "i"),
        ("flags", "I"),
        ("pad", ("hex", 36)),
    ),
    "pit_config": Codec(("flags", "I"), ("pad", ("hex", 60))),
    "pit_state": Codec(("channels", (_PIT_CHANNEL, 3))),
    "pit_state2": Codec(("channels", (_PIT_CHANNEL, 3)), ("flags", "I"), ("reserved", ("hex", 36))),
    "reinject_control": Codec(("pit_reinject", "B"), ("reserved", ("hex", 31))),
    "clock_data": Codec(
        ("clock", "Q"),
        ("flags", "I"),
        ("pad0", "I"),
        ("realtime", "Q"),
        ("host_tsc", "Q"),
        ("pad", ("hex", 16)),
    ),
    "create_device": Codec(("type", "I"), ("fd", "I"), ("flags", "I")),
    "device_attr": Codec(("flags", "I"), ("group", "I"), ("attr", "Q"), ("addr", "Q")),
    "enable_cap": Codec(("cap", "I"), ("flags", "I"), ("args", ("Q", 4)), ("pad", ("hex", 64))),
    "interrupt": Codec(("irq", "I")),
    "mp_state": Codec(("mp_state", "I")),
    "msrs": Flex(
        Codec(("nmsrs", "I"), ("pad", "I")),
        Codec(("index", "I"), ("reserved", "I"), ("data", "Q")),
    ),
    "msr_list": Flex(Codec(("nmsrs", "I")), Codec(("index", "I"))),
    "cpuid2": Flex(
        Codec(("nent", "I"), ("padding", "I")),
        Codec(
            ("function", "I"),
            ("index", "I"),
            ("flags", "I"),
            ("eax", "I"),
            ("ebx", "I"),
            ("ecx", "I"),
            ("edx", "I"),
            ("padding", ("hex", 12)),
        ),
    ),
    "user_memory_region": Codec(
        ("slot", "I"),
        ("flags", "I"),
        ("guest_phys_addr", "Q"),
        ("memory_size", "Q"),
        ("userspace_addr", "Q"),
    ),
    "regs": Codec(
        *[(n, "Q") for n in "rax rbx rcx rdx rsi rdi rsp rbp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags".split()]
    ),
    "sregs": Codec(
        *[(n, _SEG) for n in "cs ds es fs gs ss tr ldt".split()],
        ("gdt", _DT),
        ("idt", _DT),
        *[(n, "Q") for n in "cr0 cr2 cr3 cr4 cr8 efer apic_base".split()],
        ("interrupt_bitmap", ("Q", 4)),
    ),
    "vcpu_events": Codec(
        (
            "exception",
            Codec(
                ("injected", "B"),
                ("nr", "B"),
                ("has_error_code", "B"),
                ("pending", "B"),
                ("error_code", "I"),
            ),
        ),
        ("interrupt", Codec(("injected", "B"), ("nr", "B"), ("soft", "B"), ("shadow", "B"))),
        ("nmi", Codec(("injected", "B"), ("pending", "B"), ("masked", "B"), ("pad", "B"))),
        ("sipi_vector", "I"),
        ("flags", "I"),
        (
            "smi",
            Codec(("smm", "B"), ("pending", "B"), ("smm_inside_nmi", "B"), ("latched_init", "B")),
        ),
        ("triple_fault", Codec(("pending", "B"))),
        ("reserved", ("hex", 26)),
        ("exception_has_payload", "B"),
        ("exception_payload", "Q"),
    ),
}


def codec(ioctl):
    name = STRUCT_OF.get(ioctl)
    return CODECS.get(name) if name else None


def struct_size(ioctl):
    """Bytes the kernel copies for a fixed-size argument (None for a flexible one)."""
    c = codec(ioctl)
    if c is None:
        return _T[ioctl][2]
    return getattr(c, "size", None)


def encode(ioctl, fields):
    return codec(ioctl).encode(fields)


def decode(ioctl, raw):
    """Fields for these bytes, or None when no codec gives them back exactly."""
    c = codec(ioctl)
    if c is None:
        return None
    try:
        fields = c.decode(raw)
        if c.encode(fields) == bytes(raw):
            return fields
    except (ValueError, KeyError, struct.error):
        pass
    return None


def offset(ioctl, path):
    return codec(ioctl).offset(path)


# ---------------------------------------------------------------- constants

CAPS = {
    # IRQ, timer, clock and device related capabilities (uapi numbers)
    "KVM_CAP_IRQCHIP": 0, "KVM_CAP_HLT": 1, "KVM_CAP_USER_MEMORY": 3, "KVM_CAP_VAPIC": 6,
    "KVM_CAP_CLOCKSOURCE": 8, "KVM_CAP_NR_VCPUS": 9, "KVM_CAP_PIT": 11, "KVM_CAP_PV_MMU": 13,
    "KVM_CAP_MP_STATE": 14, "KVM_CAP_USER_NMI": 22, "KVM_CAP_REINJECT_CONTROL": 24,
    "KVM_CAP_IRQ_ROUTING": 25, "KVM_CAP_IRQ_INJECT_STATUS": 26, "KVM_CAP_DEVICE_DEASSIGNMENT": 27,
    "KVM_CAP_DEVICE_MSIX": 28, "KVM_CAP_ASSIGN_DEV_IRQ": 29, "KVM_CAP_MCE": 31,
    "KVM_CAP_IRQFD": 32, "KVM_CAP_PIT2": 33, "KVM_CAP_SET_BOOT_CPU_ID": 34,
    "KVM_CAP_PIT_STATE2": 35, "KVM_CAP_IOEVENTFD": 36, "KVM_CAP_XEN_HVM": 38,
    "KVM_CAP_ADJUST_CLOCK": 39, "KVM_CAP_VCPU_EVENTS": 41, "KVM_CAP_HYPERV": 44,
    "KVM_CAP_PCI_SEGMENT": 47, "KVM_CAP_INTR_SHADOW": 49, "KVM_CAP_ENABLE_CAP": 54,
    "KVM_CAP_TSC_CONTROL": 60, "KVM_CAP_GET_TSC_KHZ": 61, "KVM_CAP_MAX_VCPUS": 66,
    "KVM_CAP_ONE_REG": 70, "KVM_CAP_TSC_DEADLINE_TIMER": 72, "KVM_CAP_KVMCLOCK_CTRL": 76,
    "KVM_CAP_SIGNAL_MSI": 77, "KVM_CAP_IRQFD_RESAMPLE": 82, "KVM_CAP_DEVICE_CTRL": 89,
    "KVM_CAP_IRQ_MPIC": 90, "KVM_CAP_IRQ_XICS": 92, "KVM_CAP_HYPERV_TIME": 96,
    "KVM_CAP_IOAPIC_POLARITY_IGNORED": 97, "KVM_CAP_ENABLE_CAP_VM": 98,
    "KVM_CAP_IOEVENTFD_NO_LENGTH": 100, "KVM_CAP_VM_ATTRIBUTES": 101,
    "KVM_CAP_CHECK_EXTENSION_VM": 105, "KVM_CAP_DISABLE_QUIRKS": 116, "KVM_CAP_X86_SMM": 117,
    "KVM_CAP_SPLIT_IRQCHIP": 121, "KVM_CAP_IOEVENTFD_ANY_LENGTH": 122,
    "KVM_CAP_HYPERV_SYNIC": 123, "KVM_CAP_VCPU_ATTRIBUTES": 127, "KVM_CAP_MAX_VCPU_ID": 128,
    "KVM_CAP_X2APIC_API": 129, "KVM_CAP_MSI_DEVID": 131, "KVM_CAP_IMMEDIATE_EXIT": 136,
    "KVM_CAP_X86_DISABLE_EXITS": 143, "KVM_CAP_HYPERV_SYNIC2": 148,
    "KVM_CAP_HYPERV_EVENTFD": 154, "KVM_CAP_EXCEPTION_PAYLOAD": 164,
    "KVM_CAP_HALT_POLL": 182, "KVM_CAP_STEAL_TIME": 187, "KVM_CAP_SYS_ATTRIBUTES": 209,
    "KVM_CAP_DISABLE_QUIRKS2": 213, "KVM_CAP_VM_TSC_CONTROL": 214,
    "KVM_CAP_X86_TRIPLE_FAULT_EVENT": 218, "KVM_CAP_X86_APIC_BUS_CYCLES_NS": 237,
}  # fmt: skip

ROUTE_IRQCHIP, ROUTE_MSI, ROUTE_S390, ROUTE_HV_SINT, ROUTE_XEN = 1, 2, 3, 4, 5
MSI_VALID_DEVID = 1
IRQFD_DEASSIGN, IRQFD_RESAMPLE = 1, 2
IOEVENTFD_DATAMATCH, IOEVENTFD_PIO, IOEVENTFD_DEASSIGN, IOEVENTFD_CCW = 1, 2, 4, 8
CREATE_DEVICE_TEST = 1
DEV_TYPES = {
    "FSL_MPIC_20": 1, "FSL_MPIC_42": 2, "XICS": 3, "VFIO": 4, "ARM_VGIC_V2": 5, "FLIC": 6,
    "ARM_VGIC_V3": 7, "ARM_VGIC_ITS": 8, "XIVE": 9, "ARM_PV_TIME": 10,
}  # fmt: skip
MP_STATES = {
    "RUNNABLE": 0, "UNINITIALIZED": 1, "INIT_RECEIVED": 2, "HALTED": 3, "SIPI_RECEIVED": 4,
    "STOPPED": 5, "CHECK_STOP": 6, "OPERATING": 7, "LOAD": 8, "AP_RESET_HOLD": 9,
    "SUSPENDED": 10,
}  # fmt: skip
EV_NMI, EV_SIPI, EV_SHADOW, EV_SMM, EV_PAYLOAD, EV_TRIPLE = 1, 2, 4, 8, 16, 32
CLOCK_TSC_STABLE, CLOCK_REALTIME, CLOCK_HOST_TSC = 2, 4, 8

MSR_TSC = 0x10
MSR_APICBASE = 0x1B
MSR_TSC_ADJUST = 0x3B
MSR_TSC_DEADLINE = 0x6E0
MSR_X2APIC = 0x800
MSR_WALL_CLOCK_OLD, MSR_SYSTEM_TIME_OLD = 0x11, 0x12
MSR_WALL_CLOCK_NEW, MSR_SYSTEM_TIME_NEW = 0x4B564D00, 0x4B564D01
MSR_ASYNC_PF_EN, MSR_STEAL_TIME, MSR_PV_EOI_EN = 0x4B564D02, 0x4B564D03, 0x4B564D04
MSR_POLL_CONTROL, MSR_ASYNC_PF_INT, MSR_ASYNC_PF_ACK = 0x4B564D05, 0x4B564D06, 0x4B564D07
