"""Results for people: tables on a terminal."""

from __future__ import annotations

from fabric.report.text import render

__all__ = ["render"]
