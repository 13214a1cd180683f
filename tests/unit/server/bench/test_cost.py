"""The last step of the tour: its table."""

import pytest

from rudder.server.bench.cost import PLAIN, print_table


def test_ratios_are_of_the_same_round(capsys: pytest.CaptureFixture[str]) -> None:
    # The machine was half as fast in the second round: the ratio of medians would be 0.75.
    print_table({PLAIN: [100.0, 50.0], "Rudder": [90.0, 45.0]})
    plain, ours = capsys.readouterr().out.splitlines()
    assert plain.split() == ["plain", "vLLM:", "75"]
    assert ours.split() == ["Rudder:", "68", "0.90", "of", "it"]
