"""x86 interrupt controllers for tests: a VM of a few lines whose time moves when told to, and a VMM of a few lines."""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from fabric.devices.x86.apic_bus import ApicBus
from fabric.devices.x86.irqchip import X86Irqchip
from fabric.devices.x86.lapic import BASE_X2APIC, LDR, SVR, Lapic
from fabric.kvm import Kvm
from fabric.kvm.typed import Host, VcpuFd, VmFd
from fabric.memory import AddressSpace
from fabric.trace.ledger import Ledger
from fabric.uapi import ioctl as requests
from fabric.uapi import kvm as uapi
from fabric.uapi.usermem import SparseMemory
from fabric.uapi.x86 import (
    KvmCpuid2,
    KvmCpuidEntry2,
    KvmIoapicState,
    KvmIrqchip,
    KvmLapicState,
    KvmMsrEntry,
    KvmMsrs,
    KvmPicState,
)

ECX_X2APIC, ECX_TSC_DEADLINE = 1 << 21, 1 << 24
APIC_BASE_MSR = 0x1B
SVR_ON = 0x1FF


# -- time


class ManualTimer:
    """A timer of a :class:`ManualClock`."""

    def __init__(self, clock: ManualClock, callback: Callable[[], object]) -> None:
        self.clock = clock
        self.callback = callback
        self.deadline: int | None = None
        self.period = 0

    def arm(self, at_ns: int) -> None:
        self.deadline, self.period = max(at_ns, self.clock.now), 0

    def arm_periodic(self, first_ns: int, period_ns: int) -> None:
        self.deadline, self.period = max(first_ns, self.clock.now), period_ns

    def cancel(self) -> None:
        self.deadline = None


class ManualClock:
    """Time that goes on by :meth:`advance`."""

    def __init__(self) -> None:
        self.now = 0
        self.timers: list[ManualTimer] = []

    def timer(self, callback: Callable[[], object], *, name: str = "", priority: int = 0) -> ManualTimer:
        self.timers.append(ManualTimer(self, callback))
        return self.timers[-1]

    def advance(self, ns: int) -> None:
        """Let ``ns`` pass, with all that falls due."""
        end = self.now + ns
        while True:
            due = [timer for timer in self.timers if timer.deadline is not None and timer.deadline <= end]
            if not due:
                break
            first = min(due, key=lambda timer: timer.deadline)
            self.now = first.deadline
            first.deadline = self.now + first.period if first.period else None
            first.callback()
        self.now = end


# -- devices


class FakeX86Vcpu:
    """A vCPU that writes down what it gets. Its TSC counts nanoseconds."""

    def __init__(self, vm: FakeX86Vm, vcpu_id: int, index: int) -> None:
        self.vm = vm
        self.index, self.vcpu_id = index, vcpu_id
        self.is_bsp = not index
        self.has_run = self.running = True
        self.has_x2apic = True
        self.cpu_interface: Any = None
        self.received: list[Any] = []
        self.kicks = 0
        self.tsc = SimpleNamespace(time_until=lambda value: max(0, value - vm.clock.now))

    def kick(self) -> None:
        self.kicks += 1

    def receive_init(self) -> None:
        self.received.append("INIT")

    def receive_sipi(self, vector: int) -> None:
        self.received.append(("SIPI", vector))

    def receive_nmi(self) -> None:
        self.received.append("NMI")

    def receive_smi(self) -> bool:
        self.received.append("SMI")
        return True

    def unhalt(self) -> None:
        self.received.append("unhalt")


class FakeX86Vm:
    """What interrupt controllers see of their VM."""

    def __init__(self, **options: Any) -> None:
        self.clock = ManualClock()
        self.mmio, self.pio = AddressSpace("mmio"), AddressSpace("pio")
        self.ledger = Ledger()
        self.events: Any = None
        self.irqchip: Any = None
        self.options = {
            "vector_hashing": True, "apic_map_lag": False, "scan_on_entry": False, "timer_on_entry": False, **options,
        }  # fmt: skip
        self.vcpus: list[FakeX86Vcpu] = []

    def gsi_of_pin(self, chip: int, pin: int) -> int | None:
        return pin + (8 if chip == 1 else 0)

    def on_destroy(self, callback: Callable[[], None]) -> None:
        pass


class Apics:
    """Local APICs on a bus. ``enabled`` turns them on by SVR, ``x2apic`` (one for all, or each) sets the mode."""

    def __init__(
        self,
        ids: list[int],
        *,
        x2apic: bool | list[bool] = False,
        enabled: bool = True,
        whole: bool = False,
        quirk: bool = True,
        wide: bool = False,
        **options: Any,
    ) -> None:
        self.vm = FakeX86Vm(**options)
        if whole:
            X86Irqchip(self.vm)  # type: ignore[arg-type]
            self.bus = self.vm.irqchip.apics
        else:
            self.bus = ApicBus(self.vm)  # type: ignore[arg-type]
        self.bus.broadcast_quirk_disabled = not quirk
        self.bus.x2apic_format = wide
        self.apics: list[Lapic] = []
        for index, vcpu_id in enumerate(ids):
            vcpu = FakeX86Vcpu(self.vm, vcpu_id, index)
            self.vm.vcpus.append(vcpu)
            apic = Lapic(self.bus, vcpu)
            self.bus.add(apic)
            self.apics.append(apic)
            if x2apic[index] if isinstance(x2apic, list) else x2apic:
                apic.set_base(apic.base | BASE_X2APIC)
            if enabled:
                apic.write(SVR, SVR_ON)

    @property
    def clock(self) -> ManualClock:
        return self.vm.clock

    def set_ldr(self, *ldrs: int) -> None:
        """The logical ids, xAPIC mode."""
        for apic, ldr in zip(self.apics, ldrs, strict=True):
            apic.write(LDR, ldr << 24)

    def holders(self, vector: int) -> list[int]:
        """The indexes of those in whose IRR a vector is."""
        return [apic.index for apic in self.apics if apic.irr >> vector & 1]

    def check(self) -> None:
        """The invariants hold and the account balances."""
        if self.vm.irqchip is not None:
            self.vm.irqchip._check()
        else:
            self.bus._check()
        assert self.vm.ledger.statement().balanced


# -- the KVM layer


def outcome(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a call returns, or the name of the errno that it raises."""
    try:
        return call(*args, **kwargs)
    except OSError as error:
        return errno.errorcode[error.errno or 0]


class Pc:
    """An x86 VM; ``irqchip`` is ``"whole"``, ``"split"`` or ``""``, ``enabled`` turns the local APICs on."""

    def __init__(
        self,
        vcpus: int | list[int] = 1,
        *,
        irqchip: str = "whole",
        enabled: bool = True,
        x2apic_api: int = 0,
        **options: Any,
    ) -> None:
        self.user = SparseMemory()
        self.kvm = Kvm("x86_64", user_memory=self.user, **options)
        self.host = Host(self.kvm)
        self.vm: VmFd = self.host.create_vm()
        if irqchip == "whole":
            self.vm.ioctl(requests.KVM_CREATE_IRQCHIP)
        elif irqchip:
            self.enable(uapi.KVM_CAP_SPLIT_IRQCHIP, 24)
        if x2apic_api:
            self.enable(uapi.KVM_CAP_X2APIC_API, x2apic_api)
        self.vcpus: list[VcpuFd] = []
        for vcpu_id in range(vcpus) if isinstance(vcpus, int) else vcpus:
            self.add_vcpu(vcpu_id)
        if irqchip and enabled:
            for n in range(len(self.vcpus)):
                self.set_lapic({SVR: SVR_ON}, n)

    def add_vcpu(self, vcpu_id: int) -> VcpuFd:
        """Create a vCPU whose CPUID has x2APIC and TSC-deadline mode."""
        vcpu = self.vm.create_vcpu(vcpu_id)
        leaf = KvmCpuidEntry2(1, ecx=ECX_X2APIC | ECX_TSC_DEADLINE)
        vcpu.ioctl(requests.KVM_SET_CPUID2, bytearray(KvmCpuid2(1).pack() + leaf.pack()))
        self.vcpus.append(vcpu)
        return vcpu

    @property
    def inside(self) -> Any:
        """The Vm behind the fds."""
        return self.kvm.vm(self.vm.fd)

    def apic(self, vcpu: int = 0) -> Any:
        """A local APIC."""
        return self.inside.vcpus[vcpu].cpu_interface

    def enable(self, cap: int, arg: int) -> int:
        """KVM_ENABLE_CAP of the VM."""
        return self.vm.ioctl(requests.KVM_ENABLE_CAP, uapi.KvmEnableCap(cap, 0, (arg, 0, 0, 0)))

    # -- local APICs

    def lapic(self, vcpu: int = 0) -> bytearray:
        """KVM_GET_LAPIC."""
        page = bytearray(KvmLapicState.SIZE)
        self.vcpus[vcpu].ioctl(requests.KVM_GET_LAPIC, page)
        return page

    def word(self, offset: int, vcpu: int = 0) -> int:
        """A register of KVM_GET_LAPIC."""
        value: int = struct.unpack_from("<I", self.lapic(vcpu), offset)[0]
        return value

    def set_lapic(self, words: dict[int, int], vcpu: int = 0) -> None:
        """KVM_SET_LAPIC of what is there, with some registers changed."""
        page = self.lapic(vcpu)
        for offset, value in words.items():
            struct.pack_into("<I", page, offset, value)
        self.vcpus[vcpu].ioctl(requests.KVM_SET_LAPIC, page)

    def pending(self, vcpu: int = 0) -> list[int]:
        """The vectors in IRR, as KVM_GET_LAPIC has them."""
        page = self.lapic(vcpu)
        return [v for v in range(256) if page[0x200 + v // 32 * 16 + v % 32 // 8] >> v % 8 & 1]

    def set_msr(self, number: int, value: int, vcpu: int = 0) -> bool:
        """KVM_SET_MSRS; whether it was taken."""
        buffer = bytearray(KvmMsrs(1).pack() + KvmMsrEntry(number, 0, value).pack())
        return bool(self.vcpus[vcpu].ioctl(requests.KVM_SET_MSRS, buffer))

    def to_x2apic(self, vcpu: int = 0) -> None:
        """x2APIC mode, as a VMM restores it."""
        assert self.set_msr(APIC_BASE_MSR, 0xFEE0_0C00 | (0x100 if not vcpu else 0), vcpu)

    # -- lines and chips

    def line(self, gsi: int, level: int = 1) -> int:
        """KVM_IRQ_LINE_STATUS: the status."""
        line = bytearray(uapi.KvmIrqLevel(gsi, level).pack())
        self.vm.ioctl(requests.KVM_IRQ_LINE_STATUS, line)
        return int.from_bytes(line[:4], "little", signed=True)

    def chip(self, chip: int) -> Any:
        """KVM_GET_IRQCHIP: the state of a chip."""
        buffer = bytearray(KvmIrqchip(chip).pack())
        self.vm.ioctl(requests.KVM_GET_IRQCHIP, buffer)
        data = KvmIrqchip.unpack(buffer).chip
        return KvmIoapicState.unpack(data) if chip == 2 else KvmPicState.unpack(data)

    def set_chip(self, chip: int, state: Any) -> None:
        """KVM_SET_IRQCHIP."""
        size = len(KvmIrqchip().chip)
        self.vm.ioctl(requests.KVM_SET_IRQCHIP, KvmIrqchip(chip, chip=state.pack().ljust(size, b"\0")))

    def set_entry(self, pin: int, entry: int) -> None:
        """One redirection entry, through KVM_SET_IRQCHIP."""
        state = self.chip(2)
        entries = list(state.redirtbl)
        entries[pin] = entry
        self.set_chip(2, state.with_(redirtbl=tuple(entries)))

    def check(self) -> None:
        """The invariants hold and the account balances."""
        self.inside.irqchip._check()
        self.inside.ledger.check()
