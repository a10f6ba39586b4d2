"""A progress bar, drawn by wall time from a thread of its own: the simulation is not slowed down by it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_FIRST_S = 0.5
"""Runs that are over sooner show none."""
_EVERY_S = 0.2


@contextmanager
def shown(fraction: Callable[[], float], what: str) -> Iterator[None]:
    """While the block runs, show ``fraction()`` (0 to 1) on standard error."""
    over = threading.Event()
    thread = threading.Thread(target=_draw, args=(fraction, what, over), name="fabric progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _draw(fraction: Callable[[], float], what: str, over: threading.Event) -> None:
    if over.wait(_FIRST_S):
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, auto_refresh=False) as bar:
        task = bar.add_task(what, total=1.0)
        while not over.wait(_EVERY_S):
            bar.update(task, completed=fraction(), refresh=True)
