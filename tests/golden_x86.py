"""Replay of the x86 golden cases: what a real kernel answered, asked of ``Kvm("x86_64").ioctl`` again.

Every case runs in a simulation of its own whose time moves only where the recording slept. Structs go in as buffers
of exactly their length, pointers in them point into a simulated user memory where every buffer ends at unmapped memory.
``tests/golden/README.md`` has the format.

Run as a program it prints a table: per file, cases and operations that agree, and the first differences::

    python tests/golden_x86.py [--simulated-eventfds] [--tag TAG] [-v N] [name ...]
"""

from __future__ import annotations

import argparse
import errno
import gzip
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import attrs
import golden_x86_abi as abi

import fabric
from fabric.errors import LedgerError
from fabric.kvm import Kvm
from fabric.uapi.usermem import PAGE_SIZE, SparseMemory

GOLDEN = Path(__file__).parent / "golden" / "kvm-x86"

Op = dict[str, Any]

OURS = {"no-smm", "no-hyperv", "no-xen", "pvm-fixed-tsc"}
"""Tags of cases in which the recorded host lacked what a complete one has: another answer is right."""
LAZY = {"apic-map-lag", "scan-on-entry", "timer-on-entry"}
"""Tags of cases that show KVM's lazy bookkeeping, which is an option of the host description, off by default."""

BAD_ADDRESS = 0x10
"""Nothing is mapped on the first page."""


@attrs.define
class Difference:
    """One operation that answered differently."""

    case: str
    index: int
    op: Op
    ours: str

    def __str__(self) -> str:
        op = {k: v for k, v in self.op.items() if k not in ("on", "ioctl", "nr", "ret", "out", "save")}
        golden = f"{self.op['ret']}" + (f" out {shorten(self.op['out'])}" if "out" in self.op else "")
        return (
            f"{self.case}[{self.index}] {self.op['on']} {self.op['ioctl']} {shorten(json.dumps(op))}: "
            f"golden {golden}, ours {self.ours}"
        )


@attrs.define
class Tally:
    """How one file fared."""

    name: str
    cases: int = 0
    passed: int = 0
    ops: int = 0
    equal: int = 0
    seconds: float = 0.0
    differences: list[Difference] = attrs.field(factory=list)
    unbalanced: list[str] = attrs.field(factory=list)
    failed: list[str] = attrs.field(factory=list)
    """Cases with a difference."""


@attrs.define
class Argument:
    """What an operation hands over: a number, or a buffer; and buffers that it points to."""

    value: int | bytearray
    before: bytes = b""
    pointed: list[tuple[int, bytes, Any]] = attrs.field(factory=list)
    """Address, contents, and what is expected afterwards (None: the same)."""


class Replayer:
    """One case: its Kvm, handles, saved numbers and memory."""

    def __init__(self, *, simulated_eventfds: bool = False, **options: Any) -> None:
        self.memory = SparseMemory()
        self.kvm = Kvm("x86_64", user_memory=self.memory, **options)
        self.simulated = simulated_eventfds
        self.handles: dict[str, int] = {"sys": self.kvm.open()}
        self.saved: dict[str, int] = {}
        self.guest: dict[str, int] = {}
        self.own: list[int] = []
        """Files of the operating system."""

    # -- arguments

    def user_buffer(self, data: bytes) -> int:
        """The address of a copy of ``data`` that ends where nothing is mapped."""
        room = -(-max(len(data), 1) // PAGE_SIZE) * PAGE_SIZE
        address = self.memory.map(room) + room - len(data)
        if data:
            self.memory.write(address, data)
        return address

    def evaluate(self, text: str) -> int:
        names = {"abs": abs, "min": min, "max": max, "s64": _s64, "u64": lambda n: n & (1 << 64) - 1, **self.saved}
        return int(eval(text, {"__builtins__": {}}, names))

    def argument(self, op: Op) -> Argument:
        given = op.get("in") or {}
        if "int" in given:
            return Argument(given["int"])
        if "expr" in given:
            return Argument(self.evaluate(given["expr"]))
        if "null" in given:
            return Argument(0)
        if "bad" in given:
            return Argument(BAD_ADDRESS)
        if "fields" in given:
            data = bytearray(abi.encode(op["ioctl"], given["fields"]))
        elif "hex" in given:
            data = bytearray.fromhex(given["hex"])
        elif "poison" in given:
            data = bytearray(b"\xa5" * given["poison"])
        else:
            return Argument(0)
        argument = Argument(data)
        for patch in given.get("put", ()):
            at, size = patch["at"], patch["size"]
            data[at : at + size] = (self.patch(patch, argument) & (1 << 8 * size) - 1).to_bytes(size, "little")
        argument.before = bytes(data)
        return argument

    def patch(self, patch: dict[str, Any], argument: Argument) -> int:
        if "fd" in patch:
            return self.handles[patch["fd"]]
        if "expr" in patch:
            return self.evaluate(patch["expr"])
        if "mem" in patch:
            return self.guest[patch["mem"]] + patch.get("plus", 0)
        if "bad" in patch:
            return BAD_ADDRESS
        target = patch["ptr"]
        if "hex" in target:
            data = bytes.fromhex(target["hex"])
        elif "poison" in target:
            data = b"\xa5" * target["poison"]
        elif "fd" in target:
            data = self.handles[target["fd"]].to_bytes(4, "little")
        else:
            data = (self.evaluate(target["expr"]) & (1 << 64) - 1).to_bytes(8, "little")
        address = self.user_buffer(data)
        argument.pointed.append((address, data, patch.get("out")))
        return address

    # -- operations

    async def perform(self, op: Op) -> str | None:
        """Carry out one operation: None when it answered as recorded, otherwise what it answered."""
        name = op["ioctl"]
        argument = Argument(0)
        out = b""
        try:
            if name.startswith("@"):
                ret, out = await self.host(name, op)
            else:
                argument = self.argument(op)
                ret = self.kvm.ioctl(self.handles[op["on"]], op["nr"], argument.value)
        except OSError as error:
            ret = {"errno": errno.errorcode[error.errno or 0]}
        except Exception as error:
            return f"({type(error).__name__}: {error})"
        buffer = bytes(argument.value) if isinstance(argument.value, bytearray) else out
        for saved, where in op.get("save", {}).items() if isinstance(ret, int) else ():
            self.saved[saved] = self.read_saved(where, ret, buffer, argument)
        if "bind" in op and isinstance(argument.value, bytearray) and isinstance(ret, int):
            at = op["bind"]["at"]
            self.handles[op["bind"]["fd"]] = int.from_bytes(buffer[at : at + 4], "little")
        difference = self.compare_ret(op["ret"], ret)
        if difference is None and not op.get("host"):
            difference = self.compare_out(op, argument, buffer)
        if difference is not None and op.get("host") and type(op["ret"]) is type(ret):
            return None
        return difference

    async def host(self, name: str, op: Op) -> tuple[Any, bytes]:
        given = op.get("in", {})
        if name == "@settle":
            await fabric.advance(0)
            return 0, b""
        if name == "@sleep":
            await fabric.advance(given["ns"])
            return 0, b""
        if name == "@now":
            return fabric.now(), b""
        if name == "@assert":
            return int(bool(self.evaluate(given["expr"]))), b""
        if name == "@memory":
            self.guest[given["name"]] = self.memory.map(given["size"])
            return 0, b""
        if name == "@peek":
            return 0, self.memory.read(self.guest[given["mem"]] + given["at"], given["size"])
        if name == "@file":
            handle, path = tempfile.mkstemp()
            os.unlink(path)
            self.own.append(handle)
            return handle, b""
        if name == "@eventfd":
            flags = os.EFD_NONBLOCK | (os.EFD_SEMAPHORE if given.get("semaphore") else 0)
            if self.simulated:
                return self.kvm.eventfd(given.get("init", 0)), b""
            number = os.eventfd(given.get("init", 0), flags)
            self.own.append(number)
            return number, b""
        fd = self.handles[op["on"]]
        if name == "@close":
            if fd in self.own:
                self.own.remove(fd)
                os.close(fd)
            else:
                self.kvm.close(fd)
            return 0, b""
        if name == "@write":
            if self.simulated:
                fd.write(given["u64"])  # type: ignore[attr-defined]
            else:
                os.eventfd_write(fd, given["u64"])
                self.kvm.ioctl(self.handles["sys"], abi.NR["KVM_GET_API_VERSION"])  # a point where it is looked at
            return 8, b""
        assert name == "@read"
        count = fd.read() if self.simulated else os.eventfd_read(fd)  # type: ignore[attr-defined]
        return 8, count.to_bytes(8, "little")

    def read_saved(self, where: Any, ret: Any, buffer: bytes, argument: Argument) -> int:
        if where == "ret":
            return int(ret)
        if "ptr" in where:
            address, data, _ = argument.pointed[where["ptr"]]
            buffer = self.memory.read(address, len(data))
        return int.from_bytes(buffer[where["at"] : where["at"] + where["size"]], "little")

    # -- comparing

    def compare_ret(self, wanted: Any, ret: Any) -> str | None:
        if isinstance(wanted, dict) and "errno" not in wanted:
            if not isinstance(ret, int):
                return str(ret)
            if "fd" in wanted:
                self.handles[wanted["fd"]] = ret
                return None
            return None if "any" in wanted or ret >= wanted["ge"] else str(ret)
        return None if wanted == ret else str(ret)

    def compare_out(self, op: Op, argument: Argument, buffer: bytes) -> str | None:
        for address, data, wanted in argument.pointed:
            now = self.memory.read(address, len(data))
            if not same(op["ioctl"], wanted, data, now):
                return f"pointed-to buffer {now.hex()}"
        if "out" not in op and not isinstance(argument.value, bytearray):
            return None
        if "bind" in op:
            at = op["bind"]["at"]
            buffer = buffer[:at] + argument.before[at : at + 4] + buffer[at + 4 :]
        if same(op["ioctl"], op.get("out"), argument.before, buffer):
            return None
        fields = abi.decode(op["ioctl"], buffer) if op["ioctl"] in abi.STRUCT_OF else None
        wanted = (op.get("out") or {}).get("fields")
        if fields is not None and wanted is not None:
            keys = [key for key in {**wanted, **fields} if wanted.get(key) != fields.get(key)]
            return "; ".join(f"{key}: want {wanted.get(key)} got {fields.get(key)}" for key in keys)
        return f"buffer {shorten(buffer.hex())}"

    def finish(self) -> None:
        """Check the ledger and let everything go."""
        for fd in self.own:
            os.close(fd)
        self.kvm.check()


def same(ioctl: str, wanted: Any, before: bytes, now: bytes) -> bool:
    """Whether a buffer holds what is ``wanted`` (None: what it held before)."""
    if wanted is None:
        return before == now
    if "any" in wanted:
        return True
    expected = abi.encode(ioctl, wanted["fields"]) if "fields" in wanted else bytes.fromhex(wanted["hex"])
    a, b = bytearray(expected), bytearray(now)
    for offset, length in wanted.get("ignore", ()):
        a[offset : offset + length] = b[offset : offset + length] = bytes(length)
    return a == b


def _s64(n: int) -> int:
    n &= (1 << 64) - 1
    return n - (1 << 64) if n >> 63 else n


def shorten(text: Any) -> str:
    text = str(text)
    return text if len(text) <= 300 else f"{text[:300]}..."


def replay_case(case: dict[str, Any], tally: Tally, simulated_eventfds: bool, options: dict[str, Any]) -> None:
    """Replay one case into ``tally``."""
    before = len(tally.differences)
    ops = [*case["setup"], *case["ops"]]

    async def steps() -> None:
        replayer = Replayer(simulated_eventfds=simulated_eventfds, **options)
        try:
            for index, op in enumerate(ops):
                ours = await replayer.perform(op)
                if ours is None:
                    tally.equal += 1
                else:
                    tally.differences.append(Difference(case["id"], index - len(case["setup"]), op, ours))
        finally:
            replayer.finish()

    try:
        fabric.run(steps, pacing="manual")
    except LedgerError as error:
        tally.unbalanced.append(f"{case['id']}: {error}")
    tally.ops += len(ops)
    tally.cases += 1
    if len(tally.differences) == before:
        tally.passed += 1
    else:
        tally.failed.append(case["id"])


def host_options(case: dict[str, Any]) -> dict[str, Any]:
    """The host that a case needs described: one as lazy as the recorded one where the case shows that."""
    return {tag.replace("-", "_"): True for tag in case.get("tags", ()) if tag in LAZY}


def replay_file(path: Path, *, simulated_eventfds: bool = False, tag: str | None = None) -> Tally:
    """Replay a whole file, without the cases to which another answer is right."""
    tally = Tally(path.name.removesuffix(".json.gz"))
    begin = time.perf_counter()
    with gzip.open(path) as file:
        cases = json.load(file)
    for case in cases:
        tags = set(case.get("tags", ()))
        if tags & OURS or (tag is not None and tag not in tags):
            continue
        replay_case(case, tally, simulated_eventfds, host_options(case))
    tally.seconds = time.perf_counter() - begin
    return tally


def golden_files() -> list[Path]:
    """The files, by name."""
    return sorted(GOLDEN.glob("*.json.gz"))


def main() -> int:
    parser = argparse.ArgumentParser(description="Replay x86 golden cases and print how many agree.")
    parser.add_argument("names", nargs="*", help="beginnings of file names; default: all")
    parser.add_argument("--simulated-eventfds", action="store_true")
    parser.add_argument("--tag", help="only cases with this tag")
    parser.add_argument("-v", "--verbose", type=int, default=1, metavar="N", help="differences shown per file")
    arguments = parser.parse_args()
    whole = Tally("all")
    print(f"{'file':<18} {'cases':>9} {'operations':>13}  {'s':>5}  first difference")
    for path in golden_files():
        if arguments.names and not any(path.name.startswith(name) for name in arguments.names):
            continue
        tally = replay_file(path, simulated_eventfds=arguments.simulated_eventfds, tag=arguments.tag)
        for field in ("cases", "passed", "ops", "equal", "seconds"):
            setattr(whole, field, getattr(whole, field) + getattr(tally, field))
        _print(tally, arguments.verbose)
    _print(whole, 0)
    return 0


def _print(tally: Tally, shown: int) -> None:
    counts = f"{tally.passed}/{tally.cases}", f"{tally.equal}/{tally.ops}"
    differences = tally.differences[:shown]
    first = differences[0] if differences else ""
    print(f"{tally.name:<18} {counts[0]:>9} {counts[1]:>13}  {tally.seconds:5.1f}  {first}")
    for difference in differences[1:]:
        print(f"    {difference}")
    for text in tally.unbalanced[: max(shown, 1)]:
        print(f"    ledger: {text}")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
