"""The named priorities of one instant.

Events of the same nanosecond run in the order of these numbers; within one number in the order of their tie
(0, or drawn from the seed), then first come, first served.
"""

from __future__ import annotations

from enum import IntEnum


class Priority(IntEnum):
    """What goes first among things that happen at the same nanosecond."""

    CHANNEL = 0
    """An event that was under way arrives before anybody acts at that instant, or it would be seen a step late."""
    TIMER = 1
    """A timer has fired before whoever reads it at that instant: expiry is a fact of time, not of scheduling."""
    DEVICE = 2
    """Devices raise their interrupts before the vCPUs look, so that a vCPU sees all that is pending by then."""
    VCPU = 3
    """vCPUs run after what they can observe has happened."""
    TASK = 4
    """VMM loops and test code: they see an instant with devices and vCPUs done."""
    LAST = 7
    """The end of an instant: an ``advance`` comes back when all else due by then has run."""
