"""A VMM of a few lines for tests of Hyper-V: an x86 VM whose vCPUs see Hyper-V, with memory and SynICs as asked for."""

from __future__ import annotations

import struct
from collections.abc import Awaitable, Callable
from typing import Any

from fabric.kvm import Kvm
from fabric.kvm.typed import Host, VcpuFd, VmFd
from fabric.kvm.x86_hyperv import supported_cpuid
from fabric.uapi import hyperv as hv
from fabric.uapi import ioctl
from fabric.uapi import kvm as uapi
from fabric.uapi.usermem import SparseMemory
from fabric.uapi.x86 import (
    HypervHcall,
    HypervSynic,
    KvmCpuid2,
    KvmCpuidEntry2,
    KvmHypervExit,
    KvmLapicState,
    KvmMsrEntry,
    KvmMsrs,
)

RAM_SIZE = 0x10_0000
MESSAGES, EVENTS, TSC_PAGE, CALLS, INPUT = 0x1_0000, 0x1_1000, 0x1_2000, 0x1_3000, 0x1_4000
"""Pages of the guest's."""
NOWHERE = 0x8000_0000
SVR, SVR_ON = 0xF0, 0x1FF
X2APIC_SVR, X2APIC_EOI = 0x80F, 0x80B
BASE_X2APIC = 0xFEE0_0C00
DONE_PORT = 0xF4
"""A program that has come to its end writes to it (:func:`done`)."""
ECX_X2APIC = 1 << 21


class HypervVm:
    """The VM.

    Args:
        vcpus: how many.
        synic: KVM_CAP_HYPERV_SYNIC or KVM_CAP_HYPERV_SYNIC2, which is enabled on each; 0 for none.
        irqchip: ``"whole"``, ``"split"`` or ``""``.
        offered: whether the guest's CPUID has Hyper-V.
        options: of the host.
    """

    def __init__(
        self,
        vcpus: int = 1,
        *,
        synic: int = uapi.KVM_CAP_HYPERV_SYNIC,
        irqchip: str = "whole",
        offered: bool = True,
        **options: Any,
    ) -> None:
        self.user = SparseMemory()
        self.kvm = Kvm("x86_64", user_memory=self.user, **options)
        self.host = Host(self.kvm)
        self.vm: VmFd = self.host.create_vm()
        if irqchip == "whole":
            self.vm.ioctl(ioctl.KVM_CREATE_IRQCHIP)
        elif irqchip:
            self.vm.ioctl(ioctl.KVM_ENABLE_CAP, uapi.KvmEnableCap(uapi.KVM_CAP_SPLIT_IRQCHIP, 0, (24, 0, 0, 0)))
        self.ram = self.user.map(RAM_SIZE)
        self.vm.set_memory(0, 0, RAM_SIZE, self.ram)
        self.vcpus: list[VcpuFd] = [self.vm.create_vcpu(number) for number in range(vcpus)]
        for n, vcpu in enumerate(self.vcpus):
            leaves = (KvmCpuidEntry2(1, ecx=ECX_X2APIC), *(supported_cpuid(bool(irqchip)) if offered else ()))
            self.set_cpuid(n, *leaves)
            if synic:
                self.enable(n, synic)
            if irqchip:
                self.set_msr(0x1B, BASE_X2APIC | (0x100 if not n else 0), n)
                apic = bytearray(KvmLapicState.SIZE)
                vcpu.ioctl(ioctl.KVM_GET_LAPIC, apic)
                struct.pack_into("<I", apic, SVR, SVR_ON)
                vcpu.ioctl(ioctl.KVM_SET_LAPIC, apic)
                vcpu.mp_state = uapi.KVM_MP_STATE_RUNNABLE

    @property
    def inside(self) -> Any:
        """The Vm behind the fds."""
        return self.kvm.vm(self.vm.fd)

    def apic(self, vcpu: int = 0) -> Any:
        """A local APIC."""
        return self.inside.vcpus[vcpu].cpu_interface

    # -- calls

    def enable(self, vcpu: int, cap: int, arg: int = 0, flags: int = 0) -> None:
        """KVM_ENABLE_CAP of a vCPU."""
        self.vcpus[vcpu].ioctl(ioctl.KVM_ENABLE_CAP, uapi.KvmEnableCap(cap, flags, (arg, 0, 0, 0)))

    def set_cpuid(self, vcpu: int, *leaves: KvmCpuidEntry2) -> None:
        """KVM_SET_CPUID2."""
        table = KvmCpuid2(len(leaves)).pack() + b"".join(leaf.pack() for leaf in leaves)
        self.vcpus[vcpu].ioctl(ioctl.KVM_SET_CPUID2, bytearray(table))

    def msr(self, number: int, vcpu: int = 0) -> int | None:
        """KVM_GET_MSRS; None for one that cannot be read."""
        buffer = bytearray(KvmMsrs(1).pack() + KvmMsrEntry(number).pack())
        read = self.vcpus[vcpu].ioctl(ioctl.KVM_GET_MSRS, buffer)
        return KvmMsrEntry.unpack(buffer, KvmMsrs.SIZE).data if read else None

    def set_msr(self, number: int, value: int, vcpu: int = 0) -> bool:
        """KVM_SET_MSRS; whether it was taken."""
        buffer = bytearray(KvmMsrs(1).pack() + KvmMsrEntry(number, 0, value).pack())
        return bool(self.vcpus[vcpu].ioctl(ioctl.KVM_SET_MSRS, buffer))

    def line(self, gsi: int, level: int = 1) -> int:
        """KVM_IRQ_LINE_STATUS: the status."""
        line = bytearray(uapi.KvmIrqLevel(gsi, level).pack())
        self.vm.ioctl(ioctl.KVM_IRQ_LINE_STATUS, line)
        return int.from_bytes(line[:4], "little", signed=True)

    def connect(self, conn_id: int, fd: int, flags: int = 0) -> None:
        """KVM_HYPERV_EVENTFD."""
        self.vm.ioctl(ioctl.KVM_HYPERV_EVENTFD, hv.KvmHypervEventfd(conn_id, int(fd), flags))

    # -- memory

    def read(self, gpa: int, size: int) -> bytes:
        """Guest memory."""
        return self.user.read(self.ram + gpa, size)

    def write(self, gpa: int, data: bytes) -> None:
        """Write guest memory."""
        self.user.write(self.ram + gpa, data)

    def message(self, sint: int) -> hv.HvMessage:
        """A slot of the message page."""
        return hv.HvMessage.unpack(self.read(MESSAGES + sint * hv.HV_MESSAGE_SIZE, hv.HV_MESSAGE_SIZE))

    def post(self, sint: int, message: hv.HvMessage) -> None:
        """Put a message into a slot, as a VMM does."""
        self.write(MESSAGES + sint * hv.HV_MESSAGE_SIZE, message.pack())

    # -- running

    async def run(self, program: Callable[[Any], Awaitable[object]], vcpu: int = 0) -> list[Any]:
        """Run a program to its end; returns the Hyper-V exits on the way, whose hypercalls are completed with 0."""
        self.inside.vcpus[vcpu].restart()
        self.vcpus[vcpu].load(program)
        exits = []
        while True:
            exit_ = await self.step(vcpu)
            if exit_ is None:
                return exits
            exits.append(exit_)

    async def step(self, vcpu: int = 0) -> Any:
        """KVM_RUN: the Hyper-V exit that it ended in, or None at the end of the program."""
        fd = self.vcpus[vcpu]
        await fd.run()
        reason = int.from_bytes(fd.run_area[uapi.KVM_RUN_EXIT_REASON :][:4], "little")
        if reason == uapi.KVM_EXIT_IO:
            return None
        assert reason == uapi.KVM_EXIT_HYPERV, reason
        return details(fd)

    def complete(self, result: int, vcpu: int = 0) -> None:
        """Write the result of a hypercall."""
        at = uapi.KVM_RUN_EXIT + KvmHypervExit.OFFSETS["u"] + HypervHcall.OFFSETS["result"]
        self.vcpus[vcpu].run_area[at : at + 8] = result.to_bytes(8, "little")


def details(vcpu: VcpuFd) -> Any:
    """What KVM_EXIT_HYPERV says."""
    exit_ = KvmHypervExit.unpack(vcpu.run_area, uapi.KVM_RUN_EXIT)
    kinds: dict[int, Any] = {1: HypervSynic, 2: HypervHcall}
    return kinds[exit_.type].unpack(exit_.u) if exit_.type in kinds else exit_


async def done(cpu: Any) -> None:
    """The last thing that a program does."""
    await cpu.outp(DONE_PORT, 1, 0)


def sint_msr(n: int) -> int:
    """HV_X64_MSR_SINTn."""
    return hv.HV_X64_MSR_SINT0 + n


def timer_msrs(n: int) -> tuple[int, int]:
    """HV_X64_MSR_STIMERn_CONFIG and _COUNT."""
    return hv.HV_X64_MSR_STIMER0_CONFIG + 2 * n, hv.HV_X64_MSR_STIMER0_COUNT + 2 * n
