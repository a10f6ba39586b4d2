"""Exits that only x86 has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import attrs

from fabric.uapi.kvm import (
    KVM_EXIT_HLT,
    KVM_EXIT_IO,
    KVM_EXIT_IO_IN,
    KVM_EXIT_IO_OUT,
    KVM_EXIT_IOAPIC_EOI,
    KVM_EXIT_IRQ_WINDOW_OPEN,
    KVM_EXIT_SET_TPR,
    KVM_EXIT_SHUTDOWN,
    KVM_RUN_EXIT,
    PAGE_SIZE,
    KvmRunIo,
)
from fabric.vcpu.exits import set_exit, set_exit_reason

if TYPE_CHECKING:
    from fabric.vcpu.exits import RunArea

IO_DATA: Final = PAGE_SIZE
"""Where the data of port accesses is: the page behind struct kvm_run (KVM_PIO_PAGE_OFFSET)."""


@attrs.frozen
class PlainExit:
    """An exit of which there is nothing to say but its reason."""

    reason: int

    def fill(self, run: RunArea) -> None:
        """The reason."""
        set_exit_reason(run, self.reason)

    def complete(self, run: RunArea) -> int:
        """The guest goes on behind it."""
        return 0


HLT: Final = PlainExit(KVM_EXIT_HLT)
"""HLT, where the VMM has the local APICs."""
IRQ_WINDOW_OPEN: Final = PlainExit(KVM_EXIT_IRQ_WINDOW_OPEN)
"""The VMM wanted to know when it can inject an interrupt."""
SHUTDOWN: Final = PlainExit(KVM_EXIT_SHUTDOWN)
"""A triple fault."""
SET_TPR: Final = PlainExit(KVM_EXIT_SET_TPR)
"""The guest lowered CR8, where the VMM has the local APICs."""


@attrs.frozen
class IoExit:
    """An access of ``size`` bytes to a port that no in-kernel device claims: in (``value`` is None) or out."""

    port: int
    size: int
    value: int | None

    def fill(self, run: RunArea) -> None:
        """KVM_EXIT_IO (api.exit.io): one access, its data in the page behind."""
        direction = KVM_EXIT_IO_IN if self.value is None else KVM_EXIT_IO_OUT
        set_exit(run, KVM_EXIT_IO, KvmRunIo(direction, self.size, self.port, 1, IO_DATA))
        if self.value is not None:
            run[IO_DATA : IO_DATA + self.size] = self.value.to_bytes(self.size, "little")

    def complete(self, run: RunArea) -> int:
        """An ``in`` gets what is in the page then."""
        return 0 if self.value is not None else int.from_bytes(run[IO_DATA : IO_DATA + self.size], "little")


@attrs.frozen
class IoapicEoiExit:
    """The end of an interrupt that the VMM's IOAPIC sent, with a split irqchip."""

    vector: int

    def fill(self, run: RunArea) -> None:
        """KVM_EXIT_IOAPIC_EOI (api.exit.ioapic-eoi)."""
        set_exit_reason(run, KVM_EXIT_IOAPIC_EOI)
        run[KVM_RUN_EXIT] = self.vector

    def complete(self, run: RunArea) -> int:
        """The guest goes on behind it."""
        return 0
