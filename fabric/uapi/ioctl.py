"""Request numbers of the KVM ioctls.

``KVM_*`` are the numbers a C program gets from ``linux/kvm.h`` with the asm-generic ``_IOC`` encoding (arm64,
x86, s390; powerpc and mips encode the direction differently, but callers of fabric always use this one)::

    31  30 29          16 15          8 7           0
    +-----+--------------+-------------+-------------+
    | dir | size in bytes|  0xae KVMIO |   number    |     dir: 1 the caller writes, 2 the caller reads
    +-----+--------------+-------------+-------------+

Structs whose size depends on the architecture have their x86-64 size. Two calls may share a number
(KVM_GET_ONE_REG on a vCPU and KVM_ARM_SET_DEVICE_ADDR on a VM): the kind of fd tells them apart.
"""

from __future__ import annotations

from typing import Final

KVMIO: Final = 0xAE

IOC_WRITE: Final = 1
IOC_READ: Final = 2


def _IOC(direction: int, kind: int, nr: int, size: int) -> int:
    return direction << 30 | size << 16 | kind << 8 | nr


def _IO(kind: int, nr: int) -> int:
    return _IOC(0, kind, nr, 0)


def _IOW(kind: int, nr: int, size: int) -> int:
    return _IOC(IOC_WRITE, kind, nr, size)


def _IOR(kind: int, nr: int, size: int) -> int:
    return _IOC(IOC_READ, kind, nr, size)


def _IOWR(kind: int, nr: int, size: int) -> int:
    return _IOC(IOC_READ | IOC_WRITE, kind, nr, size)


# System fd
KVM_GET_API_VERSION: Final = _IO(KVMIO, 0x00)
KVM_CREATE_VM: Final = _IO(KVMIO, 0x01)
KVM_GET_MSR_INDEX_LIST: Final = _IOWR(KVMIO, 0x02, 4)
KVM_CHECK_EXTENSION: Final = _IO(KVMIO, 0x03)  # also on a VM fd
KVM_GET_VCPU_MMAP_SIZE: Final = _IO(KVMIO, 0x04)
KVM_GET_SUPPORTED_CPUID: Final = _IOWR(KVMIO, 0x05, 8)
KVM_GET_EMULATED_CPUID: Final = _IOWR(KVMIO, 0x09, 8)
KVM_GET_MSR_FEATURE_INDEX_LIST: Final = _IOWR(KVMIO, 0x0A, 4)
KVM_GET_SUPPORTED_HV_CPUID: Final = _IOWR(KVMIO, 0xC1, 8)  # also on a vCPU fd

# VM fd: memory and vCPUs
KVM_CREATE_VCPU: Final = _IO(KVMIO, 0x41)
KVM_GET_DIRTY_LOG: Final = _IOW(KVMIO, 0x42, 16)
KVM_SET_NR_MMU_PAGES: Final = _IO(KVMIO, 0x44)
KVM_GET_NR_MMU_PAGES: Final = _IO(KVMIO, 0x45)
KVM_SET_USER_MEMORY_REGION: Final = _IOW(KVMIO, 0x46, 32)
KVM_SET_TSS_ADDR: Final = _IO(KVMIO, 0x47)
KVM_SET_IDENTITY_MAP_ADDR: Final = _IOW(KVMIO, 0x48, 8)
KVM_CLEAR_DIRTY_LOG: Final = _IOWR(KVMIO, 0xC0, 24)
KVM_RESET_DIRTY_RINGS: Final = _IO(KVMIO, 0xC7)

# VM fd: interrupts and timers
KVM_CREATE_IRQCHIP: Final = _IO(KVMIO, 0x60)
KVM_IRQ_LINE: Final = _IOW(KVMIO, 0x61, 8)
KVM_GET_IRQCHIP: Final = _IOWR(KVMIO, 0x62, 520)
KVM_SET_IRQCHIP: Final = _IOR(KVMIO, 0x63, 520)  # reads its argument, whatever the number says
KVM_CREATE_PIT: Final = _IO(KVMIO, 0x64)
KVM_GET_PIT: Final = _IOWR(KVMIO, 0x65, 72)
KVM_SET_PIT: Final = _IOR(KVMIO, 0x66, 72)
KVM_IRQ_LINE_STATUS: Final = _IOWR(KVMIO, 0x67, 8)
KVM_REGISTER_COALESCED_MMIO: Final = _IOW(KVMIO, 0x67, 16)
KVM_UNREGISTER_COALESCED_MMIO: Final = _IOW(KVMIO, 0x68, 16)
KVM_ASSIGN_PCI_DEVICE: Final = _IOR(KVMIO, 0x69, 64)
KVM_SET_GSI_ROUTING: Final = _IOW(KVMIO, 0x6A, 8)
KVM_ASSIGN_DEV_IRQ: Final = _IOW(KVMIO, 0x70, 64)
KVM_REINJECT_CONTROL: Final = _IO(KVMIO, 0x71)
KVM_ASSIGN_SET_MSIX_NR: Final = _IOW(KVMIO, 0x73, 8)
KVM_IRQFD: Final = _IOW(KVMIO, 0x76, 32)
KVM_CREATE_PIT2: Final = _IOW(KVMIO, 0x77, 64)
KVM_SET_BOOT_CPU_ID: Final = _IO(KVMIO, 0x78)
KVM_IOEVENTFD: Final = _IOW(KVMIO, 0x79, 64)
KVM_XEN_HVM_CONFIG: Final = _IOW(KVMIO, 0x7A, 56)
KVM_SET_CLOCK: Final = _IOW(KVMIO, 0x7B, 48)
KVM_GET_CLOCK: Final = _IOR(KVMIO, 0x7C, 48)
KVM_GET_PIT2: Final = _IOR(KVMIO, 0x9F, 112)
KVM_SET_PIT2: Final = _IOW(KVMIO, 0xA0, 112)
KVM_SET_TSC_KHZ: Final = _IO(KVMIO, 0xA2)  # also on a vCPU fd
KVM_GET_TSC_KHZ: Final = _IO(KVMIO, 0xA3)  # also on a vCPU fd
KVM_SIGNAL_MSI: Final = _IOW(KVMIO, 0xA5, 32)
KVM_CREATE_SPAPR_TCE: Final = _IOW(KVMIO, 0xA8, 16)
KVM_CREATE_SPAPR_TCE_64: Final = _IOW(KVMIO, 0xA8, 32)
KVM_ARM_SET_DEVICE_ADDR: Final = _IOW(KVMIO, 0xAB, 16)
KVM_PPC_RTAS_DEFINE_TOKEN: Final = _IOW(KVMIO, 0xAC, 128)
KVM_ARM_PREFERRED_TARGET: Final = _IOR(KVMIO, 0xAF, 32)
KVM_HYPERV_EVENTFD: Final = _IOW(KVMIO, 0xBD, 24)
KVM_XEN_HVM_GET_ATTR: Final = _IOWR(KVMIO, 0xC8, 72)
KVM_XEN_HVM_SET_ATTR: Final = _IOW(KVMIO, 0xC9, 72)
KVM_XEN_HVM_EVTCHN_SEND: Final = _IOW(KVMIO, 0xD0, 12)
KVM_CREATE_DEVICE: Final = _IOWR(KVMIO, 0xE0, 12)

# Device fd; also VM, vCPU and system fds that have attributes
KVM_SET_DEVICE_ATTR: Final = _IOW(KVMIO, 0xE1, 24)
KVM_GET_DEVICE_ATTR: Final = _IOW(KVMIO, 0xE2, 24)
KVM_HAS_DEVICE_ATTR: Final = _IOW(KVMIO, 0xE3, 24)

# vCPU fd
KVM_RUN: Final = _IO(KVMIO, 0x80)
KVM_GET_REGS: Final = _IOR(KVMIO, 0x81, 144)
KVM_SET_REGS: Final = _IOW(KVMIO, 0x82, 144)
KVM_GET_SREGS: Final = _IOR(KVMIO, 0x83, 312)
KVM_SET_SREGS: Final = _IOW(KVMIO, 0x84, 312)
KVM_TRANSLATE: Final = _IOWR(KVMIO, 0x85, 24)
KVM_INTERRUPT: Final = _IOW(KVMIO, 0x86, 4)
KVM_GET_MSRS: Final = _IOWR(KVMIO, 0x88, 8)
KVM_SET_MSRS: Final = _IOW(KVMIO, 0x89, 8)
KVM_SET_CPUID: Final = _IOW(KVMIO, 0x8A, 8)
KVM_SET_SIGNAL_MASK: Final = _IOW(KVMIO, 0x8B, 4)
KVM_GET_FPU: Final = _IOR(KVMIO, 0x8C, 416)
KVM_SET_FPU: Final = _IOW(KVMIO, 0x8D, 416)
KVM_GET_LAPIC: Final = _IOR(KVMIO, 0x8E, 1024)
KVM_SET_LAPIC: Final = _IOW(KVMIO, 0x8F, 1024)
KVM_SET_CPUID2: Final = _IOW(KVMIO, 0x90, 8)
KVM_GET_CPUID2: Final = _IOWR(KVMIO, 0x91, 8)
KVM_TPR_ACCESS_REPORTING: Final = _IOWR(KVMIO, 0x92, 40)
KVM_SET_VAPIC_ADDR: Final = _IOW(KVMIO, 0x93, 8)
KVM_S390_INTERRUPT: Final = _IOW(KVMIO, 0x94, 16)  # also on a VM fd
KVM_S390_STORE_STATUS: Final = _IOW(KVMIO, 0x95, 8)
KVM_S390_SET_INITIAL_PSW: Final = _IOW(KVMIO, 0x96, 16)
KVM_S390_INITIAL_RESET: Final = _IO(KVMIO, 0x97)
KVM_GET_MP_STATE: Final = _IOR(KVMIO, 0x98, 4)
KVM_SET_MP_STATE: Final = _IOW(KVMIO, 0x99, 4)
KVM_NMI: Final = _IO(KVMIO, 0x9A)
KVM_SET_GUEST_DEBUG: Final = _IOW(KVMIO, 0x9B, 72)
KVM_GET_VCPU_EVENTS: Final = _IOR(KVMIO, 0x9F, 64)
KVM_SET_VCPU_EVENTS: Final = _IOW(KVMIO, 0xA0, 64)
KVM_GET_DEBUGREGS: Final = _IOR(KVMIO, 0xA1, 128)
KVM_SET_DEBUGREGS: Final = _IOW(KVMIO, 0xA2, 128)
KVM_ENABLE_CAP: Final = _IOW(KVMIO, 0xA3, 104)  # also on a VM fd
KVM_GET_XSAVE: Final = _IOR(KVMIO, 0xA4, 4096)
KVM_SET_XSAVE: Final = _IOW(KVMIO, 0xA5, 4096)
KVM_GET_XCRS: Final = _IOR(KVMIO, 0xA6, 392)
KVM_SET_XCRS: Final = _IOW(KVMIO, 0xA7, 392)
KVM_GET_ONE_REG: Final = _IOW(KVMIO, 0xAB, 16)
KVM_SET_ONE_REG: Final = _IOW(KVMIO, 0xAC, 16)
KVM_KVMCLOCK_CTRL: Final = _IO(KVMIO, 0xAD)
KVM_ARM_VCPU_INIT: Final = _IOW(KVMIO, 0xAE, 32)
KVM_GET_REG_LIST: Final = _IOWR(KVMIO, 0xB0, 8)
KVM_S390_MEM_OP: Final = _IOW(KVMIO, 0xB1, 64)
KVM_S390_IRQ: Final = _IOW(KVMIO, 0xB4, 72)
KVM_S390_SET_IRQ_STATE: Final = _IOW(KVMIO, 0xB5, 32)
KVM_S390_GET_IRQ_STATE: Final = _IOW(KVMIO, 0xB6, 32)
KVM_SMI: Final = _IO(KVMIO, 0xB7)
KVM_ARM_VCPU_FINALIZE: Final = _IOW(KVMIO, 0xC2, 4)
KVM_S390_NORMAL_RESET: Final = _IO(KVMIO, 0xC3)
KVM_S390_CLEAR_RESET: Final = _IO(KVMIO, 0xC4)
KVM_XEN_VCPU_GET_ATTR: Final = _IOWR(KVMIO, 0xCA, 72)
KVM_XEN_VCPU_SET_ATTR: Final = _IOW(KVMIO, 0xCB, 72)
KVM_GET_STATS_FD: Final = _IO(KVMIO, 0xCE)  # also on a VM fd


def _names() -> dict[int, str]:
    names: dict[int, str] = {}
    for name, value in globals().items():
        if name.startswith("KVM_"):
            names[value] = f"{names[value]} or {name}" if value in names else name
    return names


REQUEST_NAMES: Final[dict[int, str]] = _names()
"""Request number to name, for messages and traces; names that share a number are joined by "or"."""


def request_name(request: int) -> str:
    """The name of a request, or its number in hexadecimal."""
    return REQUEST_NAMES.get(request) or f"{request:#x}"
