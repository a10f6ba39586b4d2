"""Which device types a host of each architecture can offer.

KVM_CREATE_DEVICE looks here. A device class has

- ``supported(options)``: whether a host with those options registers the type (ENODEV otherwise);
- ``create(vm)``: the device, or the error of its creation;
- ``attributes``: its :class:`~fabric.devices.attributes.AttrTable`;
- ``destroy()``: the VM goes away or, with a true ``released_on_close``, its fd was closed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from fabric.devices.arm.vgic_its import Its
from fabric.devices.arm.vgic_v2 import VgicV2
from fabric.devices.arm.vgic_v3 import VgicV3
from fabric.devices.attributes import AttrTable
from fabric.devices.base import VmServices
from fabric.devices.vfio import Vfio
from fabric.uapi.kvm import (
    KVM_DEV_TYPE_ARM_VGIC_ITS,
    KVM_DEV_TYPE_ARM_VGIC_V2,
    KVM_DEV_TYPE_ARM_VGIC_V3,
    KVM_DEV_TYPE_VFIO,
)


class Device(Protocol):
    """What the KVM layer asks of a device, and of its class."""

    attributes: ClassVar[AttrTable]

    @classmethod
    def supported(cls, options: dict[str, Any]) -> bool:
        """Whether a host with those options has the device."""
        ...

    @classmethod
    def create(cls, vm: VmServices) -> Device:
        """Make one in ``vm``. KvmError as the device's documentation says."""
        ...

    def destroy(self) -> None:
        """The VM goes away or, with a true ``released_on_close``, its fd was closed."""
        ...


DEVICE_TYPES: Mapping[str, Mapping[int, type[Device]]] = {
    "aarch64": {
        KVM_DEV_TYPE_VFIO: Vfio,
        KVM_DEV_TYPE_ARM_VGIC_V2: VgicV2,
        KVM_DEV_TYPE_ARM_VGIC_V3: VgicV3,
        KVM_DEV_TYPE_ARM_VGIC_ITS: Its,
    },
    "x86_64": {KVM_DEV_TYPE_VFIO: Vfio},
    "ppc64": {},
    "ppce500": {},
    "s390x": {},
    "mips64": {},
}
"""KVM_DEV_TYPE number to class, by architecture; what is not here is ENODEV."""
