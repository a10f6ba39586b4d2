"""Latency histograms: exact where it is promised, within the stated bound elsewhere, mergeable."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabric.trace.histogram import PERCENTILES, Histogram

values = st.one_of(st.integers(0, 5000), st.integers(0, 10**12))
samples = st.lists(values, max_size=200)
widths = st.sampled_from([1, 4, 7, 10])


def histogram(of: list[int], bits: int = 10) -> Histogram:
    result = Histogram(bits)
    for value in of:
        result.record(value)
    return result


@given(st.lists(values, min_size=1, max_size=200), widths, st.sampled_from(["0", "1", *PERCENTILES, "100"]))
def test_percentiles_are_within_the_bound(sample: list[int], bits: int, percent: str) -> None:
    """exact <= reported <= exact + exact / 2**bits, for the nearest-rank percentile of the sorted samples."""
    per_mille = round(float(percent) * 10)
    exact = sorted(sample)[max(math.ceil(per_mille * len(sample) / 1000), 1) - 1]

    reported = histogram(sample, bits).percentile(percent)

    assert reported is not None
    assert exact <= reported <= exact + (exact >> bits)


@given(st.lists(st.integers(0, 2047), min_size=1))
def test_small_values_are_exact(sample: list[int]) -> None:
    """Below 2**(bits + 1) every value has a bucket of its own."""
    ordered = sorted(sample)

    assert ordered[math.ceil(len(sample) / 2) - 1] == histogram(sample).percentile(50)


@given(samples, widths)
def test_count_sum_and_extremes_are_exact(sample: list[int], bits: int) -> None:
    """Only percentiles are rounded."""
    h = histogram(sample, bits)

    assert (len(sample), sum(sample)) == (h.count, h.total)
    assert (min(sample, default=None), max(sample, default=None)) == (h.min, h.max)


@given(samples, samples, samples, widths)
def test_merging_is_associative_and_commutative(a: list[int], b: list[int], c: list[int], bits: int) -> None:
    """However the samples were split, the merged histogram is that of all of them."""
    x, y, z = histogram(a, bits), histogram(b, bits), histogram(c, bits)

    assert histogram(a + b + c, bits) == (x + y) + z
    assert x + (y + z) == (x + y) + z
    assert x + y == y + x
    assert histogram(a, bits) == x  # the operands are left alone


@given(samples, widths)
def test_recording_many_is_recording_each(sample: list[int], bits: int) -> None:
    """``record_many`` is only faster."""
    many = Histogram(bits)
    many.record_many(sample)

    assert histogram(sample, bits) == many


@given(samples, widths)
def test_buckets_are_disjoint_and_hold_their_samples(sample: list[int], bits: int) -> None:
    """Ascending ranges without overlap; each counts the samples inside it."""
    previous = -1
    for low, high, n in histogram(sample, bits).buckets():
        assert previous < low <= high
        assert sum(low <= value <= high for value in sample) == n
        previous = high


@given(samples, widths)
def test_a_histogram_survives_json(sample: list[int], bits: int) -> None:
    """What stats.json holds can be merged with the results of other runs."""
    h = histogram(sample, bits)

    assert h == Histogram.from_dict(json.loads(json.dumps(h.to_dict())))


def test_decimal_percentiles_mean_what_they_say() -> None:
    """99.9 % of 1000 samples is the 999th: no rounding of the binary fraction picks its neighbour."""
    h = histogram(list(range(1, 1001)))

    assert 999 == h.percentile(99.9)
    assert 999 == h.percentile("99.9")
    assert 1000 == h.percentile("99.91")


def test_an_untouched_statistic_is_null() -> None:
    """No samples: nothing is reported as 0 but the count."""
    summary = Histogram().summary()

    assert 0 == summary.pop("count")
    assert {None} == set(summary.values())


def test_the_summary_of_a_known_sample() -> None:
    """The keys of stats.json, in order."""
    expected = {"count": 100, "min": 1, "mean": 50, "p50": 50, "p90": 90, "p99": 99, "p99.9": 100, "max": 100}

    assert list(expected.items()) == list(histogram(list(range(1, 101))).summary().items())


@pytest.mark.parametrize(
    "misuse",
    [
        pytest.param(lambda: Histogram(0), id="bits"),
        pytest.param(lambda: Histogram().record(-1), id="negative"),
        pytest.param(lambda: Histogram().record(1, 0), id="none"),
        pytest.param(lambda: Histogram().percentile(101), id="percent"),
        pytest.param(lambda: Histogram(4).merge(Histogram(5)), id="merge"),
    ],
)
def test_misuse_is_a_value_error(misuse: object) -> None:
    """Arguments are checked where they enter."""
    assert callable(misuse)
    with pytest.raises(ValueError, match="must"):
        misuse()
