"""A VMM of a few lines for tests of x86 vCPUs, and what their guests do first."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from typing import Any

import trio
from engine_programs import here

import fabric
from fabric.errors import KvmError
from fabric.kvm import Kvm
from fabric.kvm.typed import Host, VcpuFd, VmFd
from fabric.uapi import ioctl as requests
from fabric.uapi import kvm as uapi
from fabric.uapi import x86
from fabric.uapi.codec import CStruct
from fabric.uapi.usermem import SparseMemory

RAM = 0x1_0000
RAM_SIZE = 0x1_0000
NOWHERE = 0xD000_0000
"""An address that nobody claims."""
PORT = 0xC000
"""Likewise a port."""
MSI = 0xFEE0_0000
"""A message to the local APIC with id 0."""
APIC_PAGE = 0xFEE0_0000
X2APIC, ENABLE = 1 << 10, 1 << 11
BASE, SVR, EOI, ICR, TPR = 0x1B, 0x80F, 0x80B, 0x830, 0x808
ECX_X2APIC, ECX_TSC_DEADLINE = 1 << 21, 1 << 24

Program = Callable[[Any], Awaitable[object]]


class X86Vm:
    """The VM. ``irqchip``: ``"kernel"``, ``"split"`` or ``"none"``; ``x2apic``: CPUID has it."""

    def __init__(self, vcpus: int = 1, irqchip: str = "kernel", *, x2apic: bool = True, **options: Any) -> None:
        self.user = SparseMemory()
        self.kvm = Kvm("x86_64", user_memory=self.user, **options)
        self.host = Host(self.kvm)
        self.vm: VmFd = self.host.create_vm()
        if irqchip == "kernel":
            self.vm.ioctl(requests.KVM_CREATE_IRQCHIP)
        elif irqchip == "split":
            self.vm.ioctl(requests.KVM_ENABLE_CAP, uapi.KvmEnableCap(uapi.KVM_CAP_SPLIT_IRQCHIP, 0, (24, 0, 0, 0)))
        self.vm.set_memory(0, RAM, RAM_SIZE, self.user.map(RAM_SIZE))
        self.vcpus: list[VcpuFd] = [self.vm.create_vcpu(number) for number in range(vcpus)]
        features = ECX_TSC_DEADLINE | (ECX_X2APIC if x2apic else 0)
        for vcpu in self.vcpus:
            leaf = x86.KvmCpuidEntry2(1, ecx=features)
            vcpu.ioctl(requests.KVM_SET_CPUID2, bytearray(x86.KvmCpuid2(1).pack() + leaf.pack()))
        self.log: list[tuple[int, object]] = []

    @property
    def inside(self) -> Any:
        """The Vm behind the fds."""
        return self.kvm.vm(self.vm.fd)

    @property
    def ledger(self) -> Any:
        """The ledger's statement."""
        return self.inside.ledger.statement()

    def vcpu(self, number: int = 0) -> Any:
        """The vCPU behind its fd."""
        return self.kvm.vcpu(self.vcpus[number].fd)

    def note(self, what: object) -> None:
        """Log ``what`` with the time."""
        self.log.append((fabric.now(), what))

    def at(self, ns: int, action: Callable[..., object], *args: object) -> None:
        """Do something later."""
        here().timer(lambda: action(*args)).arm(ns)

    def msi(self, vector: int, to: int = 0) -> None:
        """KVM_SIGNAL_MSI of an edge."""
        self.vm.signal_msi(MSI | to << 12, vector)

    async def run(self, number: int = 0) -> object:
        """KVM_RUN: the exit reason, or the name of the errno."""
        try:
            await self.vcpus[number].run()
        except KvmError as error:
            return errno.errorcode[error.errno or 0]
        return self.reason(number)

    def reason(self, number: int = 0) -> int:
        """kvm_run.exit_reason."""
        return self.field(uapi.KVM_RUN_EXIT_REASON, 4, number)

    def field(self, at: int, size: int, number: int = 0) -> int:
        """A member of kvm_run."""
        return int.from_bytes(self.vcpus[number].run_area[at : at + size], "little")

    def exit(self, struct: type[CStruct], number: int = 0) -> Any:
        """The exit's part of kvm_run."""
        return struct.unpack(self.vcpus[number].run_area, uapi.KVM_RUN_EXIT)

    async def run_all(self, *, until_ns: int) -> None:
        """KVM_RUN of every vCPU, again and again as a VMM does, up to that time."""

        async def loop(number: int) -> None:
            while await self.run(number) in ("EAGAIN", "EINTR"):
                pass
            self.note((number, self.reason(number)))

        with trio.move_on_at(until_ns / 1e9):
            async with trio.open_nursery() as nursery:
                for number in range(len(self.vcpus)):
                    nursery.start_soon(loop, number)


async def apic_on(cpu: Any) -> None:
    """x2APIC mode, and the local APIC takes interrupts."""
    await cpu.wrmsr(BASE, await cpu.rdmsr(BASE) | X2APIC)
    await cpu.wrmsr(SVR, 0x1FF)


def done(cpu: Any) -> Awaitable[None]:
    """The program's end, for the VMM to see."""
    return cpu.outp(PORT, 1, 0)  # type: ignore[no-any-return]


def simulate(
    main: Callable[[X86Vm], Awaitable[object]], *bodies: Callable[[X86Vm, Any], Awaitable[object]], **options: Any
) -> list[tuple[int, object]]:
    """Run ``main(vm)``; vCPU n has the guest ``bodies[n](vm, cpu)``, after which it is done. Returns the VM's log."""
    vms = []

    async def start() -> None:
        vm = X86Vm(len(bodies), **options)
        vms.append(vm)
        for vcpu, body in zip(vm.vcpus, bodies, strict=True):
            vcpu.load(_program(vm, body))
        await main(vm)

    fabric.run(start)
    return vms[0].log


def _program(vm: X86Vm, body: Callable[[X86Vm, Any], Awaitable[object]]) -> Program:
    async def program(cpu: Any) -> None:
        await body(vm, cpu)
        vm.note("end")
        await done(cpu)

    return program


async def one_run(vm: X86Vm) -> None:
    """KVM_RUN of vCPU 0 to the end of its program."""
    assert uapi.KVM_EXIT_IO == await vm.run()
