"""Whether what is promised is tested: the inventory of the KVM interface against the tests that claim its rows.

Contents: :mod:`~fabric.conformance.rows` reads the inventory, :mod:`~fabric.conformance.marks` the tests,
:mod:`~fabric.conformance.places` finds where a row is implemented, and :func:`examine` puts them together.
"""

from __future__ import annotations

from fabric.conformance.coverage import Coverage, examine, find_project
from fabric.conformance.marks import Marks, Test, read_marks
from fabric.conformance.places import Place, find_places
from fabric.conformance.rows import ARCHITECTURES, Row, read_inventory

__all__ = [
    "ARCHITECTURES",
    "Coverage",
    "Marks",
    "Place",
    "Row",
    "Test",
    "examine",
    "find_places",
    "find_project",
    "read_inventory",
    "read_marks",
]
