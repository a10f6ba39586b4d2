"""A histogram of non-negative integers whose memory does not grow with the number of samples.

The layout is the log-linear one of HdrHistogram: every power of two is cut into ``2**bits`` buckets of equal
width. Values below ``2**(bits + 1)`` have a bucket each and are exact. Above, a bucket is ``2**shift`` wide
and starts at ``2**(bits + shift)`` or higher, so its largest value exceeds any other by less than
``1 / 2**bits`` of it. A percentile is reported as the largest value of its bucket, hence::

    exact <= reported <= exact + exact / 2**bits

with ``bits = 10``: never too low, and less than 0.1 % too high. Count, sum, minimum and maximum are exact.

Buckets are kept in a dict by index, as latencies sit in a few clusters; merging adds counts, so it is
associative and commutative and a merged histogram equals the one of all samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from fractions import Fraction
from typing import Any, Self

DEFAULT_BITS = 10

PERCENTILES = ("50", "90", "99", "99.9")
"""The percentiles of every summary, written as in the keys of stats.json (``p50`` ... ``p99.9``)."""


class Histogram:
    """Counts of integer samples (nanoseconds, mostly), mergeable, with percentiles within ``1 / 2**bits``.

    Two histograms are equal when the same samples, up to the bucket, went into both.
    """

    __slots__ = ("bits", "count", "counts", "max", "min", "total")

    def __init__(self, bits: int = DEFAULT_BITS) -> None:
        if not 1 <= bits <= 24:
            raise ValueError(f"bits must be between 1 and 24, not {bits!r}")
        self.bits = bits
        self.count = 0
        self.total = 0
        """The sum of all samples."""
        self.min: int | None = None
        self.max: int | None = None
        self.counts: dict[int, int] = {}
        """Bucket index to number of samples."""

    def record(self, value: int, n: int = 1) -> None:
        """Add ``value`` ``n`` times."""
        if value < 0 or n < 1:
            raise ValueError(f"a sample must be >= 0 and its number >= 1, not {value!r} and {n!r}")
        self.count += n
        self.total += value * n
        if self.min is None or value < self.min:
            self.min = value
        if self.max is None or value > self.max:
            self.max = value
        index = self._index(value)
        self.counts[index] = self.counts.get(index, 0) + n

    def record_many(self, values: Collection[int]) -> None:
        """Add many samples, several times cheaper than one by one."""
        if not values:
            return
        low, high = min(values), max(values)
        if low < 0:
            raise ValueError(f"a sample must be >= 0, not {low!r}")
        self.count += len(values)
        self.total += sum(values)
        self.min = low if self.min is None else min(self.min, low)
        self.max = high if self.max is None else max(self.max, high)
        bits, counts = self.bits, self.counts
        for value, n in Counter(values).items():
            shift = value.bit_length() - bits - 1
            index = value if shift <= 0 else (shift << bits) + (value >> shift)
            counts[index] = counts.get(index, 0) + n

    def percentile(self, percent: float | str) -> int | None:
        """The smallest value that at least ``percent`` per cent of the samples do not exceed (nearest rank).

        ``None`` without samples. 0 gives the minimum and 100 the maximum, both exact.
        """
        exact = Fraction(str(percent))  # the decimal as written: 99.9 is 999/1000, not its binary neighbour
        if not 0 <= exact <= 100:
            raise ValueError(f"a percentile must be between 0 and 100, not {percent!r}")
        if self.max is None or exact == 0:
            return self.min
        rank = -(-self.count * exact // 100)
        seen = 0
        for _, high, n in self.buckets():
            seen += n
            if seen >= rank:
                return min(high, self.max)
        raise AssertionError("the counts of the buckets do not add up to the number of samples")

    def buckets(self) -> Iterator[tuple[int, int, int]]:
        """``(lowest value, highest value, samples)`` of each occupied bucket, in ascending order."""
        bits = self.bits
        for index in sorted(self.counts):
            shift = max((index >> bits) - 1, 0)
            low = (index - (shift << bits)) << shift
            yield low, low + (1 << shift) - 1, self.counts[index]

    def merge(self, other: Histogram) -> Self:
        """Add the samples of ``other`` to this one; ValueError unless both have the same ``bits``."""
        if other.bits != self.bits:
            raise ValueError(f"histograms must have the same bits to be merged, not {self.bits} and {other.bits}")
        if other.min is None or other.max is None:
            return self
        self.count += other.count
        self.total += other.total
        self.min = other.min if self.min is None else min(self.min, other.min)
        self.max = other.max if self.max is None else max(self.max, other.max)
        counts = self.counts
        for index, n in other.counts.items():
            counts[index] = counts.get(index, 0) + n
        return self

    def __add__(self, other: Histogram) -> Histogram:
        if not isinstance(other, Histogram):
            return NotImplemented
        return Histogram(self.bits).merge(self).merge(other)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Histogram):
            return NotImplemented
        mine = (self.bits, self.count, self.total, self.min, self.max, self.counts)
        return mine == (other.bits, other.count, other.total, other.min, other.max, other.counts)

    __hash__ = None  # type: ignore[assignment]  # mutable

    def summary(self) -> dict[str, int | None]:
        """``count``, ``min``, ``mean`` (rounded down), ``p50`` ... ``p99.9`` and ``max``; null if empty."""
        return {
            "count": self.count,
            "min": self.min,
            "mean": self.total // self.count if self.count else None,
            **{f"p{percent}": self.percentile(percent) for percent in PERCENTILES},
            "max": self.max,
        }

    def to_dict(self) -> dict[str, Any]:
        """The summary and what :meth:`from_dict` needs: ``bits``, ``total`` and the buckets."""
        return {
            **self.summary(),
            "bits": self.bits,
            "total": self.total,
            "buckets": [[index, self.counts[index]] for index in sorted(self.counts)],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The histogram that :meth:`to_dict` wrote, ready to be merged with those of other runs."""
        self = cls(data["bits"])
        self.count, self.total = data["count"], data["total"]
        self.min, self.max = data["min"], data["max"]
        self.counts = dict(data["buckets"])
        return self

    def __repr__(self) -> str:
        return f"<Histogram of {self.count} samples, {self.min} to {self.max}>"

    def _index(self, value: int) -> int:
        shift = value.bit_length() - self.bits - 1
        return value if shift <= 0 else (shift << self.bits) + (value >> shift)
