"""What a call of the KVM interface costs in-process, beside a real system call made from Python.

``Kvm.ioctl`` with KVM_SIGNAL_MSI (an ITS translation to an LPI) and KVM_IRQ_LINE (an SPI), each pending already (the
call alone) and each followed by acknowledge and end on the CPU interface. The peer is ``fcntl.ioctl(FIONREAD)`` on a
pipe. Rounds alternate.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import sys
import termios
import time
from collections.abc import Callable
from statistics import median
from typing import Any

from scaling import FIRST_LPI, ItsByAttributes

from fabric.uapi import ioctl
from fabric.uapi.kvm import KVM_MSI_VALID_DEVID, KvmIrqLevel, KvmMsi
from fabric.vmm.arm64_gicv3 import GITS_BASE

SPI = 40
ARM_IRQ_TYPE_SPI = 1 << 24


def operations() -> dict[str, Callable[[], Any]]:
    """What is timed, by name; the first is the peer."""
    reader, _ = os.pipe()
    room = bytearray(4)
    its = ItsByAttributes()
    its.map_lpis(16)
    machine = its.machine
    kvm, vm_fd = machine.kvm, machine.vm_fd
    message = KvmMsi(address_lo=GITS_BASE + 0x10040, data=3, flags=KVM_MSI_VALID_DEVID, devid=0)
    msi = bytearray(message.pack())
    other_msi = bytearray(KvmMsi(address_lo=GITS_BASE + 0x10040, flags=KVM_MSI_VALID_DEVID, devid=0).pack())
    high = bytearray(KvmIrqLevel(irq=ARM_IRQ_TYPE_SPI | SPI, level=1).pack())
    cpu = kvm.vm(vm_fd).vcpus[0].cpu_interface

    def signal_and_take() -> None:
        kvm.ioctl(vm_fd, ioctl.KVM_SIGNAL_MSI, other_msi)
        cpu.end_of_interrupt(1, cpu.acknowledge(1))

    kvm.ioctl(vm_fd, ioctl.KVM_SIGNAL_MSI, other_msi)
    assert cpu.acknowledge(1) == FIRST_LPI
    cpu.end_of_interrupt(1, FIRST_LPI)
    return {
        "fcntl.ioctl(FIONREAD)": lambda: fcntl.ioctl(reader, termios.FIONREAD, room),
        "KVM_SIGNAL_MSI, merged": lambda: kvm.ioctl(vm_fd, ioctl.KVM_SIGNAL_MSI, msi),
        "KVM_SIGNAL_MSI, taken and ended": signal_and_take,
        "KVM_IRQ_LINE": lambda: kvm.ioctl(vm_fd, ioctl.KVM_IRQ_LINE, high),
    }


def main() -> None:
    """Time the operations and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    parser.add_argument("--calls", type=int, default=50_000, help="calls in a round (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds (default %(default)s)")
    arguments = parser.parse_args()
    timed = operations()
    took: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(arguments.rounds):
        for name, operation in timed.items():
            began = time.perf_counter()
            for _ in range(arguments.calls):
                operation()
            took[name].append((time.perf_counter() - began) / arguments.calls * 1e6)
    peer = took[next(iter(timed))]
    rows = [
        {
            "call": name,
            "us": round(min(times), 3),
            "over_system_call": round(median(mine / theirs for mine, theirs in zip(times, peer, strict=True)), 2),
        }
        for name, times in took.items()
    ]
    if arguments.json:
        json.dump({"calls": rows}, sys.stdout, indent=2)
        print()
        return
    for row in rows:
        print(f"{row['call']:34} {row['us']:8.3f} us {row['over_system_call']:8.2f}x a system call")


if __name__ == "__main__":
    main()
