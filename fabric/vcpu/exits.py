"""Exits to the VMM: what KVM_RUN leaves in struct kvm_run, and what completes it.

An exit object says with ``fill`` what goes into the run area when KVM_RUN returns, and with ``complete`` what the
suspended access gets from it when KVM_RUN is called again.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Protocol

import attrs

from fabric.errors import KvmError
from fabric.uapi.arm64 import KvmRunArmNisv
from fabric.uapi.codec import CStruct
from fabric.uapi.kvm import (
    KVM_EXIT_ARM_NISV,
    KVM_EXIT_FAIL_ENTRY,
    KVM_EXIT_INTERNAL_ERROR,
    KVM_EXIT_INTR,
    KVM_EXIT_MMIO,
    KVM_EXIT_SYSTEM_EVENT,
    KVM_EXIT_UNKNOWN,
    KVM_RUN_EXIT,
    KVM_RUN_EXIT_REASON,
    KvmRunFailEntry,
    KvmRunInternalError,
    KvmRunMmio,
    KvmRunSystemEvent,
    KvmRunUnknown,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    RunArea = memoryview


class Exit(Protocol):
    """Why KVM_RUN returns."""

    def fill(self, run: RunArea) -> None:
        """Write exit reason and data into the run area."""
        ...

    def complete(self, run: RunArea) -> int:
        """The result of the access, taken from the run area."""
        ...


def set_exit_reason(run: RunArea, reason: int) -> None:
    """Why KVM_RUN returned, KVM_EXIT_*."""
    run[KVM_RUN_EXIT_REASON : KVM_RUN_EXIT_REASON + 4] = reason.to_bytes(4, "little")


def set_exit(run: RunArea, reason: int, details: CStruct) -> None:
    """The reason, and its own part of the run area."""
    set_exit_reason(run, reason)
    run[KVM_RUN_EXIT : KVM_RUN_EXIT + details.SIZE] = details.pack()


@attrs.frozen
class MmioExit:
    """A load (``value`` is None) or store of ``size`` bytes at ``gpa`` that no slot and no device claims."""

    gpa: int
    size: int
    value: int | None

    def fill(self, run: RunArea) -> None:
        """KVM_EXIT_MMIO."""
        data = b"" if self.value is None else self.value.to_bytes(self.size, "little")
        mmio = KvmRunMmio(
            phys_addr=self.gpa, data=data.ljust(8, b"\0"), len=self.size, is_write=int(self.value is not None)
        )
        set_exit(run, KVM_EXIT_MMIO, mmio)

    def complete(self, run: RunArea) -> int:
        """A load gets the first ``size`` bytes of ``kvm_run.mmio.data``."""
        if self.value is not None:
            return 0
        return int.from_bytes(KvmRunMmio.unpack(run[KVM_RUN_EXIT:]).data[: self.size], "little")


@attrs.frozen
class SystemEventExit:
    """The guest asks for its end or reset: KVM_EXIT_SYSTEM_EVENT with ``type`` and ``data``."""

    type: int
    data: Sequence[int] = ()

    def fill(self, run: RunArea) -> None:
        """KVM_EXIT_SYSTEM_EVENT."""
        words = tuple(self.data) + (0,) * (16 - len(self.data))
        set_exit(run, KVM_EXIT_SYSTEM_EVENT, KvmRunSystemEvent(type=self.type, ndata=len(self.data), data=words))

    def complete(self, run: RunArea) -> int:
        """Nothing is returned."""
        return 0


@attrs.frozen
class NisvExit:
    """An arm64 access outside memory that the hardware describes too little of to emulate it (api.run.ENOSYS.nisv).

    The guest makes it again at the next KVM_RUN, as its PC has not moved.
    """

    gpa: int
    iss: int
    """Of the syndrome what is valid all the same."""
    to_user: bool
    """KVM_CAP_ARM_NISV_TO_USER is on."""

    def fill(self, run: RunArea) -> None:
        """KVM_EXIT_ARM_NISV, or ENOSYS when userspace did not ask for it."""
        if not self.to_user:
            raise KvmError(
                errno.ENOSYS, f"the access at {self.gpa:#x} has no syndrome, and KVM_CAP_ARM_NISV_TO_USER is off"
            )
        set_exit(run, KVM_EXIT_ARM_NISV, KvmRunArmNisv(self.iss, self.gpa))

    def complete(self, run: RunArea) -> int:
        """Nothing can complete it."""
        return 0


@attrs.frozen
class HostExit:
    """The host fails the vCPU: KVM_EXIT_UNKNOWN, KVM_EXIT_FAIL_ENTRY or KVM_EXIT_INTERNAL_ERROR, by its ``details``.

    Hardly a guest brings these about. ``vcpu.exit_next`` injects one, to see what a VMM does about it.
    """

    details: KvmRunUnknown | KvmRunFailEntry | KvmRunInternalError

    def fill(self, run: RunArea) -> None:
        """The exit that the details belong to."""
        set_exit(run, _HOST_REASONS[type(self.details)], self.details)

    def complete(self, run: RunArea) -> int:
        """The guest did not run, so there is nothing to complete."""
        return 0


_HOST_REASONS: dict[type[CStruct], int] = {
    KvmRunUnknown: KVM_EXIT_UNKNOWN,
    KvmRunFailEntry: KVM_EXIT_FAIL_ENTRY,
    KvmRunInternalError: KVM_EXIT_INTERNAL_ERROR,
}


class _Interrupted:
    """KVM_RUN was interrupted: it fails with EINTR."""

    def fill(self, run: RunArea) -> None:
        """KVM_EXIT_INTR."""
        set_exit_reason(run, KVM_EXIT_INTR)

    def complete(self, run: RunArea) -> int:
        """The program goes on where it was."""
        return 0


INTERRUPTED = _Interrupted()
