"""Replay of what a real kernel answered about the registers of arm64 vCPUs: one-regs, the guest's view, hypercalls.

The recordings are in ``tests/golden/kvm-arm64-vcpu``; their README says how they were made. They have the form of the
others (:mod:`golden_replay`) and a few operations more: KVM_GET_REG_LIST, KVM_ARM_VCPU_FINALIZE, and as ``guest`` the
instructions ``mrs``, ``msr`` and ``hvc``.
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

from golden_replay import COMMAND_GPA, RESULT_GPA, Op, Replayer, Tally, load, replay

from fabric.errors import KvmError
from fabric.kvm import Kvm
from fabric.uapi import ioctl as requests
from fabric.uapi import kvm as uapi

GOLDEN = Path(__file__).parent / "golden" / "kvm-arm64-vcpu"
_MASK64 = (1 << 64) - 1


class VcpuReplayer(Replayer):
    """One sequence, on a host with ``options``."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__(3)
        self.kvm = Kvm("aarch64", **options)
        self.objects = {"sys": self.kvm.open()}
        self.op: Op = {}
        self.result: Any = None

    def perform(self, op: Op) -> tuple[Any, Any]:
        """As the base class, and the operations that are only here."""
        name = op["ioctl"]
        if name == "KVM_GET_REG_LIST":
            return self.reg_list(op)
        if name == "mem_read":
            mapping, at = self.memory[op["on"]].at(op["gpa"])
            return 0, {"hex": mapping[at : at + op["len"]].hex()}
        if name == "KVM_ARM_VCPU_INIT":
            self.loaded.pop(op["on"], None)  # its guest begins anew
        if name == "KVM_ARM_VCPU_FINALIZE":
            return self.finalize(op)
        return super().perform(op)

    def finalize(self, op: Op) -> tuple[Any, Any]:
        """KVM_ARM_VCPU_FINALIZE of feature ``in``."""
        return self.caught(op, requests.KVM_ARM_VCPU_FINALIZE, bytearray(op["in"].to_bytes(4, "little"))), None

    def caught(self, op: Op, request: int, arg: Any) -> Any:
        """What the call returns, or its errno as the recordings have it."""
        try:
            return self.call(op, request, arg)
        except OSError as error:
            return {"errno": errno.errorcode[error.errno or 0]}

    def reg_list(self, op: Op) -> tuple[Any, Any]:
        """KVM_GET_REG_LIST with room for ``n``; ``out`` has what ``n`` is then, also after an error, and the ids."""
        buffer = bytearray(op["n"].to_bytes(8, "little") + bytes(8 * op["n"]))
        ret = self.caught(op, requests.KVM_GET_REG_LIST, self.fault_addr if "in" in op else buffer)
        n = op["n"] if "in" in op else int.from_bytes(buffer[:8], "little")
        ids = [int.from_bytes(buffer[8 * i : 8 * i + 8], "little") for i in range(1, n + 1)] if ret == 0 else []
        return ret, {"n": n, "regs": ids}

    async def guest(self, op: Op) -> tuple[Any, Any]:
        """One instruction of a vCPU: its program waits in a load to be told which, and ends it with a store."""
        fd = self.fd(op["on"])
        self.op = op
        if op["on"] not in self.loaded:
            view = self.kvm.mmap(fd, uapi.PAGE_SIZE)
            if not self.kvm.vcpu(fd).has_guest:
                self.kvm.load(fd, self.program)
            try:
                await self.kvm.run(fd)
            except KvmError as error:
                return {"errno": errno.errorcode[error.errno or 0]}, None
            self.loaded[op["on"]] = view
        await self.kvm.run(fd)
        await self.kvm.run(fd)
        return 0, self.result

    async def program(self, cpu: Any) -> None:
        """The guest."""
        while True:
            await cpu.load(COMMAND_GPA, 8)
            try:
                self.result = await self.instruction(cpu)
            except ValueError:
                self.result = "undef"
            await cpu.store(RESULT_GPA, 8, 0)

    async def instruction(self, cpu: Any) -> Any:
        """Carry it out. What is written has no result, as in the recordings."""
        op = self.op
        if op["cmd"] == "mrs":
            return await cpu.mrs(op["name"])
        if op["cmd"] == "msr":
            await cpu.msr(op["name"], op["a1"])
            return 0
        return [word & _MASK64 for word in await cpu.smccc(op["a0"], op["a1"], op.get("a2", 0))]


def replay_file(path: Path) -> Tally:
    """Replay a whole file."""
    content = load(path)
    tally = Tally(content["group"])
    for sequence in content["sequences"]:
        replay(sequence, tally, lambda: VcpuReplayer(content.get("options", {})))
    return tally
