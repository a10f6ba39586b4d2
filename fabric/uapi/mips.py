"""What mips adds to the KVM interface, as far as fabric knows it: the kernel scratch registers.

Source: the KVM API document of Linux 6.1, KVM_SET_ONE_REG.
"""

from __future__ import annotations

from typing import Final

from fabric.uapi.kvm import KVM_REG_MIPS, KVM_REG_SIZE_U64

KVM_REG_MIPS_CP0: Final = KVM_REG_MIPS | KVM_REG_SIZE_U64 | 0x1_0000


def mips_cp0_reg(register: int, select: int) -> int:
    """The KVM_GET/SET_ONE_REG id of a 64-bit coprocessor 0 register."""
    return KVM_REG_MIPS_CP0 | register << 3 | select


KVM_REG_MIPS_CP0_KSCRATCH1: Final = mips_cp0_reg(31, 2)
KVM_REG_MIPS_CP0_KSCRATCH2: Final = mips_cp0_reg(31, 3)
KVM_REG_MIPS_CP0_KSCRATCH3: Final = mips_cp0_reg(31, 4)
KVM_REG_MIPS_CP0_KSCRATCH4: Final = mips_cp0_reg(31, 5)
KVM_REG_MIPS_CP0_KSCRATCH5: Final = mips_cp0_reg(31, 6)
KVM_REG_MIPS_CP0_KSCRATCH6: Final = mips_cp0_reg(31, 7)
