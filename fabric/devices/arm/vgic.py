"""What the GIC models share: the interrupts of a VM, and how they become pending, move and end.

A model (VGICv3, VGICv2) is a subclass of :class:`Vgic`: it adds the frames, the device attributes and the CPU
interface. This module knows interrupts, vCPUs and the ledger only.

Kept from KVM (Linux 6.1): what is on a vCPU's list of interrupts and when (:mod:`.vgic_irq`). So an interrupt raised
while the distributor does not forward is not queued at a vCPU, and enabling forwarding does not queue it either;
the next event on that interrupt does.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from heapq import heappush
from typing import TYPE_CHECKING, Any, ClassVar, Self

from fabric.devices.arm.vgic_irq import (
    ADRIFT,
    MIN_LPI,
    NR_PRIVATE_IRQS,
    NR_SGIS,
    PRIORITY_MASK,
    VgicCpu,
    VgicIrq,
    WiredIrq,
)
from fabric.errors import KvmError

if TYPE_CHECKING:
    from collections.abc import Callable

    from fabric.devices.arm.vgic_irq import Entry
    from fabric.devices.base import IrqEvents, VcpuServices, VmServices
    from fabric.trace.ledger import Ledger

DEFAULT_NR_IRQS = 256
INITIAL_PROPBASER = 0x580
"""GICR_PROPBASER from the creation of an ITS on: inner shareable, read-allocate write-back."""


class Vgic:
    """The interrupt state of a VM with an in-kernel GIC; ``vm.irqchip``.

    Attributes that others read:

    - ``initialized``, ``nr_irqs`` (SGIs and PPIs included);
    - ``cpus`` in vCPU order, ``spis`` from INTID 32 on;
    - ``lpis``: INTID to interrupt, for every LPI an ITS maps (and those still queued after being unmapped);
    - ``propbaser``: GICR_PROPBASER, one value for the VM;
    - ``its_list``: the ITS devices of the VM, in creation order;
    - ``eoi_notifiers``: INTID to functions called when that level-triggered SPI ends (resample irqfds).
    """

    model: ClassVar[str]
    """What it is called in messages."""
    max_vcpus: ClassVar[int]
    cpu_class: ClassVar[type[VgicCpu]]
    initial_group: ClassVar[int]
    """Group of SGIs, PPIs and SPIs out of reset."""

    def __init__(self, vm: VmServices) -> None:
        self.vm = vm
        self.ledger: Ledger = vm.ledger
        self.pend = self.pend_edge
        """The method, bound once: what many senders keep a reference to."""
        self._events: IrqEvents | None = vm.events
        self.initialized = False
        self.nr_irqs = NR_PRIVATE_IRQS
        self.spis: list[WiredIrq] = []
        self.lpis: dict[int, VgicIrq] = {}
        self.cpus: list[Any] = []
        self.its_list: list[Any] = vm.its_list
        self.propbaser = INITIAL_PROPBASER if self.its_list else 0
        self.eoi_notifiers: dict[int, list[Callable[[], None]]] = {}
        self.forwarding = False
        self.unmapped: dict[int, VgicIrq] = {}
        """LPIs that no ITS maps any more, until they are seen to have left their vCPU."""
        self._by_mpidr: dict[int, Any] = {}
        vm.irqchip = self
        for vcpu in vm.vcpus:
            self.vcpu_created(vcpu)
        vm.ledger.add_pending_probe(self.count_open)

    @property
    def events(self) -> IrqEvents | None:
        """Who is told about each interrupt; may be set at any time."""
        return self._events

    @events.setter
    def events(self, events: IrqEvents | None) -> None:
        self._events = events
        for cpu in self.cpus:
            cpu.events = events

    @property
    def has_its(self) -> bool:
        """The VM has an ITS, hence LPIs."""
        return bool(self.its_list)

    @classmethod
    def create(cls, vm: VmServices) -> Self:
        """KVM_CREATE_DEVICE.

        Raises:
            KvmError: EBUSY while a vCPU runs or when one has run, EEXIST when the VM has a GIC, E2BIG with more
                vCPUs than the model takes.
        """
        with vm.lock_vcpus():
            if vm.irqchip is not None:
                raise KvmError(errno.EEXIST, "the VM has an in-kernel GIC already")
            if any(vcpu.has_run for vcpu in vm.vcpus):
                raise KvmError(errno.EBUSY, "a GIC must be created before any vCPU has run")
            if len(vm.vcpus) > cls.max_vcpus:
                raise KvmError(errno.E2BIG, f"a {cls.model} takes {cls.max_vcpus} vCPUs, not {len(vm.vcpus)}")
            return cls(vm)

    def destroy(self) -> None:
        """The device fd was closed; the GIC lives as long as the VM."""

    # -- vCPUs and set-up ----------------------------------------------------------------------------------

    def check_create_vcpu(self, vcpu_id: int) -> None:
        """Whether KVM_CREATE_VCPU may go ahead.

        Raises:
            KvmError: EBUSY after initialisation, EINVAL for an id beyond the model's limit.
        """
        if self.initialized:
            raise KvmError(errno.EBUSY, f"vCPU {vcpu_id} comes after the GIC was initialised")
        if vcpu_id >= self.max_vcpus:
            raise KvmError(errno.EINVAL, f"with this GIC a vCPU id is below {self.max_vcpus}, not {vcpu_id}")

    def vcpu_created(self, vcpu: VcpuServices) -> None:
        """Give a new vCPU its interface."""
        cpu = self.cpu_class(self, vcpu)
        for irq in cpu.private:
            irq.group = self.initial_group
        vcpu.cpu_interface = cpu
        self.cpus.append(cpu)

    def vcpu_initialized(self, vcpu: VcpuServices) -> None:
        """KVM_ARM_VCPU_INIT was done, so the vCPU has its affinity and a reset CPU interface."""
        self._by_mpidr.clear()

    def first_run(self) -> None:
        """The checks that a first KVM_RUN makes; by each model."""
        raise NotImplementedError

    def initialize(self) -> None:
        """Fix the number of interrupts and bring up the distributor; again is a no-op.

        Raises:
            KvmError: EBUSY while a vCPU is being created.
        """
        if self.initialized:
            return
        if len(self.cpus) != len(self.vm.vcpus):
            raise KvmError(errno.EBUSY, "a vCPU is being created, and has no CPU interface yet")
        if self.nr_irqs == NR_PRIVATE_IRQS:
            self.nr_irqs = DEFAULT_NR_IRQS
        first = self.cpus[0] if self.cpus else None
        self.spis = [WiredIrq(n, first, self.initial_group) for n in range(NR_PRIVATE_IRQS, self.nr_irqs)]
        self.vm.set_default_routing(self.nr_irqs - NR_PRIVATE_IRQS)
        self.initialized = True

    def cpu_by_mpidr(self, mpidr: int) -> Any:
        """The first vCPU with that affinity, as its :class:`VgicCpu`, or None."""
        cpu = self._by_mpidr.get(mpidr)
        if cpu is None or cpu.vcpu.mpidr != mpidr:
            self._by_mpidr = {cpu.vcpu.mpidr: cpu for cpu in reversed(self.cpus)}
            cpu = self._by_mpidr.get(mpidr)
        return cpu

    def set_forwarding(self, on: bool) -> None:
        """GICD_CTLR: whether interrupts are passed on. A vCPU that stands still keeps what is on its list."""
        if on == self.forwarding:
            return
        self.forwarding = on
        for cpu in self.cpus:
            cpu.forwarding = on
            if not on and cpu.vcpu.running:
                cpu.purge()
            cpu.update()

    # -- becoming pending ----------------------------------------------------------------------------------

    def pend_edge(self, irq: VgicIrq) -> None:
        """An edge: latch ``irq``, which is edge-triggered, and queue it. The hot path of MSIs and SGIs."""
        self.ledger.raised += 1
        if irq.pending:
            self._coalesce(irq)
            return
        cpu = irq.target
        if irq.entry is None and irq.enabled and cpu is not None and cpu.forwarding:
            irq.pending = True
            priority = irq.priority
            cpu.seq = seq = cpu.seq + 1
            irq.entry = entry = (priority, seq, irq, cpu)
            if irq.group:
                heappush(cpu.queue, entry)
                if priority < cpu.threshold and not cpu.line:
                    if cpu.mixed:
                        cpu.update()
                    else:
                        cpu.line = True
                        kick = cpu.kick
                        kick()
            else:
                heappush(cpu.queue0, entry)
                cpu.update()
            if self._events is not None:
                self._events.pending(cpu.index, irq.intid)
        else:
            self._pend(irq)

    def line_level(self, irq: WiredIrq, level: bool) -> None:
        """Drive the input line of an SPI or PPI; an edge-triggered one takes each high as an edge."""
        if irq.edge:
            if level:
                self.pend_edge(irq)
        elif not level:
            self._lower(irq)
        else:
            was_high, was_open = irq.line, irq.open
            irq.line = True
            if irq.open and not was_open:
                self.ledger.raised += 1
                self._note_pending(irq)
            elif was_high or was_open:
                self.ledger.raised += 1
                self._note_coalesced(irq)
            if not was_high:
                self.settle(irq)

    def set_pending(self, irq: VgicIrq) -> None:
        """A write to ISPENDR: latch ``irq``, whatever its trigger."""
        self.ledger.raised += 1
        if irq.pending:
            self._coalesce(irq)
        else:
            self._pend(irq)

    def _lower(self, irq: WiredIrq) -> None:
        if not irq.line:
            return
        was_open = irq.open
        irq.line = False
        if was_open and not irq.open:
            self.drop(irq, "line lowered")
        self.settle(irq)

    def _pend(self, irq: VgicIrq) -> None:
        """Latch an interrupt that is not latched, once it has been counted as raised."""
        was_open = irq.open
        irq.pending = True
        if was_open or not irq.open:
            # Level-triggered, with its line high or active: the latch adds nothing a vCPU could tell apart.
            self._coalesce(irq)
        else:
            self._note_pending(irq)
            self.settle(irq)

    def _coalesce(self, irq: VgicIrq) -> None:
        self._note_coalesced(irq)
        if irq.entry is None or irq.entry is ADRIFT:
            self.settle(irq)

    def _note_coalesced(self, irq: VgicIrq) -> None:
        self.ledger.coalesced += 1
        if self._events is not None:
            self._events.coalesced(-1 if irq.target is None else irq.target.index, irq.intid)

    def clear_pending(self, irq: VgicIrq, reason: str) -> None:
        """Clear the pending latch; what was waiting is dropped for ``reason``."""
        was_open = irq.open
        irq.pending = False
        if was_open and not irq.open:
            self.drop(irq, reason)
        self.settle(irq, event=False)

    def set_latch(self, irq: VgicIrq, on: bool, reason: str) -> None:
        """Store the pending latch as it was saved; one that is cleared is dropped for ``reason``."""
        if not on:
            self.clear_pending(irq, reason)
            return
        was_open = irq.open
        irq.pending = True
        if irq.open and not was_open:
            self.ledger.raised += 1
            self._note_pending(irq)
        self.settle(irq)

    def store_line(self, irq: WiredIrq, level: bool) -> None:
        """Store the level of a line as it was saved, whatever the trigger."""
        was_open = irq.open
        irq.line = level
        if irq.open and not was_open:
            self.ledger.raised += 1
            self._note_pending(irq)
        elif was_open and not irq.open:
            self.drop(irq, "line lowered")
        self.settle(irq, event=level)

    def drop(self, irq: VgicIrq, reason: str) -> None:
        """Account for an interrupt that is thrown away."""
        self.ledger.drop(reason)
        if self._events is not None:
            self._events.dropped(-1 if irq.target is None else irq.target.index, irq.intid, reason)

    def _note_pending(self, irq: VgicIrq) -> None:
        if self._events is not None:
            self._events.pending(-1 if irq.target is None else irq.target.index, irq.intid)

    # -- changes of configuration ---------------------------------------------------------------------------

    def settle(self, irq: VgicIrq, *, event: bool = True) -> None:
        """Have ``irq`` where its state says; called after any change of it.

        Not every change is an ``event``, which has KVM put onto its target's list what is on none.
        """
        entry = irq.entry
        if entry is None or entry is ADRIFT:
            target = irq.target
            if event and target is not None:
                if irq.active:
                    target.hold(irq)
                elif irq.enabled and irq.asserted and target.forwarding:
                    target.push(irq)
        elif not irq.active:
            where = entry[3]
            if not self._belongs(irq, where):
                self._dislodge(entry)
            elif entry[0] != irq.priority or entry[1] in where.parked:
                where.push(irq, entry[1])
                where.tidy()

    @staticmethod
    def _belongs(irq: VgicIrq, cpu: VgicCpu) -> bool:
        """Whether ``cpu``, on whose list ``irq`` is, has it queued. (Forwarding is looked at when a vCPU runs.)"""
        return irq.target is cpu and irq.enabled and irq.asserted and (cpu.forwarding or not cpu.vcpu.running)

    def _dislodge(self, entry: Entry) -> None:
        """There is nothing to do for an interrupt where it is: onto the list of its target, when its vCPU runs."""
        where = entry[3]
        if where.vcpu.running:
            where.leave(entry)
            self.settle(entry[2])
        else:
            where.park(entry)

    def set_enabled(self, irq: VgicIrq, enabled: bool) -> None:
        """Enable or disable; a disabled interrupt keeps its pending state."""
        irq.enabled = enabled
        self.settle(irq, event=enabled)

    def set_priority(self, irq: VgicIrq, priority: int) -> None:
        """Change the priority; a queued interrupt keeps its place among equals."""
        irq.priority = priority & PRIORITY_MASK
        self.settle(irq, event=False)

    def set_group(self, irq: VgicIrq, group: int) -> None:
        """Move an interrupt to group 0 or 1."""
        entry = irq.entry
        if irq.group != group:
            irq.group = group
            if entry is not None and not irq.active and entry[1] not in entry[3].parked:
                entry[3].push(irq, entry[1])
                entry[3].tidy()
        self.settle(irq)

    def set_edge(self, irq: WiredIrq, edge: bool) -> None:
        """Change the trigger; a line that is high counts from now on, or no longer."""
        if irq.edge == edge:
            return
        was_open = irq.open
        irq.edge = edge
        if irq.open and not was_open:
            self.ledger.raised += 1
            self._note_pending(irq)
        elif was_open and not irq.open:
            self.drop(irq, "made edge-triggered")
        self.settle(irq, event=False)

    def retarget(self, irq: VgicIrq, target: VgicCpu | None) -> None:
        """Send ``irq`` to another vCPU.

        Pending state goes along when the vCPU that has it runs; an active one moves when it has ended.
        """
        irq.target = target
        self.settle(irq, event=False)

    # -- active state ----------------------------------------------------------------------------------------

    def activate(self, irq: VgicIrq) -> None:
        """Set the active state (a write to ISACTIVER)."""
        if irq.active:
            self.settle(irq)
            return
        was_open = irq.open
        entry = irq.entry
        irq.active = True
        if entry is not None:
            entry[3].hold(irq, entry[1])
        elif irq.target is not None:
            irq.target.hold(irq)
        else:
            irq.entry = ADRIFT
        if was_open and not irq.open:
            self.drop(irq, "made active")

    def deactivate(self, irq: VgicIrq, *, ended: bool = True) -> None:
        """Clear the active state: the guest ended it, or (``ended`` false) ICACTIVER was written."""
        if not irq.active:
            return
        if ended:
            entry = irq.entry
            if self._events is not None and entry is not None:
                self._events.completed(entry[3].index, irq.intid)
            if isinstance(irq, WiredIrq) and not irq.edge:
                for notify in tuple(self.eoi_notifiers.get(irq.intid, ())):
                    notify()
                irq.pending = False
        was_open = irq.open
        entry = irq.entry
        irq.active = False
        if irq.open and not was_open:
            # The line is still high: from now on this is another interrupt.
            self.ledger.raised += 1
            self._note_pending(irq)
        if entry is None or entry is ADRIFT:
            irq.entry = None
            return
        where = entry[3]
        where.nr_active -= 1
        if self._belongs(irq, where):
            where.push(irq, entry[1])
        else:
            self._dislodge(entry)

    # -- LPIs ------------------------------------------------------------------------------------------------

    def lpi(self, intid: int) -> VgicIrq | None:
        """The LPI ``intid`` if an ITS maps it."""
        irq = self.lpis.get(intid)
        return None if irq is None or intid in self.unmapped else irq

    def known_lpi(self, intid: int) -> VgicIrq | None:
        """The LPI ``intid`` if an ITS maps it, or if none does any more and it is still on a vCPU's list."""
        if intid in self.unmapped:
            self._reap()
        return self.lpis.get(intid)

    def add_lpi(self, intid: int, target: VgicCpu | None) -> VgicIrq:
        """The LPI ``intid``, made if it does not exist; one that does keeps its state and its target."""
        if intid in self.unmapped:
            self._reap()
            if intid in self.unmapped:
                return self.unmapped.pop(intid)
        existing = self.lpis.get(intid)
        if existing is not None:
            return existing
        irq = self.lpis[intid] = VgicIrq(intid, target)
        return irq

    def remove_lpi(self, irq: VgicIrq) -> None:
        """No ITS maps ``irq`` any more. One queued or active at a vCPU stays there until it is done."""
        self._reap()
        if irq.entry is not None and irq.entry is not ADRIFT:
            self.unmapped[irq.intid] = irq
            return
        if irq.pending:
            self.clear_pending(irq, "unmapped")
        self.lpis.pop(irq.intid, None)

    def mapped_lpis(self) -> Iterator[VgicIrq]:
        """The LPIs there are, in the order they were added."""
        self._reap()
        yield from self.lpis.values()

    def _reap(self) -> None:
        for intid in [intid for intid, irq in self.unmapped.items() if irq.entry is None or irq.entry is ADRIFT]:
            irq = self.unmapped.pop(intid)
            if irq.pending:
                self.clear_pending(irq, "unmapped")
            if self.lpis.get(intid) is irq:
                del self.lpis[intid]

    def invalidate_translations(self) -> None:
        """Have every ITS forget what it has cached of (device, event) to LPI."""
        for its in self.its_list:
            its.invalidate_cache()

    def set_lpi_config(self, irq: VgicIrq, enabled: bool, priority: int) -> None:
        """What the configuration table says of an LPI."""
        irq.enabled = enabled
        irq.priority = priority & PRIORITY_MASK
        self.settle(irq)

    def flush_lpis(self, cpu: VgicCpu) -> None:
        """EnableLPIs was cleared: the LPIs on the list of that vCPU are off it and no longer pending.

        Those that are active stay so, which nobody sees before they are raised again.
        """
        for irq in list(self.lpis.values()):
            entry = irq.entry
            if entry is not None and entry[3] is cpu:
                cpu.leave(entry)
                if irq.active:
                    irq.entry = ADRIFT
                if irq.pending:
                    irq.pending = False
                    self.drop(irq, "LPIs disabled")

    # -- injection from outside ------------------------------------------------------------------------------

    def inject_spi(self, intid: int, level: bool) -> None:
        """KVM_IRQ_LINE and irqfds: drive an SPI. An INTID of an LPI that exists is taken as well.

        Raises:
            KvmError: EINVAL when there is no such interrupt; by the model, EBUSY when it is not initialised.
        """
        if intid < NR_PRIVATE_IRQS:
            raise KvmError(errno.EINVAL, f"an SPI has an INTID of at least {NR_PRIVATE_IRQS}, not {intid}")
        self._check_injection()
        index = intid - NR_PRIVATE_IRQS
        if index < len(self.spis):
            irq = self.spis[index]
            if irq.owner is None:
                self.line_level(irq, level)
            return
        lpi = self.known_lpi(intid) if intid >= MIN_LPI else None
        if lpi is None:
            raise KvmError(errno.EINVAL, f"INTID {intid} is none of the {self.nr_irqs} of this GIC")
        if level:
            self.pend_edge(lpi)

    def inject_ppi(self, vcpu_index: int, intid: int, level: bool) -> None:
        """KVM_IRQ_LINE: drive a PPI.

        KVM looks the vCPU up by index, takes its *id*, and uses that as an index again; with sparse ids
        another vCPU is hit, or none.

        Raises:
            KvmError: EINVAL when there is no such vCPU or PPI; by the model, EBUSY when not initialised.
        """
        vcpus = self.vm.vcpus
        if vcpu_index >= len(vcpus):
            raise KvmError(errno.EINVAL, f"there is no vCPU {vcpu_index}")
        if not NR_SGIS <= intid < NR_PRIVATE_IRQS:
            raise KvmError(errno.EINVAL, f"a PPI has an INTID of 16 to 31, not {intid}")
        self._check_injection()
        index = vcpus[vcpu_index].vcpu_id
        if index >= len(self.cpus):
            raise KvmError(errno.EINVAL, f"vCPU {vcpu_index} has id {index}, and no vCPU has that index")
        irq = self.cpus[index].private[intid]
        if irq.owner is None:
            self.line_level(irq, level)

    def _check_injection(self) -> None:
        """Raise if the GIC cannot take interrupts yet."""

    # -- looking inside --------------------------------------------------------------------------------------

    def interrupts(self) -> Iterator[VgicIrq]:
        """Every interrupt of the VM."""
        for cpu in self.cpus:
            yield from cpu.private
        yield from self.spis
        yield from self.lpis.values()

    def count_open(self) -> int:
        """How many interrupts are pending and not yet taken, found by looking at each of them."""
        return sum(irq.open for irq in self.interrupts())

    def _check(self) -> None:
        """Assert the invariants of all interrupts and queues."""
        for cpu in self.cpus:
            cpu._check()
            assert cpu.forwarding == self.forwarding
        for irq in self.interrupts():
            entry = irq.entry
            if entry is None or entry is ADRIFT:
                assert irq.active == (entry is ADRIFT)
                continue
            where = entry[3]
            assert entry[2] is irq
            queued = where.is_queued(entry)
            parked = where.parked.get(entry[1]) is irq
            assert queued + parked + irq.active == 1
            assert irq.active or queued == self._belongs(irq, where)
