"""Scenarios: defaults, precedence, every mistake at once, and the resolved file."""

from __future__ import annotations

import contextlib
import json
import tomllib
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabric.errors import ConfigError
from fabric.scenario.load import load_scenario, make_scenario, parse_override, resolved, to_json, to_toml
from fabric.scenario.model import Block, CostTable, Fault, IpiLoad, Network, Replay, Scenario
from fabric.vcpu.host import Costs


def problems(document: dict[str, Any], **keywords: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        make_scenario(document, **keywords)
    return caught.value.problems


# What is taken from where


def test_nothing_is_required() -> None:
    """An empty file is an idle machine: everything has a default."""
    assert Scenario() == make_scenario({})


def test_the_file_wins_over_defaults_and_overrides_over_the_file() -> None:
    """defaults < file < command line, key by key."""
    document = {"vcpus": 8, "costs": {"exit_ns": 1, "eoi_ns": 2}}

    scenario = make_scenario(document, {"costs.eoi_ns": 3, "seed": 9, "tick.hz": 250})

    assert (8, 9, 250) == (scenario.vcpus, scenario.seed, scenario.tick.hz)
    assert CostTable(exit_ns=1, eoi_ns=3) == scenario.costs
    assert {"vcpus": 8, "costs": {"exit_ns": 1, "eoi_ns": 2}} == document  # the caller's own is left alone


def test_arrays_of_tables_are_devices() -> None:
    """Each ``[[block]]`` is a device of its own."""
    document = tomllib.loads('[[block]]\nname = "a"\n[[block]]\nname = "b"\nqueues = 4\n[[network]]\n')

    scenario = make_scenario(document)

    assert (Block(name="a"), Block(name="b", queues=4)) == scenario.block
    assert (Network(),) == scenario.network


def test_the_costs_of_vcpus() -> None:
    """The table of the scenario has every cost that vCPUs know, under the same name."""
    costs = CostTable(exit_ns=1, userspace_exit_ns=2, injection_ns=3, eoi_ns=4, wakeup_ns=5, context_switch_ns=6)

    assert Costs(1, 2, 3, 4, 5, 6) == costs.for_vcpus()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("costs.exit_ns=500", ("costs.exit_ns", 500)),
        ("vcpus = 16", ("vcpus", 16)),
        ("trace.events=false", ("trace.events", False)),
        ("name=mixed", ("name", "mixed")),
        ('name="mixed"', ("name", "mixed")),
        ("replay.scale=1/2", ("replay.scale", "1/2")),
    ],
)
def test_settings_of_the_command_line(text: str, expected: tuple[str, Any]) -> None:
    """KEY=VALUE, the value as in the file; quotes may be left out."""
    assert expected == parse_override(text)


@pytest.mark.parametrize("text", ["vcpus", "=3", ""])
def test_a_setting_needs_a_key_and_a_value(text: str) -> None:
    """Anything else is a request that was wrong."""
    with pytest.raises(ConfigError, match="must be KEY=VALUE"):
        parse_override(text)


# What is wrong with it


def test_all_problems_are_reported_at_once() -> None:
    """Types, ranges, choices and unknown keys of all tables, with path and nearest name."""
    document = {
        "vcpu": 3,
        "vcpus": 0,
        "board": "arm64-gicv33",
        "costs": {"exitns": 1, "eoi_ns": -1},
        "block": [{"nme": "x"}, {"arrivals": "expo", "iops": True}],
        "tick": 3,
        "network": {},
        "fault": [{"channel": "msi", "kind": "dely"}, {"channel": "msi", "kind": "delay"}],
    }
    overrides = {"costs.injection_ns": "x", "vcpus.q": 1}

    found = problems(document, overrides=overrides, boards=["x86-apic", "arm64-gicv3"])

    assert sorted(
        [
            "vcpus.q: vcpus has no keys that can be set one by one",
            "board: must be one of arm64-gicv3, x86-apic, not 'arm64-gicv33'; did you mean arm64-gicv3?",
            "vcpus: must be an integer from 1 to 1024, not 0",
            "costs.injection_ns: must be an integer >= 0, not 'x'",
            "costs.eoi_ns: must be an integer >= 0, not -1",
            "costs.exitns: unknown key; did you mean exit_ns?",
            "block[0].nme: unknown key; did you mean name?",
            "block[1].iops: must be an integer from 1 to 100000000, not True",
            "block[1].arrivals: must be one of exponential, constant, not 'expo'; did you mean exponential?",
            "network: must be an array of tables, not {}",
            "tick: must be a table, not 3",
            "fault[0].kind: must be one of hold, drop, duplicate, delay, fail, not 'dely'; did you mean delay?",
            "fault[1]: delay_ns must be > 0 for a fault of kind delay",
            "vcpu: unknown key; did you mean vcpus?",
        ]
    ) == sorted(found)


def test_an_unknown_key_with_no_near_name_lists_the_known() -> None:
    """What could have been meant is said in any case."""
    assert ["tick.zzz: unknown key; known are hz, handler_ns"] == problems({"tick": {"zzz": 1}})


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"vcpus": 1.5}, "vcpus: must be an integer from 1 to 1024, not 1.5"),
        ({"vcpus": "4"}, "vcpus: must be an integer from 1 to 1024, not '4'"),
        ({"seed": -1}, "seed: must be an integer from 0 to 18446744073709551615, not -1"),
        ({"explore_ties": 1}, "explore_ties: must be true or false, not 1"),
        ({"name": "../x"}, "name: must be a name of letters, digits, '.', '_' and '-', not '../x'"),
        ({"board": 3}, "board: must be a string, not 3"),
        ({"memory_bytes": (1 << 30) + 1}, "memory_bytes must be a multiple of 4096, not 1073741825"),
        ({"duration_ns": 0}, "duration_ns must be > 0 unless a trace is replayed"),
        ({"ipi": {"per_s": 1}}, "ipi.per_s must be 0 with one vCPU, which has nobody to interrupt"),
        (
            {"block": [{}, {}], "network": [{"name": "disk"}]},
            "every device needs a name of its own, but there are two of disk",
        ),
        (
            {"network": [{"coalesce_packets": 8}]},
            "network[0]: coalesce_ns must be > 0 when coalesce_packets > 1, or the last packets stay unannounced",
        ),
        (
            {"replay": {"scale": "0"}},
            "replay.scale: must be a positive number or a fraction such as '1/2', not '0'",
        ),
        (
            {"replay": {"scale": "1/0"}},
            "replay.scale: must be a positive number or a fraction such as '1/2', not '1/0'",
        ),
        ({"fault": [{}]}, "fault[0]: channel must name the channel that fails"),
        (
            {"fault": [{"channel": "msi", "from_ns": 5, "until_ns": 5}]},
            "fault[0]: until_ns must be > from_ns (5), not 5",
        ),
        (
            {"fault": [{"channel": "msi", "kind": "hold", "count": 1}]},
            "fault[0]: a hold stops every event: count and probability are not for it",
        ),
        (
            {"fault": [{"channel": "msi", "probability": 0}]},
            "fault[0].probability: must be a number > 0 and <= 1, not 0",
        ),
        (
            {"fault": [{"channel": "msi", "kind": "fail", "errno": "EAGAINN"}]},
            "fault[0].errno: must be the name of an errno such as EAGAIN, not 'EAGAINN'; did you mean EAGAIN?",
        ),
    ],
)
def test_each_rule_has_its_sentence(document: dict[str, Any], expected: str) -> None:
    """What must hold, then the value that does not."""
    assert [expected] == problems(document)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param(b"vcpus = ", "is not TOML", id="syntax"),
        pytest.param(b"vcpus = 1\nvcpus = 2", "is not TOML", id="twice"),
        pytest.param(b'name = "\xff"', "is not UTF-8 text", id="encoding"),
    ],
)
def test_a_file_that_is_no_scenario(text: bytes, words: str, tmp_path: Path) -> None:
    """The file is named and the reason given."""
    path = tmp_path / "s.toml"
    path.write_bytes(text)

    with pytest.raises(ConfigError, match=words) as caught:
        load_scenario(path)

    assert str(path) == caught.value.where


def test_a_missing_file(tmp_path: Path) -> None:
    """An unreadable scenario is a request that was wrong."""
    with pytest.raises(ConfigError, match="cannot be read: no such file"):
        load_scenario(tmp_path / "absent.toml")


@given(
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.dictionaries(st.sampled_from([*attrs.fields_dict(Scenario), "name", "kind", "x"]), inner, max_size=4),
        ),
    ).filter(lambda value: isinstance(value, dict))
)
def test_no_document_is_more_than_a_config_error(document: dict[str, Any]) -> None:
    """Any document is a scenario or a list of problems, never another exception."""
    with contextlib.suppress(ConfigError):
        assert isinstance(make_scenario(document), Scenario)


def test_the_classes_obey_the_same_rules() -> None:
    """Who builds a scenario in Python is told the same, at construction."""
    with pytest.raises(ValueError, match="vcpus must be an integer from 1 to 1024, not 0"):
        Scenario(vcpus=0)
    with pytest.raises(ValueError, match=r"exit_ns must be an integer >= 0, not 0\.5"):
        CostTable(exit_ns=0.5)  # type: ignore[arg-type]


# What is written into the run directory


names = st.from_regex(r"[a-z][a-z0-9.-]{0,8}", fullmatch=True)
scenarios = st.builds(
    Scenario,
    name=names,
    board=st.text(max_size=8),
    vcpus=st.integers(2, 512),
    pcpus=st.none() | st.integers(1, 64),
    seed=st.integers(0, 2**64 - 1),
    explore_ties=st.booleans(),
    costs=st.builds(CostTable, exit_ns=st.integers(0, 10**6)),
    block=st.lists(st.builds(Block, name=names), max_size=3, unique_by=lambda device: device.name).map(tuple),
    ipi=st.builds(IpiLoad, per_s=st.integers(0, 1000)),
    replay=st.builds(Replay, trace=st.text(max_size=8)),
    fault=st.lists(
        st.builds(
            Fault,
            channel=names,
            count=st.none() | st.integers(1, 9),
            probability=st.floats(0, 1, exclude_min=True),
            until_ns=st.none() | st.integers(1, 10**9),
        ),
        max_size=2,
    ).map(tuple),
)


@given(scenarios)
def test_the_resolved_scenario_gives_itself(scenario: Scenario) -> None:
    """A run is repeated from its run directory: JSON and TOML read back as the same scenario."""
    assert scenario == make_scenario(json.loads(to_json(scenario)))
    assert scenario == make_scenario(tomllib.loads(to_toml(scenario)))


def test_the_resolved_scenario_has_every_key() -> None:
    """Defaults are spelled out, so that a later version with other defaults repeats the run."""
    document = resolved(make_scenario({"block": [{}]}))

    absent = {"pcpus", "explore_ties"}  # stays absent: what that means depends on other keys
    assert set(attrs.fields_dict(Scenario)) - absent == set(document)
    assert set(attrs.fields_dict(Block)) == set(document["block"][0])


def test_a_replayed_trace_is_found_beside_the_scenario(tmp_path: Path) -> None:
    """The path in a file is relative to the file, and absolute once resolved."""
    path = tmp_path / "s.toml"
    path.write_text('[replay]\ntrace = "t.txt.gz"\n')

    assert str(tmp_path / "t.txt.gz") == load_scenario(path).replay.trace
