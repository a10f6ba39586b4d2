"""The x86 vCPU: what a guest program sees of it, and the state that a VMM reads and writes."""

from __future__ import annotations

from fabric.vcpu.cpu import Cpu
from fabric.vcpu.vcpu import Vcpu


class X86Cpu(Cpu):
    """What an x86 guest program runs on."""

    __slots__ = ()


class X86Vcpu(Vcpu):
    """An x86 vCPU."""

    __slots__ = ()

    cpu_class = X86Cpu
