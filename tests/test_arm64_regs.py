"""Registers of arm64 vCPUs beyond the recordings: other hosts, and a vCPU saved and restored register by register."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kvm_machine import Arm, outcome
from test_vcpu import Machine

import fabric
from fabric.kvm import Kvm
from fabric.kvm.typed import VcpuFd
from fabric.uapi import arm64 as arm
from fabric.uapi import ioctl as requests
from fabric.uapi import kvm as uapi
from fabric.vcpu import arm64_sysregs as sysregs

PMU, SVE, NARROW = arm.KVM_ARM_VCPU_PMU_V3, arm.KVM_ARM_VCPU_SVE, arm.KVM_ARM_VCPU_EL1_32BIT
PTRAUTH = (arm.KVM_ARM_VCPU_PTRAUTH_ADDRESS, arm.KVM_ARM_VCPU_PTRAUTH_GENERIC)
VLS = arm.KVM_REG_ARM64_SVE_VLS
FINALIZE = bytearray(SVE.to_bytes(4, "little"))


def sysreg(name: str) -> int:
    """The id of a system register."""
    encoding = sysregs.BY_NAME[name].encoding
    return uapi.KVM_REG_ARM64 | uapi.KVM_REG_SIZE_U64 | arm.KVM_REG_ARM64_SYSREG | encoding


def one(features: tuple[int, ...] = (), **options: Any) -> VcpuFd:
    """An initialised vCPU on a host."""
    vcpu = Arm(0, gic=False, **options).vm.create_vcpu(0)
    vcpu.init(features)
    return vcpu


# -- hosts


@pytest.mark.parametrize(
    ("options", "field", "value"),
    [
        pytest.param({}, 24, 1, id="GICv3"),
        pytest.param({"host_gic": 2}, 24, 0, id="GICv2"),
        pytest.param({"ras": False}, 28, 0, id="no RAS"),
        pytest.param({}, 4, 2, id="AArch32 at EL1"),
        pytest.param({"el1_32bit": False}, 4, 1, id="AArch64 only"),
    ],
)
def test_what_the_cpu_has_is_what_the_host_has(options: dict[str, Any], field: int, value: int) -> None:
    """The fields of ID_AA64PFR0_EL1 follow the host's description."""
    assert value == one(**options).get_reg(sysreg("ID_AA64PFR0_EL1")) >> field & 0xF


def test_a_cpu_without_aarch32() -> None:
    """Its AArch32 ID registers are 0, and what a VMM restores into them is ignored; there is no AArch32 user mode."""
    vcpu = one(el1_32bit=False)
    pfr0 = sysreg("ID_PFR0_EL1")
    pstate = arm.arm64_core_reg(264)

    assert [0, None, 0] == [vcpu.get_reg(pfr0), outcome(vcpu.set_reg, pfr0, 0x131), vcpu.get_reg(pfr0)]
    assert "EINVAL" == outcome(vcpu.set_reg, pstate, 0x10)
    assert None is outcome(one().set_reg, pstate, 0x10)


@pytest.mark.parametrize(
    ("options", "version"), [({}, 5), ({"pmu_event_bits": 10}, 1), ({"pmu_long_counters": True}, 6)]
)
def test_the_version_of_the_pmu(options: dict[str, Any], version: int) -> None:
    """ID_AA64DFR0_EL1 has it, for vCPUs with a PMU."""
    dfr0 = sysreg("ID_AA64DFR0_EL1")

    assert version == one((PMU,), **options).get_reg(dfr0) >> 8 & 0xF
    assert 0 == one(**options).get_reg(dfr0) >> 8 & 0xF


@pytest.mark.parametrize("longest", [1, 4, 16])
def test_vectors_have_the_host_s_length(longest: int) -> None:
    """All lengths up to it, or up to a shorter one that is chosen; a Z register has 16 bytes a quadword."""
    vcpu = one((SVE,), sve_max_vq=longest)
    zreg = arm.KVM_REG_ARM64_SVE_ZREG_BASE

    assert (1 << longest) - 1 == vcpu.get_reg(VLS)
    assert "EINVAL" == outcome(vcpu.set_reg, VLS, (1 << longest + 1) - 1)
    vcpu.ioctl(requests.KVM_ARM_VCPU_FINALIZE, FINALIZE)
    vcpu.set_reg(zreg, (1 << 2048) - 1)
    assert (1 << 128 * longest) - 1 == vcpu.get_reg(zreg)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sve_max_vq": 17}, "sve_max_vq must be 1 to 16 quadwords"),
        ({"cpu_hz": 0}, "frequency must be above 0 Hz"),
        ({"instructions_per_cycle": -1}, "must not be negative"),
        ({"pmu_counters": 31}, "0 to 30 event counters"),
        ({"pmu_event_bits": 12}, "10 or 16 bits"),
    ],
)
def test_hosts_that_there_are_not(options: dict[str, Any], words: str) -> None:
    """ValueError says what an option must be."""
    with pytest.raises(ValueError, match=words):
        Kvm("aarch64", **options)


# -- the table


def test_the_table_is_in_order_and_names_are_its_own() -> None:
    """One row an encoding and a name; KVM_GET_REG_LIST has them by encoding."""
    rows = [*sysregs.HOST, *sysregs.REGISTERS]

    assert len(rows) == len(sysregs.BY_ENCODING) == len(sysregs.BY_NAME)
    assert sorted(row.encoding for row in sysregs.REGISTERS) == [row.encoding for row in sysregs.REGISTERS]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("SCTLR_EL3", "no such register, but SCTLR_EL1"),
        ("FPEXC32_EL2", "cannot be accessed so"),
        ("APIAKeyLo_EL1", "cannot be accessed so, or the vCPU does not have it"),
        ("PMCR_EL0", "cannot be accessed so, or the vCPU does not have it"),
        ("ZCR_EL1", "the vCPU does not have it"),
    ],
)
def test_registers_that_a_guest_does_not_have(name: str, words: str) -> None:
    """ValueError, with what there is of a similar name."""

    async def main() -> None:
        machine = Machine()

        async def program(cpu: Any) -> None:
            for access in (cpu.mrs(name), cpu.msr(name, 0)):
                with pytest.raises(ValueError, match=words):
                    await access
            await cpu.system_off()

        machine.vcpus[0].load(program)
        await machine.run()

    fabric.run(main)


# -- save and restore


@pytest.mark.spec("api.get-one-reg", "api.set-one-reg")
@given(
    features=st.sets(st.sampled_from([PMU, SVE, PTRAUTH])),
    values=st.lists(st.tuples(st.integers(0, 400), st.integers(0, (1 << 64) - 1)), max_size=60),
    lengths=st.integers(1, 16),
)
def test_a_vcpu_saved_and_restored(features: set[Any], values: list[tuple[int, int]], lengths: int) -> None:
    """Whatever was written into registers: all that KVM_GET_REG_LIST names can be written into another vCPU and reads
    the same there. The vector lengths come before KVM_ARM_VCPU_FINALIZE, the counter moves on by itself."""
    flat = tuple(
        f for feature in sorted(features, key=str) for f in (feature if type(feature) is tuple else (feature,))
    )

    def finalized(chosen: int) -> VcpuFd:
        vcpu = one(flat)
        if SVE in flat:
            vcpu.set_reg(VLS, chosen)
            vcpu.ioctl(requests.KVM_ARM_VCPU_FINALIZE, FINALIZE)
        return vcpu

    source = finalized((1 << lengths) - 1)
    ids = source.reg_list()
    for at, value in values:
        reg = ids[at % len(ids)]
        outcome(source.set_reg, reg, value & (1 << 8 * uapi.reg_size(reg)) - 1)
    saved = {reg: source.get_reg(reg) for reg in ids}
    target = finalized(saved.get(VLS, 0))
    for reg, value in saved.items():
        if reg != VLS:
            target.set_reg(reg, value)

    assert ids == target.reg_list()
    assert saved == {reg: target.get_reg(reg) for reg in ids}
