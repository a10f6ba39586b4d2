"""The in-kernel irqchip of x86 VMs: creation, state of PIC and IOAPIC, interrupt lines and routes.

Rules: api.create-irqchip, api.get-irqchip, api.set-irqchip, api.irq-line(-status), api.set-gsi-routing and
api.cap.split-irqchip of the interface inventory.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from fabric.channel import LineLevel
from fabric.devices.x86.irqchip import (
    CHIP_IOAPIC,
    CHIP_MASTER,
    CHIP_SLAVE,
    SOURCE_RESAMPLE,
    SOURCE_USERSPACE,
    X86Irqchip,
)
from fabric.errors import KvmError
from fabric.kvm import x86_hyperv, x86_lapic
from fabric.kvm.dispatch import POINTER, VALUE, Ioctl, Members, Pointer
from fabric.kvm.routing import MsiRoute, OtherRoute, PinRoute, Route, RoutingTable
from fabric.kvm.x86_eoi import IoapicEnds
from fabric.uapi import ioctl as requests
from fabric.uapi import kvm as uapi
from fabric.uapi.x86 import KvmIoapicState, KvmIrqchip, KvmPicState

if TYPE_CHECKING:
    from fabric.kvm.vm import Vm, VmFile

PIC_PINS = 16
IOAPIC_PINS = 24
PINS = {CHIP_MASTER: 8, CHIP_SLAVE: 8, CHIP_IOAPIC: IOAPIC_PINS}
"""Inputs of each chip."""
MAX_RESERVED_PINS = 4096
"""GSIs that a split irqchip may leave to the VMM's IOAPIC."""


def ready(vm: Vm) -> bool:
    """Whether the VM has an in-kernel irqchip, whole or split."""
    return vm.irqchip is not None


def default_routes() -> RoutingTable:
    """GSI 0 to 15 to PIC and IOAPIC, 16 to 23 to the IOAPIC alone."""
    table = RoutingTable()
    for gsi in range(IOAPIC_PINS):
        table.add(gsi, PinRoute(CHIP_IOAPIC, gsi))
        if gsi < PIC_PINS:
            table.add(gsi, PinRoute(gsi // 8, gsi % 8))
    return table


def _check_creation(vm: Vm) -> None:
    if vm.irqchip is not None:
        raise KvmError(errno.EEXIST, "the VM has an irqchip already")


def create_irqchip(file: VmFile, _arg: int) -> None:
    """KVM_CREATE_IRQCHIP: PIC, IOAPIC and local APICs, before any vCPU."""
    vm = file.vm
    _check_creation(vm)
    if vm.vcpus:
        raise KvmError(errno.EINVAL, "an irqchip comes before the vCPUs")
    X86Irqchip(vm)
    x86_lapic.apply_x2apic_api(vm)
    vm.set_routing(default_routes())


def enable_split_irqchip(file: VmFile, cap: uapi.KvmEnableCap) -> None:
    """KVM_CAP_SPLIT_IRQCHIP: local APICs only; ``args[0]`` GSIs are the VMM's IOAPIC's."""
    vm = file.vm
    pins = cap.args[0]
    if pins > MAX_RESERVED_PINS:
        raise KvmError(errno.EINVAL, f"a split irqchip reserves at most {MAX_RESERVED_PINS} pins, not {pins}")
    _check_creation(vm)
    if vm.vcpus:
        raise KvmError(errno.EEXIST, "a split irqchip comes before the vCPUs")
    X86Irqchip(vm, split=True, reserved_pins=pins)
    vm.part.ioapic_ends = IoapicEnds(vm)
    x86_lapic.apply_x2apic_api(vm)
    vm.set_routing(RoutingTable())


# -- lines


def set_gsi(vm: Vm, gsi: int, level: bool, *, reported: bool = False) -> int:
    """KVM_IRQ_LINE(_STATUS): drive all that ``gsi`` is routed to; the sum of what they report, -1 for nothing."""
    total = -1
    for route in vm.routing.routes(gsi):
        status = drive(vm, route, level, SOURCE_USERSPACE, reported=reported)
        if status >= 0:
            total = max(total, 0) + status
    return total


def drive(vm: Vm, route: Route, level: bool, source: int, *, reported: bool = False) -> int:
    """Drive the far end of one route: -1 ignored, 0 merged, n taken by n CPUs; 1 for a line that is lowered."""
    if isinstance(route, PinRoute):
        irqchip: X86Irqchip = vm.irqchip
        if vm.lines.plain:
            return irqchip.set_pin(route.irqchip, route.pin, level, source, reported=reported)
        # What becomes of it is not known: somebody does something to the line.
        vm.lines.send_nowait(LineLevel(_line(route), level))
        return 1
    if isinstance(route, MsiRoute):
        return x86_lapic.send_msi(vm, route.address, route.data) if level else -1
    return x86_hyperv.send(vm, route) if level else -1


def _line(route: PinRoute) -> int:
    """The number of an input in the VM's line channel: PIC 0 to 15, IOAPIC from 16 on."""
    return route.irqchip * 8 + route.pin


def irq_line(file: VmFile, irq: int, level: int) -> None:
    """KVM_IRQ_LINE."""
    if file.vm.irqchip is None:
        raise KvmError(errno.ENXIO, "a line needs an in-kernel irqchip")
    set_gsi(file.vm, irq, bool(level))


def irq_line_status(file: VmFile, ptr: Pointer) -> None:
    """KVM_IRQ_LINE_STATUS: what became of it is in ``status``, in the place of the GSI."""
    line = uapi.KvmIrqLevel.unpack(ptr.read(uapi.KvmIrqLevel.SIZE))
    if file.vm.irqchip is None:
        raise KvmError(errno.ENXIO, "a line needs an in-kernel irqchip")
    status = set_gsi(file.vm, line.irq, bool(line.level), reported=True)
    ptr.write(uapi.KvmIrqLevel(status & 0xFFFF_FFFF, line.level).pack())


# -- routes


def check_route(vm: Vm, route: Route) -> None:
    """KvmError(EINVAL) for a route that the VM's irqchip does not have."""
    if isinstance(route, PinRoute):
        if vm.irqchip.split:
            raise KvmError(errno.EINVAL, "with a split irqchip there are no inputs to route to")
        if route.pin >= PINS.get(route.irqchip, 0):
            raise KvmError(errno.EINVAL, f"irqchip {route.irqchip} has no pin {route.pin}")
    elif isinstance(route, MsiRoute):
        x86_lapic.check_msi_address(vm, route.address)
    elif route.type != uapi.KVM_IRQ_ROUTING_HV_SINT or vm.part.hyperv is None:
        raise KvmError(errno.EINVAL, f"x86 has no routes of type {route.type}")


def injector(vm: Vm, routes: tuple[Route, ...], resample: bool) -> Callable[[], object]:
    """A function for what a signal of an irqfd with these routes does.

    An irqfd is a pulse; with a resampler the lines are raised, and stay up until the interrupt ends.
    """
    if not routes:
        return partial(vm.lost, "no route")
    if len(routes) == 1 and isinstance(routes[0], MsiRoute):
        return x86_lapic.msi_injector(vm, routes[0].address, routes[0].data)
    if len(routes) == 1 and isinstance(routes[0], OtherRoute):
        return partial(x86_hyperv.send, vm, routes[0])
    source = SOURCE_RESAMPLE if resample else SOURCE_USERSPACE

    def inject() -> None:
        for route in routes:
            drive(vm, route, True, source)
        if not resample:
            for route in routes:
                drive(vm, route, False, source)

    return inject


def deliver_line(vm: Vm, event: LineLevel) -> None:
    """The end of the VM's line channel."""
    chip = min(event.line // 8, CHIP_IOAPIC)
    vm.irqchip.set_pin(chip, event.line - 8 * chip, event.level, SOURCE_USERSPACE)


def on_end(vm: Vm, route: Route, ended: Callable[[], None]) -> Callable[[], None]:
    """Have ``ended`` called at the end of an interrupt of that input; returns what undoes it."""
    if not isinstance(route, PinRoute):
        return x86_hyperv.on_end(vm, route, ended)
    told = vm.irqchip.notifiers(route.irqchip, route.pin)
    told.append(ended)
    return partial(told.remove, ended)


# -- state


def _chip(file: VmFile, ptr: Pointer) -> tuple[X86Irqchip, KvmIrqchip]:
    given = KvmIrqchip.unpack(ptr.read(KvmIrqchip.SIZE))
    irqchip = file.vm.irqchip
    if irqchip is None or irqchip.split:
        raise KvmError(errno.ENXIO, "the VM has no PIC and IOAPIC in the kernel")
    if given.chip_id not in PINS:
        raise KvmError(errno.EINVAL, f"chips are 0 and 1 (PIC) and 2 (IOAPIC), not {given.chip_id}")
    return irqchip, given


def get_irqchip(file: VmFile, ptr: Pointer) -> None:
    """KVM_GET_IRQCHIP: the chip that ``chip_id`` says. What the chip does not fill stays as it was given."""
    irqchip, given = _chip(file, ptr)
    assert irqchip.pic is not None
    assert irqchip.ioapic is not None
    state: KvmIoapicState | KvmPicState
    if given.chip_id == CHIP_IOAPIC:
        state = KvmIoapicState(**irqchip.ioapic.state())
    else:
        state = KvmPicState(**irqchip.pic.state(given.chip_id))
    packed = state.pack()
    ptr.write(given.with_(chip=packed + given.chip[len(packed) :]).pack())


def set_irqchip(file: VmFile, ptr: Pointer) -> None:
    """KVM_SET_IRQCHIP."""
    irqchip, given = _chip(file, ptr)
    assert irqchip.pic is not None
    assert irqchip.ioapic is not None
    if given.chip_id == CHIP_IOAPIC:
        irqchip.ioapic.set_state(KvmIoapicState.unpack(given.chip).members())
    else:
        irqchip.pic.set_state(given.chip_id, KvmPicState.unpack(given.chip).members())


VM_TABLE = (
    Ioctl(requests.KVM_CREATE_IRQCHIP, VALUE, create_irqchip, "api.create-irqchip"),
    Ioctl(requests.KVM_GET_IRQCHIP, POINTER, get_irqchip, "api.get-irqchip"),
    Ioctl(requests.KVM_SET_IRQCHIP, POINTER, set_irqchip, "api.set-irqchip"),
    Ioctl(requests.KVM_IRQ_LINE, Members(uapi.KvmIrqLevel), irq_line, "api.irq-line"),
    Ioctl(requests.KVM_IRQ_LINE_STATUS, POINTER, irq_line_status, "api.irq-line-status"),
)
ENABLE_CAP: dict[int, Callable[[VmFile, uapi.KvmEnableCap], None]] = {
    uapi.KVM_CAP_SPLIT_IRQCHIP: enable_split_irqchip,
}
"""Capabilities of the VM fd that KVM_ENABLE_CAP turns on, and what does it."""
