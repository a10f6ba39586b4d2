"""Attributes that all GIC models have: the number of interrupts, and initialisation.

Specification: arm-vgic and arm-vgic-v3, groups KVM_DEV_ARM_VGIC_GRP_NR_IRQS and KVM_DEV_ARM_VGIC_GRP_CTRL.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from fabric.devices.arm.vgic_irq import NR_PRIVATE_IRQS
from fabric.devices.attributes import Attr, Group, Pointer
from fabric.errors import KvmError
from fabric.uapi import arm64 as uapi

if TYPE_CHECKING:
    from fabric.devices.arm.vgic import Vgic

MIN_NR_IRQS = 64
MAX_NR_IRQS = 992
"""The documents say 1024, and the kernel refuses it."""


def _set_nr_irqs(vgic: Vgic, _attr: int, ptr: Pointer) -> None:
    count = ptr.u32()
    if not MIN_NR_IRQS <= count <= MAX_NR_IRQS or count % 32:
        raise KvmError(
            errno.EINVAL, f"NR_IRQS must be a multiple of 32 from {MIN_NR_IRQS} to {MAX_NR_IRQS}, not {count}"
        )
    if vgic.nr_irqs > NR_PRIVATE_IRQS:
        raise KvmError(errno.EBUSY, f"NR_IRQS is {vgic.nr_irqs} and can no longer be set")
    vgic.nr_irqs = count


def _get_nr_irqs(vgic: Vgic, _attr: int, ptr: Pointer) -> None:
    ptr.put_u32(vgic.nr_irqs)


def _initialize(vgic: Vgic, _attr: int, _ptr: Pointer) -> None:
    vgic.initialize()


def nr_irqs_group(interface: str) -> Group:
    """KVM_DEV_ARM_VGIC_GRP_NR_IRQS, for the inventory ``interface``."""
    return Group(
        uapi.KVM_DEV_ARM_VGIC_GRP_NR_IRQS,
        "KVM_DEV_ARM_VGIC_GRP_NR_IRQS",
        (
            Attr(
                f"{interface}.nr-irqs",
                "(any number)",
                type="u32",
                set=_set_nr_irqs,
                get=_get_nr_irqs,
                errors=(errno.EFAULT, errno.EINVAL, errno.EBUSY),
            ),
        ),
    )


def init_attr(interface: str) -> Attr:
    """KVM_DEV_ARM_VGIC_CTRL_INIT, for the inventory ``interface``."""
    return Attr(
        f"{interface}.ctrl.init",
        "KVM_DEV_ARM_VGIC_CTRL_INIT",
        number=uapi.KVM_DEV_ARM_VGIC_CTRL_INIT,
        set=_initialize,
        errors=(errno.EBUSY,),
    )
