"""The GITS register frame.

Specification: GICv3 architecture (IHI 0069), section 12.18; the ``register`` rows of arm-vgic-its.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from fabric.devices.arm.vgic_its_tables import BASER_INDIRECT, DEVICE_ID_BITS, VALID
from fabric.devices.registers import Access, Register, RegisterBlock, View
from fabric.errors import KvmError

if TYPE_CHECKING:
    from fabric.devices.arm.vgic_its import Its

GITS_FRAME_SIZE = 0x10000
GITS_TRANSLATER = 0x10040
"""The doorbell: in the second 64 KiB frame, from the base of the ITS."""
ITS_SIZE = 2 * GITS_FRAME_SIZE

CTLR_ENABLED = 1 << 0
CTLR_QUIESCENT = 1 << 31
IIDR = 0x4B << 24 | 0x43B
"""Product 0x4b, implementer Arm; the revision, bits 15:12, is the table format."""
TYPER_PHYSICAL_LPIS = 1 << 0
TYPER_ITT_ENTRY_SIZE = (8 - 1) << 4
QUEUE_OFFSET = 0xF_FFE0

BASER_FIXED = 0x071F_0000_0000_0000
"""Type 58:56 and Entry_Size 52:48, which are read-only."""
BASER_KIND = (0x0107_0000_0000_0000, 0x0407_0000_0000_0000)
"""Those fields for BASER0 (devices) and BASER1 (collections): entries of 8 bytes."""
BASER_PAGE_SIZE = 3 << 8
BASER_64K = 2 << 8
BASER_RESET = (0x1907_0000_0000_0600, 0x1C07_0000_0000_0600)
_INNER_SHIFT, _OUTER_SHIFT, _SHARE_SHIFT = 59, 53, 10

RO, RW, RAZ_WI = Access.RO, Access.RW, Access.RAZ_WI


def sanitise(value: int) -> int:
    """Cacheability and shareability as far as KVM has them, in GITS_BASER and GITS_CBASER alike.

    Inner cacheability (61:59): device memory and non-cacheable become read-allocate write-back. Outer (55:53):
    all but "as inner" and non-cacheable become "as inner". Shareability (11:10): outer becomes inner.
    """
    if value >> _INNER_SHIFT & 7 < 2:
        value = value & ~(7 << _INNER_SHIFT) | 3 << _INNER_SHIFT
    if value >> _OUTER_SHIFT & 7 > 1:
        value &= ~(7 << _OUTER_SHIFT)
    if value >> _SHARE_SHIFT & 3 == 2:
        value = value & ~(3 << _SHARE_SHIFT) | 1 << _SHARE_SHIFT
    return value


def _ctlr(its: Its) -> int:
    quiescent = CTLR_QUIESCENT if its.creadr == its.cwriter else 0
    return quiescent | (CTLR_ENABLED if its.enabled else 0)


def _set_ctlr(its: Its, value: int) -> None:
    its.enable(bool(value & CTLR_ENABLED))


def _iidr(its: Its) -> int:
    return IIDR | its.abi << 12


def _user_set_iidr(its: Its, value: int) -> None:
    revision = value >> 12 & 0xF
    if revision:
        raise KvmError(errno.EINVAL, f"the ITS table format must be revision 0, not {revision}")
    its.abi = revision


def _typer(its: Its) -> int:
    id_bits = (its.event_id_bits - 1) << 8
    return TYPER_PHYSICAL_LPIS | TYPER_ITT_ENTRY_SIZE | id_bits | (DEVICE_ID_BITS - 1) << 13


def _cbaser(its: Its) -> int:
    return its.cbaser


def _set_cbaser(its: Its, value: int) -> None:
    if not its.enabled:
        its.cbaser = sanitise(value) & ~0xF000
        its.creadr = its.cwriter = 0


def _cwriter(its: Its) -> int:
    return its.cwriter


def _set_cwriter(its: Its, value: int) -> None:
    value &= QUEUE_OFFSET
    if value < its.queue_size:
        its.cwriter = value
        its.process()


def _creadr(its: Its) -> int:
    return its.creadr


def _user_set_creadr(its: Its, value: int) -> None:
    if its.enabled:
        raise KvmError(errno.EBUSY, "GITS_CREADR cannot be written while the ITS is enabled")
    value &= QUEUE_OFFSET
    if value >= its.queue_size:
        raise KvmError(errno.EINVAL, f"GITS_CREADR {value:#x} is not in a queue of {its.queue_size:#x} bytes")
    its.creadr = value


def _baser0(its: Its) -> int:
    return its.baser[0]


def _baser1(its: Its) -> int:
    return its.baser[1]


def _set_baser0(its: Its, value: int) -> None:
    if not its.enabled:
        _store_baser(its, 0, value)
        if not value & VALID:
            its.forget_devices()


def _set_baser1(its: Its, value: int) -> None:
    if not its.enabled:
        _store_baser(its, 1, value & ~BASER_INDIRECT)
        if not value & VALID:
            its.forget_collections()


def _store_baser(its: Its, which: int, value: int) -> None:
    value = sanitise(value & ~BASER_FIXED | BASER_KIND[which])
    its.baser[which] = value & ~BASER_PAGE_SIZE | BASER_64K


def _wide(offset: int, name: str, access: Access, **how: object) -> Register:
    number = name.removeprefix("GITS_").lower()
    return Register(offset, name, access, length=8, widths=(4, 8), id=f"its.reg.{number}", **how)  # type: ignore[arg-type]


_ID_VALUES = {0xFFD0: 0x40, 0xFFE0: 0x92, 0xFFE4: 0xB4, 0xFFE8: 0x3B}
_ID_VALUES |= {0xFFF0: 0x0D, 0xFFF4: 0xF0, 0xFFF8: 0x05, 0xFFFC: 0xB1}
_PIDR = (4, 5, 6, 7, 0, 1, 2, 3)


def _id_register(offset: int) -> Register:
    number = (offset - 0xFFD0) // 4
    name = f"GITS_PIDR{_PIDR[number]}" if number < 8 else f"GITS_CIDR{number - 8}"
    return Register(offset, name, RO, value=_ID_VALUES.get(offset, 0), id="its.reg.idregs")


GITS = RegisterBlock(
    "GITS",
    GITS_FRAME_SIZE,
    (
        Register(0x0000, "GITS_CTLR", RW, read=_ctlr, write=_set_ctlr, id="its.reg.ctlr"),
        Register(
            0x0004,
            "GITS_IIDR",
            RO,
            read=_iidr,
            user=View(access=RW, write=_user_set_iidr),
            id="its.reg.iidr",
        ),
        _wide(0x0008, "GITS_TYPER", RO, read=_typer),
        _wide(0x0080, "GITS_CBASER", RW, read=_cbaser, write=_set_cbaser),
        _wide(0x0088, "GITS_CWRITER", RW, read=_cwriter, write=_set_cwriter),
        _wide(0x0090, "GITS_CREADR", RO, read=_creadr, user=View(access=RW, write=_user_set_creadr)),
        _wide(0x0100, "GITS_BASER0", RW, read=_baser0, write=_set_baser0),
        _wide(0x0108, "GITS_BASER1", RW, read=_baser1, write=_set_baser1),
        *(_wide(0x0100 + 8 * n, f"GITS_BASER{n}", RAZ_WI) for n in range(2, 8)),
        *(_id_register(offset) for offset in range(0xFFD0, 0x10000, 4)),
    ),
)
"""The control frame. Of the translation frame behind it the doorbell is all there is."""
