"""KVM_GET_ONE_REG, KVM_SET_ONE_REG and KVM_GET_REG_LIST of an arm64 vCPU.

Registers come in spaces, told apart by bits 27:16 of their ids, each with its own habits:

========== ========================================= ======================================================
space      what                                      peculiar
========== ========================================= ======================================================
core       struct kvm_regs by offset                 no vector registers on a vCPU with SVE
SVE        Z0-31, P0-15, FFR; the vector lengths     before KVM_ARM_VCPU_FINALIZE only the lengths, after it
                                                     only the others can be set
firmware   PSCI version, CPU bugs, service bitmaps   common to the VM's vCPUs
timer      the virtual timer's three                 ids of system registers
system     :mod:`fabric.vcpu.arm64_sysregs`          a set reads the value before it looks the id up
caches     CCSIDR_EL1 by level and type              read-only
========== ========================================= ======================================================

Read-only means that a set is accepted if it changes nothing. Rules: api.get-one-reg, api.set-one-reg, api.reg of the
interface inventory, and answers recorded of Linux 6.1.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from sys import byteorder
from typing import TYPE_CHECKING, Final, NoReturn

from fabric.clock.arch_timer import ArchTimers
from fabric.devices.attributes import Pointer
from fabric.errors import KvmError
from fabric.uapi import arm64 as arm
from fabric.uapi import kvm as uapi
from fabric.vcpu import arm64_sysregs as sysregs
from fabric.vcpu import smccc

if TYPE_CHECKING:
    from fabric.kvm.arm64_vcpu import ArmVcpuPart

CORE_REGS_SIZE: Final = 864
"""struct kvm_regs: user_pt_regs (x0-x30, sp, pc, pstate), sp_el1, elr_el1, spsr[5], padding, fp_regs."""
PC: Final = 256
PSTATE: Final = 264
EXCEPTION_STATE: Final = range(272, 296)
"""SP_EL1, ELR_EL1 and SPSR_EL1."""
_VREGS = range(336, 848)
_CORE_PARTS = ((range(328), 8), (_VREGS, 16), (range(848, 856), 4))
"""Where struct kvm_regs has members, and of which size."""

_MODES_64 = (0x0, 0x4, 0x5)  # EL0t, EL1t, EL1h
_MODE_USER_32 = 0x10
_MODE_SYSTEM_32 = 0x1F
_MODES_32 = (0x11, 0x12, 0x13, 0x17, 0x1B, _MODE_SYSTEM_32)  # FIQ, IRQ, supervisor, abort, undefined, system
_PSTATE_32 = 0x10
"""AArch32."""

_ID_BITS = uapi.KVM_REG_ARCH_MASK | uapi.KVM_REG_SIZE_MASK | arm.KVM_REG_ARM_COPROC_MASK | 0xFFFF
"""What an id may have besides the register's number."""


def _unknown(reg: int) -> NoReturn:
    raise KvmError(errno.ENOENT, f"there is no register {reg:#x}")


# -- core ------------------------------------------------------------------------------------------------------------


def core_reg(part: ArmVcpuPart, reg: int) -> tuple[int, int]:
    """Offset in struct kvm_regs and size of a core register.

    Raises:
        KvmError: ENOENT beyond the struct, EINVAL where no member of the id's size begins.
    """
    at, size = 4 * (reg & 0xFFFF), uapi.reg_size(reg)
    if reg & ~_ID_BITS or at + size // 4 * 4 >= CORE_REGS_SIZE:
        raise KvmError(errno.ENOENT, f"core register {reg:#x} is beyond struct kvm_regs")
    if at in _VREGS and part.has(arm.KVM_ARM_VCPU_SVE):
        raise KvmError(errno.EINVAL, "the vector registers of a vCPU with SVE are its Z registers")
    for place, member in _CORE_PARTS:
        if at in place and not (at - place.start) % member and size == member:
            return at, size
    raise KvmError(errno.EINVAL, f"no core register of {size} bytes is at offset {at}")


def _core_ids(part: ArmVcpuPart) -> Iterator[int]:
    for place, member in _CORE_PARTS:
        if place is not _VREGS or not part.has(arm.KVM_ARM_VCPU_SVE):
            yield from (arm.arm64_core_reg(at, member) for at in place[::member])


def _get_core(part: ArmVcpuPart, reg: int, ptr: Pointer) -> None:
    at, size = core_reg(part, reg)
    ptr.write(part.core[at : at + size])


def _set_core(part: ArmVcpuPart, reg: int, ptr: Pointer) -> None:
    at, size = core_reg(part, reg)
    value = ptr.read(size)
    if at == PSTATE:
        _check_mode(part, int.from_bytes(value, byteorder))
    part.core[at : at + size] = value
    pstate = int.from_bytes(part.core[PSTATE : PSTATE + 8], byteorder)
    if pstate & _PSTATE_32:
        # AArch32 has half of each register, and only the first 15 in user and system mode.
        few = pstate & 0x1F in (_MODE_USER_32, _MODE_SYSTEM_32)
        for start in (*range(0, 8 * (15 if few else 31), 8), PC):
            part.core[start : start + 8] = _narrow(part.core[start : start + 8])


def _narrow(value: bytearray) -> bytes:
    return (int.from_bytes(value, byteorder) & 0xFFFF_FFFF).to_bytes(8, byteorder)


def _check_mode(part: ArmVcpuPart, pstate: int) -> None:
    """EINVAL for a PSTATE whose mode the vCPU does not have."""
    mode = pstate & 0x1F
    if mode == _MODE_USER_32:
        fits = bool(part.vm.options["el1_32bit"])
    else:
        fits = mode in (_MODES_32 if part.has(arm.KVM_ARM_VCPU_EL1_32BIT) else _MODES_64)
    if not fits:
        raise KvmError(errno.EINVAL, f"PSTATE {pstate:#x} has a mode that this vCPU does not have")


# -- SVE -------------------------------------------------------------------------------------------------------------

_SVE_SPACING = 0x20
"""Between the ids of two registers; the slices of one would be between them, and there is one."""
_MAX_VQ = 16
"""The longest vectors there are, in 128-bit quadwords."""
_PREGS_END = arm.KVM_REG_ARM64_SVE_FFR_BASE + _SVE_SPACING


def _sve_ids(part: ArmVcpuPart) -> Iterator[int]:
    if part.has(arm.KVM_ARM_VCPU_SVE):
        yield arm.KVM_REG_ARM64_SVE_VLS
        yield from (arm.KVM_REG_ARM64_SVE_ZREG_BASE + _SVE_SPACING * n for n in range(32))
        yield from (arm.KVM_REG_ARM64_SVE_PREG_BASE + _SVE_SPACING * n for n in range(16))
        yield arm.KVM_REG_ARM64_SVE_FFR_BASE


def _sve_size(part: ArmVcpuPart, reg: int) -> int:
    """Bytes that the vCPU has of an SVE register. KvmError(EINVAL, ENOENT, EPERM)."""
    zreg = arm.KVM_REG_ARM64_SVE_ZREG_BASE <= reg < arm.KVM_REG_ARM64_SVE_ZREG_BASE + 32 * _SVE_SPACING
    if not zreg and not arm.KVM_REG_ARM64_SVE_PREG_BASE <= reg < _PREGS_END:
        raise KvmError(errno.EINVAL, f"{reg:#x} is no SVE register")
    if not part.has(arm.KVM_ARM_VCPU_SVE) or reg % _SVE_SPACING:
        _unknown(reg)
    if not part.sve_finalized:
        raise KvmError(errno.EPERM, "SVE was not finalised")
    return part.sve_vq * (16 if zreg else 2)


def _get_sve(part: ArmVcpuPart, reg: int, ptr: Pointer) -> None:
    if reg == arm.KVM_REG_ARM64_SVE_VLS:
        if not part.has(arm.KVM_ARM_VCPU_SVE):
            _unknown(reg)
        value = ((1 << part.sve_vq) - 1).to_bytes(8, byteorder)
    else:
        value = part.sve.get(reg, bytes(_sve_size(part, reg)))
    ptr.write(value.ljust(uapi.reg_size(reg), b"\0"))


def _set_sve(part: ArmVcpuPart, reg: int, ptr: Pointer) -> None:
    if reg == arm.KVM_REG_ARM64_SVE_VLS:
        _set_vector_lengths(part, ptr)
        return
    size = _sve_size(part, reg)
    part.sve[reg] = bytes(size)  # and so it stays when the value cannot be read
    part.sve[reg] = ptr.read(size)


def _set_vector_lengths(part: ArmVcpuPart, ptr: Pointer) -> None:
    if not part.has(arm.KVM_ARM_VCPU_SVE):
        _unknown(arm.KVM_REG_ARM64_SVE_VLS)
    if part.sve_finalized:
        raise KvmError(errno.EPERM, "the vector lengths are chosen before SVE is finalised")
    # 512 bits, of which those beyond the longest vectors are not looked at.
    lengths = int.from_bytes(ptr.read(64), byteorder) & (1 << 512) - 1
    chosen = lengths.bit_length()
    limit = part.vm.options["sve_max_vq"]
    if not 0 < chosen <= limit or lengths != (1 << chosen) - 1:
        raise KvmError(
            errno.EINVAL, f"the vector lengths must be all of 1 to some number up to {limit}, not {lengths:#x}"
        )
    part.sve_vq = chosen


# -- firmware --------------------------------------------------------------------------------------------------------

_WORKAROUNDS = {
    # The host's state as a level: 0 not available, 1 available or unknown, 2 the CPU does not need it.
    arm.KVM_REG_ARM_SMCCC_ARCH_WORKAROUND_1: 2,
    arm.KVM_REG_ARM_SMCCC_ARCH_WORKAROUND_2: 0,
    arm.KVM_REG_ARM_SMCCC_ARCH_WORKAROUND_3: 0,
}
_LEVEL_MASK = 0xF
_WORKAROUND_2_AVAILABLE, _WORKAROUND_2_NOT_REQUIRED, _WORKAROUND_2_ENABLED = 2, 3, 1 << 4

_FIRMWARE = (arm.KVM_REG_ARM_PSCI_VERSION, *_WORKAROUNDS, *smccc.SERVICES)


def _check_firmware(reg: int) -> None:
    if uapi.reg_size(reg) != 8:
        _unknown(reg)


def _get_firmware(part: ArmVcpuPart, reg: int, ptr: Pointer) -> None:
    _check_firmware(reg)
    if reg == arm.KVM_REG_ARM_PSCI_VERSION:
        ptr.put_u64(smccc.psci_version(part.vcpu))
    elif reg in _WORKAROUNDS:
        ptr.put_u64(_WORKAROUNDS[reg])
    elif reg in smccc.SERVICES:
        ptr.put_u64(part.vcpu.firmware.services[reg])
    else:
        _unknown(reg)


def _set_firmware(part: ArmVcpuPart, reg: int, ptr: Pointer) -> None:
    _check_firmware(reg)
    value = ptr.u64()
    if reg == arm.KVM_REG_ARM_PSCI_VERSION:
        _set_psci_version(part, value)
    elif reg in _WORKAROUNDS:
        _check_workaround(reg, value)
    elif reg in smccc.SERVICES:
        _set_services(part, reg, value)
    else:
        _unknown(reg)


def _set_psci_version(part: ArmVcpuPart, value: int) -> None:
    with_feature = (smccc.PSCI_0_2, smccc.PSCI_1_0, smccc.PSCI_1_1)
    allowed = with_feature if part.has(arm.KVM_ARM_VCPU_PSCI_0_2) else (smccc.PSCI_0_1,)
    if value not in allowed:
        raise KvmError(errno.EINVAL, f"the PSCI version of this vCPU must be one of {allowed}, not {value:#x}")
    part.vcpu.firmware.psci_version = value


def _check_workaround(reg: int, value: int) -> None:
    """A guest may not be told of more than the host has; what it was told is not kept."""
    level = value & _LEVEL_MASK
    if reg == arm.KVM_REG_ARM_SMCCC_ARCH_WORKAROUND_2:
        fits = not value & ~(_LEVEL_MASK | _WORKAROUND_2_ENABLED) and level <= _WORKAROUND_2_NOT_REQUIRED
        fits &= not value & _WORKAROUND_2_ENABLED or level == _WORKAROUND_2_AVAILABLE
        level = 0 if level < _WORKAROUND_2_AVAILABLE else _WORKAROUND_2_NOT_REQUIRED
    else:
        fits = value == level
    if not fits or level > _WORKAROUNDS[reg]:
        raise KvmError(errno.EINVAL, f"the host's state of the workaround is {_WORKAROUNDS[reg]}, not {value:#x}")


def _set_services(part: ArmVcpuPart, reg: int, value: int) -> None:
    if value & ~smccc.SERVICES[reg]:
        raise KvmError(errno.EINVAL, f"the services must be of {smccc.SERVICES[reg]:#x}, not {value:#x}")
    services = part.vcpu.firmware.services
    if part.shared.has_run and value != services[reg]:
        raise KvmError(errno.EBUSY, "services are chosen before any vCPU has run")
    services[reg] = value


# -- timers, system registers, caches ----------------------------------------------------------------------------------


def _system_ids(part: ArmVcpuPart) -> Iterator[int]:
    rows = (*sysregs.HOST, *(row for row in sysregs.REGISTERS if part.vcpu.sysregs.visible(row)))
    yield from (uapi.KVM_REG_ARM64 | uapi.KVM_REG_SIZE_U64 | arm.KVM_REG_ARM64_SYSREG | row.encoding for row in rows)
    yield from (
        uapi.KVM_REG_ARM64 | uapi.KVM_REG_SIZE_U32 | arm.KVM_REG_ARM_DEMUX | select for select in sysregs.CACHES
    )


def _row(part: ArmVcpuPart, reg: int) -> sysregs.SysReg | None:
    """The system register of an id. A HOST register is found in any space that nothing else has, as in the kernel."""
    if reg & ~_ID_BITS or uapi.reg_size(reg) != 8:
        return None
    row = sysregs.BY_ENCODING.get(reg & 0xFFFF)
    if row is None or row.kind is sysregs.Kind.HOST:
        return row
    known = reg & arm.KVM_REG_ARM_COPROC_MASK == arm.KVM_REG_ARM64_SYSREG and part.vcpu.sysregs.visible(row)
    return row if known else None


def _get_system(part: ArmVcpuPart, reg: int, ptr: Pointer) -> None:
    if reg in ArchTimers.ONE_REG_IDS:
        ptr.put_u64(part.vcpu.timers.get_one_reg(reg))
        return
    row = _row(part, reg)
    if row is None:
        _unknown(reg)
    if row.kind is sysregs.Kind.PMU:
        assert part.vcpu.pmu is not None
        ptr.put_u64(part.vcpu.pmu.get_user(row.name))
    else:
        ptr.put_u64(part.vcpu.sysregs.get(row))


def _set_system(part: ArmVcpuPart, reg: int, ptr: Pointer) -> None:
    value = ptr.u64()
    if reg in ArchTimers.ONE_REG_IDS:
        part.vcpu.timers.set_one_reg(reg, value)
        return
    row = _row(part, reg)
    if row is None:
        _unknown(reg)
    registers = part.vcpu.sysregs
    if row.kind is sysregs.Kind.PMU:
        assert part.vcpu.pmu is not None
        part.vcpu.pmu.set_user(row.name, value)
    elif row.encoding == sysregs.MPIDR:
        part.set_mpidr(value)
    elif row.kind is sysregs.Kind.STATE:
        if row.encoding == sysregs.OSLSR:
            _check_same(row, value, registers.get(row), sysregs.OSLK)
        registers.put(row, value)
    elif row.encoding == sysregs.PFR0:
        _check_same(row, value, registers.get(row), sysregs.CSV_FIELDS)
        if value & sysregs.CSV_FIELDS & ~part.shared.csv:
            raise KvmError(errno.EINVAL, f"{row.name} {value:#x} promises more about speculation than the host can")
        registers.host[sysregs.PFR0] = registers.host[sysregs.PFR0] & ~sysregs.CSV_FIELDS | value & sysregs.CSV_FIELDS
    elif row.encoding not in sysregs.aarch32_registers() or part.vm.options["el1_32bit"]:
        _check_same(row, value, registers.get(row), 0)


def _check_same(row: sysregs.SysReg, value: int, own: int, may_differ: int) -> None:
    if (value ^ own) & ~may_differ:
        raise KvmError(errno.EINVAL, f"{row.name} is {own:#x} and cannot be {value:#x}")


def _cache(reg: int) -> int:
    """The CCSIDR_EL1 that an id names."""
    if reg & ~_ID_BITS or uapi.reg_size(reg) != 4 or reg & 0xFFFF not in sysregs.CACHES:
        _unknown(reg)
    return sysregs.CACHES[reg & 0xFFFF]


def _get_cache(_part: ArmVcpuPart, reg: int, ptr: Pointer) -> None:
    ptr.put_u32(_cache(reg))


def _set_cache(_part: ArmVcpuPart, reg: int, ptr: Pointer) -> None:
    own = _cache(reg)
    value = ptr.u32()
    if value != own:
        raise KvmError(errno.EINVAL, f"the cache's geometry is {own:#x} and cannot be {value:#x}")


# -- all -------------------------------------------------------------------------------------------------------------

_SPACES = {
    arm.KVM_REG_ARM_CORE: (_get_core, _set_core),
    arm.KVM_REG_ARM64_SVE: (_get_sve, _set_sve),
    arm.KVM_REG_ARM_FW: (_get_firmware, _set_firmware),
    arm.KVM_REG_ARM_FW_FEAT_BMAP: (_get_firmware, _set_firmware),
    arm.KVM_REG_ARM_DEMUX: (_get_cache, _set_cache),
}
_SYSTEM = (_get_system, _set_system)


def get_reg(part: ArmVcpuPart, reg: int, ptr: Pointer) -> None:
    """Store the register's value at ``ptr``. KvmError(EINVAL, ENOENT, EPERM, EFAULT)."""
    _check_architecture(reg)
    _SPACES.get(reg & arm.KVM_REG_ARM_COPROC_MASK, _SYSTEM)[0](part, reg, ptr)


def set_reg(part: ArmVcpuPart, reg: int, ptr: Pointer) -> None:
    """Take the register's value from ``ptr``. KvmError as for :func:`get_reg`, and EBUSY."""
    _check_architecture(reg)
    _SPACES.get(reg & arm.KVM_REG_ARM_COPROC_MASK, _SYSTEM)[1](part, reg, ptr)


def reg_list(part: ArmVcpuPart) -> list[int]:
    """The ids of all registers that the vCPU has, in the kernel's order."""
    return [*_core_ids(part), *_sve_ids(part), *_FIRMWARE, *ArchTimers.ONE_REG_IDS, *_system_ids(part)]


def _check_architecture(reg: int) -> None:
    if (reg & ~uapi.KVM_REG_SIZE_MASK) >> 32 != uapi.KVM_REG_ARM64 >> 32:
        raise KvmError(errno.EINVAL, f"{reg:#x} is no register id of arm64")
