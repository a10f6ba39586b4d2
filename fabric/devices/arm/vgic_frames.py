"""Where a frame of a GIC may lie in the guest's address space.

Specification: arm-vgic and arm-vgic-v3, group KVM_DEV_ARM_VGIC_GRP_ADDR.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from fabric.errors import KvmError

if TYPE_CHECKING:
    from fabric.devices.base import VmServices

UNDEFINED = 0xFFFF_FFFF_FFFF_FFFF
"""Address of a frame that is not placed."""
TOP = 1 << 64


def check_range(vm: VmServices, what: str, base: int, size: int, alignment: int) -> None:
    """Whether a frame may be placed at ``base``.

    Raises:
        KvmError: EINVAL when it is not aligned or wraps around, E2BIG when it leaves the guest's address space.
    """
    if base % alignment:
        raise KvmError(errno.EINVAL, f"{what} base {base:#x} is not {alignment >> 10} KiB aligned")
    if base + size >= TOP:
        raise KvmError(errno.EINVAL, f"{what} from {base:#x} wraps around the end of memory")
    limit = 1 << vm.ipa_bits
    if base >= limit or base + size > limit:
        raise KvmError(errno.E2BIG, f"{what} at {base:#x} lies beyond the guest address space of {limit:#x}")


def overlap(base: int, size: int, other: int, other_size: int) -> bool:
    """Whether two ranges of addresses share one."""
    return base + size > other and base < other + other_size
