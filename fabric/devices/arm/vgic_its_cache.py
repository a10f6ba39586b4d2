"""The translation cache that the ITSs of a VM share.

KVM remembers the translations it used last, and that is no mere speed-up, it shows: a remembered MSI is delivered
without KVM_MSI_VALID_DEVID, without asking whether its target has LPIs enabled, and whatever RESTORE_TABLES has made
of the maps since. Linux 6.1 remembers 16 for each vCPU there was when the GIC was initialised; a further one replaces
the one that was used longest ago. All are forgotten at once, those of every ITS, by

- what unmaps or moves an event: MOVI, MOVALL between two vCPUs, DISCARD, MAPC with V=0 (of any collection), and
  whatever drops a device with its events: MAPD of a known one, an invalid GITS_BASER0, RESET, a restore that fails;
- disabling an ITS (one that is disabled already, too), and clearing EnableLPIs of a vCPU.

MAPC that moves a collection, CLEAR, INV, INVALL, a repeated MAPTI and a restore that succeeds keep them: an entry
names the LPI, and only the target or the state of that changes.

A translation is known by the doorbell's address, not by its ITS: of two ITSs at one address, whose MSIs all go to
the first, the other's translations are found there as well once an INT command has used them.

Senders
-------
A sender bound to one message (an irqfd) is lent a way past all look-ups for as long as its translation is remembered;
an MSI is then the LPI made pending and nothing else. Such uses are not seen here, so a sender's translation counts as
used when it was lent. As long as nothing has to give way, the order of use decides nothing. From the first time
something does, nothing is lent any more and every use counts.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from fabric.devices.arm.vgic_irq import VgicIrq
    from fabric.devices.base import VmServices

PER_VCPU = 16
"""Translations remembered for each vCPU."""

Key: TypeAlias = tuple[int, int, int]
"""``(address of the doorbell, device id, event id)``."""
Shortcut: TypeAlias = Callable[[Any, Any], object]
"""Is given a function and the LPI that is its argument, and None twice when that way ends."""


class TranslationCache:
    """The translations used last, of all ITSs of a VM."""

    __slots__ = ("_lent", "_lpis", "_overflown", "_vm")

    def __init__(self, vm: VmServices) -> None:
        self._vm = vm
        self._lpis: OrderedDict[Key, VgicIrq] = OrderedDict()  # the one used last is the last
        self._lent: list[Shortcut] = []
        self._overflown = False

    def __len__(self) -> int:
        return len(self._lpis)

    @property
    def capacity(self) -> int:
        """How many translations are remembered; vCPUs cannot be added once the GIC is initialised."""
        vgic = self._vm.irqchip
        return PER_VCPU * len(self._vm.vcpus) if vgic is not None and vgic.initialized else 0

    def find(self, key: Key) -> VgicIrq | None:
        """The LPI of a translation, which has been used now; or None."""
        irq = self._lpis.get(key)
        if irq is not None:
            self._lpis.move_to_end(key)
        return irq

    def add(self, key: Key, irq: VgicIrq) -> None:
        """A translation was used. One that is remembered keeps its LPI."""
        if self.find(key) is not None:
            return
        if len(self._lpis) >= self.capacity:
            if not self._lpis:
                return
            self._overflown = True
            self._recall()
            self._lpis.popitem(last=False)
        self._lpis[key] = irq

    def lend(self, key: Key, shortcut: Shortcut, direct: Callable[[VgicIrq], None]) -> None:
        """Give a sender the way ``direct`` to its LPI, if its translation is remembered."""
        irq = self._lpis.get(key)
        if irq is not None and not self._overflown:
            self._lent.append(shortcut)
            shortcut(direct, irq)

    def forget(self) -> None:
        """Forget all translations."""
        self._lpis.clear()
        self._overflown = False
        self._recall()

    def _recall(self) -> None:
        lent, self._lent = self._lent, []
        for shortcut in lent:
            shortcut(None, None)

    # -- state

    def state(self) -> tuple[tuple[int, int, int, int], ...]:
        """``(doorbell, device id, event id, LPI)`` of each translation, the one used last at the end."""
        return tuple((*key, irq.intid) for key, irq in self._lpis.items())

    def apply(self, state: tuple[tuple[int, int, int, int], ...]) -> None:
        """Remember what :meth:`state` said; the LPIs are those of the VM's GIC."""
        lpis = self._vm.irqchip.lpis if state else {}
        self._lpis = OrderedDict(((doorbell, devid, event), lpis[lpi]) for doorbell, devid, event, lpi in state)

    def _check(self) -> None:
        """Assert the invariants."""
        assert len(self._lpis) <= self.capacity or not self._lpis
        for irq in self._lpis.values():
            assert self._vm.irqchip.lpis[irq.intid] is irq
        assert not (self._lent and self._overflown)
