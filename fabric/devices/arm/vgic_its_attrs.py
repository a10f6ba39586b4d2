"""The device attributes of the ITS.

Specification: arm-vgic-its, groups KVM_DEV_ARM_VGIC_GRP_ADDR, _CTRL and _ITS_REGS.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from fabric.devices.arm import vgic_its_tables
from fabric.devices.arm.vgic_its_regs import GITS, ITS_SIZE
from fabric.devices.attributes import Attr, AttrTable, Group
from fabric.errors import KvmError
from fabric.uapi.arm64 import (
    KVM_DEV_ARM_ITS_CTRL_RESET,
    KVM_DEV_ARM_ITS_RESTORE_TABLES,
    KVM_DEV_ARM_ITS_SAVE_TABLES,
    KVM_DEV_ARM_VGIC_CTRL_INIT,
    KVM_DEV_ARM_VGIC_GRP_ADDR,
    KVM_DEV_ARM_VGIC_GRP_CTRL,
    KVM_DEV_ARM_VGIC_GRP_ITS_REGS,
    KVM_VGIC_ITS_ADDR_TYPE,
)

if TYPE_CHECKING:
    from fabric.devices.arm.vgic_its import Its
    from fabric.devices.attributes import Pointer
    from fabric.devices.registers import Row

ALIGNMENT = 1 << 16
UNSET_ADDRESS = (1 << 64) - 1
FIRST_ID_REGISTER = 0xFFD0


# -- ADDR -------------------------------------------------------------------------------------------------------


def _set_address(its: Its, _attr: int, ptr: Pointer) -> None:
    base = ptr.u64()
    if its.base is not None:
        raise KvmError(errno.EEXIST, f"this ITS is at {its.base:#x} already")
    if base % ALIGNMENT:
        raise KvmError(errno.EINVAL, f"ITS base {base:#x} is not 64 KiB aligned")
    if base + ITS_SIZE >= 1 << 64:
        raise KvmError(errno.EINVAL, f"an ITS at {base:#x} does not fit 64 bits")
    if base + ITS_SIZE > 1 << its.vm.ipa_bits:
        raise KvmError(errno.E2BIG, f"an ITS at {base:#x} does not fit {its.vm.ipa_bits} address bits")
    its.place(base)


def _get_address(its: Its, _attr: int, ptr: Pointer) -> None:
    ptr.put_u64(UNSET_ADDRESS if its.base is None else its.base)


def _wrong_address(_its: Its, attr: int, _ptr: Pointer) -> None:
    raise KvmError(errno.ENODEV, f"an ITS has address type {KVM_VGIC_ITS_ADDR_TYPE}, not {attr}")


# -- CTRL -------------------------------------------------------------------------------------------------------


def _init(_its: Its, _attr: int, _ptr: Pointer) -> None:
    """There is nothing to do, whatever the documents say."""


def _reset(its: Its, _attr: int, _ptr: Pointer) -> None:
    with its.vm.lock_vcpus():
        its.reset()


def _save_tables(its: Its, _attr: int, _ptr: Pointer) -> None:
    with its.vm.lock_vcpus():
        vgic_its_tables.save(its)


def _restore_tables(its: Its, _attr: int, _ptr: Pointer) -> None:
    with its.vm.lock_vcpus():
        vgic_its_tables.restore(its)


def _other_control(its: Its, _attr: int, _ptr: Pointer) -> None:
    """Linux 6.1 accepts any other number and does nothing, once it has stopped the vCPUs."""
    with its.vm.lock_vcpus():
        pass


def _no_such(_its: Its, attr: int) -> None:
    raise KvmError(errno.ENXIO, f"there is no attribute {attr:#x}")


# -- ITS_REGS ---------------------------------------------------------------------------------------------------


def _offset(attr: int) -> int:
    """The register offset of an attribute number: the kernel checks 64 bits of it, and finds by 32."""
    # The 32-bit registers are at the two ends: GITS_CTLR and GITS_IIDR, and the identification registers.
    alignment = 4 if attr < 8 or attr >= FIRST_ID_REGISTER else 8
    if attr % alignment:
        raise KvmError(errno.EINVAL, f"offset {attr:#x} is not {alignment}-byte aligned")
    return attr & 0xFFFF_FFFF


def _register(offset: int) -> Row:
    row = GITS.find(offset)
    if row is None:
        raise KvmError(errno.ENXIO, f"there is no ITS register at {offset:#x}")
    return row


def _access(its: Its, attr: int) -> tuple[Row, int]:
    """The register of an attribute number and the byte in it, checked in the kernel's order."""
    offset = _offset(attr)
    with its.vm.lock_vcpus():
        if its.base is None:
            raise KvmError(errno.ENXIO, "the ITS has no address yet")
    row = _register(offset)
    return row, offset - row.offset


def _set_register(its: Its, attr: int, ptr: Pointer) -> None:
    value = ptr.u64()
    row, start = _access(its, attr)
    if start:
        # The upper half of a register, which only numbers of more than 32 bits get at: the value is added to it.
        value = GITS.user_read(its, row.offset, row.length) | value << 8 * start
    GITS.user_write(its, row.offset, value & (1 << 8 * row.length) - 1, row.length)


def _get_register(its: Its, attr: int, ptr: Pointer) -> None:
    row, start = _access(its, attr)
    ptr.put_u64(GITS.user_read(its, row.offset, row.length) >> 8 * start)


def _has_register(_its: Its, attr: int) -> None:
    _register(_offset(attr))


ITS_ATTRIBUTES = AttrTable(
    (
        Group(
            KVM_DEV_ARM_VGIC_GRP_ADDR,
            "KVM_DEV_ARM_VGIC_GRP_ADDR",
            (
                Attr(
                    "its.addr.its",
                    "KVM_VGIC_ITS_ADDR_TYPE",
                    number=KVM_VGIC_ITS_ADDR_TYPE,
                    type="u64",
                    set=_set_address,
                    get=_get_address,
                    errors=(errno.EFAULT, errno.EEXIST, errno.EINVAL, errno.E2BIG),
                ),
                Attr(
                    "its.addr.its",
                    "(any other address type)",
                    set=_wrong_address,
                    get=_wrong_address,
                    has=_no_such,
                    errors=(errno.ENODEV, errno.ENXIO),
                ),
            ),
        ),
        Group(
            KVM_DEV_ARM_VGIC_GRP_CTRL,
            "KVM_DEV_ARM_VGIC_GRP_CTRL",
            (
                Attr(
                    "its.ctrl.init",
                    "KVM_DEV_ARM_VGIC_CTRL_INIT",
                    number=KVM_DEV_ARM_VGIC_CTRL_INIT,
                    set=_init,
                ),
                Attr(
                    "its.ctrl.save-tables",
                    "KVM_DEV_ARM_ITS_SAVE_TABLES",
                    number=KVM_DEV_ARM_ITS_SAVE_TABLES,
                    set=_save_tables,
                    errors=(errno.EBUSY, errno.EINVAL, errno.EFAULT),
                ),
                Attr(
                    "its.ctrl.restore-tables",
                    "KVM_DEV_ARM_ITS_RESTORE_TABLES",
                    number=KVM_DEV_ARM_ITS_RESTORE_TABLES,
                    set=_restore_tables,
                    errors=(errno.EBUSY, errno.EFAULT, errno.EINVAL, errno.EEXIST),
                ),
                Attr(
                    "its.ctrl.reset",
                    "KVM_DEV_ARM_ITS_CTRL_RESET",
                    number=KVM_DEV_ARM_ITS_CTRL_RESET,
                    set=_reset,
                    errors=(errno.EBUSY,),
                ),
                Attr(
                    "its.any",
                    "(any other number)",
                    set=_other_control,
                    has=_no_such,
                    errors=(errno.EBUSY, errno.ENXIO),
                ),
            ),
        ),
        Group(
            KVM_DEV_ARM_VGIC_GRP_ITS_REGS,
            "KVM_DEV_ARM_VGIC_GRP_ITS_REGS",
            (
                Attr(
                    "its.its-regs",
                    "(register offset)",
                    type="u64",
                    set=_set_register,
                    get=_get_register,
                    has=_has_register,
                    errors=(errno.EFAULT, errno.EINVAL, errno.EBUSY, errno.ENXIO),
                ),
            ),
        ),
    )
)
