"""Programs of :mod:`qtest_steps` for an ITS: what drives one by hand, and random commands made from seeds.

See :mod:`qtest_programs` for what random programs keep to.
"""

from __future__ import annotations

from random import Random

from qtest_programs import Words
from qtest_steps import (
    COLLECTION_TABLE,
    CONFIG,
    CPUS,
    DEVICE_TABLE,
    FIRST_LPI,
    GICD,
    GITS,
    ITT_SIZE,
    ITTS,
    LEVEL2,
    PENDING,
    PENDING_SIZE,
    QUEUE,
    Program,
    frame,
)

from fabric.devices.arm.vgic_its_commands import encode

CTLR, IIDR, TYPER, CBASER, CWRITER, CREADR, BASER0, BASER1 = 0x0, 0x4, 0x8, 0x80, 0x88, 0x90, 0x100, 0x108
GICR_CTLR, GICR_PROPBASER, GICR_PENDBASER = 0x0, 0x70, 0x78
VALID, INDIRECT, PAGE_64K, PTZ = 1 << 63, 1 << 62, 2 << 8, 1 << 62
COMMAND_SIZE = 32
DEVICES = (0, 1, 8, 77, 300, 8190, 9000)
"""The device table is for 8192 devices if it is flat; with two levels it has pages for device 0 to 16383."""
NO_DEVICES = (7, 40_000, 0xFFFF, 0x1_0000, 0xFFFF_FFFF)
NR_ITTS = 16
MOST_WAITING = 60
"""Commands; a queue has room for twice as many at least."""
ID_BITS = 16


class ItsQueue:
    """An ITS and the LPI side of the redistributors, driven as software does: tables, command queue, commands."""

    def __init__(self, program: Program, *, indirect: bool = False, queue_size: int = 1 << 12) -> None:
        self.program = program
        self.indirect = indirect
        self.queue_size = queue_size
        self.writer = 0
        self.batch: list[bytes] = []

    def enable(self) -> None:
        """Give LPIs and ITS their tables and enable them."""
        program = self.program
        if self.indirect:
            program.store(DEVICE_TABLE, b"".join((VALID | LEVEL2 + n * 0x1_0000).to_bytes(8, "little") for n in (0, 1)))
        for cpu in range(CPUS):
            self.enable_lpis(cpu)
        device_table = DEVICE_TABLE | (INDIRECT if self.indirect else 0)
        program.write(GITS + BASER0, VALID | device_table | PAGE_64K, 8)
        program.write(GITS + BASER1, VALID | COLLECTION_TABLE | PAGE_64K, 8)
        self.place_queue()
        program.write(GITS + CTLR, 1)

    def enable_lpis(self, cpu: int) -> None:
        """At one CPU, with the pending table as it is."""
        write = self.program.write
        write(frame(cpu) + GICR_PROPBASER, CONFIG | ID_BITS - 1, 8)
        write(frame(cpu) + GICR_PENDBASER, PENDING + cpu * PENDING_SIZE, 8)
        write(frame(cpu) + GICR_CTLR, 1)

    def place_queue(self) -> None:
        """An empty command queue, for an ITS that is disabled."""
        self.program.write(GITS + CBASER, VALID | QUEUE | (self.queue_size >> 12) - 1, 8)
        self.program.write(GITS + CWRITER, 0, 8)
        self.writer = 0

    def command(self, name: str, **fields: int) -> None:
        """A command for the next :meth:`ring`."""
        self.batch.append(encode(name, **fields))

    def ring(self) -> None:
        """Store the commands in the queue, and have the ITS read them."""
        for command in self.batch:
            self.program.store(QUEUE + self.writer, command)
            self.writer = (self.writer + COMMAND_SIZE) % self.queue_size
            self.stored()
        self.batch.clear()
        self.publish()
        self.program.read(GITS + CREADR, 8)

    def stored(self) -> None:
        """A command is in the queue."""

    def publish(self, size: int = 8) -> None:
        """Tell the ITS how far the queue is written."""
        self.program.write(GITS + CWRITER, self.writer, size)


class ItsCommands(ItsQueue, Words):
    """Random commands, MSIs, and register accesses.

    What is mapped is kept track of, to make more commands that mean something than commands that do not.
    """

    def __init__(self, seed: int, length: int = 120) -> None:
        Words.__init__(self, Random(f"its {seed}"))
        rng = self.rng
        program = Program(f"its {seed}", "gicv3")
        super().__init__(program, indirect=rng.random() < 0.5, queue_size=rng.choice((1, 1, 2)) << 12)
        self.forwarding = rng.random() < 0.5
        self.enabled = True
        self.waiting = 0
        """Commands stored since the ITS was disabled."""
        self.devices: dict[int, int] = {}
        """Device id to bits of event ids."""
        self.events: dict[tuple[int, int], tuple[int, int]] = {}
        """``(device id, event id)`` to ``(LPI, collection)``."""
        self.collections: dict[int, int] = {}
        """Collection to CPU."""
        self.itts: dict[int, int] = {}
        """Device id to the place of its ITT."""
        self.loaded: set[int] = set()
        """LPIs that were pending in a table when LPIs were enabled. KVM leaves their bits in memory, where they are
        found again when the LPI is mapped anew, so these are not."""
        self.left: set[int] = set()
        """CPUs that LPIs have been moved away from."""
        self.set_up()
        program.essential = len(program.steps)
        actions = {self.commands: 60, self.msi: 12, self.configure_lpi: 6, self.registers: 10, self.toggle: 3,
                   self.restart: 2, self.reload: 4, self.pending: 15}  # fmt: skip
        for action in rng.choices(list(actions), list(actions.values()), k=length):
            action()
        if not self.enabled:
            self.toggle()
        self.pending()

    def set_up(self) -> None:
        """Three collections, three devices, some events."""
        self.program.write(GICD, 2 if self.forwarding else 0)
        self.program.store(CONFIG, self.rng.randbytes(256))
        self.enable()
        for icid in range(3):
            self.map_collection(icid, icid % CPUS)
        for device in DEVICES[:3]:
            self.map_device(device)
        for _ in range(8):
            self.map_event()
        self.ring()

    # Commands.

    def stored(self) -> None:
        self.waiting += not self.enabled
        if self.rng.random() < 0.3:
            self.publish()

    def publish(self, size: int = 0) -> None:
        super().publish(size or self.rng.choice((4, 8)))

    def commands(self) -> None:
        """Some commands; if the ITS is disabled they wait, but those that need memory are not given then."""
        if not self.enabled and self.waiting > MOST_WAITING:
            return
        for _ in range(self.rng.randint(1, 4)):
            kind = self.rng.random()
            if kind < 0.45:
                self.use_event()
            elif kind < 0.75:
                choices = [self.map_event, self.map_event, self.discard, self.discard, self.move, self.move,
                           self.map_collection_again, self.unmap_collection]  # fmt: skip
                if self.enabled:
                    choices += [self.map_device, self.unmap_device, self.move_collection]
                self.rng.choice(choices)()
            else:
                self.nonsense()
        self.ring()

    def event(self) -> tuple[int, int]:
        """An event that is mapped; if there is none, one that could be."""
        return self.rng.choice(list(self.events)) if self.events else (DEVICES[0], 0)

    def use_event(self) -> None:
        device, event = self.event()
        name = self.rng.choice(("INT", "INT", "INT", "CLEAR", "CLEAR", "INV"))
        self.command(name, DeviceID=device, EventID=event)
        if self.rng.random() < 0.2:
            self.command("SYNC", RDbase=self.rng.randrange(CPUS))
        if self.rng.random() < 0.1:
            self.command("INVALL", ICID=self.rng.randrange(4))

    def map_device(self, device: int | None = None) -> None:
        """MAPD with an empty ITT. A device that is mapped is unmapped before."""
        if device is None:
            device = self.rng.choice(DEVICES if self.indirect else DEVICES[:-1])
        if device in self.devices:
            self.drop_device(device)
        if self.batch:
            self.ring()  # commands before this one may still need the ITT that is used again
        free = [slot for slot in range(NR_ITTS) if slot not in self.itts.values()]
        slot = self.itts[device] = self.rng.choice(free)
        bits = self.devices[device] = self.rng.choice((1, 2, 5, 5, 8, 14))
        self.program.zero(ITTS + slot * ITT_SIZE, ITT_SIZE)
        self.command("MAPD", DeviceID=device, Size=bits - 1, ITT_addr=ITTS + slot * ITT_SIZE >> 8, V=1)

    def drop_device(self, device: int) -> None:
        for key in [key for key in self.events if key[0] == device]:
            self.drop_event(key)
        del self.devices[device], self.itts[device]
        self.command("MAPD", DeviceID=device, V=0, Size=self.rng.randrange(ID_BITS))

    def unmap_device(self) -> None:
        if self.devices:
            self.drop_device(self.rng.choice(list(self.devices)))

    def map_event(self) -> None:
        if not self.devices or not self.collections:
            return
        device = self.rng.choice(list(self.devices))
        bits = self.devices[device]
        taken = self.loaded.union(lpi for lpi, _ in self.events.values())
        event = self.rng.choice((self.rng.randrange(1 << bits), (1 << bits) - 1, 0))
        icid = self.rng.choice(list(self.collections))
        if bits == 14 and self.rng.random() < 0.5:
            event = self.rng.randrange(FIRST_LPI, 1 << bits)
            if (device, event) not in self.events and event not in taken:
                self.events[device, event] = event, icid
                self.command("MAPI", DeviceID=device, EventID=event, ICID=icid)
            return
        lpi = self.rng.choice(
            (self.rng.randrange(FIRST_LPI, FIRST_LPI + 256), self.rng.randrange(FIRST_LPI, 1 << ID_BITS))
        )
        if (device, event) not in self.events and lpi not in taken:
            self.events[device, event] = lpi, icid
            self.command("MAPTI", DeviceID=device, EventID=event, pINTID=lpi, ICID=icid)

    def drop_event(self, key: tuple[int, int]) -> None:
        """DISCARD, of an event that is not pending."""
        del self.events[key]
        self.command("CLEAR", DeviceID=key[0], EventID=key[1])
        self.command("DISCARD", DeviceID=key[0], EventID=key[1])

    def discard(self) -> None:
        if self.events:
            self.drop_event(self.event())

    def move(self) -> None:
        if self.events and self.collections:
            key = self.event()
            icid = self.rng.choice(list(self.collections))
            self.left.add(self.collections[self.events[key][1]])
            self.events[key] = self.events[key][0], icid
            self.command("MOVI", DeviceID=key[0], EventID=key[1], ICID=icid)

    def map_collection(self, icid: int, cpu: int) -> None:
        self.collections[icid] = cpu
        self.command("MAPC", ICID=icid, RDbase=cpu, V=1)

    def map_collection_again(self) -> None:
        """As it is, or one that is new."""
        icid = self.rng.choice((0, 1, 2, 3, 500, 8191))
        self.map_collection(icid, self.collections.get(icid, self.rng.randrange(CPUS)))

    def move_collection(self) -> None:
        """All collections of a CPU go to another one, and with MOVALL what is pending as well.

        A MOVALL that comes first moves what is pending too, and is seen to.
        """
        source = self.rng.randrange(CPUS)
        self.left.add(source)
        target = (source + 1) % CPUS
        if self.rng.random() < 0.5:
            self.command("MOVALL", RDbase=source, RDbase2=target)
            self.ring()
            self.program.lpis()
        for icid in [icid for icid, cpu in self.collections.items() if cpu == source]:
            self.map_collection(icid, target)
        self.command("MOVALL", RDbase=source, RDbase2=target)

    def unmap_collection(self) -> None:
        """MAPC with V=0, of a collection without events."""
        unused = [icid for icid in self.collections if icid not in {where for _, where in self.events.values()}]
        if unused and len(self.collections) > 1:
            icid = self.rng.choice(unused)
            cpu = self.collections.pop(icid)
            self.command("MAPC", ICID=icid, RDbase=cpu, V=0)

    def nonsense(self) -> None:
        """A command that breaks a rule; it has no effect, and an event that it would have mapped raises nothing."""
        rng = self.rng
        device, event = self.event()
        bits = self.devices.get(device, 1)
        unmapped = [n for n in range(8) if (device, n) not in self.events]
        no_device = rng.choice([n for n in NO_DEVICES if n not in self.devices])
        no_icid = rng.choice([n for n in (5, 900, 8000, 0xFFFF) if n not in self.collections])
        no_cpu = rng.choice((CPUS, 77, 0xFFFF_FFFF))
        name = rng.choice(("INT", "CLEAR", "DISCARD", "INV"))
        match rng.randrange(12):
            case 0:
                self.command(name, DeviceID=no_device, EventID=event)
            case 1 if unmapped:
                self.command(name, DeviceID=device, EventID=rng.choice(unmapped))
            case 2:
                self.command(name, DeviceID=device, EventID=rng.choice((1 << bits, 0x1_0000, 0xFFFF_FFFF)))
            case 3:
                self.command("MOVI", DeviceID=device, EventID=event, ICID=no_icid)
            case 4 if unmapped:
                self.command("MOVI", DeviceID=device, EventID=rng.choice(unmapped), ICID=0)
            case 5:
                self.map_nonsense(no_device, 0, FIRST_LPI + 300)
            case 6:
                out = 1 << bits if rng.random() < 0.5 else 0xFFFF_FFFF
                self.map_nonsense(device, out, FIRST_LPI + 300)
            case 7 if unmapped and bits > 2:
                lpi = rng.choice((0, 31, 1023, FIRST_LPI - 1, 1 << ID_BITS, 0xFFFF_FFFF))
                self.map_nonsense(device, rng.choice(unmapped), lpi)
            case 8:
                self.command("MAPC", ICID=rng.choice((0, 1, 5)), RDbase=no_cpu, V=1)
            case 9:
                self.command("MOVALL", RDbase=no_cpu, RDbase2=0)
                self.command("MOVALL", RDbase=0, RDbase2=no_cpu)
            case 10:
                size = rng.randrange(ID_BITS, 32)
                self.command("MAPD", DeviceID=rng.choice(DEVICES), Size=size, ITT_addr=ITTS >> 8, V=1)
            case 11:
                self.command("MAPD", DeviceID=rng.choice(NO_DEVICES[2:]), Size=4, ITT_addr=ITTS >> 8, V=1)

    def map_nonsense(self, device: int, event: int, lpi: int) -> None:
        self.command("MAPTI", DeviceID=device, EventID=event, pINTID=lpi, ICID=0)
        self.command("INT", DeviceID=device, EventID=event)

    # Everything else.

    def msi(self) -> None:
        """Device 0 rings the doorbell."""
        known = [event for device, event in self.events if device == 0]
        self.program.msi(self.rng.choice(known) if known and self.rng.random() < 0.8 else self.rng.randrange(1 << 6))

    def configure_lpi(self) -> None:
        """Change the configuration of LPIs in memory, with the INV that has to follow."""
        self.program.store(CONFIG + self.rng.randrange(256), self.rng.randbytes(self.rng.randint(1, 4)))
        if self.enabled:
            self.command("INVALL", ICID=self.rng.choice(list(self.collections)))
            self.ring()

    def registers(self) -> None:
        choices = [(offset, 8) for offset in (TYPER, CBASER, CWRITER, BASER0, BASER1, 0x110, 0x138)]
        choices += [(offset, 4) for offset in (CTLR, IIDR, CBASER + 4, CREADR, 0xFFD0, 0xFFE0, 0xFFE8, 0xFFF0)]
        self.program.read(GITS + self.rng.choice(choices)[0], 4)
        offset, size = self.rng.choice(choices)
        self.program.read(GITS + offset, size)
        cpu = self.rng.randrange(CPUS)
        offset, size = self.rng.choice(((GICR_CTLR, 4), (GICR_PROPBASER, 8), (GICR_PENDBASER, 8)))
        self.program.read(frame(cpu) + offset, size)

    def toggle(self) -> None:
        """Disable or enable the ITS; commands wait meanwhile, and MSIs are lost."""
        self.enabled = not self.enabled
        self.waiting = 0
        self.program.write(GITS + CTLR, int(self.enabled))
        self.program.read(GITS + CTLR)

    def restart(self) -> None:
        """A new command queue for an ITS that is disabled."""
        if not self.enabled:
            self.toggle()
        self.toggle()
        self.queue_size = self.rng.choice((1, 2, 3)) << 12
        self.place_queue()
        self.program.read(GITS + CBASER, 8)
        self.toggle()

    def reload(self) -> None:
        """Disable LPIs at a CPU, write the pending table anew, and enable them.

        Of a vCPU that has not run since, KVM takes LPIs along that were moved away when they were queued for it.
        """
        cpu = self.rng.randrange(CPUS)
        if self.waiting or (self.forwarding and cpu in self.left):
            return
        program = self.program
        program.write(frame(cpu) + GICR_CTLR, 0)
        program.read(frame(cpu) + GICR_CTLR)
        for event in range(self.rng.randrange(3)):
            program.msi(event)
        table = PENDING + cpu * PENDING_SIZE
        program.zero(table, PENDING_SIZE)
        mine = [lpi for lpi, icid in self.events.values() if self.collections[icid] == cpu]
        pending = self.rng.sample(mine, self.rng.randint(0, len(mine)))
        for byte in {lpi // 8 for lpi in pending}:
            bits = sum(1 << lpi % 8 for lpi in pending if lpi // 8 == byte)
            program.store(table + byte, bytes([bits]))
        self.loaded.update(pending)
        self.enable_lpis(cpu)
        self.pending()

    def pending(self) -> None:
        self.program.lpis()
        self.program.read(GITS + CREADR, 8)
