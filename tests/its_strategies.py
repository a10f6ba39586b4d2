"""What guests and VMMs may do to an ITS, for tests with arbitrary sequences."""

from __future__ import annotations

from hypothesis import strategies as st
from its_machine import (
    BASER0,
    BASER1,
    CBASER,
    COLLECTION_TABLE,
    CREADR,
    CTLR,
    CWRITER,
    DEVICE_TABLE,
    HOLE,
    LEVEL2,
    LPI,
    PENDING,
    QUEUE,
    RESET,
    RESTORE_TABLES,
    SAVE_TABLES,
    VALID,
    event_command,
    itt,
    mapc,
    mapd,
    mapti,
)

from fabric.devices.arm.vgic_its_commands import COMMANDS, Command, Field, encode

LIKELY: dict[str, st.SearchStrategy[int]] = {
    "DeviceID": st.one_of(st.integers(0, 3), st.sampled_from([8192, 65535, 1 << 31])),
    "EventID": st.one_of(st.integers(0, 8), st.sampled_from([31, 32, LPI, LPI + 1, 0xFFFF_FFFF])),
    "pINTID": st.one_of(st.integers(LPI, LPI + 8), st.sampled_from([0, 8191, 65535, 65536])),
    "Size": st.sampled_from([0, 2, 4, 4, 13, 15, 16, 31]),
    "ITT_addr": st.sampled_from([itt(n) >> 8 for n in range(4)] + [HOLE >> 8, QUEUE >> 8]),
    "ICID": st.one_of(st.integers(0, 3), st.sampled_from([8191, 8192, 65535])),
    "RDbase": st.one_of(st.integers(0, 2), st.just(0xFFFF_FFFF)),
    "RDbase2": st.integers(0, 3),
    "V": st.sampled_from([0, 1, 1, 1]),
}


def field_values(fields: tuple[Field, ...]) -> st.SearchStrategy[dict[str, int]]:
    return st.fixed_dictionaries({field.name: LIKELY[field.name] for field in fields})


def structured(command: Command) -> st.SearchStrategy[bytes]:
    return field_values(command.fields).map(lambda fields: encode(command.name, **fields))


def on_an_event(*names: str) -> st.SearchStrategy[bytes]:
    """Commands on an event that may well be mapped."""
    return st.builds(event_command, st.sampled_from(names), st.integers(0, 1), st.integers(0, 5))


# Most of what random fields give is refused, and MAPD drops all events of a device, so that what keeps a machine
# going comes more often.
commands = st.one_of(
    st.builds(mapti, st.integers(0, 1), st.integers(0, 8), st.integers(LPI, LPI + 8), st.integers(0, 3)),
    st.builds(mapti, st.integers(0, 1), st.integers(0, 8), st.integers(LPI, LPI + 8), st.integers(0, 3)),
    st.builds(mapc, st.integers(0, 2), st.integers(0, 2)),
    on_an_event("INT", "INV"),
    on_an_event("DISCARD", "CLEAR"),
    st.one_of(*(structured(command) for command in COMMANDS)),
    st.one_of(
        st.binary(min_size=32, max_size=32),
        st.builds(lambda code, rest: bytes([code]) + rest, st.integers(1, 15), st.binary(min_size=31, max_size=31)),
    ),
)

msis = st.one_of(
    st.tuples(st.integers(0, 1), st.integers(0, 5), st.sampled_from([0, 1, 1, 1]), st.just(0)),
    st.tuples(
        LIKELY["DeviceID"], LIKELY["EventID"], st.sampled_from([0, 1, 1, 1, 2]), st.sampled_from([0, 0, 2, 1 << 20])
    ),
)

table_words = st.one_of(
    st.just(0),
    st.integers(0, (1 << 64) - 1),
    st.builds(
        lambda step, at, size: VALID | step << 49 | at >> 8 << 5 | size,
        st.integers(0, 3),
        st.sampled_from([itt(0), itt(1), HOLE]),
        st.sampled_from([0, 2, 4, 15, 16]),
    ),
    st.builds(
        lambda step, lpi, icid: step << 48 | lpi << 16 | icid,
        st.integers(0, 3),
        st.integers(LPI - 1, LPI + 8),
        st.integers(0, 3),
    ),
    st.builds(lambda rdbase, icid: VALID | rdbase << 16 | icid, st.integers(0, 3), st.integers(0, 4)),
)

table_places = st.builds(
    lambda base, n: base + 8 * n,
    st.sampled_from([DEVICE_TABLE, COLLECTION_TABLE, itt(0), itt(1), LEVEL2, QUEUE, PENDING + LPI // 8]),
    st.integers(0, 5),
)

registers = st.one_of(
    st.tuples(st.just(CTLR), st.integers(0, 1)),
    st.tuples(st.just(CWRITER), st.one_of(st.integers(0, 40).map(lambda n: 32 * n), st.integers(0, 1 << 64))),
    st.tuples(st.just(CREADR), st.integers(0, 1 << 13)),
    st.tuples(st.just(CBASER), st.sampled_from([0, VALID | QUEUE, VALID | QUEUE | 1, VALID | HOLE, (1 << 64) - 1])),
    st.tuples(
        st.just(BASER0),
        st.sampled_from([0, VALID | DEVICE_TABLE, VALID | 1 << 62 | DEVICE_TABLE, VALID | HOLE, VALID | QUEUE]),
    ),
    st.tuples(st.just(BASER1), st.sampled_from([0, VALID | COLLECTION_TABLE, VALID | HOLE])),
)

steps = st.one_of(
    st.tuples(st.just("command"), commands),
    st.tuples(st.just("command"), commands),
    st.tuples(st.just("command"), commands),
    st.tuples(st.just("msi"), msis),
    st.tuples(st.just("msi"), msis),
    st.tuples(st.just("register"), registers),
    st.tuples(st.just("control"), st.sampled_from([SAVE_TABLES, SAVE_TABLES, RESTORE_TABLES, RESET])),
    st.tuples(st.just("poke"), st.tuples(table_places, table_words)),
    st.tuples(st.just("lpis"), st.tuples(st.integers(0, 1), st.booleans())),
    st.tuples(st.just("forward"), st.booleans()),
    st.tuples(st.just("take"), st.integers(0, 1)),
)

START = (
    mapc(0, 0),
    mapc(1, 1),
    mapd(0),
    mapd(1),
    *(mapti(0, event, LPI + event, event % 2) for event in range(4)),
)
