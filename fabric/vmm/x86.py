"""What the x86 boards share: where RAM and devices lie, CPUID, ports, and how the guest starts its CPUs.

Memory map (guest physical)::

    0x0000_0000   RAM       up to 3 GiB; the guest's rings are at the end of this part
    0xc000_0000   devices   64 KiB each
    0xfec0_0000   IOAPIC
    0xfee0_0000   local APICs
    0x1_0000_0000 RAM       what is left

Ports: 0x604 is PM1a_CNT of ACPI, through which a guest turns the machine off; 0xcf9 resets it, as does a triple fault.
"""

from __future__ import annotations

from struct import unpack
from typing import Any

from fabric.guest.apic import (
    APIC_BASE,
    CPUID_FEATURES,
    CPUID_FREQUENCIES,
    CPUID_KVM_FEATURES,
    EAX_MSI_EXT_DEST_ID,
    ECX_TSC_DEADLINE,
    ECX_X2APIC,
    ApicDriver,
    ApicLayout,
    start_processor,
)
from fabric.guest.driver import MsiMessage, Pages
from fabric.uapi import ioctl
from fabric.uapi.kvm import (
    KVM_CAP_TSC_DEADLINE_TIMER,
    KVM_CAP_X2APIC_API,
    KVM_EXIT_IO,
    KVM_EXIT_IO_OUT,
    KVM_EXIT_SHUTDOWN,
    KVM_MAX_IRQ_ROUTES,
    KVM_MP_STATE_RUNNABLE,
    KVM_RUN_EXIT,
    KvmIrqRoutingEntry,
    KvmMpState,
    KvmRunIo,
)
from fabric.uapi.x86 import (
    KVM_IOAPIC_NUM_PINS,
    KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK,
    KVM_X2APIC_API_USE_32BIT_IDS,
    KvmCpuid2,
    KvmCpuidEntry2,
)
from fabric.vmm.machine import Machine

HOLE = 0xC000_0000
"""From here to 4 GiB there is no RAM."""
HIGH_RAM = 1 << 32
IOAPIC_BASE = 0xFEC0_0000
RINGS_SIZE = 1 << 20

PORT_POWER, PORT_RESET = 0x604, 0xCF9
SLEEP_ENABLE = 1 << 13
RESET_CPU = 1 << 2

PIN_ROUTES = KVM_IOAPIC_NUM_PINS + 16
"""Of the in-kernel IOAPIC and the 8259 pair."""
EDX_TSC_MSR_APIC = 1 << 4 | 1 << 5 | 1 << 9
ECX_HYPERVISOR = 1 << 31
CPUID_TOPOLOGY, CPUID_HYPERVISOR = 0xB, 0x4000_0000
APIC_BUS_KHZ = 1_000_000
EXT_DEST_SHIFT = 5
"""Bits 11:5 of a message's address: bits 14:8 of the destination (KVM_FEATURE_MSI_EXT_DEST_ID)."""


class X86Machine(Machine):
    """An x86 board; vCPUs have x2APIC and the TSC deadline timer where KVM has them."""

    arch = "x86_64"
    ram_base = 0
    bar_base = HOLE
    first_msi_gsi = KVM_IOAPIC_NUM_PINS
    max_vcpus = 1024
    max_vectors = KVM_MAX_IRQ_ROUTES - PIN_ROUTES
    msi_flags = 0
    banked = 256
    has_pic = False
    """There is an 8259 pair."""

    @classmethod
    def least_memory(cls, vcpus: int) -> int:
        """The rings."""
        return RINGS_SIZE

    def ram_regions(self) -> list[tuple[int, int]]:
        """Below the hole, and above 4 GiB."""
        low = min(self.memory_bytes, HOLE)
        high = self.memory_bytes - low
        return [(0, low), (HIGH_RAM, high)] if high else [(0, low)]

    def guest_pages(self) -> Pages:
        """The last megabyte below the hole."""
        low = min(self.memory_bytes, HOLE)
        return Pages(low - RINGS_SIZE, RINGS_SIZE)

    def driver(self) -> ApicDriver:
        """An APIC driver."""
        return ApicDriver(ApicLayout(range(len(self.vcpu_fds)), IOAPIC_BASE, self.has_pic))

    def use_long_ids(self) -> None:
        """Local APICs have ids of 32 bits, for more than 255 vCPUs."""
        self.enable_cap(KVM_CAP_X2APIC_API, KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK)

    def create_vcpu(self, fd: int, number: int) -> None:
        """KVM_SET_CPUID2. All vCPUs but the first wait for an INIT and a SIPI."""
        leaves = self.cpuid(fd, number)
        data = KvmCpuid2(nent=len(leaves)).pack() + b"".join(leaf.pack() for leaf in leaves)
        self.kvm.ioctl(fd, ioctl.KVM_SET_CPUID2, bytearray(data))

    def cpuid(self, fd: int, number: int) -> list[KvmCpuidEntry2]:
        """The leaves that a guest looks at to find its way about interrupts and clocks."""
        features = ECX_X2APIC | ECX_HYPERVISOR
        if self.kvm.ioctl(self.vm_fd, ioctl.KVM_CHECK_EXTENSION, KVM_CAP_TSC_DEADLINE_TIMER):
            features |= ECX_TSC_DEADLINE
        khz = self.kvm.ioctl(fd, ioctl.KVM_GET_TSC_KHZ)
        vendor = unpack("<3I", b"GenuineIntel")
        kvm = unpack("<3I", b"KVMKVMKVM\0\0\0")
        return [
            KvmCpuidEntry2(0, eax=CPUID_TOPOLOGY, ebx=vendor[0], edx=vendor[1], ecx=vendor[2]),
            KvmCpuidEntry2(CPUID_FEATURES, ebx=(number & 0xFF) << 24, ecx=features, edx=EDX_TSC_MSR_APIC),
            KvmCpuidEntry2(CPUID_TOPOLOGY, edx=number),
            KvmCpuidEntry2(CPUID_HYPERVISOR, eax=CPUID_FREQUENCIES, ebx=kvm[0], ecx=kvm[1], edx=kvm[2]),
            KvmCpuidEntry2(CPUID_KVM_FEATURES, eax=EAX_MSI_EXT_DEST_ID),
            KvmCpuidEntry2(CPUID_FREQUENCIES, eax=khz, ebx=APIC_BUS_KHZ),
        ]

    def power_on(self) -> None:
        """Let all vCPUs run at once (KVM_SET_MP_STATE), for programs that do not boot one another."""
        for fd in self.vcpu_fds:
            self.kvm.ioctl(fd, ioctl.KVM_SET_MP_STATE, bytearray(KvmMpState(mp_state=KVM_MP_STATE_RUNNABLE).pack()))

    async def start_secondary(self, cpu: Any, number: int) -> None:
        """INIT and STARTUP; a local APIC has the id of its vCPU."""
        await start_processor(cpu, number)

    async def shut_down(self, cpu: Any) -> None:
        """ACPI S5."""
        await cpu.outp(PORT_POWER, 2, SLEEP_ENABLE)

    def msi_route(self, gsi: int, message: MsiMessage) -> KvmIrqRoutingEntry:
        """With the destination's upper bits where KVM wants them: in the upper half of the address."""
        low = message.address & 0xFFFF_FFFF
        extension = low >> EXT_DEST_SHIFT & 0x7F
        if low >> 20 == APIC_BASE >> 20 and extension:
            address = extension << 40 | low & ~(0x7F << EXT_DEST_SHIFT)
            message = MsiMessage(address, message.data, message.devid)
        return super().msi_route(gsi, message)

    def exited(self, number: int, reason: int, area: memoryview) -> bool:
        """Ports, and a triple fault."""
        if reason == KVM_EXIT_SHUTDOWN:
            self.stopped = "reset"
            return True
        if reason != KVM_EXIT_IO:
            return False
        io = KvmRunIo.unpack(area[KVM_RUN_EXIT:])
        data = slice(io.data_offset, io.data_offset + io.size)
        if io.direction == KVM_EXIT_IO_OUT:
            self.write_port(io.port, int.from_bytes(area[data], "little"))
        else:
            area[data] = b"\xff" * io.size  # nobody answers, as on a bus
        return True

    def write_port(self, port: int, value: int) -> None:
        """A write to a port that KVM has not."""
        if port == PORT_POWER and value & SLEEP_ENABLE:
            self.stopped = "shutdown"
        elif port == PORT_RESET and value & RESET_CPU:
            self.stopped = "reset"
