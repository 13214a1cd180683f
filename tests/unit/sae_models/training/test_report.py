"""The report shows the figures of the run and every kind of plot, and is self-contained."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from rudder.sae_models.training import report
from rudder.sae_models.training.record import Record

pytest.importorskip("matplotlib")

EVALUATION = {
    "l0": 31.94, "fvu": 0.0811, "ce_recovered": 0.9812, "kl": 0.21, "dead_share": 0.0007, "shrinkage": 0.995,
    "density": [1] * 24, "decoder_cosine": [2] * 20, "probe_1": 0.75, "probe_1_of_inputs": 0.61,
}  # fmt: skip
TRAIN = {"fvu": 0.5, "l0": 32.0, "dead_share": 0.1, "loss": 0.6, "learning_rate": 1e-3}


class PageParser(HTMLParser):
    """Collects table cells, images and external references."""

    def __init__(self) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.pictures: list[str] = []
        self.outside: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.open.append(tag)
        if tag == "td":
            self.cells.append("")
        if tag == "img":
            self.pictures.append(values["src"] or "")
        self.outside += [value for name, value in values.items() if name in ("href", "src") and value]

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "td":
            self.cells[-1] += data


def write_run(folder: Path, saes: dict[str, dict[str, Any]], *, whole: bool = True) -> Path:
    """Write a run's folder with 20 training lines per SAE, and their evaluations."""
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text("model: <model> & co\n")
    with Record(folder, 0) as record:
        for step in range(1, 21):
            record.add("train", step, step * 512, {name: TRAIN | {"fvu": 1 / step} for name in saes})
        if whole:
            record.add("evaluation", 20, 20 * 512, saes)
    return folder


def read(folder: Path) -> PageParser:
    """Return the parsed page of a run."""
    reader = PageParser()
    reader.feed(report.write(folder).read_text())
    return reader


def test_report_shows_figures_and_every_plot(tmp_path: Path) -> None:
    page = read(write_run(tmp_path, {"k16": EVALUATION | {"l0": 16.0, "fvu": 0.12}, "k32": EVALUATION}))
    assert page.cells[:4] == ["k16", "16.0", "0.1200", "0.9812"]
    assert page.cells[len(page.cells) // 2 :][:3] == ["k32", "31.9", "0.0811"]
    assert len(page.pictures) == 6
    for picture in page.pictures:
        kind, data = picture.split(",", 1)
        assert kind == "data:image/svg+xml;base64"
        assert ElementTree.fromstring(base64.b64decode(data)).tag.endswith("svg")
    assert page.outside == page.pictures


def test_single_sae_has_no_pareto_plot(tmp_path: Path) -> None:
    assert len(read(write_run(tmp_path, {"alone": EVALUATION})).pictures) == 5


def test_unfinished_run_is_reported(tmp_path: Path) -> None:
    page = read(write_run(tmp_path, {"k16": EVALUATION}, whole=False))
    assert (page.cells, len(page.pictures)) == ([], 3)
    assert "The run is not finished" in (tmp_path / report.REPORT).read_text()


def test_names_and_configuration_are_escaped(tmp_path: Path) -> None:
    page = report.write(write_run(tmp_path, {"<script>": EVALUATION})).read_text()
    assert "<script>" not in page
    assert "&lt;model&gt; &amp; co" in page


def test_many_saes_have_distinct_colours(tmp_path: Path) -> None:
    saes = {f"k{number}": EVALUATION | {"l0": float(number), "fvu": 1 / (number + 1)} for number in range(12)}
    page = read(write_run(tmp_path, saes))
    drawn = base64.b64decode(page.pictures[0].split(",")[1]).decode()
    strokes = set(re.findall(r"stroke: (#\w{6}); stroke-width: 1.4", drawn))
    assert strokes == {colour.lower() for colour in report.assign_colours(list(saes)).values()}
    assert len(strokes) == 12


def test_family_has_shades_of_one_colour_and_names_lose_their_common_prefix() -> None:
    names = [f"model-layers.2-{kind}-k{k}" for kind in ("topk", "gated") for k in (8, 16, 32, 64)]
    colours = report.assign_colours(names)
    assert (colours[names[3]], colours[names[7]]) == (report.COLOURS[0].lower(), report.COLOURS[1].lower())
    brightness = [sum(int(colours[name][i : i + 2], 16) for i in (1, 3, 5)) for name in names[:4]]
    assert brightness == sorted(brightness, reverse=True)
    assert list(report.strip_common_prefix(names).values())[:2] == ["topk-k8", "topk-k16"]
    assert report.strip_common_prefix(["model-layers.2"]) == {"model-layers.2": "model-layers.2"}
    assert report.strip_common_prefix(["a-k1", "a-k16"]) == {"a-k1": "k1", "a-k16": "k16"}


def test_each_site_has_its_own_pareto_front(tmp_path: Path) -> None:
    sparse, dense = {"l0": 16.0, "fvu": 0.2}, {"l0": 32.0, "fvu": 0.1}
    saes = {f"{site}{point['l0']}": EVALUATION | point | {"site": site} for site in "ab" for point in (sparse, dense)}
    drawn = base64.b64decode(read(write_run(tmp_path, saes)).pictures[3].split(",")[1]).decode()
    assert len(re.findall(r"stroke: #999999", drawn)) == 2


def test_pareto_front_excludes_dominated_points() -> None:
    points = [(16, 0.12), (32, 0.08), (40, 0.09), (16, 0.2), (64, 0.05)]
    assert report.pareto_front(points) == [(16, 0.12), (32, 0.08), (64, 0.05)]


def test_empty_record_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"^report: .*metrics\.jsonl holds no line"):
        report.write(tmp_path)


def test_record_drops_lines_after_the_checkpoint_and_a_truncated_line(tmp_path: Path) -> None:
    write_run(tmp_path, {"k16": EVALUATION}, whole=False)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "tok')
    with Record(tmp_path, 5) as record:
        record.add("train", 6, 6 * 512, {"k16": TRAIN})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_scalars_go_to_tensorboard(tmp_path: Path) -> None:
    board = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    write_run(tmp_path, {"k16": EVALUATION})
    events = board.EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert [round(event.value, 4) for event in events.Scalars("train/fvu/k16")][:2] == [1.0, 0.5]
    assert [event.step for event in events.Scalars("evaluation/fvu/k16")] == [20 * 512]
    assert "evaluation/density/k16" not in events.Tags()["scalars"]


def test_tensorboard_shows_a_resumed_run_once(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    write_run(tmp_path, {"k16": EVALUATION}, whole=False)
    with Record(tmp_path, 5) as record:
        record.add("train", 6, 6 * 512, {"k16": TRAIN | {"fvu": 0.25}})
    events = accumulator.EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    points = {event.step: round(event.value, 4) for event in events.Scalars("train/fvu/k16")}
    assert points == {step * 512: round(1 / step, 4) for step in range(1, 6)} | {6 * 512: 0.25}
