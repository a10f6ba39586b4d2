"""Scenario files: TOML in, with every mistake reported at once, and the resolved scenario out.

Precedence is defaults < file < overrides (the command line). Overrides are put into the document before it is
checked, so that they obey the same rules and are reported the same way.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
from cattrs import ClassValidationError, Converter, ForbiddenExtraKeysError, IterableValidationError
from cattrs.gen import make_dict_structure_fn, override

from fabric.errors import ConfigError
from fabric.scenario.model import (
    Block,
    CostTable,
    Fault,
    Guest,
    IpiLoad,
    Network,
    Replay,
    Scenario,
    Tick,
    Tracing,
    did_you_mean,
)

_TABLES = (CostTable, Block, Network, Tick, IpiLoad, Replay, Guest, Tracing, Fault, Scenario)


def load_scenario(
    path: str | os.PathLike[str],
    overrides: Mapping[str, Any] | None = None,
    boards: Collection[str] | None = None,
) -> Scenario:
    """The scenario in a TOML file; ConfigError lists everything that is wrong with it.

    ``overrides`` maps dotted keys (``costs.exit_ns``) to values. A ``replay.trace`` of the file is relative to the
    file. With ``boards`` the board must be one of them.
    """
    where = os.fspath(path)
    try:
        document = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(where, [f"the scenario cannot be read: {reason[:1].lower() + reason[1:]}"]) from error
    except UnicodeDecodeError as error:
        raise ConfigError(where, ["the scenario is not UTF-8 text"]) from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(where, [f"the scenario is not TOML: {error}"]) from error
    replay = document.get("replay")
    if isinstance(replay, dict) and isinstance(trace := replay.get("trace"), str) and trace:
        replay["trace"] = os.path.abspath(os.path.join(os.path.dirname(where), trace))
    return make_scenario(document, overrides, boards, where)


def make_scenario(
    document: Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    boards: Collection[str] | None = None,
    where: str = "scenario",
) -> Scenario:
    """The scenario in an already parsed document; as :func:`load_scenario`."""
    problems: list[str] = []
    merged = _merged(document, overrides or {}, problems)
    board = merged.get("board")
    if boards is not None and isinstance(board, str) and board not in boards:
        known = ", ".join(sorted(boards))
        problems.append(f"board: must be one of {known}, not {board!r}{did_you_mean(board, sorted(boards))}")
    try:
        scenario: Scenario = _CONVERTER.structure(merged, Scenario)
    except ClassValidationError as error:
        problems += _problems(error, "")
    if problems:
        raise ConfigError(where, problems)
    return scenario


def parse_override(text: str) -> tuple[str, Any]:
    """``costs.exit_ns=500`` as key and value; a value that is no TOML is a string. ConfigError without ``=``."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(text, ["a setting must be KEY=VALUE, such as costs.exit_ns=500"])
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()


def resolved(scenario: Scenario) -> dict[str, Any]:
    """Every key with the value it has in the end; absent stays absent. ``make_scenario`` gives the same back."""
    document: dict[str, Any] = _CONVERTER.unstructure(scenario)
    return _without_absent(document)


def to_json(scenario: Scenario) -> str:
    """The resolved scenario as JSON."""
    return json.dumps(resolved(scenario), indent=2) + "\n"


def to_toml(scenario: Scenario) -> str:
    """The resolved scenario as a scenario file."""
    document = resolved(scenario)
    lines = [f"{key} = {_toml(value)}" for key, value in document.items() if not _is_table(value)]
    for key, value in document.items():
        for table in value if isinstance(value, list) else [value] if isinstance(value, dict) else []:
            lines += ["", f"[[{key}]]" if isinstance(value, list) else f"[{key}]"]
            lines += [f"{name} = {_toml(entry)}" for name, entry in table.items()]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    # JSON's numbers, booleans and strings are TOML's as well, but for two things: TOML has no escape for half a
    # surrogate pair, and wants DEL escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _is_table(value: Any) -> bool:
    return isinstance(value, dict | list)


def _without_absent(document: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, dict):
            result[key] = _without_absent(value)
        elif isinstance(value, list | tuple):
            result[key] = [_without_absent(entry) for entry in value]
        elif value is not None:
            result[key] = value
    return result


def _merged(document: Mapping[str, Any], overrides: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    merged = {key: dict(value) if isinstance(value, dict) else value for key, value in document.items()}
    for dotted, value in overrides.items():
        *tables, key = dotted.split(".")
        at: Any = merged
        for table in tables:
            at = at.setdefault(table, {})
            if not isinstance(at, dict):
                problems.append(f"{dotted}: {table} has no keys that can be set one by one")
                break
        else:
            at[key] = value
    return merged


# Structuring: cattrs walks the classes and collects the errors, the rules of the model check the values.


def _converter() -> Converter:
    converter = Converter(forbid_extra_keys=True, detailed_validation=True)
    for table in _TABLES:
        hooks: Any = {
            field.name: override(struct_hook=_hook(converter, field.metadata)) for field in attrs.fields(table)
        }
        converter.register_structure_hook(
            table, make_dict_structure_fn(table, converter, _cattrs_forbid_extra_keys=True, **hooks)
        )
    return converter


def _hook(converter: Converter, metadata: Mapping[str, Any]) -> Callable[[Any, Any], Any]:
    """What turns the value of a key into that of its attribute: its rule, or the table or tables it stands for."""
    rule = metadata.get("rule")
    table: Any = metadata.get("table") or metadata.get("tables")

    def of_value(value: Any, _: Any) -> Any:
        return rule(value)  # type: ignore[misc]

    def of_table(value: Any, _: Any) -> Any:
        if not isinstance(value, dict):
            raise ValueError(f"must be a table, not {value!r}")
        return converter.structure(value, table)

    def of_tables(value: Any, _: Any) -> Any:
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            raise ValueError(f"must be an array of tables, not {value!r}")
        return converter.structure(value, tuple[table, ...])

    return of_value if rule else of_table if "table" in metadata else of_tables


_CONVERTER = _converter()


def _problems(error: BaseException, path: str) -> Iterator[str]:
    """The errors of a structuring as sentences, each beginning with the path to the value."""
    if isinstance(error, ClassValidationError):
        of_fields, of_class = error.group_exceptions()
        for inner, note in of_fields:
            yield from _problems(inner, f"{path}.{note.name}" if path else note.name)
        for other in of_class:
            if isinstance(other, ForbiddenExtraKeysError):
                known = [field.name for field in attrs.fields(other.cl)]
                for key in sorted(other.extra_fields):
                    full = f"{path}.{key}" if path else key
                    yield f"{full}: unknown key{did_you_mean(key, known) or '; known are ' + ', '.join(known)}"
            else:
                yield from _problems(other, path)
    elif isinstance(error, IterableValidationError):
        of_entries, _ = error.group_exceptions()
        for inner, entry in of_entries:
            yield from _problems(inner, f"{path}[{entry.index}]")
    else:
        yield f"{path}: {error}" if path else str(error)
