"""vCPUs: the run loop, exits, what a guest program sees of its CPU, and the host's physical CPUs."""

from __future__ import annotations

from fabric.vcpu.arm64 import Arm64Cpu, Arm64Vcpu
from fabric.vcpu.cpu import Cpu
from fabric.vcpu.guest import Guest
from fabric.vcpu.host import Costs, Host
from fabric.vcpu.vcpu import Vcpu
from fabric.vcpu.x86 import X86Vcpu
from fabric.vcpu.x86_cpu import X86Cpu

__all__ = ["Arm64Cpu", "Arm64Vcpu", "Costs", "Cpu", "Guest", "Host", "Vcpu", "X86Cpu", "X86Vcpu"]
