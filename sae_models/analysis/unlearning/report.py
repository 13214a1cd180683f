"""The report of a study: JSON, the rows of a table, and a plot."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import msgspec

from rudder.sae_models.activations.corpus import Document
from rudder.sae_models.analysis.unlearning.material import fold_of
from rudder.sae_models.analysis.unlearning.methods import CONTROLS, METHODS
from rudder.sae_models.analysis.unlearning.metrics import BARS, CHANCE, by_book, figures
from rudder.sae_models.analysis.unlearning.statistics import Estimate
from rudder.sae_models.analysis.unlearning.study import ALWAYS_OPEN, KEYWORDS, PRESENT, Study, configuration, pooled
from rudder.sae_models.errors import UserError
from rudder.sae_models.files import write_atomically
from rudder.sae_models.optional import import_optional

SEED = 0
NOTES = {
    PRESENT: "the program that ships: it was fitted on most of the sections that it is reported on",
    ALWAYS_OPEN: "the chosen method without its gate",
    KEYWORDS: "refuses texts that have a term of the topic; a refusal is no answer",
}
# Columns of the table, and whether they are percentages.
TABLE = {
    "forget_cloze": True,
    "forget_loss_gap": False,
    "leak_at_8": True,
    "fluency_ratio": False,
    "gibberish": True,
    "retain_top1_drop": True,
    "retain_top1_drop_worst": True,
    "neighbour_top1_drop": True,
    "neighbour_cloze_drop": True,
    "forget_tokens_touched": True,
    "neighbour_tokens_touched": True,
    "tokens_touched": True,
}
# Metrics of the plot, and the largest value on its axis.
PLOTTED = {"forget_loss_gap": 3.0, "fluency_ratio": 30.0}
MOST_POINTS_LOST = 40.0


class Report(msgspec.Struct, frozen=True):
    """The result of a study as the command writes it in JSON.

    `chance`, `twin`: accuracy of the topic's questions by guessing, and of the twin. `references`: figures of the plain
    model and of the twin. `reached`: of each bar, whether the chosen method's bounds are within. `doses`: of each
    rotation. `reports`: digests of the configurations that this file has reported, in order: more than one means that
    the reported folds were looked at before the last was run. `gates`: drift and level of each rotation.
    """

    chance: float
    twin: float
    chosen: str
    methods: dict[str, dict[str, Estimate]]
    controls: dict[str, dict[str, Estimate]]
    per_book: dict[str, dict[str, dict[str, Estimate]]]
    references: dict[str, dict[str, Estimate]]
    reached: dict[str, bool]
    doses: dict[str, list[float]]
    notes: dict[str, str]
    folds: dict[str, int]
    seeds: list[int]
    split_sha256: str
    configuration: str
    size: dict[str, int | None]
    reports: list[str]


class Earlier(msgspec.Struct):
    """What a later run reads of a report."""

    reports: list[str]


def report_of(study: Study, earlier: Sequence[str] = ()) -> Report:
    """Return the report of a study; `earlier`: the configurations that its file has reported before."""
    material = study.bench.material
    everything = {**study.outcomes, **study.controls}
    references = {
        name: figures(study.drawn, sums, study.plain, study.twin, study.groups)
        for name, sums in (("plain", study.plain), ("twin", study.twin))
    }
    per_book = {
        name: by_book(study.drawn, pooled(o.reported for o in outcomes), study.plain)
        for name, outcomes in everything.items()
    }
    methods = {name: study.figures(outcomes) for name, outcomes in study.outcomes.items()}
    digest = configuration(material)
    return Report(
        chance=CHANCE,
        twin=references["twin"]["forget_cloze"].value,
        chosen=study.chosen,
        methods=methods,
        controls={name: study.figures(outcomes) for name, outcomes in study.controls.items()}
        | {KEYWORDS: dict(study.refusals)},
        per_book=per_book,
        references=references,
        reached={bar.metric: bar.reached(methods[study.chosen]) for bar in BARS},
        doses={name: [outcome.dose for outcome in outcomes] for name, outcomes in everything.items()},
        notes={name: method.note for name, method in {**METHODS, **CONTROLS}.items()} | NOTES,
        folds={f"{d.book}/{d.module}": fold_of(d) for d in used_documents(study)},
        seeds=[SEED],
        split_sha256=material.split.sha256,
        configuration=digest,
        size=asdict(material.size),
        reports=[*earlier, digest],
    )


def used_documents(study: Study) -> list[Document]:
    """Return the sections that windows or questions are of."""
    material = study.bench.material
    sections = {*material.section.tolist(), *material.question_section.tolist()}
    return [material.split.documents[section] for section in sorted(sections)]


def earlier_reports(path: Path) -> list[str]:
    """Return the configurations that a file has reported before. UserError: the file is no report."""
    if not path.is_file():
        return []
    try:
        return msgspec.json.decode(path.read_bytes(), type=Earlier).reports
    except msgspec.DecodeError as error:
        raise UserError(f"json: {path} is there and is no report of this command: {error}") from error


def write(path: Path, report: Report) -> None:
    """Write a report; figures that were not measured are null."""
    write_atomically(path, msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")


def changed(report: Report) -> str:
    """Return a sentence on what the file reported before with another configuration; empty if nothing."""
    others = {*report.reports[:-1]} - {report.configuration}
    return (
        f"The reported folds were looked at before, with {len(others)} other configuration(s): "
        f"this is report {len(report.reports)} of this file."
        if others
        else ""
    )


def cloze_note(report: Report) -> str:
    """Return a sentence where the topic's questions cannot tell the plain model from its twin; empty where they can."""
    plain, twin = (report.references[name]["forget_cloze"] for name in ("plain", "twin"))
    if plain.low > twin.high:
        return ""
    return (
        f"The topic's questions do not tell the model ({cell(plain, True)} %) from its twin ({cell(twin, True)} %): "
        "a method that keeps forget_cloze near the twin's shows little by it."
    )


def table_rows(report: Report) -> list[tuple[str, ...]]:
    """Return a row of each reference, method and control: its name and the figures of TABLE."""
    named = {**report.references, **report.methods, **report.controls}
    return [
        (name, *(cell(figures[column], share) for column, share in TABLE.items()))
        for name, figures in named.items()
        if "forget_cloze" in figures
    ]


def cell(estimate: Estimate, share: bool) -> str:
    """Format a figure with its bounds."""
    if estimate.value != estimate.value:
        return "-"
    factor, places = (100, 1) if share else (1, 2)
    value, low, high = (f"{factor * number:.{places}f}" for number in (estimate.value, estimate.low, estimate.high))
    return f"{value} ({low}, {high})"


def bars_text(report: Report) -> list[str]:
    """Return a line on each bar: whether the bounds of the chosen method are within."""
    chosen = report.methods[report.chosen]
    return [
        f"{'reached' if report.reached[bar.metric] else 'MISSED '}  {bar.metric} {cell(chosen[bar.metric], False)}, "
        f"wanted {bar.low:g} to {bar.high:g}"
        for bar in BARS
    ]


def plot(report: Report, path: Path) -> None:
    """Draw forgetting and fluency against the cost on the neighbours as PNG, numbered as in the legend.

    Shaded: where the bars are reached. A point beyond an axis stands at its edge, as a triangle.
    """
    figure = import_optional("matplotlib.figure", "the plot").Figure(figsize=(12, 5), layout="constrained")
    points = {**report.methods, **{n: f for n, f in report.controls.items() if "forget_cloze" in f}}
    bars = {bar.metric: bar for bar in BARS}
    left, right = figure.subplots(1, 2)
    for axes, (metric, top) in zip((left, right), PLOTTED.items(), strict=True):
        for number, (name, f) in enumerate(points.items(), 1):
            x, y = 100 * f["neighbour_top1_drop"].value, f[metric].value
            beyond = x > MOST_POINTS_LOST or y > top
            x, y = min(x, MOST_POINTS_LOST), min(y, top)
            color = "#d62728" if name == report.chosen else "#888888" if name in report.controls else "#1f77b4"
            axes.scatter(x, y, color=color, marker="^" if beyond else "o", zorder=2, label=f"{number}  {name}", s=16)
            offset = (5, 3) if number % 2 else (-11, -9)
            axes.annotate(str(number), (x, y), xytext=offset, textcoords="offset points", fontsize=7, color=color)
        axes.axhspan(max(bars[metric].low, 0), bars[metric].high, color="#2ca02c", alpha=0.08, lw=0)
        axes.axvspan(0, 100 * bars["neighbour_top1_drop"].high, color="#2ca02c", alpha=0.08, lw=0)
        axes.set(xlabel="top-1 accuracy lost on the worse neighbour, points", ylabel=metric.replace("_", " "))
        axes.set_xscale("symlog", linthresh=1)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    cost = [(100 * f["neighbour_top1_drop"].value, f["fluency_ratio"].value) for f in points.values()]
    front = [point for point in pareto(cost) if point[0] <= MOST_POINTS_LOST]
    right.plot(*zip(*front, strict=True), color="#bbbbbb", lw=1, zorder=1)
    right.set_yscale("log")
    left.set_xlim(-0.2)
    right.set_xlim(-0.2)
    figure.legend(*right.get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)


def pareto(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other is below in both coordinates, in order of the first."""
    front = list[tuple[float, float]]()
    for point in sorted(points):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front
