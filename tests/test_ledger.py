"""The ledger: every raised interrupt is delivered, coalesced, pending or dropped."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabric.errors import LedgerError
from fabric.trace import Ledger, LedgerStatement

counts = st.integers(0, 1000)
statements = st.builds(LedgerStatement, counts, counts, counts, counts, st.dictionaries(st.sampled_from("abc"), counts))


def test_a_new_ledger_balances() -> None:
    """Nothing raised, nothing to account for."""
    assert LedgerStatement() == Ledger().check()


def test_every_outcome_is_one_column() -> None:
    """raised == delivered + coalesced + pending + dropped."""
    ledger = Ledger()
    ledger.raised = 10
    ledger.delivered = 4
    ledger.coalesced = 3
    ledger.drop("unmapped event", 2)
    ledger.add_pending_probe(lambda: 1)

    assert LedgerStatement(10, 4, 3, 1, {"unmapped event": 2}) == ledger.check()


def test_held_interrupts_are_raised_and_pending() -> None:
    """What a channel holds was counted by no controller yet, and appears on both sides."""
    ledger = Ledger()
    held = [3]
    ledger.add_in_flight_probe(lambda: held[0])

    assert LedgerStatement(raised=3, pending=3) == ledger.check()

    held[0] = 0
    ledger.raised = ledger.delivered = 3

    assert LedgerStatement(raised=3, delivered=3) == ledger.check()


@pytest.mark.parametrize(
    ("delivered", "words"),
    [pytest.param(4, "1 lost", id="lost"), pytest.param(7, "2 invented", id="invented")],
)
def test_an_unbalanced_ledger_is_an_error(delivered: int, words: str) -> None:
    """A lost or an invented interrupt fails the run, with the account in the message."""
    ledger = Ledger()
    ledger.raised = 5
    ledger.delivered = delivered

    with pytest.raises(LedgerError, match=f"{words}: raised 5 = delivered {delivered}"):
        ledger.check()


def test_a_negative_count_does_not_balance() -> None:
    """Two mistakes that cancel out are still mistakes."""
    ledger = Ledger()
    ledger.delivered = 1
    ledger.coalesced = -1

    with pytest.raises(LedgerError, match="a count is negative"):
        ledger.check()


def test_reasons_add_up_and_are_listed_in_order() -> None:
    """Drops of one reason are one row; rows are alphabetical, whatever came first."""
    ledger = Ledger()
    ledger.drop("vm closed")
    ledger.drop("disabled LPI", 2)
    ledger.drop("vm closed", 3)
    ledger.drop("never happened", 0)

    assert [("disabled LPI", 2), ("vm closed", 4)] == list(ledger.statement().dropped.items())


def holding(pending: int, in_flight: int = 0, raised: int = 0) -> Ledger:
    """The ledger of a VM that holds interrupts; those in flight are not counted as raised yet."""
    ledger = Ledger()
    ledger.raised = raised or pending
    ledger.delivered = ledger.raised - pending
    ledger.add_pending_probe(lambda: pending)
    ledger.add_in_flight_probe(lambda: in_flight)
    return ledger


def test_what_is_handed_over_is_not_in_the_account() -> None:
    """Neither raised nor pending; what is in flight stays. Then the account stands still, to its end as well."""
    ledger = holding(2, in_flight=1, raised=5)
    ledger.hand_over()

    assert LedgerStatement(raised=4, delivered=3, pending=1) == ledger.statement()
    assert 2 == ledger.handed_over
    ledger.raised += 7
    ledger.drop("nobody's")
    assert LedgerStatement(raised=4, delivered=3, dropped={"vm closed": 1}) == ledger.close("vm closed")


def test_what_was_handed_over_can_be_taken_back() -> None:
    """The account is as it was; taking back what was not handed over does nothing."""
    ledger = holding(2, raised=5)
    before = ledger.statement()
    ledger.take_back()
    ledger.hand_over()
    ledger.take_back()

    assert before == ledger.statement()
    assert 0 == ledger.handed_over


def test_an_account_that_does_not_balance_is_not_handed_over() -> None:
    """Its mistake would be lost with it."""
    ledger = holding(2, raised=5)
    ledger.raised += 1

    with pytest.raises(LedgerError, match="1 lost"):
        ledger.hand_over()


def test_what_is_taken_over_begins_an_account() -> None:
    """Whatever it took to make it pending. What is missing was lost on the way; more is an error."""
    ledger = holding(2, raised=9)
    ledger.take_over(2, "lost")
    assert LedgerStatement(raised=2, pending=2) == ledger.statement()
    ledger.take_over(3, "lost")
    assert LedgerStatement(raised=3, pending=2, dropped={"lost": 1}) == ledger.statement()

    with pytest.raises(LedgerError, match="1 interrupts were handed over, and 2 are pending"):
        ledger.take_over(1, "lost")


def test_a_removed_probe_is_not_asked() -> None:
    """A device that went away holds nothing."""
    ledger = Ledger()

    def probe() -> int:
        return 1

    ledger.add_pending_probe(probe)
    ledger.remove_pending_probe(probe)
    ledger.add_in_flight_probe(probe)
    ledger.remove_in_flight_probe(probe)

    assert LedgerStatement() == ledger.statement()


def test_a_statement_as_json() -> None:
    """The five names every ledger in machine-readable output has."""
    assert {
        "raised": 2,
        "delivered": 1,
        "coalesced": 0,
        "pending": 0,
        "dropped": {"x": 1},
    } == LedgerStatement(2, 1, 0, 0, {"x": 1}).to_dict()


@given(statements, statements, statements)
def test_statements_add_up_in_any_order(a: LedgerStatement, b: LedgerStatement, c: LedgerStatement) -> None:
    """Addition is associative and commutative, and the missing interrupts add up as well."""
    assert a + b == b + a
    assert (a + b) + c == a + (b + c)
    assert a.missing + b.missing + c.missing == sum([a, b, c], LedgerStatement()).missing
