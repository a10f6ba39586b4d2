"""The ITS command queue: what each command does, and what it refuses."""

from __future__ import annotations

import pytest
from its_machine import (
    CBASER,
    CONFIG,
    CREADR,
    CTLR,
    CWRITER,
    DEVICE_TABLE,
    HOLE,
    LPI,
    QUEUE,
    VALID,
    ItsMachine,
    event_command,
    itt,
    mapc,
    mapd,
    mapti,
)

from fabric.devices.arm.vgic_its_commands import COMMANDS, encode

NO_EVENT = "the event must be mapped"
NO_COLLECTION = "the collection must be mapped"
NO_RDBASE = "RDbase must be the number of a vCPU"


def movi(devid: int, eventid: int, icid: int) -> bytes:
    return encode("MOVI", DeviceID=devid, EventID=eventid, ICID=icid)


def movall(source: int, destination: int) -> bytes:
    return encode("MOVALL", RDbase=source, RDbase2=destination)


@pytest.fixture
def machine() -> ItsMachine:
    """Events 0..3 of device 1 are LPIs 8192..8195, in collections 0 and 1 in turn, on vCPUs 0 and 1."""
    machine = ItsMachine()
    machine.map_all()
    return machine


def refused(machine: ItsMachine, *commands: bytes) -> dict[str, int]:
    """Run commands on their own account; why they were refused."""
    machine.its.refused.clear()
    machine.run(*commands)
    return machine.its.refused


def targets(machine: ItsMachine) -> list[int | None]:
    """Index of the vCPU of each LPI."""
    return [None if irq.target is None else irq.target.index for irq in machine.vgic.lpis.values()]


class TestTable:
    def test_twelve_commands(self) -> None:
        """The table has every command KVM knows, once each, with its row in the inventory."""
        expected = {
            "MOVI": 1,
            "INT": 3,
            "CLEAR": 4,
            "SYNC": 5,
            "MAPD": 8,
            "MAPC": 9,
            "MAPTI": 10,
            "MAPI": 11,
            "INV": 12,
            "INVALL": 13,
            "MOVALL": 14,
            "DISCARD": 15,
        }

        assert expected == {command.name: command.opcode for command in COMMANDS}
        assert [f"its.cmd.{command.name.lower()}" for command in COMMANDS] == [c.id for c in COMMANDS]

    def test_encoding(self) -> None:
        """A command is four little-endian words with the opcode lowest."""
        expected = "0a000000010000000200000003200000" + "0400000000000000" + "00" * 8

        assert expected == mapti(1, 2, 8195, 4).hex()

    @pytest.mark.parametrize(
        ("name", "fields", "message"),
        [
            pytest.param("MAPX", {}, "name must be one of", id="name"),
            pytest.param("MAPC", {"EventID": 1}, "a field of MAPC must be one of ICID, RDbase, V", id="field"),
            pytest.param("MAPC", {"ICID": 1 << 16}, "MAPC.ICID must fit 16 bits, not 0x10000", id="wide"),
        ],
    )
    def test_encoding_refuses(self, name: str, fields: dict[str, int], message: str) -> None:
        """A command, field or value that does not exist is a ValueError."""
        with pytest.raises(ValueError, match=message):
            encode(name, **fields)


class TestQueue:
    @pytest.mark.spec("its.commands.rule.trigger", "its.commands.rule.size")
    def test_commands_run_before_the_write_returns(self) -> None:
        """A CWRITER write runs everything up to it, and CREADR follows."""
        machine = ItsMachine()
        machine.memory.write(QUEUE, mapc(0, 0) + mapc(1, 1) + mapc(2, 0))
        machine.set_reg(CWRITER, 64)

        assert 64 == machine.reg(CREADR)
        assert [0, 1] == list(machine.its.collections)

    @pytest.mark.spec("its.commands.rule.trigger", "its.its-regs.rule.ctlr-last")
    def test_enabling_runs_what_waits(self) -> None:
        """Commands queued while the ITS is disabled run when it is enabled."""
        machine = ItsMachine()
        machine.set_reg(CTLR, 0)
        machine.memory.write(QUEUE, mapc(0, 0))
        machine.set_reg(CWRITER, 32)
        assert (0, 0) == (machine.reg(CREADR), machine.reg(CTLR))
        machine.set_reg(CTLR, 1)
        assert (32, 0x8000_0001) == (machine.reg(CREADR), machine.reg(CTLR))
        assert [0] == list(machine.its.collections)

    def test_the_queue_is_a_ring(self) -> None:
        """CREADR wraps at the end of the queue."""
        machine = ItsMachine()
        machine.run(*[encode("SYNC")] * 127)
        machine.memory.write(QUEUE + 127 * 32, mapc(0, 0))
        machine.memory.write(QUEUE, mapc(1, 1))
        machine.set_reg(CWRITER, 32)

        assert 32 == machine.reg(CREADR)
        assert [0, 1] == list(machine.its.collections)

    @pytest.mark.spec("its.commands.rule.errors-ignored")
    def test_an_unreadable_queue_is_skipped(self) -> None:
        """Commands where there is no memory do nothing, and CREADR advances all the same."""
        machine = ItsMachine()
        machine.set_reg(CTLR, 0)
        machine.set_reg(CBASER, VALID | HOLE)
        machine.set_reg(CTLR, 1)
        machine.set_reg(CWRITER, 96)

        assert 96 == machine.reg(CREADR)
        assert {"guest memory must be there": 3} == machine.its.refused

    @pytest.mark.spec("its.commands.rule.errors-ignored")
    def test_unknown_opcodes_are_skipped(self, machine: ItsMachine) -> None:
        """Every opcode that does not exist is passed over."""
        known = {command.opcode for command in COMMANDS}
        unknown = [bytes([opcode]) + b"\xff" * 31 for opcode in range(256) if opcode not in known]

        assert {"the opcode must be one that exists": 244} == refused(machine, *unknown)

    def test_reserved_bits_are_ignored(self, machine: ItsMachine) -> None:
        """Only the fields of a command count."""
        noise = int.from_bytes(event_command("INT", 1, 2), "little") | 0xFFFF_FF00 | 0xABCD << 128
        machine.run(noise.to_bytes(32, "little"))

        assert {LPI + 2: 0} == machine.pending()

    @pytest.mark.spec("its.cmd.sync")
    def test_sync_does_nothing(self, machine: ItsMachine) -> None:
        """SYNC takes any RDbase."""
        assert {} == refused(machine, encode("SYNC", RDbase=0xFFFF))


@pytest.mark.spec("its.cmd.mapd")
class TestMapd:
    def test_drops_a_known_device(self, machine: ItsMachine) -> None:
        """MAPD of a device that exists starts it over; what was pending is dropped."""
        machine.msi(1, 0)
        machine.run(mapd(1, 4))

        assert ({}, 4) == (machine.vgic.lpis, machine.its.devices[1].bits)
        assert {"unmapped": 1} == machine.dropped()

    def test_v0_ignores_size_and_clears_the_dte(self, machine: ItsMachine) -> None:
        """V=0 drops the device, whatever Size says, and zeroes the DTE in memory at once."""
        machine.save()
        assert machine.memory.read_u64(DEVICE_TABLE + 8)
        assert {} == refused(machine, mapd(1, 17, 0))
        assert 0 == machine.memory.read_u64(DEVICE_TABLE + 8)
        assert {} == machine.its.devices

    def test_v0_of_an_unknown_device(self, machine: ItsMachine) -> None:
        """Unmapping what is not mapped is no error, and clears the DTE too."""
        machine.memory.write_u64(DEVICE_TABLE + 8 * 5, VALID)
        assert {} == refused(machine, mapd(5, valid=0))
        assert 0 == machine.memory.read_u64(DEVICE_TABLE + 8 * 5)

    @pytest.mark.parametrize(
        ("command", "reason"),
        [
            pytest.param(mapd(1, 17), "Size must be within GITS_TYPER.ID_bits", id="17-bits"),
            pytest.param(mapd(8192), "the device table must have an entry for the device", id="id"),
            pytest.param(mapd(1 << 16), "the device table must have an entry for the device", id="16-bits"),
        ],
    )
    def test_refuses(self, machine: ItsMachine, command: bytes, reason: str) -> None:
        """Size must fit GITS_TYPER, the device id the table; an existing device stays then."""
        assert {reason: 1} == refused(machine, command)
        assert 4 == machine.its.devices[1].count


@pytest.mark.spec("its.cmd.mapc", "its.commands.rule.rdbase")
class TestMapc:
    def test_retargets(self, machine: ItsMachine) -> None:
        """Mapping a collection again moves the LPIs of its events, pending or not."""
        machine.msi(1, 0)
        machine.run(mapc(0, 1))

        assert [1, 1, 1, 1] == targets(machine)
        assert {LPI: 1} == machine.pending()

    def test_v0_detaches_for_good(self, machine: ItsMachine) -> None:
        """Events of an unmapped collection go nowhere, and mapping it again does not bring them back."""
        machine.msi(1, 0)
        machine.run(mapc(0, 0, 0))
        assert 0 == machine.msi(1, 2)
        assert {LPI: 0} == machine.pending(), "what was pending stays so"
        machine.run(mapc(0, 0))
        assert 0 == machine.msi(1, 2)
        assert 1 == machine.msi(1, 1)

    @pytest.mark.parametrize("valid", [0, 1])
    def test_rdbase_must_exist(self, machine: ItsMachine, valid: int) -> None:
        """RDbase is looked at even when the collection is unmapped."""
        assert {NO_RDBASE: 1} == refused(machine, mapc(0, 2, valid))
        assert 0 == machine.its.collections[0].rdbase

    def test_needs_a_table_entry(self, machine: ItsMachine) -> None:
        """The collection id must fit the table: 8192 entries in a page."""
        reason = "the collection table must have an entry for the collection"

        assert {reason: 1} == refused(machine, mapc(8191, 0), mapc(8192, 0))
        assert 8191 in machine.its.collections


@pytest.mark.spec("its.cmd.mapti", "its.cmd.mapi")
class TestMapti:
    @pytest.mark.parametrize(
        ("command", "reason"),
        [
            pytest.param(mapti(2, 0, LPI, 0), "the device must be mapped", id="device"),
            pytest.param(mapti(1, 32, LPI, 0), "EventID must be within the device's size", id="event"),
            pytest.param(mapti(1, 9, LPI - 1, 0), "pINTID must be an LPI within GICR_PROPBASER.IDbits", id="no-lpi"),
            pytest.param(mapti(1, 9, 1 << 16, 0), "pINTID must be an LPI within GICR_PROPBASER.IDbits", id="too-high"),
            pytest.param(
                mapti(1, 9, LPI + 9, 8192),
                "the collection table must have an entry for the collection",
                id="collection",
            ),
            pytest.param(
                encode("MAPI", DeviceID=1, EventID=9, ICID=0),
                "pINTID must be an LPI within GICR_PROPBASER.IDbits",
                id="mapi",
            ),
        ],
    )
    def test_refuses(self, machine: ItsMachine, command: bytes, reason: str) -> None:
        """A device, an event, an LPI and a collection that exist are needed."""
        assert {reason: 1} == refused(machine, command)
        assert 4 == machine.its.devices[1].count

    def test_of_a_mapped_event_is_ignored(self, machine: ItsMachine) -> None:
        """An event keeps its first mapping."""
        assert {} == refused(machine, mapti(1, 0, LPI + 9, 1))
        assert LPI == machine.its.devices[1].event(0).intid  # type: ignore[union-attr]

    def test_mapi_takes_the_event_id_as_lpi(self, machine: ItsMachine) -> None:
        """MAPI maps event n to LPI n."""
        machine.run(mapd(2, 16), encode("MAPI", DeviceID=2, EventID=9000, ICID=0))
        machine.msi(2, 9000)

        assert {9000: 0} == machine.pending()

    def test_unmapped_collections_come_to_be(self, machine: ItsMachine) -> None:
        """An event may name a collection before MAPC; it goes nowhere until then."""
        machine.run(mapti(1, 9, LPI + 9, 7))
        assert 0 == machine.msi(1, 9)
        machine.run(mapc(7, 1))
        assert 1 == machine.msi(1, 9)
        assert {LPI + 9: 1} == machine.pending()

    def test_events_may_share_an_lpi(self, machine: ItsMachine) -> None:
        """The LPI goes where its first event said, and lives as long as one of them does."""
        machine.run(mapti(1, 9, LPI, 1))
        machine.msi(1, 9)
        assert {LPI: 0} == machine.pending()
        machine.run(event_command("DISCARD", 1, 0))
        assert {LPI: 0} == machine.pending()
        machine.run(event_command("DISCARD", 1, 9))
        assert {} == machine.pending()
        assert {"unmapped": 1} == machine.dropped()

    def test_lpi_may_be_used_again(self, machine: ItsMachine) -> None:
        """Once its last event is gone an LPI can be mapped afresh."""
        machine.msi(1, 0)
        machine.run(event_command("DISCARD", 1, 0), mapti(1, 0, LPI, 1))

        assert {} == machine.pending()
        assert 1 == machine.vgic.lpis[LPI].target.index

    def test_reads_the_configuration(self, machine: ItsMachine) -> None:
        """Enable and priority come from the configuration table: byte n - 8192."""
        machine.memory.write_u8(CONFIG + 9, 0x42)
        machine.run(mapti(1, 9, LPI + 9, 0))
        irq = machine.vgic.lpis[LPI + 9]

        assert (False, 0x40) == (irq.enabled, irq.priority)

    def test_consumes_the_pending_bit(self, machine: ItsMachine) -> None:
        """A pending bit of the table becomes pending state and is cleared in memory, whatever PTZ says."""
        cpu = machine.vgic.cpus[0]
        cpu.pendbaser |= 1 << 62
        byte = machine.pending_table(0) + (LPI + 9) // 8
        machine.memory.write_u8(byte, 0xFF)
        machine.run(mapti(1, 9, LPI + 9, 0))

        assert {LPI + 9: 0} == machine.pending()
        assert 0xFD == machine.memory.read_u8(byte)

    @pytest.mark.parametrize("table", ["configuration", "pending", "itt"])
    def test_needs_memory(self, machine: ItsMachine, table: str) -> None:
        """The event is not mapped when one of its tables is not in a memory slot."""
        if table == "configuration":
            machine.vgic.propbaser = HOLE | 15
        elif table == "pending":
            machine.vgic.cpus[0].pendbaser = HOLE
        machine.run(mapd(2, at=HOLE if table == "itt" else itt(2)), mapti(2, 0, LPI + 9, 0))

        assert 0 == machine.its.devices[2].count
        assert LPI + 9 not in machine.vgic.lpis

    def test_lpi_limit_follows_propbaser(self, machine: ItsMachine) -> None:
        """GICR_PROPBASER.IDbits bounds the LPIs, up to the 16 bits of KVM."""
        machine.vgic.propbaser = CONFIG | 13
        assert 1 << 14 == machine.its.lpi_limit
        machine.vgic.propbaser = CONFIG | 31
        assert 1 << 16 == machine.its.lpi_limit

    def test_wider_ids_are_an_option(self) -> None:
        """With the host option lpi_id_bits events and LPIs may have up to 24 bits."""
        machine = ItsMachine(lpi_id_bits=20)
        machine.vgic.propbaser = CONFIG | 19
        machine.run(mapc(0, 0), mapd(1, 20), mapti(1, 1, 1 << 17, 0))

        assert 1 == machine.msi(1, 1)
        assert 19 == machine.reg(0x8) >> 8 & 0x1F


@pytest.mark.spec("its.cmd.movi")
class TestMovi:
    def test_moves_with_pending_state(self, machine: ItsMachine) -> None:
        """The LPI goes to the vCPU of the new collection, as soon as the vCPU that has it runs."""
        machine.forward()
        machine.msi(1, 0)
        assert (True, False) == (machine.vgic.cpus[0].line, machine.vgic.cpus[1].line)
        machine.run(movi(1, 0, 1))
        assert (False, False) == (machine.vgic.cpus[0].line, machine.vgic.cpus[1].line)
        machine.vgic.cpus[0].load()
        assert (False, True) == (machine.vgic.cpus[0].line, machine.vgic.cpus[1].line)
        assert LPI == machine.vgic.cpus[1].acknowledge(1)

    @pytest.mark.parametrize(
        ("before", "command", "reason"),
        [
            pytest.param([], movi(1, 9, 1), NO_EVENT, id="event"),
            pytest.param([], movi(1, 0, 7), NO_COLLECTION, id="to-nowhere"),
            pytest.param([mapti(1, 9, LPI + 9, 7)], movi(1, 0, 7), NO_COLLECTION, id="to-unmapped"),
            pytest.param([mapti(1, 9, LPI + 9, 7)], movi(1, 9, 1), NO_COLLECTION, id="from-unmapped"),
            pytest.param([mapc(0, 0, 0)], movi(1, 0, 1), NO_COLLECTION, id="from-detached"),
        ],
    )
    def test_refuses(self, machine: ItsMachine, before: list[bytes], command: bytes, reason: str) -> None:
        """The event and both collections must be mapped."""
        machine.run(*before)
        was = targets(machine)

        assert {reason: 1} == refused(machine, command)
        assert was == targets(machine)


@pytest.mark.spec("its.cmd.movall")
class TestMovall:
    def test_moves_lpis_not_collections(self, machine: ItsMachine) -> None:
        """Every LPI of one vCPU goes to the other; a later MOVI or MAPC decides by the collection again."""
        machine.msi(1, 0)
        machine.run(movall(0, 1))
        assert [1, 1, 1, 1] == targets(machine)
        assert {LPI: 1} == machine.pending()
        assert 0 == machine.its.collections[0].rdbase
        machine.run(movi(1, 0, 0))
        assert [0, 1, 1, 1] == targets(machine)
        machine.run(mapc(0, 0))
        assert [0, 1, 0, 1] == targets(machine)

    @pytest.mark.parametrize("command", [movall(0, 2), movall(2, 0)])
    def test_both_vcpus_must_exist(self, machine: ItsMachine, command: bytes) -> None:
        """Neither RDbase may be beyond the vCPUs."""
        assert {NO_RDBASE: 1} == refused(machine, command)
        assert [0, 1, 0, 1] == targets(machine)


@pytest.mark.spec("its.cmd.discard")
class TestDiscard:
    def test_unmaps_and_clears_the_ite(self, machine: ItsMachine) -> None:
        """The event is gone, its pending state with it, and its ITE is zeroed at once."""
        machine.save()
        machine.msi(1, 1)
        assert machine.memory.read_u64(itt(1) + 8)
        machine.run(event_command("DISCARD", 1, 1))
        assert 0 == machine.memory.read_u64(itt(1) + 8)
        assert 0 == machine.msi(1, 1)
        assert {"unmapped": 1, "unmapped event": 1} == machine.dropped()

    def test_queued_lpis_stay_until_taken(self, machine: ItsMachine) -> None:
        """An LPI that waits at a vCPU is still delivered; mapping it again meanwhile keeps it."""
        machine.forward()
        machine.msi(1, 0)
        machine.msi(1, 2)
        machine.run(event_command("DISCARD", 1, 0), event_command("DISCARD", 1, 2), mapti(1, 5, LPI + 2, 0))
        cpu = machine.vgic.cpus[0]
        taken = [cpu.acknowledge(1)]
        cpu.end_of_interrupt(1, taken[0])
        taken.append(cpu.acknowledge(1))
        cpu.end_of_interrupt(1, taken[1])
        machine.check()

        assert [LPI, LPI + 2] == taken
        machine.run(event_command("DISCARD", 1, 5))
        assert LPI + 2 not in machine.vgic.lpis

    def test_unmapped_lpis_go_when_no_longer_queued(self, machine: ItsMachine) -> None:
        """One that leaves its vCPU without being taken is dropped, and does not come back with its number."""
        machine.forward()
        machine.msi(1, 0)
        machine.run(event_command("DISCARD", 1, 0))
        assert {} == machine.dropped()
        machine.vgic.set_forwarding(False)
        machine.vgic.cpus[0].load()
        machine.run(mapti(1, 0, LPI, 0))
        assert ({"unmapped": 1}, {}) == (machine.dropped(), machine.pending())

    @pytest.mark.parametrize(
        ("before", "eventid", "reason"),
        [
            pytest.param([], 9, NO_EVENT, id="event"),
            pytest.param([mapc(0, 0, 0)], 0, NO_COLLECTION, id="detached"),
            pytest.param([mapti(1, 9, LPI + 9, 7)], 9, NO_COLLECTION, id="unmapped-collection"),
        ],
    )
    def test_refuses(self, machine: ItsMachine, before: list[bytes], eventid: int, reason: str) -> None:
        """An event can be discarded only while its collection is mapped."""
        machine.run(*before)
        count = machine.its.devices[1].count

        assert {reason: 1} == refused(machine, event_command("DISCARD", 1, eventid))
        assert count == machine.its.devices[1].count


@pytest.mark.spec("its.cmd.int", "its.cmd.clear")
class TestIntAndClear:
    def test_int_raises_clear_drops(self, machine: ItsMachine) -> None:
        """INT is an MSI by command; CLEAR drops what is pending."""
        machine.run(event_command("INT", 1, 1))
        assert {LPI + 1: 1} == machine.pending()
        machine.run(event_command("CLEAR", 1, 1))
        assert {} == machine.pending()
        assert {"cleared by the guest": 1} == machine.dropped()

    def test_clear_of_what_is_not_pending(self, machine: ItsMachine) -> None:
        """Nothing pending, nothing dropped."""
        machine.run(event_command("CLEAR", 1, 1))

        assert {} == machine.dropped()

    def test_int_that_reaches_nobody_is_dropped(self, machine: ItsMachine) -> None:
        """INT of an unmapped event, or towards disabled LPIs, is a lost interrupt like an MSI."""
        machine.vgic.cpus[0].lpis_enabled = False
        reasons = refused(machine, event_command("INT", 1, 9), event_command("INT", 1, 0))

        assert {"unmapped event": 1, "LPIs disabled": 1} == reasons == machine.dropped()

    @pytest.mark.parametrize("name", ["CLEAR", "INV"])
    def test_events_must_be_mapped(self, machine: ItsMachine, name: str) -> None:
        """CLEAR and INV need the event only, not its collection."""
        machine.run(mapc(0, 0, 0))

        assert {NO_EVENT: 2} == refused(
            machine, event_command(name, 1, 0), event_command(name, 1, 9), event_command(name, 2, 0)
        )


@pytest.mark.spec("its.cmd.inv", "its.cmd.invall")
class TestInv:
    def test_inv_reloads_one(self, machine: ItsMachine) -> None:
        """The configuration of one LPI is read again."""
        machine.memory.write(CONFIG, b"\x40" * 4)
        machine.run(event_command("INV", 1, 1))

        assert [0xA0, 0x40, 0xA0, 0xA0] == [irq.priority for irq in machine.vgic.lpis.values()]

    def test_invall_goes_by_vcpu(self, machine: ItsMachine) -> None:
        """All LPIs that go to the collection's vCPU are read again, those of other collections too."""
        machine.run(mapc(2, 0), movi(1, 1, 2))
        machine.memory.write(CONFIG, b"\x40" * 4)
        machine.run(encode("INVALL", ICID=2))

        assert [0x40, 0x40, 0x40, 0xA0] == [irq.priority for irq in machine.vgic.lpis.values()]

    def test_invall_needs_a_mapped_collection(self, machine: ItsMachine) -> None:
        """A collection that is not there, or has no vCPU, reloads nothing."""
        machine.run(mapti(1, 9, LPI + 9, 7))

        assert {NO_COLLECTION: 2} == refused(machine, encode("INVALL", ICID=7), encode("INVALL", ICID=9))
