"""The PIT of x86 VMs: KVM_CREATE_PIT2, its state, reinjection.

Rules: api.create-pit2, api.get-pit2, api.set-pit2 and api.reinject-control of the interface inventory.
"""

from __future__ import annotations

import errno

from fabric.devices.x86.irqchip import SOURCE_PIT
from fabric.devices.x86.pit import Pit
from fabric.errors import KvmError
from fabric.kvm import x86_irqchip
from fabric.kvm.dispatch import POINTER, VALUE, Ioctl, Pointer
from fabric.kvm.vm import Vm, VmFile
from fabric.uapi import ioctl as requests
from fabric.uapi.x86 import (
    KVM_PIT_SPEAKER_DUMMY,
    KvmPitChannelState,
    KvmPitConfig,
    KvmPitState,
    KvmPitState2,
    KvmReinjectControl,
)

PIT_GSI = 0


def _create(vm: Vm, *, speaker: bool) -> None:
    irqchip = vm.irqchip
    if irqchip is not None and irqchip.pit is not None:
        raise KvmError(errno.EEXIST, "the VM has a PIT already")
    if irqchip is None or irqchip.pic is None:
        raise KvmError(errno.ENOENT, "a PIT needs a PIC in the kernel")

    def drive(level: bool) -> None:
        for route in vm.routing.routes(PIT_GSI):
            x86_irqchip.drive(vm, route, level, SOURCE_PIT)

    pit = irqchip.pit = Pit(vm, drive, speaker=speaker)
    irqchip.gsi_ended[PIT_GSI] = [pit.ended]
    irqchip.gsi_unmasked[PIT_GSI] = [pit.reset_reinjection]
    vm.on_destroy(pit.close)


def create_pit(file: VmFile, _arg: int) -> None:
    """KVM_CREATE_PIT: with the speaker's port."""
    _create(file.vm, speaker=True)


def create_pit2(file: VmFile, config: KvmPitConfig) -> None:
    """KVM_CREATE_PIT2; flags that are not known are not looked at."""
    _create(file.vm, speaker=bool(config.flags & KVM_PIT_SPEAKER_DUMMY))


def _pit(file: VmFile) -> Pit:
    pit: Pit | None = None if file.vm.irqchip is None else file.vm.irqchip.pit
    if pit is None:
        raise KvmError(errno.ENXIO, "the VM has no PIT in the kernel")
    return pit


def _channels(pit: Pit) -> tuple[KvmPitChannelState, ...]:
    return tuple(KvmPitChannelState(**channel) for channel in pit.state()["channels"])


def get_pit(file: VmFile, ptr: Pointer) -> None:
    """KVM_GET_PIT."""
    ptr.read(KvmPitState.SIZE)
    ptr.write(KvmPitState(_channels(_pit(file))).pack())


def get_pit2(file: VmFile, ptr: Pointer) -> None:
    """KVM_GET_PIT2."""
    pit = _pit(file)
    ptr.write(KvmPitState2(_channels(pit), pit.flags).pack())


def set_pit(file: VmFile, ptr: Pointer) -> None:
    """KVM_SET_PIT."""
    state = KvmPitState.unpack(ptr.read(KvmPitState.SIZE))
    pit = _pit(file)
    pit.set_state(tuple(channel.members() for channel in state.channels), pit.flags)


def set_pit2(file: VmFile, ptr: Pointer) -> None:
    """KVM_SET_PIT2."""
    state = KvmPitState2.unpack(ptr.read(KvmPitState2.SIZE))
    _pit(file).set_state(tuple(channel.members() for channel in state.channels), state.flags)


def reinject_control(file: VmFile, control: KvmReinjectControl) -> None:
    """KVM_REINJECT_CONTROL: whether ticks wait for the guest."""
    pit = _pit(file)
    wanted = bool(control.pit_reinject)
    if wanted != pit.reinject:
        pit.reinject = wanted
        pit.reset_reinjection()


VM_TABLE: tuple[Ioctl, ...] = (
    Ioctl(requests.KVM_CREATE_PIT, VALUE, create_pit),
    Ioctl(requests.KVM_CREATE_PIT2, KvmPitConfig, create_pit2, "api.create-pit2"),
    Ioctl(requests.KVM_GET_PIT, POINTER, get_pit),
    Ioctl(requests.KVM_GET_PIT2, POINTER, get_pit2, "api.get-pit2"),
    Ioctl(requests.KVM_SET_PIT, POINTER, set_pit),
    Ioctl(requests.KVM_SET_PIT2, POINTER, set_pit2, "api.set-pit2"),
    Ioctl(requests.KVM_REINJECT_CONTROL, KvmReinjectControl, reinject_control, "api.reinject-control"),
)
