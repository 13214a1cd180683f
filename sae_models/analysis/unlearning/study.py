"""A study of all methods on one corpus, cross-fitted: each fold selects, tunes and reports once, and the three reports
are pooled. So every dose, threshold and the choice of a method come from sections other than those it is reported on.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from rudder.sae_models.analysis.program import Program
from rudder.sae_models.analysis.unlearning.bench import Bench, bench_of, measure, measure_text
from rudder.sae_models.analysis.unlearning.keywords import measure_filter
from rudder.sae_models.analysis.unlearning.material import FOLDS, Material
from rudder.sae_models.analysis.unlearning.methods import CONTROLS, METHODS, Fitted, Method, always_open
from rudder.sae_models.analysis.unlearning.metrics import BARS, Groups, figures
from rudder.sae_models.analysis.unlearning.rig import Edit
from rudder.sae_models.analysis.unlearning.statistics import Estimate, Resamples, Sums, resamples
from rudder.sae_models.analysis.unlearning.steering import ProgramEdit, untouched
from rudder.sae_models.analysis.unlearning.subjects import Edited, Whole

# Doses are tuned to this loss gap: all methods forget equally much, as far as they can.
TARGET_GAP = 1.1
TUNING_STEPS, TUNING_WINDOWS = 4, 10
# Those that text alone shows.
TUNED_METRICS = {bar.metric for bar in BARS} - {
    "forget_cloze_against_twin",
    "leak_at_8_against_twin",
    "neighbour_cloze_drop",
}
PRESENT, ALWAYS_OPEN, KEYWORDS = "present", "chosen-always-open", "keyword-filter"


class Outcome(NamedTuple):
    """A method in one rotation: its dose, what was measured of text on the fold for tuning, and on the reported one."""

    dose: float
    tuned: Sums
    reported: Sums


@dataclass(frozen=True)
class Study:
    """The outcomes of each method, one for each rotation, with the sums of the plain model and of the twin."""

    bench: Bench
    plain: Sums
    twin: Sums
    outcomes: Mapping[str, list[Outcome]]
    controls: Mapping[str, list[Outcome]]
    refusals: Mapping[str, Estimate]
    chosen: str
    drawn: Resamples

    @property
    def groups(self) -> Groups:
        """The topic's books, their neighbours and the others."""
        return groups_of(self.bench.material)

    def figures(self, outcomes: list[Outcome]) -> dict[str, Estimate]:
        """Return the figures of a method, pooled over the reported folds."""
        return figures(self.drawn, pooled(o.reported for o in outcomes), self.plain, self.twin, self.groups)


def groups_of(material: Material) -> Groups:
    """Return the groups of a material's books."""
    topic = material.split.topic
    return Groups(topic.books, topic.neighbours, material.split.far)


def pooled(parts: Iterable[Sums]) -> Sums:
    """Add sums."""
    parts = list(parts)
    total = Sums(parts[0].sections)
    for part in parts:
        total.add(torch.arange(part.sections), **part.columns)
    return total


def configuration(material: Material) -> str:
    """Return a digest of all that a study's figures depend on, but the code."""
    bounds = {name: (m.low, m.high) for name, m in {**METHODS, **CONTROLS}.items()}
    facts = (vars(material.size), vars(material.split.topic), material.split.sha256, material.rig.bundle.sha256, bounds)
    return hashlib.sha256(json.dumps([*facts, TARGET_GAP], sort_keys=True, default=list).encode()).hexdigest()


def run(material: Material, present: Program | None, store: Path | None = None) -> Study:
    """Run a study. `present`: a program that is measured as it is; `store`: a folder where outcomes are kept, so that a
    run that was stopped goes on.
    """
    bench = bench_of(material)
    store = store / configuration(material)[:16] if store else None
    plain = measure(bench, Edited(material.rig, untouched), range(FOLDS))
    twin = measure(bench, Whole(material.rig.twin), range(FOLDS), material.split.topic.books)
    every: dict[str, Method] = {**METHODS, **CONTROLS}
    if present:
        program = ProgramEdit(present, material.rig.bundle)
        every[PRESENT] = Method(lambda *_: program, 1.0, 1.0, "the program that ships, not fitted here")
    rotations = [Fitted(material, fold, (fold + 1) % FOLDS) for fold in range(FOLDS)]
    outcomes = {name: [outcome(bench, f, name, method, store) for f in rotations] for name, method in progress(every)}
    methods = {name: result for name, result in outcomes.items() if name not in CONTROLS}
    controls = {name: outcomes[name] for name in CONTROLS}
    chosen = choose(bench, methods, plain, twin)
    opened = Method(lambda f, v: always_open(every[chosen].edit(f, v)), 1.0, 1.0, f"{chosen} without its gate")
    controls[ALWAYS_OPEN] = [
        outcome(bench, f, f"{ALWAYS_OPEN}-{chosen}", replace(opened, low=o.dose, high=o.dose), store)
        for f, o in zip(rotations, methods[chosen], strict=True)
    ]
    drawn = resamples(material.split.books, used=material.used(range(FOLDS)))
    return Study(bench, plain, twin, methods, controls, measure_filter(material, drawn), chosen, drawn)


def progress(methods: Mapping[str, Method]) -> "tqdm[tuple[str, Method]]":
    """Return a progress bar over methods."""
    return tqdm(methods.items(), desc="methods", unit="method")


def outcome(bench: Bench, fitted: Fitted, name: str, method: Method, store: Path | None) -> Outcome:
    """Tune and measure a method in one rotation, or read what was measured before."""
    file = store / f"{name}-{fitted.select}.safetensors" if store else None
    if file and file.is_file():
        return read_outcome(file, len(bench.material.split.documents))
    dose = tuned_dose(bench, fitted, method)
    subject = Edited(bench.material.rig, method.edit(fitted, dose))
    measured = Outcome(dose, measure_text(bench, subject, [fitted.tune]), measure(bench, subject, [fitted.report]))
    if file:
        write_outcome(file, measured)
    return measured


def write_outcome(file: Path, measured: Outcome) -> None:
    """Store an outcome."""
    file.parent.mkdir(parents=True, exist_ok=True)
    parts = {"tuned": measured.tuned, "reported": measured.reported}
    tensors = {f"{part} {name}": column for part, sums in parts.items() for name, column in sums.columns.items()}
    save_file(tensors, file, {"dose": repr(measured.dose)})


def read_outcome(file: Path, sections: int) -> Outcome:
    """Read a stored outcome."""
    sums = {"tuned": Sums(sections), "reported": Sums(sections)}
    with safe_open(file, "pt") as stored:
        for key in stored.keys():  # noqa: SIM118
            part, _, name = key.partition(" ")
            sums[part].columns[name] = stored.get_tensor(key)
        return Outcome(float(stored.metadata()["dose"]), sums["tuned"], sums["reported"])


def tuned_dose(bench: Bench, fitted: Fitted, method: Method) -> float:
    """Return the dose whose loss gap on some windows of the fold for tuning is nearest to TARGET_GAP, by bisection of
    its logarithm: the loss rises with the dose.
    """
    if method.low == method.high:
        return method.low
    topic = bench.material.split.topic.books
    index = bench.material.windows_of([fitted.tune], topic)[:TUNING_WINDOWS]
    return bisect(method.low, method.high, lambda dose: loss_gap(bench, method.edit(fitted, dose), index))


def bisect(low: float, high: float, gap: Callable[[float], float]) -> float:
    """Return the dose tried whose gap is nearest to TARGET_GAP; `gap` rises with the dose."""
    tried = dict[float, float]()
    for _ in range(TUNING_STEPS):
        dose = (low * high) ** 0.5
        tried[dose] = gap(dose)
        low, high = (dose, high) if tried[dose] < TARGET_GAP else (low, dose)
    return min(reversed(tried), key=lambda dose: abs(tried[dose] - TARGET_GAP))


def loss_gap(bench: Bench, edit: Edit, index: Tensor) -> float:
    """Return the loss gap of an edit on windows of the topic with these indices."""
    texts = bench.material.windows.take(index)
    plain = bench.windows.take(index)
    edited = Edited(bench.material.rig, edit).read(texts, plain).log_p.sum()
    return float((plain.log_p.sum() - edited) / (plain.log_p.sum() - bench.twin_log_p[index].sum()))


def choose(bench: Bench, methods: Mapping[str, list[Outcome]], plain: Sums, twin: Sums) -> str:
    """Return the method that on the text of the folds for tuning misses the bars by least, and of those the most fluent
    one.
    """
    drawn = resamples(bench.material.split.books, 1, used=bench.material.used(range(FOLDS)))
    rank = dict[str, tuple[float, float]]()
    bars = [bar for bar in BARS if bar.metric in TUNED_METRICS]
    unedited = figures(drawn, plain, plain, twin, groups_of(bench.material))
    for name, outcomes in methods.items():
        measured = figures(drawn, pooled(o.tuned for o in outcomes), plain, twin, groups_of(bench.material))
        excess = sum(bar.excess(measured[bar.metric].value, unedited[bar.metric].value) for bar in bars)
        rank[name] = (round(excess, 2), measured["fluency_ratio"].value)
    return min(rank, key=lambda name: rank[name])
