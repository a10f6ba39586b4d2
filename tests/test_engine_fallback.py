"""Without trio's private names the engine lets trio step the tasks, and nothing else changes."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import test_engine
import test_engine_cancel
import test_engine_deadlock
import test_timers
from engine_programs import PROGRAMS, log_of

from fabric.clock import _trio, engine


def _tests() -> dict[str, Callable[[], None]]:
    """The tests of the engine that take no arguments."""
    modules = (test_engine, test_engine_cancel, test_engine_deadlock, test_timers)
    return {
        f"{module.__name__}.{name}": test
        for module in modules
        for name, test in vars(module).items()
        if name.startswith("test_") and not inspect.signature(test).parameters
    }


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trio that keeps its state elsewhere."""
    monkeypatch.setattr(engine, "run_context", lambda: None)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", PROGRAMS)
def test_the_log_is_the_same(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways run the same events in the same order, for any seed."""
    fast = log_of(name, seed)
    monkeypatch.setattr(engine, "run_context", lambda: None)

    assert fast == log_of(name, seed)


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("name", _tests())
def test_the_rules_of_the_engine_hold(name: str) -> None:
    """Every rule of the engine holds on the slow way as well."""
    _tests()[name]()


@pytest.mark.parametrize("missing", ["deadlines", "waiting_for_idle"])
def test_a_trio_that_renamed_something_is_noticed(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast way is taken only when every name it needs is there."""
    contexts: list[object] = []
    run_context = _trio.run_context

    class Run:
        def __init__(self, real: object) -> None:
            self.real = real

        def __getattr__(self, name: str) -> object:
            if name == missing:
                raise AttributeError(name)
            return getattr(self.real, name)

    def renamed() -> _trio.RunContext | None:
        from trio._core._run import GLOBAL_RUN_CONTEXT

        slots = vars(GLOBAL_RUN_CONTEXT)
        runner = slots["runner"]
        slots["runner"] = Run(runner)
        try:
            contexts.append(run_context())
        finally:
            slots["runner"] = runner
        return None

    monkeypatch.setattr(engine, "run_context", renamed)
    log_of("ties")

    assert [None] == contexts
