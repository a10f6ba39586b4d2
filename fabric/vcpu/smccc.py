"""What an arm64 guest gets for a hypercall: the SMC calling convention's services, as far as KVM has them.

======================== ================================================================== ========================
service                  functions                                                          switched off by
======================== ================================================================== ========================
Arm architecture         version, features, workarounds for bugs of the CPU                 -
PSCI                     power of vCPUs and of the machine (Arm DEN 0022)                   the vCPU's PSCI version
stolen time              where it is (Arm DEN 0057)                                         KVM_REG_ARM_STD_HYP_BMAP
entropy                  random numbers, from the run's seed (Arm DEN 0098)                 KVM_REG_ARM_STD_BMAP
KVM's own                identification, features, clock pair (ptp_kvm)                     KVM_REG_ARM_VENDOR_HYP_BMAP
======================== ================================================================== ========================

Everything else is not supported, -1. Sources: Arm DEN 0028, and answers recorded of Linux 6.1.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final

import attrs

from fabric.uapi import arm64 as arm
from fabric.uapi.kvm import (
    KVM_CAP_ARM_SYSTEM_SUSPEND,
    KVM_SYSTEM_EVENT_RESET,
    KVM_SYSTEM_EVENT_SHUTDOWN,
    KVM_SYSTEM_EVENT_SUSPEND,
)
from fabric.vcpu.exits import SystemEventExit
from fabric.vcpu.pvtime import INVALID_IPA

if TYPE_CHECKING:
    from random import Random

    from fabric.vcpu.arm64 import Arm64Cpu, Arm64Vcpu

SUCCESS: Final = 0
NOT_SUPPORTED: Final = -1
INVALID_PARAMETERS: Final = -2
ALREADY_ON: Final = -4
INTERNAL_FAILURE: Final = -6

SMCCC_VERSION: Final = 0x8000_0000
SMCCC_ARCH_FEATURES: Final = 0x8000_0001
ARCH_WORKAROUND_1: Final = 0x8000_8000
ARCH_WORKAROUND_2: Final = 0x8000_7FFF
ARCH_WORKAROUND_3: Final = 0x8000_3FFF

PSCI_VERSION: Final = 0x8400_0000
PSCI_CPU_SUSPEND: Final = 0x8400_0001
PSCI_CPU_OFF: Final = 0x8400_0002
PSCI_CPU_ON: Final = 0x8400_0003
PSCI_AFFINITY_INFO: Final = 0x8400_0004
PSCI_MIGRATE_INFO_TYPE: Final = 0x8400_0006
PSCI_SYSTEM_OFF: Final = 0x8400_0008
PSCI_SYSTEM_RESET: Final = 0x8400_0009
PSCI_FEATURES: Final = 0x8400_000A
PSCI_SYSTEM_SUSPEND: Final = 0x8400_000E
PSCI_SYSTEM_RESET2: Final = 0x8400_0012
SMC64: Final = 1 << 30
"""The variant of a function with 64-bit arguments."""
PSCI_0_1_BASE: Final = 0x95C1_BA5E
"""KVM's numbers for the functions of PSCI 0.1, which has none of its own: CPU_SUSPEND, CPU_OFF, CPU_ON, MIGRATE."""
RESET2_VENDOR: Final = 1 << 31
RESET2_FLAG: Final = 1 << 0
"""KVM_SYSTEM_EVENT_RESET_FLAG_PSCI_RESET2."""

TRNG_VERSION: Final = 0x8400_0050
TRNG_FEATURES: Final = 0x8400_0051
TRNG_GET_UUID: Final = 0x8400_0052
TRNG_RND32: Final = 0x8400_0053
TRNG_RND64: Final = TRNG_RND32 | SMC64
_TRNG = (TRNG_VERSION, TRNG_FEATURES, TRNG_GET_UUID, TRNG_RND32, TRNG_RND64)

VENDOR_UID: Final = 0x8600_FF01
VENDOR_FEATURES: Final = 0x8600_0000
VENDOR_PTP: Final = 0x8600_0001

PSCI_0_1: Final = 0x0_0001
PSCI_0_2: Final = 0x0_0002
PSCI_1_0: Final = 0x1_0000
PSCI_1_1: Final = 0x1_0001

AFFINITY_MASK: Final = 0xFF_00FF_FFFF
"""Aff3..Aff0 of MPIDR_EL1."""
_LEVELS = (AFFINITY_MASK, 0xFF_00FF_FF00, 0xFF_00FF_0000, 0xFF_0000_0000)
"""What of an affinity counts at affinity levels 0 to 3."""

SERVICES: Final = {
    arm.KVM_REG_ARM_STD_BMAP: arm.KVM_REG_ARM_STD_BIT_TRNG_V1_0,
    arm.KVM_REG_ARM_STD_HYP_BMAP: arm.KVM_REG_ARM_STD_HYP_BIT_PV_TIME,
    arm.KVM_REG_ARM_VENDOR_HYP_BMAP: arm.KVM_REG_ARM_VENDOR_HYP_BIT_FUNC_FEAT | arm.KVM_REG_ARM_VENDOR_HYP_BIT_PTP,
}
"""The bitmaps of services, with every service that there is."""

_MASK32 = (1 << 32) - 1

Words = tuple[int, int, int, int]
"""x0 to x3."""


@attrs.define
class Firmware:
    """What the VMs's vCPUs find as their firmware."""

    psci_version: int | None = None
    """As userspace set it; the newest while None."""
    services: dict[int, int] = attrs.field(factory=lambda: dict(SERVICES))
    """Bitmap register to the services that are on."""
    entropy: Random | None = None

    def has(self, register: int, service: int) -> bool:
        """Whether a service is on."""
        return bool(self.services[register] & service)


def psci_version(vcpu: Arm64Vcpu) -> int:
    """The PSCI that a vCPU has; without feature KVM_ARM_VCPU_PSCI_0_2 that is 0.1."""
    if arm.KVM_ARM_VCPU_PSCI_0_2 not in vcpu.features:
        return PSCI_0_1
    return PSCI_1_1 if vcpu.firmware.psci_version is None else vcpu.firmware.psci_version


async def call(cpu: Arm64Cpu, function: int, args: tuple[int, ...]) -> Words:
    """Carry out a hypercall; x0 to x3, of which errors are negative."""
    vcpu = cpu._vcpu
    padded = (*args, 0, 0, 0)[:3]
    handler = _FUNCTIONS.get(function)
    service = _SERVICE_OF.get(function)
    if service is not None and not vcpu.firmware.has(*service):
        return NOT_SUPPORTED, 0, 0, 0
    if handler is None:
        handler = _psci_function(vcpu, function)
        if handler is None:
            return NOT_SUPPORTED, 0, 0, 0
        if not function & SMC64:
            padded = tuple(arg & _MASK32 for arg in padded)
    answer = handler(cpu, *padded)
    if not isinstance(answer, int | tuple):
        answer = await answer
    return (answer, 0, 0, 0) if isinstance(answer, int) else answer


Answer = int | Words | Awaitable[int]
Handler = Callable[["Arm64Cpu", int, int, int], Answer]


# -- Arm architecture calls, stolen time


def _arch_features(cpu: Arm64Cpu, function: int, _a2: int, _a3: int) -> int:
    if function == ARCH_WORKAROUND_1:
        return 1  # the CPU does not have the bug
    services = cpu._vcpu.firmware
    if function == arm.ARM_SMCCC_HV_PV_TIME_FEATURES and services.has(*_SERVICE_OF[function]):
        return SUCCESS
    return NOT_SUPPORTED


def _pv_time_features(cpu: Arm64Cpu, function: int, _a2: int, _a3: int) -> int:
    known = function in (arm.ARM_SMCCC_HV_PV_TIME_FEATURES, arm.ARM_SMCCC_HV_PV_TIME_ST)
    return SUCCESS if known and cpu._vcpu.stolen.base != INVALID_IPA else NOT_SUPPORTED


def _pv_time_st(cpu: Arm64Cpu, *_: int) -> int:
    vcpu = cpu._vcpu
    if vcpu.stolen.base == INVALID_IPA:
        return NOT_SUPPORTED
    vcpu.stolen.start(vcpu.vm.memory, vcpu.stolen_ns)
    return vcpu.stolen.base


# -- entropy, and what is KVM's own


def _trng_features(_cpu: Arm64Cpu, function: int, _a2: int, _a3: int) -> int:
    return SUCCESS if function in _TRNG else NOT_SUPPORTED


def _trng(width: int) -> Handler:
    def random(cpu: Arm64Cpu, bits: int, _a2: int, _a3: int) -> Words:
        if bits > 3 * width:
            return INVALID_PARAMETERS, 0, 0, 0
        vcpu = cpu._vcpu
        if vcpu.firmware.entropy is None:
            vcpu.firmware.entropy = cpu._engine.rng(f"entropy of {vcpu.vm!r}")
        value = vcpu.firmware.entropy.getrandbits(bits) if bits else 0
        words = [value >> width * n & (1 << width) - 1 for n in range(3)]
        return SUCCESS, words[2], words[1], words[0]

    return random


def _ptp(cpu: Arm64Cpu, which: int, _a2: int, _a3: int) -> Words:
    """Time of day and counter at one instant, in halves. The time of day is that of the run."""
    counter = cpu._vcpu.timers.counter
    if which not in (0, 1):
        return NOT_SUPPORTED, 0, 0, 0
    cycles, now = counter.physical() if which else counter.virtual(), cpu.now
    return now >> 32, now & _MASK32, cycles >> 32, cycles & _MASK32


# -- PSCI


def _psci_function(vcpu: Arm64Vcpu, function: int) -> Handler | None:
    version = psci_version(vcpu)
    if version == PSCI_0_1:
        return _PSCI_0_1.get(function)
    number = function & ~SMC64
    since, handler, wide = _PSCI.get(number, (0, None, False))
    if handler is None or version < since or (function != number and not wide):
        return None
    if function & SMC64 and arm.KVM_ARM_VCPU_EL1_32BIT in vcpu.features:
        return None
    if number == PSCI_SYSTEM_SUSPEND and KVM_CAP_ARM_SYSTEM_SUSPEND not in vcpu.vm.enabled:
        return None
    return handler


def _psci_features(cpu: Arm64Cpu, function: int, _a2: int, _a3: int) -> int:
    known = function == SMCCC_VERSION or _psci_function(cpu._vcpu, function) is not None
    return SUCCESS if known else NOT_SUPPORTED


async def _cpu_suspend(cpu: Arm64Cpu, *_: int) -> int:
    await cpu.wait_for_interrupt()
    return SUCCESS


def _cpu_off(_cpu: Arm64Cpu, *_: int) -> int:
    raise ValueError("PSCI CPU_OFF: return from the program instead")


def _cpu_on(cpu: Arm64Cpu, affinity: int, _a2: int, _a3: int) -> int:
    found = _with_affinity(cpu._vcpu, affinity, 0)
    if not found:
        return INVALID_PARAMETERS
    if not found[0].powered_off:
        return INVALID_PARAMETERS if psci_version(cpu._vcpu) == PSCI_0_1 else ALREADY_ON
    found[0].power_on()
    return SUCCESS


def _affinity_info(cpu: Arm64Cpu, affinity: int, level: int, _a3: int) -> int:
    """0 when a vCPU of that affinity is on, 1 when all are off."""
    found = _with_affinity(cpu._vcpu, affinity, level)
    if not found:
        return INVALID_PARAMETERS
    return int(all(vcpu.powered_off for vcpu in found))


def _with_affinity(vcpu: Arm64Vcpu, affinity: int, level: int) -> list[Any]:
    if affinity & ~AFFINITY_MASK or level >= len(_LEVELS):
        return []
    mask = _LEVELS[level]
    return [other for other in vcpu.vm.vcpus if other.mpidr & mask == affinity & mask]


def _system_event(event: int) -> Handler:
    async def leave(cpu: Arm64Cpu, *_: int) -> int:
        return int(await cpu._leave(SystemEventExit(event)))

    return leave


async def _system_reset2(cpu: Arm64Cpu, kind: int, _cookie: int, _a3: int) -> int:
    if 0 < kind < RESET2_VENDOR:
        return INVALID_PARAMETERS
    await cpu._leave(SystemEventExit(KVM_SYSTEM_EVENT_RESET, (RESET2_FLAG,)))
    return INTERNAL_FAILURE  # the VMM let it run on


_PSCI: Final[dict[int, tuple[int, Handler, bool]]] = {
    # Function to the PSCI version that has it first, what it does, and whether there is one with 64-bit arguments.
    PSCI_VERSION: (PSCI_0_2, lambda cpu, *_: psci_version(cpu._vcpu), False),
    PSCI_CPU_SUSPEND: (PSCI_0_2, _cpu_suspend, True),
    PSCI_CPU_OFF: (PSCI_0_2, _cpu_off, False),
    PSCI_CPU_ON: (PSCI_0_2, _cpu_on, True),
    PSCI_AFFINITY_INFO: (PSCI_0_2, _affinity_info, True),
    PSCI_MIGRATE_INFO_TYPE: (PSCI_0_2, lambda *_: 2, False),  # there is no trusted OS to migrate
    PSCI_SYSTEM_OFF: (PSCI_0_2, _system_event(KVM_SYSTEM_EVENT_SHUTDOWN), False),
    PSCI_SYSTEM_RESET: (PSCI_0_2, _system_event(KVM_SYSTEM_EVENT_RESET), False),
    PSCI_FEATURES: (PSCI_1_0, _psci_features, False),
    PSCI_SYSTEM_SUSPEND: (PSCI_1_0, _system_event(KVM_SYSTEM_EVENT_SUSPEND), True),
    PSCI_SYSTEM_RESET2: (PSCI_1_1, _system_reset2, True),
}

_PSCI_0_1: Final[dict[int, Handler]] = {PSCI_0_1_BASE + 1: _cpu_off, PSCI_0_1_BASE + 2: _cpu_on}

_FUNCTIONS: Final[dict[int, Handler]] = {
    SMCCC_VERSION: lambda *_: PSCI_1_1,  # 1.1
    SMCCC_ARCH_FEATURES: _arch_features,
    ARCH_WORKAROUND_1: lambda *_: SUCCESS,
    ARCH_WORKAROUND_2: lambda *_: SUCCESS,
    ARCH_WORKAROUND_3: lambda *_: SUCCESS,
    arm.ARM_SMCCC_HV_PV_TIME_FEATURES: _pv_time_features,
    arm.ARM_SMCCC_HV_PV_TIME_ST: _pv_time_st,
    TRNG_VERSION: lambda *_: 1 << 16,
    TRNG_FEATURES: _trng_features,
    TRNG_GET_UUID: lambda *_: (0x00E0_210D, 0xEB11_8443, 0x4452_7080, 0x4C5A_4E55),
    TRNG_RND32: _trng(32),
    TRNG_RND64: _trng(64),
    VENDOR_UID: lambda *_: (0xB66F_B428, 0xE911_C52E, 0x564B_CAA9, 0x743A_004D),
    VENDOR_FEATURES: lambda cpu, *_: cpu._vcpu.firmware.services[arm.KVM_REG_ARM_VENDOR_HYP_BMAP],
    VENDOR_PTP: _ptp,
}

_SERVICE_OF: Final[dict[int, tuple[int, int]]] = {
    **dict.fromkeys(_TRNG, (arm.KVM_REG_ARM_STD_BMAP, arm.KVM_REG_ARM_STD_BIT_TRNG_V1_0)),
    **dict.fromkeys(
        (arm.ARM_SMCCC_HV_PV_TIME_FEATURES, arm.ARM_SMCCC_HV_PV_TIME_ST),
        (arm.KVM_REG_ARM_STD_HYP_BMAP, arm.KVM_REG_ARM_STD_HYP_BIT_PV_TIME),
    ),
    **dict.fromkeys(
        (VENDOR_UID, VENDOR_FEATURES), (arm.KVM_REG_ARM_VENDOR_HYP_BMAP, arm.KVM_REG_ARM_VENDOR_HYP_BIT_FUNC_FEAT)
    ),
    VENDOR_PTP: (arm.KVM_REG_ARM_VENDOR_HYP_BMAP, arm.KVM_REG_ARM_VENDOR_HYP_BIT_PTP),
}
