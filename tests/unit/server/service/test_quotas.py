"""Quotas: rates by the minute, debts, and streams at once; of each caller alone."""

import pytest

from rudder.server.caller import Caller, Quotas
from rudder.server.service import quotas
from rudder.server.service.errors import Refusal
from rudder.server.service.quotas import QuotaLedger


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
    used: list[Caller] = []

    def use_up() -> None:
        for limited in (low, high) * 5:
            ledger.require(limited, "requests", "QUOTA_REQUESTS")
            ledger.charge(limited, "requests", 1)
            used.append(limited)

    with pytest.raises(Refusal):
        use_up()
    assert len(used) <= 3


def test_debt_outlasts_a_change_of_the_rate() -> None:
    clock = Clock()
    ledger = QuotaLedger(clock)
    ledger.charge(caller(generated_tokens=60), "generated_tokens", 180)
    with pytest.raises(Refusal) as caught:
        ledger.require(caller(generated_tokens=120), "generated_tokens", "QUOTA_TOKENS")
    assert caught.value.retry_after_s == pytest.approx(30.5)


def test_streams_at_once() -> None:
    ledger, limited = QuotaLedger(Clock()), caller(streams=2)
    with ledger.streaming(limited, 2):
        with pytest.raises(Refusal) as caught, ledger.streaming(limited, 1):
            pass
        assert caught.value.reason == "QUOTA_STREAMS"
    with pytest.raises(KeyError), ledger.streaming(limited, 2):
        raise KeyError
    with ledger.streaming(limited, 2):
        pass


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
