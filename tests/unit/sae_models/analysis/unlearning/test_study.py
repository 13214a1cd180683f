"""A whole study on a small corpus."""

from dataclasses import replace
from pathlib import Path

import pytest

from rudder.sae_models.analysis.unlearning import report as reports
from rudder.sae_models.analysis.unlearning import study as studies
from rudder.sae_models.analysis.unlearning.keywords import refuses
from rudder.sae_models.analysis.unlearning.material import Material, gather
from rudder.sae_models.analysis.unlearning.methods import CONTROLS, METHODS
from rudder.sae_models.analysis.unlearning.metrics import METRICS
from rudder.sae_models.errors import UserError
from tests.unit.sae_models.analysis.unlearning.rigs import SMALL, TOPIC, rig, save_corpus


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    path: Path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    return gather(rig(), save_corpus(path), TOPIC, SMALL)


def test_sections_are_in_three_folds_and_questions_in_those_of_their_sections(material: Material) -> None:
    every = material.windows_of(range(3))
    assert len(every) == len(material.windows)
    assert sum(len(material.windows_of([fold])) for fold in range(3)) == len(every)
    topic = material.questions_of(range(3), ["microbiology"]).tolist()
    assert {material.questions[number].book for number in topic} == {"microbiology"}
    assert len(material.options) == len(material.priors) == 4 * len(material.questions)


def test_a_book_that_the_corpus_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no book astronomy"):
        gather(rig(), save_corpus(tmp_path / "corpus.jsonl"), replace(TOPIC, neighbours=("astronomy",)), SMALL)


def test_a_fold_without_the_topic_is_named(tmp_path: Path) -> None:
    path = save_corpus(tmp_path / "corpus.jsonl")
    gone = [f'"microbiology", "module": "m{number}-' for number in (1, 4, 7)]
    lines = [line for line in path.read_text().splitlines() if not any(part in line for part in gone)]
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match="fold 1 of 3 lacks text of the topic"):
        gather(rig(), path, TOPIC, SMALL)


def test_bisection_finds_the_dose_and_stops_at_the_bound_of_one_that_never_reaches_it() -> None:
    dose = studies.bisect(0.01, 100.0, lambda v: v**0.5)
    assert abs(dose**0.5 - studies.TARGET_GAP) < 0.4
    assert studies.bisect(0.01, 1.0, lambda _: 0.0) > 0.7


def test_a_filter_refuses_whole_terms_only() -> None:
    terms = [("cell", "wall"), ("plasmid",)]
    assert refuses("The Cell wall.", terms)
    assert not refuses("the wall of a cell, plasmids", terms)


def test_a_second_run_reads_outcomes_and_says_that_it_was_not_the_first(
    material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(studies, "METHODS", {name: METHODS[name] for name in ("set-crisp",)})
    monkeypatch.setattr(studies, "CONTROLS", {"gated-blank": CONTROLS["gated-blank"]})
    report = reports.report_of(studies.run(material, None, tmp_path))
    path = tmp_path / "report.json"
    reports.write(path, report)
    assert reports.earlier_reports(path) == [report.configuration]
    assert not reports.changed(report)
    assert {*report.methods} == {"set-crisp"}
    assert {*report.controls} == {"gated-blank", studies.ALWAYS_OPEN, studies.KEYWORDS}
    assert {*report.methods["set-crisp"]} == {*METRICS}
    assert {*report.per_book["set-crisp"]} == {"microbiology", "anatomy", "history"}
    assert report.references["plain"]["forget_loss_gap"].value == 0
    assert report.references["twin"]["forget_loss_gap"].value == pytest.approx(1)
    assert report.controls["gated-blank"]["forget_loss_gap"].value > 1
    assert sorted({*report.folds.values()}) == [0, 1, 2]
    assert len(reports.table_rows(report)) == 2 + 1 + 2
    monkeypatch.setattr(studies, "measure_text", None)
    again = reports.report_of(studies.run(material, None, tmp_path), ["another", *reports.earlier_reports(path)])
    assert again.methods["set-crisp"]["forget_cloze"] == report.methods["set-crisp"]["forget_cloze"]
    assert "1 other configuration" in reports.changed(again)


@pytest.mark.long
def test_study_of_all_methods(material: Material) -> None:
    study = studies.run(material, None)
    assert {*study.outcomes} == {*METHODS}
    assert {*study.controls} == {*CONTROLS, studies.ALWAYS_OPEN}
    assert study.chosen in METHODS
