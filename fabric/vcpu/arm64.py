"""The arm64 vCPU: system registers, hypercalls, the generic timers, stolen time.

System registers go by their Arm names: the ICC_* CPU interface of the GIC, ISR_EL1, the timers (CNT*_EL0), DAIF, and
those of :mod:`fabric.vcpu.arm64_sysregs`. Hypercalls are in :mod:`fabric.vcpu.smccc`: PSCI, with which a vCPU turns
others on and off and ends the machine, stolen time, and KVM's own.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, NoReturn

from fabric.clock.arch_timer import ArchTimers
from fabric.devices.arm.vgic_cpuif import ICC_READ, ICC_WRITE, VgicV3Cpu
from fabric.uapi.kvm import KVM_CAP_ARM_NISV_TO_USER, KVM_SYSTEM_EVENT_SHUTDOWN
from fabric.vcpu import smccc
from fabric.vcpu.arm64_sysregs import BY_NAME, SystemRegisters
from fabric.vcpu.cpu import Cpu
from fabric.vcpu.exits import NisvExit, SystemEventExit
from fabric.vcpu.pmu import GUEST_REGISTERS
from fabric.vcpu.pvtime import INVALID_IPA, StolenTime
from fabric.vcpu.user_gic import CpuLines
from fabric.vcpu.vcpu import Vcpu

if TYPE_CHECKING:
    from collections.abc import Callable

    from fabric.clock.arch_timer import ArchCounter
    from fabric.clock.engine import Engine
    from fabric.devices.base import VmServices
    from fabric.vcpu.pmu import Pmu

DAIF_I = 1 << 1
"""The IRQ bit in the immediate of DAIFSet and DAIFClr."""
PSTATE_I = 1 << 7
"""The IRQ bit of DAIF as a register."""

ISS_WNR = 1 << 6
ISS_TRANSLATION_FAULT = 0x05
"""At level 1 of stage 2: nothing is mapped anywhere near."""

_TRAPPED = frozenset({"ICC_SGI1R_EL1", "ICC_ASGI1R_EL1", "ICC_SGI0R_EL1"})
"""Writes that KVM has to emulate: the hardware's CPU interface cannot reach another vCPU."""
_EOI = frozenset({"ICC_EOIR0_EL1", "ICC_EOIR1_EL1"})
_GICV2_READ = {"ISR_EL1": ICC_READ["ISR_EL1"]}


class DataAbort(Exception):
    """Raised in a guest program by the access at ``gpa`` to which the VMM injected an external abort."""

    def __init__(self, gpa: int) -> None:
        super().__init__(f"external abort at {gpa:#x}")
        self.gpa = gpa


class Arm64Cpu(Cpu):
    """What an arm64 guest program runs on. ``cpu.mrs(name)``, ``cpu.msr(name, value)``, ``cpu.hvc(...)``.

    The two registers that every interrupt needs the hardware answers without leaving the guest, so they are plain
    calls as well: ``iar1()`` reads ICC_IAR1_EL1 and ``eoir1(intid)`` writes ICC_EOIR1_EL1. What the end of an
    interrupt costs then passes with the next thing that takes time. (RuntimeError in a VM without a GICv3.)
    """

    __slots__ = ("_icc_read", "_icc_write", "_interface", "_write_costs", "eoir1", "iar1")

    _vcpu: Arm64Vcpu

    def bind(self, vcpu: Vcpu) -> None:
        """As the base class; the system registers are those of ``vcpu`` as well."""
        super().bind(vcpu)
        costs = vcpu.costs
        priced = {**dict.fromkeys(_TRAPPED, costs.exit_ns), **dict.fromkeys(_EOI, costs.eoi_ns)}
        self._write_costs = {name: ns for name, ns in priced.items() if ns}
        self._interface: Any = vcpu.cpu_interface  # there by the first run if it ever is
        if self._interface is None:
            self._controller = self._vcpu.lines
        present = isinstance(self._interface, VgicV3Cpu)  # a GICv2's interface is in memory
        self.iar1: Callable[[], int] = self._interface.iar1 if present else self._no_interface
        self.eoir1: Callable[[int], None] = self._interface.eoir1 if present else self._no_interface
        if present and costs.eoi_ns:
            self.eoir1 = self._priced_eoir1
        self._icc_read = ICC_READ if present else {} if self._interface is None else _GICV2_READ
        if present and not self._write_costs:
            self._icc_write = ICC_WRITE  # one for all vCPUs: it stays in the cache
        else:
            self._icc_write = {n: ICC_WRITE[n] for n in ICC_WRITE if present and n not in self._write_costs}

    async def mrs(self, name: str) -> int:
        """Read system register ``name``. ValueError for one that is not there or not readable."""
        try:
            read = self._icc_read[name]
        except KeyError:
            pass
        else:
            return read(self._interface)
        other = _READ.get(name)
        if other is not None:
            return other(self)
        try:
            return self._vcpu.sysregs.read(name)
        except KeyError:
            raise ValueError(_unknown(name, "mrs")) from None

    async def msr(self, name: str, value: int) -> None:
        """Write system register ``name``; DAIFSet and DAIFClr take their immediate."""
        try:
            write = self._icc_write[name]
        except KeyError:
            pass
        else:
            write(self._interface, value)
            return
        if name in self._write_costs and isinstance(self._interface, VgicV3Cpu):
            await self._spend(self._write_costs[name])
            ICC_WRITE[name](self._interface, value)
            return
        other = _WRITE.get(name)
        if other is not None:
            other(self, value)
            return
        try:
            self._vcpu.sysregs.write(name, value)
        except KeyError:
            raise ValueError(_unknown(name, "msr")) from None

    def _priced_eoir1(self, intid: int) -> None:
        self._interface.eoir1(intid)
        self._vcpu.owe(self._vcpu.costs.eoi_ns)

    def _no_interface(self, *_: int) -> NoReturn:
        raise RuntimeError("ICC_IAR1_EL1, ICC_EOIR1_EL1: the VM has no GICv3")

    async def load_pair(self, gpa: int) -> tuple[int, int]:
        """LDP: the two 64-bit words at ``gpa``, an access that is for memory only.

        Hardware gives no syndrome for it, so nobody can emulate it: outside memory slots, in-kernel devices
        included, KVM_RUN fails with ENOSYS or exits with KVM_EXIT_ARM_NISV, and the guest is where it was.

        Raises:
            DataAbort: the VMM has injected one.
        """
        while not self._vcpu.vm.memory.is_backed(gpa, 16):
            await self._no_syndrome(gpa, ISS_TRANSLATION_FAULT)
        memory = self._vcpu.vm.memory
        return memory.read_u64(gpa), memory.read_u64(gpa + 8)

    async def store_pair(self, gpa: int, first: int, second: int) -> None:
        """STP; as :meth:`load_pair`, and read-only slots are not memory to it."""
        while not self._vcpu.vm.memory.is_writable(gpa, 16):
            await self._no_syndrome(gpa, ISS_TRANSLATION_FAULT | ISS_WNR)
        self._vcpu.vm.memory.write_u64(gpa, first)
        self._vcpu.vm.memory.write_u64(gpa + 8, second)

    async def _no_syndrome(self, gpa: int, iss: int) -> None:
        if self._vcpu.costs.exit_ns:
            await self._spend(self._vcpu.costs.exit_ns)
        await self._leave(NisvExit(gpa, iss, KVM_CAP_ARM_NISV_TO_USER in self._vcpu.vm.enabled))

    async def hvc(self, function: int, *args: int) -> int:
        """A hypercall: function and up to three arguments (x0 first); x0 of the answer, negative for an error."""
        return (await self.smccc(function, *args))[0]

    async def smccc(self, function: int, *args: int) -> smccc.Words:
        """A hypercall, with all of its answer: x0 to x3. The functions are those of :mod:`fabric.vcpu.smccc`."""
        if self._vcpu.costs.exit_ns:
            await self._spend(self._vcpu.costs.exit_ns)
        return await smccc.call(self, function, args)

    async def system_off(self) -> None:
        """The machine is turned off, as by PSCI SYSTEM_OFF: the VMM gets KVM_EXIT_SYSTEM_EVENT."""
        if self._vcpu.costs.exit_ns:
            await self._spend(self._vcpu.costs.exit_ns)
        await self._leave(SystemEventExit(KVM_SYSTEM_EVENT_SHUTDOWN))


class Arm64Vcpu(Vcpu):
    """An arm64 vCPU: features, registers, timers and PMU besides what every vCPU has.

    Args:
      vm, vcpu_id, index, engine: as for :class:`~fabric.vcpu.vcpu.Vcpu`.
      counter, host, firmware: what it has in common with the VM's other vCPUs: the counter, the host's ID registers
        by encoding, and what hypercalls find.
    """

    __slots__ = ("_cpu_class", "features", "firmware", "lines", "pmu", "stolen", "sysregs", "timers")

    def __init__(
        self,
        vm: VmServices,
        vcpu_id: int,
        index: int,
        engine: Engine | None,
        counter: ArchCounter,
        host: dict[int, int],
        firmware: smccc.Firmware,
    ) -> None:
        super().__init__(vm, vcpu_id, index, engine)
        self.initialized = False
        self.features: frozenset[int] = frozenset()
        """KVM_ARM_VCPU_* features given to KVM_ARM_VCPU_INIT."""
        self.timers = ArchTimers(counter, name=f"vcpu{vcpu_id}")
        self.lines = CpuLines(self)
        """In use without an in-kernel GIC."""
        self.sysregs = SystemRegisters(host)
        self.firmware = firmware
        self.stolen = StolenTime()
        self.pmu: Pmu | None = None
        """With KVM_ARM_VCPU_PMU_V3, see :meth:`give_pmu`."""
        self._cpu_class: type[Cpu] = Arm64Cpu

    @property
    def cpu_class(self) -> type[Cpu]:  # type: ignore[override]
        """What its guest runs on; a guest that counts needs another class than one that does not."""
        return self._cpu_class

    def give_pmu(self, pmu: Pmu, cpu_class: type[Cpu]) -> None:
        """Have a PMU, and guests run on a CPU that feeds it."""
        self.pmu = pmu
        self._cpu_class = cpu_class

    def stole(self, ns: int) -> None:
        """As the base class; the guest learns of it in its memory."""
        super().stole(ns)
        if self.stolen.base != INVALID_IPA:
            self.stolen.update(self.vm.memory, self.stolen_ns)

    def entering(self) -> None:
        """Registers, CPU interface, timers and PMU go onto the CPU."""
        self.sysregs.load()
        if self.cpu_interface is not None:
            self.cpu_interface.load()
        self.timers.load()
        if self.pmu is not None:
            self.pmu.load()
        if self.stolen.base != INVALID_IPA:
            self.stolen.update(self.vm.memory, self.stolen_ns)
        if self.cpu_interface is None:
            self.lines.check()

    def touch_hardware(self) -> None:
        """Registers, CPU interface and timers are loaded and stored again; a timer that is due raises its line."""
        self.sysregs.load()
        if self.cpu_interface is not None:
            self.cpu_interface.touch_hardware()
        self.timers.load()
        self.timers.put()

    def leaving(self) -> None:
        """The lines stand still until the next KVM_RUN."""
        self.timers.put()
        if self.pmu is not None:
            self.pmu.put()
        if self.cpu_interface is None:
            self.lines.tell()


def _read_daif(cpu: Arm64Cpu) -> int:
    return PSTATE_I if cpu.masked else 0


def _write_daif(cpu: Arm64Cpu, value: int) -> None:
    if value & PSTATE_I:
        cpu.mask()
    else:
        cpu.unmask()


def _daif_set(cpu: Arm64Cpu, value: int) -> None:
    if value & DAIF_I:
        cpu.mask()


def _daif_clear(cpu: Arm64Cpu, value: int) -> None:
    if value & DAIF_I:
        cpu.unmask()


def _timer_read(name: str) -> Callable[[Arm64Cpu], int]:
    read = ArchTimers.READ[name]
    return lambda cpu: read(cpu._vcpu.timers)


def _timer_write(name: str) -> Callable[[Arm64Cpu, int], None]:
    write = ArchTimers.WRITE[name]
    return lambda cpu, value: write(cpu._vcpu.timers, value)


_READ: dict[str, Callable[[Arm64Cpu], int]] = {
    "DAIF": _read_daif,
    "ISR_EL1": lambda cpu: cpu._vcpu.lines.isr(),
    "PMMIR_EL1": lambda cpu: 0,
    **{name: _timer_read(name) for name in ArchTimers.READ},
}

_WRITE: dict[str, Callable[[Arm64Cpu, int], None]] = {
    "DAIF": _write_daif,
    "DAIFSet": _daif_set,
    "DAIFClr": _daif_clear,
    **{name: _timer_write(name) for name in ArchTimers.WRITE},
}


def _unknown(name: str, instruction: str) -> str:
    if name in ICC_READ or name in ICC_WRITE:
        return f"{instruction} of {name}: it cannot be accessed so, or the VM has no GICv3"
    if name in BY_NAME or name in _READ or name in _WRITE or name in GUEST_REGISTERS:
        return f"{instruction} of {name}: it cannot be accessed so, or the vCPU does not have it"
    near = get_close_matches(name, [*ICC_READ, *ICC_WRITE, *_READ, *_WRITE, *GUEST_REGISTERS, *BY_NAME], n=3)
    return f"{instruction} of {name!r}: there is no such register" + (f", but {', '.join(near)}" if near else "")
