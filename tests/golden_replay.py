"""Replay of golden cases: what a real kernel answered, asked of ``Kvm.ioctl`` again.

Each case is a sequence of calls on objects that it names itself; ``tests/golden/README.md`` has the format. Calls
go in as a C program makes them: structs in buffers, values behind user addresses of this process, guest memory in
mappings of it. Compared are the return value or errno, and what was handed back.

Run as a program it prints a table: per file, sequences and operations that agree, and the first difference::

    python tests/golden_replay.py [--simulated-eventfds] [-v] [name ...]
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import gzip
import json
import mmap
import os
import re
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs

import fabric
from fabric.errors import LedgerError
from fabric.kvm import Kvm
from fabric.uapi import ioctl as requests
from fabric.uapi import kvm as uapi
from fabric.uapi.arm64 import KvmVcpuInit

GOLDEN = Path(__file__).parent / "golden" / "kvm-arm64"

Op = dict[str, Any]

COMMAND_GPA, RESULT_GPA = 0x1000_0000, 0x1000_0018
"""Where the guest of the recordings asks for its next command, and leaves the result."""

_ZERO_PAGE = bytes(4096)
_NONZERO = re.compile(rb"[^\0]")


class Gone(Exception):
    """An operation names an object that was not created here."""


@attrs.define
class Difference:
    """One operation that answered differently."""

    sequence: str
    index: int
    op: Op
    ours: str

    def __str__(self) -> str:
        op = {k: v for k, v in self.op.items() if k not in ("on", "ioctl", "ret", "out", "also", "note")}
        arguments = json.dumps(op)
        golden = f"{self.op['ret']}" + (f" out {shorten(self.op['out'])}" if "out" in self.op else "")
        return (
            f"{self.sequence}[{self.index}] {self.op['on']} {self.op['ioctl']} {shorten(arguments)}: "
            f"golden {golden}, ours {self.ours}"
        )


@attrs.define
class Tally:
    """How one file fared."""

    name: str
    sequences: int = 0
    passed: int = 0
    ops: int = 0
    equal: int = 0
    seconds: float = 0.0
    differences: list[Difference] = attrs.field(factory=list)
    unbalanced: list[str] = attrs.field(factory=list)
    """Sequences after which the ledger did not add up, with what it says."""


@attrs.define
class VmMemory:
    """The mappings behind the slots of a VM: slot to (gpa, mapping)."""

    slots: dict[int, tuple[int, mmap.mmap]] = attrs.field(factory=dict)

    def at(self, gpa: int) -> tuple[mmap.mmap, int]:
        """The mapping that backs ``gpa``, and the offset in it."""
        for base, mapping in self.slots.values():
            if base <= gpa < base + len(mapping):
                return mapping, gpa - base
        raise Gone(f"no memory at {gpa:#x}")


class Replayer:
    """One sequence: its Kvm, the objects it named, and its memory."""

    def __init__(self, host_gic: int, *, simulated_eventfds: bool = False) -> None:
        self.kvm = Kvm("aarch64", host_gic=host_gic)
        self.simulated_eventfds = simulated_eventfds
        self.objects: dict[str, int] = {"sys": self.kvm.open()}
        self.memory: dict[str, VmMemory] = {}
        self.regions: dict[int, mmap.mmap] = {}
        self.eventfds: list[int] = []
        self.loaded: dict[str, memoryview] = {}
        self.value = ctypes.create_string_buffer(1 << 16)
        self.value_addr = ctypes.addressof(self.value)
        # Nothing is mapped on the first page.
        self.fault_addr = 0x10
        self.attr = bytearray(uapi.KvmDeviceAttr.SIZE)

    # -- one operation: the return value (an errno name for an error) and what was handed back

    def perform(self, op: Op) -> tuple[Any, Any]:
        """Carry out ``op`` (not ``guest``)."""
        handler: Callable[[Replayer, Op], tuple[Any, Any]] | None = _OPS.get(op["ioctl"])
        if handler is None:
            raise Gone(f"{op['ioctl']} is not replayed")
        try:
            return handler(self, op)
        except OSError as error:
            return {"errno": errno.errorcode[error.errno or 0]}, None

    def fd(self, name: str) -> int:
        number = self.objects.get(name)
        if number is None:
            raise Gone(f"{name} was not created")
        return number

    def call(self, op: Op, request: int, arg: Any = 0) -> int:
        return self.kvm.ioctl(self.fd(op["on"]), request, arg)

    def name(self, op: Op, number: int) -> None:
        """A creating call succeeded; after one that failed in the recording the name is not used."""
        if op["ret"] == 0 and "new" in op:
            self.objects[op["new"]] = number

    def put(self, value: Any, size: int) -> int:
        """Store a value of the recording in user memory; its address."""
        if isinstance(value, dict):
            if "ptr" in value:
                return 0 if value["ptr"] == "null" else self.fault_addr
            data = bytes.fromhex(value["hex"])
        else:
            data = (int(value) & (1 << 8 * size) - 1).to_bytes(size, "little")
        ctypes.memmove(self.value_addr, data, len(data))
        return self.value_addr

    def got(self, out: Any, size: int) -> Any:
        """What was handed back, in the form that the recording has it."""
        if isinstance(out, dict):
            return {"hex": self.value.raw[: len(out["hex"]) // 2].hex()}
        return int.from_bytes(self.value.raw[:size] if size > 8 else ctypes.string_at(self.value_addr, size), "little")

    # -- operations

    def create_vm(self, op: Op) -> tuple[Any, Any]:
        self.name(op, self.call(op, requests.KVM_CREATE_VM, op["arg"]))
        self.memory[op["new"]] = VmMemory()
        return 0, None

    def create_vcpu(self, op: Op) -> tuple[Any, Any]:
        self.name(op, self.call(op, requests.KVM_CREATE_VCPU, op["arg"]))
        return 0, None

    def vcpu_init(self, op: Op) -> tuple[Any, Any]:
        init = KvmVcpuInit(op["target"], tuple(op["features"]))
        return self.call(op, requests.KVM_ARM_VCPU_INIT, bytearray(init.pack())), None

    def create_device(self, op: Op) -> tuple[Any, Any]:
        buffer = bytearray(uapi.KvmCreateDevice(op["type"], 0, op["flags"]).pack())
        ret = self.call(op, requests.KVM_CREATE_DEVICE, buffer)
        self.name(op, uapi.KvmCreateDevice.unpack(buffer).fd)
        return ret, None

    def device_attr(self, op: Op) -> tuple[Any, Any]:
        size = op.get("size", 8)
        value = op.get("in")
        out = op.get("out")
        if value is not None:
            addr = self.put(value, size)
        elif op["ioctl"] == "KVM_HAS_DEVICE_ATTR":
            addr = 0
        else:
            addr = self.put(0, max(size, 8))
        struct.pack_into("IIQQ", self.attr, 0, op.get("flags", 0), op["group"], op["attr"], addr)
        ret = self.kvm.ioctl(self.fd(op["on"]), _ATTR_REQUESTS[op["ioctl"]], self.attr)
        return ret, None if out is None else self.got(out, size)

    def one_reg(self, op: Op) -> tuple[Any, Any]:
        size = op.get("size", 8)
        addr = self.put(op.get("in", 0), size)
        reg = bytearray(uapi.KvmOneReg(op["id"], addr).pack())
        request = requests.KVM_SET_ONE_REG if op["ioctl"] == "KVM_SET_ONE_REG" else requests.KVM_GET_ONE_REG
        ret = self.call(op, request, reg)
        return ret, self.got(op["out"], size) if "out" in op else None

    def irq_line(self, op: Op) -> tuple[Any, Any]:
        request = requests.KVM_IRQ_LINE if op["ioctl"] == "KVM_IRQ_LINE" else requests.KVM_IRQ_LINE_STATUS
        line = bytearray(uapi.KvmIrqLevel(op["irq"], op["level"]).pack())
        ret = self.call(op, request, line)
        return ret, uapi.KvmIrqLevel.unpack(line).irq if "out" in op else None

    def signal_msi(self, op: Op) -> tuple[Any, Any]:
        address = op["address"]
        msi = uapi.KvmMsi(address & 0xFFFF_FFFF, address >> 32, op["data"], op["flags"], op["devid"])
        return self.call(op, requests.KVM_SIGNAL_MSI, bytearray(msi.pack())), None

    def gsi_routing(self, op: Op) -> tuple[Any, Any]:
        table = uapi.KvmIrqRouting(op["nr"], op["flags"]).pack()
        for entry in op["entries"]:
            if "pin" in entry:
                to = uapi.KvmIrqRoutingIrqchip(entry["irqchip"], entry["pin"]).pack()
            elif "address" in entry:
                address = entry["address"]
                to = uapi.KvmIrqRoutingMsi(
                    address & 0xFFFF_FFFF, address >> 32, entry["data"], entry.get("devid", 0)
                ).pack()
            else:
                to = b""
            table += uapi.KvmIrqRoutingEntry(
                entry["gsi"], entry["type"], entry.get("flags", 0), 0, to.ljust(32, b"\0")
            ).pack()
        return self.call(op, requests.KVM_SET_GSI_ROUTING, bytearray(table)), None

    def irqfd(self, op: Op) -> tuple[Any, Any]:
        fds = [
            0xFFFF_FFFF if op.get(key) is None else self.fd(op[key]) if key in op else 0 for key in ("fd", "resamplefd")
        ]
        resample = fds[1] if "resamplefd" in op else 0
        irqfd = uapi.KvmIrqfd(fds[0], op["gsi"], op["flags"], resample)
        return self.call(op, requests.KVM_IRQFD, bytearray(irqfd.pack())), None

    def eventfd(self, op: Op) -> tuple[Any, Any]:
        fd = self.kvm.eventfd() if self.simulated_eventfds else os.eventfd(0, os.EFD_NONBLOCK)
        self.eventfds.append(fd)
        self.objects[op["new"]] = fd
        return 0, None

    def write(self, op: Op) -> tuple[Any, Any]:
        fd = self.fd(op["on"])
        if self.simulated_eventfds:
            fd.write(op["in"])  # type: ignore[attr-defined]
        else:
            os.eventfd_write(fd, op["in"])
            # A real eventfd is looked at before each ioctl; a read below must see that it was consumed.
            self.kvm.ioctl(self.objects["sys"], requests.KVM_GET_API_VERSION)
        return 0, None

    def read(self, op: Op) -> tuple[Any, Any]:
        fd = self.fd(op["on"])
        return 0, fd.read() if self.simulated_eventfds else os.eventfd_read(fd)  # type: ignore[attr-defined]

    def close(self, op: Op) -> tuple[Any, Any]:
        fd = self.objects.pop(op["on"])
        if fd in self.eventfds:
            self.eventfds.remove(fd)
            if not self.simulated_eventfds:
                os.close(fd)
                return 0, None
        self.kvm.close(fd)
        return 0, None

    def memory_region(self, op: Op) -> tuple[Any, Any]:
        memory = self.memory[op["on"]]
        size, slot = op["size"], op["slot"]
        user = 0
        mapping = None
        if size:
            mapping = mmap.mmap(-1, size)
            user = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        region = uapi.KvmUserspaceMemoryRegion(slot, op["flags"], op["gpa"], size, user)
        ret = self.call(op, requests.KVM_SET_USER_MEMORY_REGION, bytearray(region.pack()))
        if mapping is None:
            memory.slots.pop(slot, None)
        else:
            memory.slots[slot] = (op["gpa"], mapping)
        return ret, None

    def mem_write(self, op: Op) -> tuple[Any, Any]:
        mapping, at = self.memory[op["on"]].at(op["gpa"])
        data = bytes.fromhex(op["in"]["hex"])
        mapping[at : at + len(data)] = data
        return 0, None

    def mem_fill(self, op: Op) -> tuple[Any, Any]:
        mapping, at = self.memory[op["on"]].at(op["gpa"])
        mapping[at : at + op["len"]] = bytes([op["in"]]) * op["len"]
        return 0, None

    def mem_copy(self, op: Op) -> tuple[Any, Any]:
        source, start = self.memory[op["src"]].at(op["gpa"])
        mapping, at = self.memory[op["on"]].at(op["gpa"])
        mapping[at : at + op["len"]] = source[start : start + op["len"]]
        return 0, None

    def mem_read(self, op: Op) -> tuple[Any, Any]:
        mapping, at = self.memory[op["on"]].at(op["gpa"])
        return 0, [[offset, data.hex()] for offset, data in nonzero_runs(mapping[at : at + op["len"]])]

    def run(self, op: Op) -> tuple[Any, Any]:
        fd = self.fd(op["on"])
        view = self.kvm.mmap(fd, uapi.PAGE_SIZE)
        view[uapi.KVM_RUN_IMMEDIATE_EXIT] = op["immediate_exit"]
        try:
            return self.kvm.ioctl(fd, requests.KVM_RUN), None
        finally:
            view[uapi.KVM_RUN_IMMEDIATE_EXIT] = 0

    def by_value(self, op: Op) -> tuple[Any, Any]:
        return self.call(op, getattr(requests, op["ioctl"]), op.get("arg", 0)), None

    def by_struct(self, op: Op) -> tuple[Any, Any]:
        buffer = bytearray.fromhex(op["in"]["hex"])
        ret = self.call(op, getattr(requests, op["ioctl"]), buffer)
        return ret, {"hex": buffer.hex()} if "out" in op else None

    # -- guests

    async def guest(self, op: Op) -> tuple[Any, Any]:
        """One access by a vCPU: its program asks for a command, carries it out, and stores the result."""
        fd = self.fd(op["on"])
        run = self.loaded.get(op["on"])
        if run is None:
            self.kvm.load(fd, guest_program)
            run = self.loaded[op["on"]] = self.kvm.mmap(fd, uapi.PAGE_SIZE)
            await self.kvm.run(fd)
        for word in (_COMMANDS.index(op["cmd"]), op["a0"], op["a1"]):
            offset = uapi.KVM_RUN_EXIT + uapi.KvmRunMmio.OFFSETS["data"]
            run[offset : offset + 8] = word.to_bytes(8, "little")
            await self.kvm.run(fd)
        astray = None
        while (mmio := uapi.KvmRunMmio.unpack(run[uapi.KVM_RUN_EXIT :])).phys_addr != RESULT_GPA:
            astray = mmio  # an access that should not have left the guest
            await self.kvm.run(fd)
        await self.kvm.run(fd)
        if astray is not None:
            raise Gone(f"the guest left at {astray.phys_addr:#x}")
        return 0, int.from_bytes(mmio.data, "little")

    def finish(self) -> None:
        """Check the ledger and let everything go."""
        for fd in self.eventfds:
            if not self.simulated_eventfds:
                os.close(fd)
        self.kvm.check()


async def guest_program(cpu: Any) -> None:
    """Load three words (command and two arguments), do it, store the result; each of these exits."""
    while True:
        command, a0, a1 = [await cpu.load(COMMAND_GPA + 8 * n, 8) for n in range(3)]
        try:
            result = await _GUEST[_COMMANDS[command]](cpu, a0, a1)
        except ValueError:  # no such register: the VM lacks the interrupt controller
            result = (1 << 64) - 1
        await cpu.store(RESULT_GPA, 8, result or 0)


def _mrs(name: str) -> Callable[[Any, int, int], Any]:
    return lambda cpu, _a0, _a1: cpu.mrs(name)


def _msr(name: str) -> Callable[[Any, int, int], Any]:
    return lambda cpu, a0, _a1: cpu.msr(name, a0)


def _load(size: int) -> Callable[[Any, int, int], Any]:
    return lambda cpu, a0, _a1: cpu.load(a0, size)


def _store(size: int) -> Callable[[Any, int, int], Any]:
    return lambda cpu, a0, a1: cpu.store(a0, size, a1)


_GUEST: dict[str, Callable[[Any, int, int], Any]] = {
    **{f"{reg}{group}": _mrs(f"ICC_{reg.upper()}{group}_EL1") for reg in ("iar", "hppir", "bpr") for group in (0, 1)},
    **{f"eoir{group}": _msr(f"ICC_EOIR{group}_EL1") for group in (0, 1)},
    "rpr": _mrs("ICC_RPR_EL1"),
    "dir": _msr("ICC_DIR_EL1"),
    "get_pmr": _mrs("ICC_PMR_EL1"),
    "set_pmr": _msr("ICC_PMR_EL1"),
    "sgi1r": _msr("ICC_SGI1R_EL1"),
    "asgi1r": _msr("ICC_ASGI1R_EL1"),
    "sgi0r": _msr("ICC_SGI0R_EL1"),
    "get_ctlr": _mrs("ICC_CTLR_EL1"),
    "set_ctlr": _msr("ICC_CTLR_EL1"),
    "get_isr": _mrs("ISR_EL1"),
    "isr": _mrs("ISR_EL1"),
    **{f"set_{reg}{group}": _msr(f"ICC_{reg.upper()}{group}_EL1") for reg in ("bpr", "igrpen") for group in (0, 1)},
    **{f"get_{reg}{group}": _mrs(f"ICC_{reg.upper()}{group}_EL1") for reg in ("bpr", "igrpen") for group in (0, 1)},
    **{f"ldr{8 * size}": _load(size) for size in (1, 2, 4, 8)},
    **{f"str{8 * size}": _store(size) for size in (1, 2, 4, 8)},
}
_COMMANDS = list(_GUEST)

_ATTR_REQUESTS = {
    "KVM_SET_DEVICE_ATTR": requests.KVM_SET_DEVICE_ATTR,
    "KVM_GET_DEVICE_ATTR": requests.KVM_GET_DEVICE_ATTR,
    "KVM_HAS_DEVICE_ATTR": requests.KVM_HAS_DEVICE_ATTR,
}

_OPS: dict[str, Callable[[Replayer, Op], tuple[Any, Any]]] = {
    "KVM_CREATE_VM": Replayer.create_vm,
    "KVM_CREATE_VCPU": Replayer.create_vcpu,
    "KVM_ARM_VCPU_INIT": Replayer.vcpu_init,
    "KVM_CREATE_DEVICE": Replayer.create_device,
    **dict.fromkeys(_ATTR_REQUESTS, Replayer.device_attr),
    "KVM_SET_ONE_REG": Replayer.one_reg,
    "KVM_GET_ONE_REG": Replayer.one_reg,
    "KVM_IRQ_LINE": Replayer.irq_line,
    "KVM_IRQ_LINE_STATUS": Replayer.irq_line,
    "KVM_SIGNAL_MSI": Replayer.signal_msi,
    "KVM_SET_GSI_ROUTING": Replayer.gsi_routing,
    "KVM_IRQFD": Replayer.irqfd,
    "KVM_SET_USER_MEMORY_REGION": Replayer.memory_region,
    "KVM_RUN": Replayer.run,
    "eventfd": Replayer.eventfd,
    "write": Replayer.write,
    "read": Replayer.read,
    "close": Replayer.close,
    "mem_write": Replayer.mem_write,
    "mem_fill": Replayer.mem_fill,
    "mem_copy": Replayer.mem_copy,
    "mem_read": Replayer.mem_read,
    **dict.fromkeys(("KVM_CHECK_EXTENSION", "KVM_GET_API_VERSION", "KVM_CREATE_IRQCHIP"), Replayer.by_value),
    **dict.fromkeys(
        ("KVM_ARM_SET_DEVICE_ADDR", "KVM_GET_MP_STATE", "KVM_SET_MP_STATE", "KVM_GET_VCPU_EVENTS"),
        Replayer.by_struct,
    ),
}


def nonzero_runs(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Runs of 8-byte units that are not all zero, with their offsets."""
    at, zero = 0, bytes(8)
    while True:
        while data[at : at + 4096] == _ZERO_PAGE:
            at += 4096
        found = _NONZERO.search(data, at)
        if found is None:
            return
        start = at = found.start() & ~7
        while at < len(data) and data[at : at + 8] != zero:
            at += 8
        yield start, data[start:at]


def shorten(text: Any) -> str:
    text = str(text)
    return text if len(text) <= 200 else f"{text[:200]}..."


def load(path: Path) -> dict[str, Any]:
    """A golden file."""
    with gzip.open(path) as file:
        content: dict[str, Any] = json.load(file)
    return content


def replay_sequence(sequence: dict[str, Any], tally: Tally, host_gic: int, simulated_eventfds: bool) -> None:
    """Replay one sequence into ``tally``; one with guests inside a simulation of its own."""
    replay(sequence, tally, lambda: Replayer(host_gic, simulated_eventfds=simulated_eventfds))


def replay(sequence: dict[str, Any], tally: Tally, make: Callable[[], Replayer]) -> None:
    """Replay one sequence into ``tally`` by a replayer of its own."""
    ops = sequence["ops"]
    before = tally.equal
    compared = sum(1 for op in ops if not op.get("optional"))

    def compare(index: int, op: Op, ret: Any, out: Any) -> None:
        if ret == op["ret"] and ("out" not in op or op["out"] == out):
            tally.equal += 1
        else:
            ours = f"{ret}" + ("" if out is None else f" out {shorten(out)}")
            tally.differences.append(Difference(sequence["name"], index, op, ours))

    async def steps() -> None:
        replayer = make()
        try:
            for index, op in enumerate(ops):
                if op.get("optional"):
                    continue
                try:
                    answer = await replayer.guest(op) if op["ioctl"] == "guest" else replayer.perform(op)
                except Gone as gone:
                    answer = (f"({gone})", None)
                compare(index, op, *answer)
        finally:
            replayer.finish()

    try:
        if any(op["ioctl"] == "guest" for op in ops):
            fabric.run(steps)
        else:
            drive(steps())
    except LedgerError as error:
        tally.unbalanced.append(f"{sequence['name']}: {error}")
    tally.ops += compared
    tally.sequences += 1
    tally.passed += tally.equal - before == compared


def drive(steps: Any) -> None:
    """Run a coroutine that waits for nothing, outside any simulation."""
    try:
        steps.send(None)
    except StopIteration:
        return
    raise RuntimeError("a sequence without guests waits")


def replay_file(path: Path, *, simulated_eventfds: bool = False) -> Tally:
    """Replay a whole file."""
    content = load(path)
    tally = Tally(path.name.removesuffix(".json.gz"))
    begin = time.perf_counter()
    for sequence in content["sequences"]:
        replay_sequence(sequence, tally, content["host_gic"], simulated_eventfds)
    tally.seconds = time.perf_counter() - begin
    return tally


def golden_files() -> list[Path]:
    """The files, by name."""
    return sorted(GOLDEN.glob("*.json.gz"))


def main() -> int:
    parser = argparse.ArgumentParser(description="Replay golden cases and print how many agree.")
    parser.add_argument("names", nargs="*", help="beginnings of file names; default: all")
    parser.add_argument("--simulated-eventfds", action="store_true")
    parser.add_argument("-v", "--verbose", type=int, default=1, metavar="N", help="differences shown per file")
    arguments = parser.parse_args()
    whole = Tally("all")
    print(f"{'file':<24} {'sequences':>10} {'operations':>15}  {'s':>5}  first difference")
    for path in golden_files():
        if arguments.names and not any(path.name.startswith(name) for name in arguments.names):
            continue
        tally = replay_file(path, simulated_eventfds=arguments.simulated_eventfds)
        for field in ("sequences", "passed", "ops", "equal", "seconds"):
            setattr(whole, field, getattr(whole, field) + getattr(tally, field))
        _print(tally, arguments.verbose)
    _print(whole, 0)
    return 0


def _print(tally: Tally, shown: int) -> None:
    counts = f"{tally.passed}/{tally.sequences}", f"{tally.equal}/{tally.ops}"
    differences = tally.differences[:shown]
    print(
        f"{tally.name:<24} {counts[0]:>10} {counts[1]:>15}  {tally.seconds:5.1f}  "
        f"{shorten(differences[0]) if differences else ''}"
    )
    for difference in differences[1:]:
        print(f"    {difference}")
    for text in tally.unbalanced[: max(shown, 1)]:
        print(f"    ledger: {text}")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
