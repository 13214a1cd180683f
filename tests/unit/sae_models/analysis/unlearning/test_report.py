"""The report of a study: its file, its table, and whether the reported folds were looked at before."""

from pathlib import Path

import msgspec
import pytest

from rudder.sae_models.analysis.unlearning import report as reports
from rudder.sae_models.analysis.unlearning.metrics import BARS, METRICS
from rudder.sae_models.analysis.unlearning.report import Report
from rudder.sae_models.analysis.unlearning.statistics import Estimate
from rudder.sae_models.errors import UserError

GOOD, NONE = Estimate(0.0, -0.01, 0.01), Estimate(float("nan"), float("nan"), float("nan"))


def report(configuration: str, earlier: list[str]) -> Report:
    figures = dict.fromkeys(METRICS, GOOD) | {"leak_at_8": NONE, "fluency_ratio": Estimate(1.2, 1.1, 1.3)}
    return Report(
        chance=0.25, twin=0.4, chosen="one", methods={"one": figures, "two": figures}, controls={"open": figures},
        per_book={}, references={"plain": figures}, reached={bar.metric: bar.reached(figures) for bar in BARS},
        doses={}, notes={}, folds={}, seeds=[0], split_sha256="", configuration=configuration, size={},
        reports=[*earlier, configuration],
    )  # fmt: skip


def test_a_file_counts_what_it_reported(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    assert reports.earlier_reports(path) == []
    first = report("a", [])
    reports.write(path, first)
    assert not reports.changed(first)
    same = report("a", reports.earlier_reports(path))
    assert not reports.changed(same), "the same configuration again is no second look"
    reports.write(path, same)
    other = report("b", reports.earlier_reports(path))
    assert "1 other configuration(s): this is report 3" in reports.changed(other)


def test_figures_that_were_not_measured_are_null(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    reports.write(path, report("a", []))
    written = msgspec.json.decode(path.read_bytes())
    assert written["methods"]["one"]["leak_at_8"] == {"value": None, "low": None, "high": None}
    assert written["methods"]["one"]["forget_cloze"] == {"value": 0.0, "low": -0.01, "high": 0.01}
    assert not written["reached"]["forget_loss_gap"]


def test_a_file_that_is_no_report_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "corpus.json"
    path.write_text('{"text": "mine"}')
    with pytest.raises(UserError, match="no report of this command"):
        reports.earlier_reports(path)


def test_table_has_every_row_and_a_dash_for_what_was_not_measured() -> None:
    rows = reports.table_rows(report("a", []))
    assert [row[0] for row in rows] == ["plain", "one", "two", "open"]
    assert rows[0][1:4] == ("0.0 (-1.0, 1.0)", "0.00 (-0.01, 0.01)", "-")


def test_questions_that_the_twin_answers_as_well_are_named() -> None:
    known, unknown = Estimate(0.55, 0.52, 0.58), Estimate(0.45, 0.42, 0.48)
    same, apart = report("a", []), report("a", [])
    same.references.update(plain={"forget_cloze": known}, twin={"forget_cloze": Estimate(0.5, 0.47, 0.53)})
    apart.references.update(plain={"forget_cloze": known}, twin={"forget_cloze": unknown})
    assert "do not tell the model (55.0 (52.0, 58.0) %) from its twin" in reports.cloze_note(same)
    assert not reports.cloze_note(apart)


def test_front_leaves_out_what_another_is_better_than_in_both() -> None:
    assert reports.pareto([(2, 1), (1, 2), (2, 2), (3, 0.5), (1, 3)]) == [(1, 2), (2, 1), (3, 0.5)]


def test_plot_is_written(tmp_path: Path) -> None:
    reports.plot(report("a", []), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
