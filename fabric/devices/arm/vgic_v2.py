"""VGICv2: KVM's in-kernel GICv2 as a device, with its attributes.

Specification: arm-vgic (Linux 6.1). Where the document and the kernel differ the kernel is followed; each such rule is
at its row or check.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, ClassVar, Self

from fabric.devices.arm.vgic import Vgic
from fabric.devices.arm.vgic_attrs import init_attr, nr_irqs_group
from fabric.devices.arm.vgic_v2_cpu import VgicV2Cpu
from fabric.devices.arm.vgic_v2_frames import Frames
from fabric.devices.arm.vgic_v2_regs import GICC, GICD
from fabric.devices.arm.vgic_v2_state import VgicV2State, restore, save
from fabric.devices.attributes import Attr, AttrTable, Group, Pointer
from fabric.errors import KvmError
from fabric.uapi import arm64 as uapi

if TYPE_CHECKING:
    from fabric.devices.arm.vgic_irq import VgicIrq
    from fabric.devices.arm.vgic_v2_cpu import Sgi
    from fabric.devices.base import VmServices
    from fabric.devices.registers import RegisterBlock


SGI_CLEARED = "SGI cleared"


class VgicV2(Vgic):
    """The GICv2 of a VM.

    ``revision`` is GICD_IIDR's, 3 or (set by userspace for an older guest) 2. From when userspace has written
    GICD_IIDR, ``groups_writable``, it can also set the groups of interrupts.
    """

    model = "GICv2"
    max_vcpus = uapi.VGIC_V2_MAX_CPUS
    cpu_class = VgicV2Cpu
    initial_group = 0
    attributes: ClassVar[AttrTable]

    def __init__(self, vm: VmServices) -> None:
        self.frames = Frames(self)
        self.revision = uapi.KVM_VGIC_IMP_REV_LATEST
        self.groups_writable = False
        super().__init__(vm)

    @classmethod
    def supported(cls, options: dict[str, Any]) -> bool:
        """Whether the host can offer it: it has a GICv2, or a GICv3 that can be one for guests."""
        return bool(
            options.get("host_gic", 3) == 2 or (options.get("host_gic", 3) == 3 and options.get("gicv2_compat"))
        )

    def state(self) -> VgicV2State:
        """Everything that decides what a guest sees, as a record."""
        return save(self)

    @classmethod
    def from_state(cls, vm: VmServices, state: VgicV2State) -> Self:
        """The GIC in that state, in a VM that has the same vCPUs.

        What is pending counts as raised in the ledger of ``vm``. ValueError for another version or vCPU count.
        """
        vgic = cls(vm)
        restore(vgic, state)
        return vgic

    def first_run(self) -> None:
        """Check the set-up at a first KVM_RUN, initialise, and have the frames answer. Again is a no-op.

        Raises:
            KvmError: ENXIO when a frame has no address, EINVAL when the frames overlap; each kills the VM.
        """
        if not self.frames.mapped:
            self.frames.check()
            self.initialize()
            self.frames.map()

    def place_legacy(self, kind: int, base: int) -> None:
        """KVM_ARM_SET_DEVICE_ADDR. KvmError as of the attributes, but ENODEV for an unknown type."""
        if kind not in self.frames.bases:
            raise KvmError(errno.ENODEV, f"a GICv2 has no address of type {kind}")
        self.frames.place(kind, base)

    def cpu_by_id(self, vcpu_id: int) -> VgicV2Cpu:
        """The vCPU with that id. KvmError(EINVAL)."""
        for cpu in self.cpus:
            if cpu.vcpu.vcpu_id == vcpu_id:
                found: VgicV2Cpu = cpu
                return found
        raise KvmError(errno.EINVAL, f"there is no vCPU with id {vcpu_id}")

    def _check_injection(self) -> None:
        self.initialize()

    # -- becoming pending ------------------------------------------------------------------------------------

    def pend_edge(self, irq: VgicIrq) -> None:
        """An edge: latch ``irq``, which is edge-triggered, and queue it."""
        self.set_pending(irq)

    def raise_sgi(self, sgi: Sgi, senders: int) -> None:
        """Make ``sgi`` pending from each vCPU whose id is a bit of ``senders``; 0 only queues it if it is pending.

        Who listens is told of one sender at a time: of the next one when the one before is taken.
        """
        for bit in _bits(senders):
            self.ledger.raised += 1
            if sgi.senders & bit:
                self._note_coalesced(sgi)
                continue
            if not sgi.senders:
                self._note_pending(sgi)
            sgi.senders |= bit
        if sgi.senders:
            sgi.pending = True
            self._sgi_changed(sgi, event=True)

    def clear_sgi(self, sgi: Sgi, senders: int) -> None:
        """Make ``sgi`` no longer pending from those."""
        for bit in _bits(sgi.senders & senders):
            sgi.senders ^= bit
            if sgi.senders:
                self.ledger.drop(SGI_CLEARED)
            else:
                self.drop(sgi, SGI_CLEARED)
        sgi.pending = bool(sgi.senders)
        self._sgi_changed(sgi, event=False)

    def _sgi_changed(self, sgi: Sgi, *, event: bool) -> None:
        self.settle(sgi, event=event)
        if sgi.target is not None:
            sgi.target.update()  # the number of its senders counts, too

    def set_priority(self, irq: VgicIrq, priority: int) -> None:
        super().set_priority(irq, priority)
        if irq.active and irq.entry is not None:
            irq.entry[3].update()  # what is behind an active SGI depends on its priority


def _bits(value: int) -> list[int]:
    return [1 << n for n in range(value.bit_length()) if value >> n & 1]


# -- attributes ---------------------------------------------------------------------------------------------


def _set_address(vgic: VgicV2, attr: int, ptr: Pointer) -> None:
    vgic.frames.place(attr, ptr.u64())


def _get_address(vgic: VgicV2, attr: int, ptr: Pointer) -> None:
    ptr.put_u64(vgic.frames.bases[attr])


def _no_address(_vgic: VgicV2, attr: int) -> None:
    raise KvmError(errno.ENXIO, f"a GICv2 has no address of type {attr}")


def _unknown_address(vgic: VgicV2, attr: int, ptr: Pointer) -> None:
    # The value is fetched before the type is looked at.
    ptr.u64()
    _no_address(vgic, attr)


def _cpu(vgic: VgicV2, attr: int) -> VgicV2Cpu:
    """The vCPU that an attribute number names: the document says by index, the kernel goes by id."""
    return vgic.cpu_by_id((attr & uapi.KVM_DEV_ARM_VGIC_CPUID_MASK) >> uapi.KVM_DEV_ARM_VGIC_CPUID_SHIFT)


def _offset(attr: int) -> int:
    return attr & uapi.KVM_DEV_ARM_VGIC_OFFSET_MASK


def _register_attr(id_: str, block: RegisterBlock) -> Attr:
    """The family of the registers of a frame, as the vCPU in the attribute number sees them."""

    def set_(vgic: VgicV2, attr: int, ptr: Pointer) -> None:
        cpu = _cpu(vgic, attr)
        value = ptr.u32()
        with vgic.vm.lock_vcpus():
            vgic.initialize()
            block.user_write(cpu, _offset(attr), value)

    def get(vgic: VgicV2, attr: int, ptr: Pointer) -> None:
        cpu = _cpu(vgic, attr)
        with vgic.vm.lock_vcpus():
            vgic.initialize()
            value = block.user_read(cpu, _offset(attr))
        ptr.put_u32(value)

    def has(vgic: VgicV2, attr: int) -> None:
        if not block.has(_cpu(vgic, attr), _offset(attr)):
            raise KvmError(errno.ENXIO, f"{block.name} has no register at {_offset(attr):#x}")

    errors = (errno.EINVAL, errno.EFAULT, errno.EBUSY, errno.ENXIO)
    return Attr(id_, "vCPU and offset", type="u32", set=set_, get=get, has=has, errors=errors)


def _address_attr(id_: str, name: str, number: int) -> Attr:
    errors = (errno.EFAULT, errno.EEXIST, errno.EINVAL, errno.E2BIG)
    return Attr(id_, name, number=number, type="u64", set=_set_address, get=_get_address, errors=errors)


VgicV2.attributes = AttrTable(
    (
        Group(
            uapi.KVM_DEV_ARM_VGIC_GRP_ADDR,
            "KVM_DEV_ARM_VGIC_GRP_ADDR",
            (
                _address_attr("vgic-v2.addr.dist", "KVM_VGIC_V2_ADDR_TYPE_DIST", uapi.KVM_VGIC_V2_ADDR_TYPE_DIST),
                _address_attr("vgic-v2.addr.cpu", "KVM_VGIC_V2_ADDR_TYPE_CPU", uapi.KVM_VGIC_V2_ADDR_TYPE_CPU),
                # Reading this one takes an index from user memory, and that comes before the question of the model.
                Attr(
                    "vgic-v2.any",
                    "KVM_VGIC_V3_ADDR_TYPE_REDIST_REGION",
                    number=uapi.KVM_VGIC_V3_ADDR_TYPE_REDIST_REGION,
                    type="u64",
                    set=_unknown_address,
                    get=_unknown_address,
                    has=_no_address,
                    errors=(errno.EFAULT, errno.ENXIO),
                ),
                Attr(
                    "vgic-v2.any",
                    "(any other address type)",
                    type="u64",
                    set=_unknown_address,
                    has=_no_address,
                    errors=(errno.EFAULT, errno.ENXIO),
                ),
            ),
        ),
        Group(
            uapi.KVM_DEV_ARM_VGIC_GRP_DIST_REGS,
            "KVM_DEV_ARM_VGIC_GRP_DIST_REGS",
            (_register_attr("vgic-v2.dist-regs", GICD),),
        ),
        Group(
            uapi.KVM_DEV_ARM_VGIC_GRP_CPU_REGS,
            "KVM_DEV_ARM_VGIC_GRP_CPU_REGS",
            (_register_attr("vgic-v2.cpu-regs", GICC),),
        ),
        nr_irqs_group("vgic-v2"),
        Group(uapi.KVM_DEV_ARM_VGIC_GRP_CTRL, "KVM_DEV_ARM_VGIC_GRP_CTRL", (init_attr("vgic-v2"),)),
    )
)
