"""How interrupt messages find local APICs: destinations, shorthands, lowest priority.

A message reaches the local APICs that its destination names. KVM looks most destinations up in a map of the VM's
local APICs, which is rebuilt when one of them changes its id, its mode, its logical destination or is (un)plugged or
enabled; what the map cannot say (broadcasts, shorthands, odd logical destinations) asks every local APIC in turn. The
two ways differ in what they report when nobody was reached: 0 where the map knew the destination, -1 where it had to
ask.

Lowest priority (a delivery mode, and the redirection hint of a MSI): with vector hashing, as hosts have it, the
(vector mod n)-th of the n candidates; without, the candidate that was chosen least often so far.

Sources: Intel SDM vol. 3, 11.6.2 (determining destinations), 11.11 (MSI format); KVM_CAP_X2APIC_API of the KVM API
document.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable

    from fabric.devices.base import IrqEvents, VmServices
    from fabric.devices.x86.lapic import Lapic

MODE_FIXED, MODE_LOWEST, MODE_SMI, MODE_REMOTE_READ, MODE_NMI, MODE_INIT, MODE_SIPI, MODE_EXTINT = range(8)
NO_SHORTHAND, SELF, ALL, ALL_BUT_SELF = range(4)
XAPIC_BROADCAST: Final = 0xFF
X2APIC_BROADCAST: Final = 0xFFFF_FFFF
NOBODY: Final = -1
Shortcut: TypeAlias = "Callable[[Any, Any], object]"
"""Is given a function and its argument, and None twice when that way ends."""
LVT0: Final = 0x350

# How the logical destinations of a VM can be looked up.
UNUSED, FLAT, CLUSTER, X2APIC, UNMAPPED = "unused", "flat", "cluster", "x2apic", "unmapped"


class ApicMap:
    """Who has which physical and which logical id."""

    __slots__ = ("largest_id", "logical", "logical_mode", "physical")

    def __init__(self, apics: list[Lapic], x2apic_format: bool) -> None:
        present = [apic for apic in apics if apic.hw_enabled]
        self.largest_id = max([XAPIC_BROADCAST, *(apic.x2apic_id for apic in present)])
        self.physical: dict[int, Lapic] | None = {}
        self.logical: dict[int, Lapic] = {}
        """By cluster << 4 | member; cluster 0 in the flat model."""
        self.logical_mode = UNUSED
        for apic in present:
            self._add_physical(apic, x2apic_format)
            if self.physical is None:
                return
            self._add_logical(apic)

    def _add_physical(self, apic: Lapic, x2apic_format: bool) -> None:
        assert self.physical is not None
        if x2apic_format:
            # An id beyond 8 bits is its own in either mode: that is how such vCPUs can be started.
            if apic.x2apic or apic.x2apic_id > XAPIC_BROADCAST:
                self.physical[apic.x2apic_id] = apic
            if not apic.x2apic:
                self.physical.setdefault(apic.xapic_id, apic)
            return
        number = apic.x2apic_id if apic.x2apic else apic.xapic_id
        if number in self.physical:
            self.physical = None  # two with one id: no map at all
        else:
            self.physical[number] = apic

    def _add_logical(self, apic: Lapic) -> None:
        if self.logical_mode == UNMAPPED or not apic.sw_enabled or not apic.ldr:
            return
        mode = X2APIC if apic.x2apic else FLAT if apic.flat else CLUSTER
        if self.logical_mode not in (UNUSED, mode):
            self.logical_mode = UNMAPPED
            return
        self.logical_mode = mode
        if mode == X2APIC:
            return  # follows from the id
        cluster, members = self.members(apic.ldr >> 24)
        if not members:
            return
        place = cluster << 4 | members.bit_length() - 1
        if members & members - 1 or place in self.logical:
            self.logical_mode = UNMAPPED
        else:
            self.logical[place] = apic

    def members(self, dest: int) -> tuple[int, int]:
        """A logical xAPIC destination: its cluster and a bit for each member."""
        if self.logical_mode == CLUSTER:
            return dest >> 4 & 0xF, dest & 0xF
        return 0, dest & 0xFF

    def find_logical(self, dest: int) -> list[Lapic | None] | None:
        """The local APIC of each member that ``dest`` names (None: it names one there is not), or None: ask all."""
        if self.logical_mode == UNMAPPED:
            return None
        if self.logical_mode == UNUSED:
            return []
        if self.logical_mode == X2APIC:
            assert self.physical is not None
            first = (dest >> 16) * 16
            return [self.physical.get(first + n) for n in range(16) if dest >> n & 1 and first + n <= self.largest_id]
        cluster, members = self.members(dest)
        return [self.logical.get(cluster << 4 | n) for n in range(8) if members >> n & 1]


class ApicBus:
    """The local APICs of a VM, and the messages between them, the IOAPIC and devices.

    Attributes that others set:

    - ``x2apic_format`` and ``broadcast_quirk_disabled``: what KVM_CAP_X2APIC_API turned on;
    - ``eoi_listeners``: called with (vector, local APIC, whether it was level-triggered) at each end of interrupt
      that is broadcast.
    """

    __slots__ = (
        "_events",
        "_map",
        "apics",
        "broadcast_quirk_disabled",
        "cycle_ns",
        "directed_eoi",
        "eoi_listeners",
        "extint",
        "lazy_map",
        "lazy_scan",
        "lazy_timer",
        "lent",
        "vector_hashing",
        "vm",
        "watched",
        "x2apic_format",
    )

    def __init__(self, vm: VmServices) -> None:
        self.vm = vm
        self.apics: list[Lapic] = []
        """In vCPU order."""
        self.x2apic_format = False
        self.broadcast_quirk_disabled = False
        self.vector_hashing: bool = vm.options["vector_hashing"]
        self.lazy_map: bool = vm.options["apic_map_lag"]
        self.lazy_scan: bool = vm.options["scan_on_entry"]
        self.lazy_timer: bool = vm.options["timer_on_entry"]
        """How much of KVM's laziness the host has: what is only done when a vCPU next enters the guest."""
        self.eoi_listeners: list[Callable[[int, Lapic, bool], None]] = []
        self.watched = -1
        """The vectors whose ends the listeners want to know, a bit for each; they keep it up to date."""
        self.extint = False
        """The output of the 8259 pair."""
        self.directed_eoi = False
        """Local APICs in x2APIC-capable CPUs can keep an end of interrupt to themselves (SVR bit 12)."""
        self.cycle_ns = 1
        """ns a bus cycle of the timers."""
        self._map: ApicMap | None = None
        self.lent: list[Shortcut] = []
        """Ways past all look-ups that senders were given; they end when the map changes."""
        self._events: IrqEvents | None = None
        vm.ledger.add_pending_probe(lambda: sum(apic.count_open() for apic in self.apics))

    @property
    def events(self) -> IrqEvents | None:
        """Who is told about each interrupt."""
        return self._events

    @events.setter
    def events(self, events: IrqEvents | None) -> None:
        self._events = events
        for apic in self.apics:
            apic.events = events

    # -- the local APICs

    def add(self, apic: Lapic) -> None:
        """A vCPU was created. On a lazy host (``apic_map_lag``) the map does not know before something rebuilds it."""
        if not self.lazy_map:
            self.changed()
        elif self._map is None:
            self._map = ApicMap(self.apics, self.x2apic_format)
        self.apics.append(apic)

    def changed(self) -> None:
        """Ids, modes, logical destinations or enables of a local APIC changed: the map is out of date."""
        self._map = None
        if self.lent:
            lent, self.lent = self.lent, []
            for shortcut in lent:
                shortcut(None, None)

    @property
    def map(self) -> ApicMap:
        """The map, rebuilt if need be."""
        found = self._map
        if found is None:
            found = self._map = ApicMap(self.apics, self.x2apic_format)
        return found

    def set_extint(self, level: bool) -> None:
        """The output of the 8259 pair: local APICs whose LINT0 takes it tell their CPUs."""
        if level != self.extint:
            self.extint = level
            for apic in self.apics:
                apic.update()

    def watchdog_tick(self) -> None:
        """The 8254 ticks: when LINT0 of some local APIC is an NMI, all deliver their LINT0 (a watchdog's wiring)."""
        if any(apic.nmi_on_lint0 for apic in self.apics):
            for apic in self.apics:
                apic.deliver_local(LVT0)

    # -- messages

    def deliver(
        self,
        dest: int,
        logical: bool,
        mode: int,
        vector: int,
        level: bool,
        trigger: int,
        *,
        shorthand: int = NO_SHORTHAND,
        source: Lapic | None = None,
        lowest: bool = False,
        takers: list[Lapic] | None = None,
    ) -> int:
        """Send a message: how many local APICs took it, 0 for none of those named, :data:`NOBODY` for nobody there.

        Args:
            dest: destination; 8 bits, or 32 in x2APIC mode.
            logical: destination mode.
            mode: delivery mode, one of ``MODE_*``.
            vector: of the interrupt.
            level: asserted (only a level-triggered INIT or fixed interrupt may be de-asserted).
            trigger: 1 level, 0 edge.
            shorthand: of an IPI.
            source: the local APIC that sends an IPI.
            lowest: the redirection hint of a MSI.
            takers: is filled with those that took it.
        """
        if lowest or mode == MODE_LOWEST:
            if not logical and dest == XAPIC_BROADCAST:
                # Whatever its mode was; to all, unless the redirection hint narrows it to one.
                mode = MODE_FIXED
            else:
                lowest = True
        targets = self._find(dest, logical, vector, shorthand, source, lowest)
        if targets is None:
            self._lost()
            return NOBODY
        taken = 0
        for apic in targets:
            accepted = apic.accept(mode, vector, level, trigger)
            taken += accepted
            if accepted and takers is not None:
                takers.append(apic)
        if not taken:
            self._lost()
        return taken

    def _lost(self) -> None:
        self.vm.ledger.raised += 1
        self.vm.ledger.drop("no local APIC took it")

    def _find(
        self, dest: int, logical: bool, vector: int, shorthand: int, source: Lapic | None, lowest: bool
    ) -> list[Lapic] | None:
        """Whom a message reaches; None where the map could not say, and nobody was found."""
        if shorthand == SELF:
            return [source] if source is not None else []
        if not shorthand:
            found = self._look_up(dest, logical, vector, source, lowest)
            if found is not None:
                return found
        named = [apic for apic in self.apics if apic.hw_enabled and self._named(apic, dest, logical, shorthand, source)]
        if lowest:
            named = [apic for apic in named if apic.sw_enabled]
            named = [self._choose(named, vector)] if named else []
        return named or None

    def _look_up(self, dest: int, logical: bool, vector: int, source: Lapic | None, lowest: bool) -> list[Lapic] | None:
        """Whom the map finds; None when it cannot say."""
        known = self.map
        if known.physical is None or self._is_broadcast(dest, source, known):
            return None
        if not logical:
            # Unknown ids are as good as known ones: nobody there is an answer.
            apic = known.physical.get(dest)
            return [apic] if apic is not None else []
        members = known.find_logical(dest)
        if members is None:
            return None
        if not lowest or not members:
            return [apic for apic in members if apic is not None]
        if not self.vector_hashing:
            there = [apic for apic in members if apic is not None]
            return [self._choose(there, vector)] if there else []
        # Among the members that are named, there or not.
        chosen = members[vector % len(members)]
        return [chosen] if chosen is not None else []

    def _choose(self, candidates: list[Lapic], vector: int) -> Lapic:
        """One of several for a message of lowest priority."""
        if self.vector_hashing:
            return candidates[vector % len(candidates)]
        return min(candidates, key=lambda apic: apic.arbitrations)

    def _is_broadcast(self, dest: int, source: Lapic | None, known: ApicMap) -> bool:
        if self.broadcast_quirk_disabled:
            return dest == X2APIC_BROADCAST or (dest == XAPIC_BROADCAST and known.logical_mode != X2APIC)
        # The quirk: 0xff of a device is a broadcast, whatever the mode of the local APICs.
        return dest == (X2APIC_BROADCAST if source is not None and source.x2apic else XAPIC_BROADCAST)

    def _named(self, apic: Lapic, dest: int, logical: bool, shorthand: int, source: Lapic | None) -> bool:
        if shorthand:
            return shorthand == ALL or apic is not source
        return self.matches(apic, dest, logical, source=source)

    def matches(self, apic: Lapic, dest: int, logical: bool, *, source: Lapic | None = None) -> bool:
        """Whether a destination names ``apic``, asked of itself."""
        if dest == XAPIC_BROADCAST and apic.x2apic and source is None and not self.broadcast_quirk_disabled:
            dest = X2APIC_BROADCAST
        if dest == (X2APIC_BROADCAST if apic.x2apic else XAPIC_BROADCAST):
            return True
        if not logical:
            if apic.x2apic or (apic.x2apic_id > XAPIC_BROADCAST and dest == apic.x2apic_id):
                return dest == apic.x2apic_id
            return dest == apic.xapic_id
        if apic.x2apic:
            return dest >> 16 == apic.ldr >> 16 and bool(dest & apic.ldr & 0xFFFF)
        mine = apic.ldr >> 24
        if apic.flat:
            return bool(mine & dest)
        return apic.clustered and mine >> 4 == dest >> 4 and bool(mine & dest & 0xF)

    def lend(self, dest: int, vector: int, shortcut: Shortcut) -> None:
        """Give a sender of fixed, edge-triggered messages to the physical id ``dest`` a way to the one local APIC
        that has it, for as long as the map stays as it is."""
        known = self.map
        if known.physical is None or self._is_broadcast(dest, None, known):
            return
        apic = known.physical.get(dest)
        if apic is not None and apic.sw_enabled:
            self.lent.append(shortcut)
            shortcut(apic.accept_edge, vector)

    # -- ends of interrupts

    def ended(self, vector: int, apic: Lapic, level: bool) -> None:
        """A local APIC broadcasts the end of ``vector``."""
        for listener in self.eoi_listeners:
            listener(vector, apic, level)

    def _check(self) -> None:
        """Assert the invariants."""
        if not self.lazy_map and self._map is not None:
            fresh: Any = ApicMap(self.apics, self.x2apic_format)
            assert fresh.physical == self._map.physical
            assert fresh.logical == self._map.logical
        for apic in self.apics:
            apic._check()


_NOT_PLAIN_ADDRESS = 1 << 2 | 1 << 3
"""Logical destination mode, redirection hint."""
_NOT_PLAIN_DATA = 7 << 8 | 1 << 15
"""A delivery mode other than fixed, level-triggered."""


def msi_destination(address: int, x2apic_format: bool) -> int:
    """The destination in a MSI's 64-bit address: bits 19:12, and with 32-bit ids bits 63:40 as bits 31:8."""
    dest = address >> 12 & 0xFF
    return dest | (address >> 32 & 0xFFFF_FF00) if x2apic_format else dest


class MsiSender:
    """:func:`deliver_msi` bound to its arguments, for a sender that raises the same MSI again and again.

    Who calls it may set ``shortcut``: that is lent a way to the local APIC when there is a shorter one.
    """

    __slots__ = ("_bus", "_message", "shortcut")

    def __init__(self, bus: ApicBus, address: int, data: int) -> None:
        self._bus = bus
        self._message = address, data
        self.shortcut: Shortcut | None = None

    def __call__(self) -> int:
        address, data = self._message
        taken = deliver_msi(self._bus, address, data)
        if taken == 1 and self.shortcut is not None and not address & _NOT_PLAIN_ADDRESS and not data & _NOT_PLAIN_DATA:
            self._bus.lend(msi_destination(address, self._bus.x2apic_format), data & 0xFF, self.shortcut)
        return taken


def deliver_msi(bus: ApicBus, address: int, data: int) -> int:
    """A MSI: what :meth:`ApicBus.deliver` says of it. Nothing else of address and data is looked at."""
    return bus.deliver(
        msi_destination(address, bus.x2apic_format),
        bool(address >> 2 & 1),
        data >> 8 & 7,
        data & 0xFF,
        True,
        data >> 15 & 1,
        lowest=bool(address >> 3 & 1),
    )
