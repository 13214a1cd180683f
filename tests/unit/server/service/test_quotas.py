"""Quotas: rates by the minute, debts, and streams at once; of each caller alone."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from rudder.server.caller import Caller, Quotas
from rudder.server.engine.adapter import SamplingParams
from rudder.server.engine.call import Call
from rudder.server.program import wire
from rudder.server.program.watch import Watched
from rudder.server.service import quotas
from rudder.server.service.errors import Refusal
from rudder.server.service.quotas import Demand, QuotaLedger, demand_of


class Clock:
    """A clock that is set."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def caller(name: str = "a", **caps: float) -> Caller:
    return Caller(name, name, frozenset({"generate"}), Quotas(**caps))  # type: ignore[arg-type]


def test_rate_is_used_up_and_comes_back() -> None:
    clock = Clock()
    ledger, limited = QuotaLedger(clock), caller(requests=2)
    for _ in range(2):
        ledger.require(limited, "requests", "QUOTA_REQUESTS")
        ledger.charge(limited, "requests", 1)
    with pytest.raises(Refusal) as caught:
        ledger.require(limited, "requests", "QUOTA_REQUESTS")
    assert caught.value.reason == "QUOTA_REQUESTS"
    assert caught.value.retry_after_s == pytest.approx(30)
    clock.now += 30
    ledger.require(limited, "requests", "QUOTA_REQUESTS")


def test_debt_is_paid_before_the_next_call() -> None:
    clock = Clock()
    ledger, limited = QuotaLedger(clock), caller(generated_tokens=60)
    ledger.charge(limited, "generated_tokens", 180)
    with pytest.raises(Refusal) as caught:
        ledger.require(limited, "generated_tokens", "QUOTA_TOKENS")
    assert caught.value.retry_after_s == pytest.approx(121)
    clock.now += 120
    with pytest.raises(Refusal):
        ledger.require(limited, "generated_tokens", "QUOTA_TOKENS")
    clock.now += 2
    ledger.require(limited, "generated_tokens", "QUOTA_TOKENS")


def test_callers_have_buckets_of_their_own_and_none_without_a_quota() -> None:
    ledger = QuotaLedger(Clock())
    ledger.charge(caller("a", requests=1), "requests", 5)
    ledger.require(caller("b", requests=1), "requests", "QUOTA_REQUESTS")
    ledger.charge(caller("c"), "requests", 1e9)
    ledger.require(caller("c"), "requests", "QUOTA_REQUESTS")


def test_two_tokens_of_a_caller_with_other_rates_share_what_is_used() -> None:
    ledger = QuotaLedger(Clock())
    low, high = caller(requests=2), caller(requests=3)
    for limited in (low, high):
        ledger.require(limited, "requests", "QUOTA_REQUESTS")
        ledger.charge(limited, "requests", 1)
    with pytest.raises(Refusal):
        ledger.require(low, "requests", "QUOTA_REQUESTS")
    ledger.require(high, "requests", "QUOTA_REQUESTS")


def test_debt_outlasts_a_change_of_the_rate() -> None:
    clock = Clock()
    ledger = QuotaLedger(clock)
    ledger.charge(caller(generated_tokens=60), "generated_tokens", 180)
    with pytest.raises(Refusal) as caught:
        ledger.require(caller(generated_tokens=120), "generated_tokens", "QUOTA_TOKENS")
    assert caught.value.retry_after_s == pytest.approx(30.5)


def capped(caller_id: str, name: str) -> Caller:
    """A caller that may hold two of something at once."""
    return replace(caller(caller_id), quotas=Quotas(**{name: 2}))


def nothing() -> Demand:
    return Demand(0, 0, 0, 0)


@pytest.mark.parametrize(("name", "reason"), [("streams", "QUOTA_STREAMS"), ("rows", "QUOTA_ROWS")])
def test_what_is_held_at_once_is_bounded_and_given_back(name: str, reason: str) -> None:
    ledger, limited = QuotaLedger(Clock()), capped("a", name)

    def demand(amount: int) -> Demand:
        return replace(nothing(), **{name: amount})

    with ledger.reserved(limited, demand(2), nothing):
        with pytest.raises(Refusal) as caught, ledger.reserved(limited, demand(1), nothing):
            pass
        assert (caught.value.reason, caught.value.retry_after_s) == (reason, 1.0)
        with ledger.reserved(capped("b", name), demand(2), nothing):
            assert ledger.held(name) == 4
    with pytest.raises(KeyError), ledger.reserved(limited, demand(2), nothing):
        raise KeyError
    with pytest.raises(Refusal) as caught, ledger.reserved(limited, demand(3), nothing):
        pass
    # No wait makes room for more than there is.
    assert caught.value.retry_after_s is None
    with ledger.reserved(limited, demand(2), nothing):
        pass
    assert ledger.held(name) == 0


def test_tokens_are_reserved_when_a_call_is_admitted_and_given_back_at_its_end() -> None:
    ledger, limited = QuotaLedger(Clock()), caller(prompt_tokens=100, generated_tokens=100)
    demand = Demand(2, 0, 20, 90)
    with ledger.reserved(limited, demand, lambda: Demand(2, 0, 10, 30)):
        for other in (Demand(1, 0, 1, 11), Demand(1, 0, 81, 1)):
            with pytest.raises(Refusal) as caught, ledger.reserved(limited, other, nothing):
                pass
            assert caught.value.reason == "QUOTA_TOKENS"
        # The refused ones took nothing.
        with ledger.reserved(limited, Demand(1, 0, 80, 10), nothing):
            pass
    with ledger.reserved(limited, Demand(1, 0, 90, 70), nothing):
        pass
    with pytest.raises(Refusal), ledger.reserved(limited, Demand(1, 0, 91, 0), nothing):
        pass


def test_a_call_larger_than_the_rate_runs_alone_and_leaves_a_debt() -> None:
    clock = Clock()
    ledger, limited = QuotaLedger(clock), caller(generated_tokens=60)
    with ledger.reserved(limited, Demand(1, 0, 0, 180), lambda: Demand(1, 0, 0, 120)):
        pass
    with pytest.raises(Refusal) as caught:
        ledger.require(limited, "generated_tokens", "QUOTA_TOKENS")
    assert caught.value.retry_after_s == pytest.approx(61)


def test_demand_counts_the_prompt_of_each_choice_and_shared_rows_once() -> None:
    rows = wire.Row("a", 1), wire.Row("a", 2)
    watch = (Watched(0, rows[0]), Watched(1, rows[0]))
    call = Call((1, 2, 3), SamplingParams(max_tokens=5), watch=watch)
    assert demand_of([call, call]) == Demand(2, 2, 6, 10)
    program: Any = SimpleNamespace(sites=(wire.Site(0, rows),))
    assert demand_of([replace(call, compiled=program)]) == Demand(1, 3, 3, 5)


def test_idle_callers_are_forgotten_and_debtors_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quotas, "MAX_IDLE", 3)
    clock = Clock()
    ledger = QuotaLedger(clock)
    ledger.charge(caller("debtor", requests=1), "requests", 1000)
    for number in range(20):
        ledger.charge(caller(f"c{number}", requests=60), "requests", 1)
        clock.now += 30
    assert len(ledger.usage) <= 3
    with pytest.raises(Refusal):
        ledger.require(caller("debtor", requests=1), "requests", "QUOTA_REQUESTS")
