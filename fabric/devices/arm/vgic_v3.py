"""VGICv3: KVM's in-kernel GICv3 as a device, with its attributes.

Specification: arm-vgic-v3 (Linux 6.1). Where the document and the kernel differ the kernel is followed; each such
rule is at its row or check.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, ClassVar, Self

from fabric.devices.arm import vgic_lpi
from fabric.devices.arm.vgic import Vgic
from fabric.devices.arm.vgic_attrs import init_attr, nr_irqs_group
from fabric.devices.arm.vgic_cpuif import USER_SYSREGS, UserSysreg, VgicV3Cpu
from fabric.devices.arm.vgic_frames import UNDEFINED
from fabric.devices.arm.vgic_irq import NR_PRIVATE_IRQS, NR_SGIS, VgicIrq
from fabric.devices.arm.vgic_v3_frames import Frames
from fabric.devices.arm.vgic_v3_regs import GICD, GICR
from fabric.devices.arm.vgic_v3_state import VgicV3State, restore, save
from fabric.devices.attributes import Attr, AttrTable, Group, Pointer
from fabric.errors import KvmError
from fabric.uapi import arm64 as uapi

if TYPE_CHECKING:
    from fabric.devices.base import VcpuServices, VmServices


class VgicV3(Vgic):
    """The GICv3 of a VM. ``revision`` is GICD_IIDR's, 3 or (set by userspace for an older guest) 2."""

    model = "GICv3"
    max_vcpus = uapi.VGIC_V3_MAX_CPUS
    cpu_class = VgicV3Cpu
    initial_group = 1
    attributes: ClassVar[AttrTable]

    def __init__(self, vm: VmServices) -> None:
        self.frames = Frames(self)
        self.revision = 3
        self.lpi_id_bits: int = vm.options.get("lpi_id_bits", 16)
        self.vgic = self  # register handlers serve the distributor and the redistributors alike
        super().__init__(vm)

    @classmethod
    def supported(cls, options: dict[str, Any]) -> bool:
        """Whether the host can offer it."""
        return bool(options.get("host_gic", 3) == 3)

    def state(self) -> VgicV3State:
        """Everything that decides what a guest sees, as a record."""
        return save(self)

    @classmethod
    def from_state(cls, vm: VmServices, state: VgicV3State) -> Self:
        """The GIC in that state, in a VM that has the same vCPUs.

        What is pending counts as raised in the ledger of ``vm``. ValueError for another version or vCPU count.
        """
        vgic = cls(vm)
        restore(vgic, state)
        return vgic

    # -- vCPUs -----------------------------------------------------------------------------------------------

    def check_create_vcpu(self, vcpu_id: int) -> None:
        """As the base class; also EINVAL when its redistributor would be placed wrongly, ENOSPC when nowhere."""
        super().check_create_vcpu(vcpu_id)
        self.frames.check_placement()
        if any(vcpu.vcpu_id == vcpu_id for vcpu in self.vm.vcpus):
            self.frames.use_up_place()

    def vcpu_created(self, vcpu: VcpuServices) -> None:
        super().vcpu_created(vcpu)
        self.frames.place(self.cpus[-1])

    def first_run(self) -> None:
        """Check the set-up at a first KVM_RUN, and have the frames answer. Again is a no-op.

        Raises:
            KvmError: ENXIO when a frame has no address, EINVAL when frames overlap or lie beyond the guest's
                address space, EBUSY when the GIC was not initialised; each kills the VM.
        """
        if self.frames.mapped:
            return
        self.frames.first_run()
        if not self.initialized:
            raise KvmError(errno.EBUSY, "the GIC was not initialised before the first KVM_RUN")
        self.frames.map_distributor()

    def is_last(self, cpu: VgicV3Cpu) -> bool:
        """GICR_TYPER.Last of a vCPU."""
        return self.frames.is_last(cpu)

    def register_irq(self, intid: int) -> VgicIrq | None:
        """The interrupt in the distributor's arrays; SGIs and PPIs live in the redistributors."""
        index = intid - NR_PRIVATE_IRQS
        return self.spis[index] if 0 <= index < len(self.spis) else None

    def _check_injection(self) -> None:
        if not self.initialized:
            raise KvmError(errno.EBUSY, "the GIC takes no interrupts before it is initialised")


# -- attributes ---------------------------------------------------------------------------------------------


def _set_distributor(vgic: VgicV3, _attr: int, ptr: Pointer) -> None:
    vgic.frames.place_distributor(ptr.u64())


def _get_distributor(vgic: VgicV3, _attr: int, ptr: Pointer) -> None:
    ptr.put_u64(vgic.frames.distributor)


def _set_redistributors(vgic: VgicV3, _attr: int, ptr: Pointer) -> None:
    vgic.frames.add_legacy_region(ptr.u64())


def _get_redistributors(vgic: VgicV3, _attr: int, ptr: Pointer) -> None:
    regions = vgic.frames.regions
    ptr.put_u64(regions[0].base if regions else UNDEFINED)


def _set_region(vgic: VgicV3, _attr: int, ptr: Pointer) -> None:
    vgic.frames.add_region(ptr.u64())


def _get_region(vgic: VgicV3, _attr: int, ptr: Pointer) -> None:
    ptr.put_u64(vgic.frames.region(ptr.u64()).value)


def _set_unknown_address(_vgic: VgicV3, attr: int, ptr: Pointer) -> None:
    # The value is fetched before the type is looked at.
    ptr.u64()
    _no_address(_vgic, attr)


def _no_address(_vgic: VgicV3, attr: int) -> None:
    raise KvmError(errno.ENXIO, f"a GICv3 has no address of type {attr}")


def _save_pending_tables(vgic: VgicV3, _attr: int, _ptr: Pointer) -> None:
    with vgic.vm.lock_vcpus():
        if not vgic.initialized:
            raise KvmError(errno.ENXIO, "pending tables can be saved once the GIC is initialised")
        vgic_lpi.save_pending(vgic)


def _accessor(vgic: VgicV3) -> None:
    """Distributor registers are reached on behalf of vCPU 0."""
    if not vgic.cpus:
        raise KvmError(errno.EINVAL, "distributor registers need a vCPU")


def _cpu(vgic: VgicV3, attr: int) -> VgicV3Cpu:
    """The vCPU that an attribute number names by affinity (Aff3.Aff2.Aff1.Aff0 in its upper half)."""
    affinity = attr >> uapi.KVM_DEV_ARM_VGIC_V3_MPIDR_SHIFT
    mpidr = (affinity & 0xFF00_0000) << 8 | affinity & 0xFF_FFFF
    cpu: VgicV3Cpu | None = vgic.cpu_by_mpidr(mpidr)
    if cpu is None:
        raise KvmError(errno.EINVAL, f"no vCPU has the affinity {mpidr:#x}")
    return cpu


def _check_initialized(vgic: VgicV3) -> None:
    if not vgic.initialized:
        raise KvmError(errno.EBUSY, "registers can be accessed once the GIC is initialised")


def _offset(attr: int) -> int:
    return attr & uapi.KVM_DEV_ARM_VGIC_OFFSET_MASK


def _set_dist(vgic: VgicV3, attr: int, ptr: Pointer) -> None:
    _accessor(vgic)
    value = ptr.u32()
    with vgic.vm.lock_vcpus():
        _check_initialized(vgic)
        GICD.user_write(vgic, _offset(attr), value)


def _get_dist(vgic: VgicV3, attr: int, ptr: Pointer) -> None:
    _accessor(vgic)
    with vgic.vm.lock_vcpus():
        _check_initialized(vgic)
        value = GICD.user_read(vgic, _offset(attr))
    ptr.put_u32(value)


def _has_dist(vgic: VgicV3, attr: int) -> None:
    _accessor(vgic)
    if not GICD.has(vgic, _offset(attr)):
        raise KvmError(errno.ENXIO, f"the distributor has no register at {_offset(attr):#x}")


def _set_redist(vgic: VgicV3, attr: int, ptr: Pointer) -> None:
    cpu = _cpu(vgic, attr)
    value = ptr.u32()
    with vgic.vm.lock_vcpus():
        _check_initialized(vgic)
        GICR.user_write(cpu, _offset(attr), value)


def _get_redist(vgic: VgicV3, attr: int, ptr: Pointer) -> None:
    cpu = _cpu(vgic, attr)
    with vgic.vm.lock_vcpus():
        _check_initialized(vgic)
        value = GICR.user_read(cpu, _offset(attr))
    ptr.put_u32(value)


def _has_redist(vgic: VgicV3, attr: int) -> None:
    if not GICR.has(_cpu(vgic, attr), _offset(attr)):
        raise KvmError(errno.ENXIO, f"a redistributor has no register at {_offset(attr):#x}")


def _sysreg(attr: int) -> UserSysreg:
    register = USER_SYSREGS.get(attr & uapi.KVM_DEV_ARM_VGIC_SYSREG_INSTR_MASK)
    if register is None:
        # The documents say ENXIO, which only the has-test gives.
        raise KvmError(errno.ENOENT, f"{attr & 0xFFFF:#x} encodes no CPU interface register")
    return register


def _set_sysreg(vgic: VgicV3, attr: int, ptr: Pointer) -> None:
    cpu = _cpu(vgic, attr)
    with vgic.vm.lock_vcpus():
        _check_initialized(vgic)
        value = ptr.u64()
        _sysreg(attr).write(cpu, value)


def _get_sysreg(vgic: VgicV3, attr: int, ptr: Pointer) -> None:
    cpu = _cpu(vgic, attr)
    with vgic.vm.lock_vcpus():
        _check_initialized(vgic)
        ptr.put_u64(_sysreg(attr).read(cpu))


def _has_sysreg(vgic: VgicV3, attr: int) -> None:
    _cpu(vgic, attr)
    if attr & uapi.KVM_DEV_ARM_VGIC_SYSREG_INSTR_MASK not in USER_SYSREGS:
        raise KvmError(errno.ENXIO, f"{attr & 0xFFFF:#x} encodes no CPU interface register")


def _level_info(attr: int) -> int:
    """The first INTID of a LEVEL_INFO attribute."""
    info = (attr & uapi.KVM_DEV_ARM_VGIC_LINE_LEVEL_INFO_MASK) >> uapi.KVM_DEV_ARM_VGIC_LINE_LEVEL_INFO_SHIFT
    intid = attr & uapi.KVM_DEV_ARM_VGIC_LINE_LEVEL_INTID_MASK
    if info != uapi.VGIC_LEVEL_INFO_LINE_LEVEL:
        raise KvmError(errno.EINVAL, f"info must be VGIC_LEVEL_INFO_LINE_LEVEL, not {info}")
    if intid % 32:
        raise KvmError(errno.EINVAL, f"line levels start at a multiple of 32, not at INTID {intid}")
    return intid


def _set_levels(vgic: VgicV3, attr: int, ptr: Pointer) -> None:
    cpu = _cpu(vgic, attr)
    value = ptr.u32()
    with vgic.vm.lock_vcpus():
        _check_initialized(vgic)
        first = _level_info(attr)
        for n in range(32):
            irq = cpu.wired(first + n)
            if irq is not None and irq.intid >= NR_SGIS:
                vgic.store_line(irq, bool(value >> n & 1))


def _get_levels(vgic: VgicV3, attr: int, ptr: Pointer) -> None:
    cpu = _cpu(vgic, attr)
    value = 0
    with vgic.vm.lock_vcpus():
        _check_initialized(vgic)
        first = _level_info(attr)
        for n in range(32):
            irq = cpu.wired(first + n)
            if irq is not None and irq.line and not irq.edge:
                value |= 1 << n
    ptr.put_u32(value)


def _has_levels(_vgic: VgicV3, attr: int) -> None:
    info = (attr & uapi.KVM_DEV_ARM_VGIC_LINE_LEVEL_INFO_MASK) >> uapi.KVM_DEV_ARM_VGIC_LINE_LEVEL_INFO_SHIFT
    if info != uapi.VGIC_LEVEL_INFO_LINE_LEVEL:
        raise KvmError(errno.ENXIO, f"info must be VGIC_LEVEL_INFO_LINE_LEVEL, not {info}")


_EFAULT, _EINVAL, _EEXIST, _E2BIG, _ENXIO = errno.EFAULT, errno.EINVAL, errno.EEXIST, errno.E2BIG, errno.ENXIO
_EBUSY, _ENOENT = errno.EBUSY, errno.ENOENT

VgicV3.attributes = AttrTable(
    (
        Group(
            uapi.KVM_DEV_ARM_VGIC_GRP_ADDR,
            "KVM_DEV_ARM_VGIC_GRP_ADDR",
            (
                Attr(
                    "vgic-v3.addr.dist",
                    "KVM_VGIC_V3_ADDR_TYPE_DIST",
                    number=uapi.KVM_VGIC_V3_ADDR_TYPE_DIST,
                    type="u64",
                    set=_set_distributor,
                    get=_get_distributor,
                    errors=(_EFAULT, _EEXIST, _EINVAL, _E2BIG),
                ),
                Attr(
                    "vgic-v3.addr.redist",
                    "KVM_VGIC_V3_ADDR_TYPE_REDIST",
                    number=uapi.KVM_VGIC_V3_ADDR_TYPE_REDIST,
                    type="u64",
                    set=_set_redistributors,
                    get=_get_redistributors,
                    errors=(_EFAULT, _EINVAL, _EEXIST, _E2BIG),
                ),
                Attr(
                    "vgic-v3.addr.redist-region",
                    "KVM_VGIC_V3_ADDR_TYPE_REDIST_REGION",
                    number=uapi.KVM_VGIC_V3_ADDR_TYPE_REDIST_REGION,
                    type="u64",
                    set=_set_region,
                    get=_get_region,
                    errors=(_EFAULT, _EINVAL, _E2BIG, _ENOENT),
                ),
                Attr(
                    "vgic-v3.any",
                    "(any other address type)",
                    type="u64",
                    set=_set_unknown_address,
                    has=_no_address,
                    errors=(_EFAULT, _ENXIO),
                ),
            ),
        ),
        Group(
            uapi.KVM_DEV_ARM_VGIC_GRP_DIST_REGS,
            "KVM_DEV_ARM_VGIC_GRP_DIST_REGS",
            (
                Attr(
                    "vgic-v3.dist-regs",
                    "affinity and offset",
                    type="u32",
                    set=_set_dist,
                    get=_get_dist,
                    has=_has_dist,
                    errors=(_EINVAL, _EFAULT, _EBUSY, _ENXIO),
                ),
            ),
        ),
        nr_irqs_group("vgic-v3"),
        Group(
            uapi.KVM_DEV_ARM_VGIC_GRP_CTRL,
            "KVM_DEV_ARM_VGIC_GRP_CTRL",
            (
                init_attr("vgic-v3"),
                Attr(
                    "vgic-v3.ctrl.save-pending-tables",
                    "KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES",
                    number=uapi.KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES,
                    set=_save_pending_tables,
                    errors=(_EBUSY, _ENXIO, _EFAULT),
                ),
            ),
        ),
        Group(
            uapi.KVM_DEV_ARM_VGIC_GRP_REDIST_REGS,
            "KVM_DEV_ARM_VGIC_GRP_REDIST_REGS",
            (
                Attr(
                    "vgic-v3.redist-regs",
                    "affinity and offset",
                    type="u32",
                    set=_set_redist,
                    get=_get_redist,
                    has=_has_redist,
                    errors=(_EINVAL, _EFAULT, _EBUSY, _ENXIO),
                ),
            ),
        ),
        Group(
            uapi.KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS,
            "KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS",
            (
                Attr(
                    "vgic-v3.cpu-sysregs",
                    "affinity and register encoding",
                    type="u64",
                    set=_set_sysreg,
                    get=_get_sysreg,
                    has=_has_sysreg,
                    errors=(_EINVAL, _EBUSY, _EFAULT, _ENOENT, _ENXIO),
                ),
            ),
        ),
        Group(
            uapi.KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO,
            "KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO",
            (
                Attr(
                    "vgic-v3.level-info",
                    "affinity, info and first INTID",
                    type="u32",
                    set=_set_levels,
                    get=_get_levels,
                    has=_has_levels,
                    errors=(_EINVAL, _EFAULT, _EBUSY, _ENXIO),
                ),
            ),
        ),
    )
)
