"""`rudder policy derive`: a policy that makes a topic of a labelled corpus inaccessible, with a report to read."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from google.protobuf.json_format import ParseDict

from rudder.sae_models.analysis.unlearning import metrics, policy
from rudder.sae_models.analysis.unlearning import report as reports
from rudder.sae_models.analysis.unlearning.bench import Bench, bench_of, measure
from rudder.sae_models.analysis.unlearning.material import FULL, QUICK, gather
from rudder.sae_models.analysis.unlearning.methods import METHODS, Fitted
from rudder.sae_models.analysis.unlearning.statistics import Estimate, resamples
from rudder.sae_models.analysis.unlearning.steering import untouched
from rudder.sae_models.analysis.unlearning.study import groups_of, tuned_dose
from rudder.sae_models.analysis.unlearning.subjects import Edited, Whole
from rudder.sae_models.errors import UserError
from rudder.server.cli.arguments import command, integer
from rudder.server.cli.program import CORPUS
from rudder.server.cli.rig import add_rig, rig_of, topic_of
from rudder.v1.policy_pb2 import Policy

EXAMPLES = """\
examples:
  rudder policy derive --corpus textbooks.jsonl.xz --topic microbiology --neighbours anatomy-physiology chemistry \\
    --out policies/forget-microbiology.yaml
"""
METHOD = METHODS["learned-rows"]
SELECT, TUNE, REPORT = range(3)


def main(argv: Sequence[str]) -> None:
    """Derive a policy: its YAML file, the bundle of its rows beside it, and its report in Markdown."""
    args = parser().parse_args(argv)
    if args.out.suffix not in (".yaml", ".yml"):
        raise UserError(f"out: {args.out} is not a YAML file (.yaml, .yml)")
    torch.set_num_threads(args.threads or torch.get_num_threads())
    size = QUICK if args.quick else FULL
    size = replace(size, steps=args.steps or size.steps)
    material = gather(rig_of(args), args.corpus, topic_of(args), size)
    bench, fitted = bench_of(material), Fitted(material, SELECT, TUNE)
    dose = tuned_dose(bench, fitted, METHOD)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    folder = args.rows or args.out.parent / f"{args.out.stem}-rows"
    rows = policy.write_rows(folder, fitted.learned_rows, fitted, material.rig.bundle.manifest.model)
    derived = policy.Derived(fitted, dose, rows)
    content = policy.policy_of(derived, args.out.stem, args.version)
    # Refuses what is not in the contract.
    ParseDict(content, Policy())
    policy.write_policy(args.out, content)
    args.out.with_suffix(".md").write_text(report_text(bench, derived, args.out.stem), encoding="utf-8")
    for path in (args.out, folder, args.out.with_suffix(".md")):
        print(path)


def report_text(bench: Bench, derived: policy.Derived, name: str) -> str:
    """Measure a policy on the reported fold, and return its report."""
    material = bench.material
    rig, drawn = material.rig, resamples(material.split.books, used=material.used([REPORT]))
    method = measure(bench, Edited(rig, METHOD.edit(derived.fitted, derived.dose)), [REPORT])
    plain = measure(bench, Edited(rig, untouched), [REPORT])
    twin = measure(bench, Whole(rig.twin), [REPORT], material.split.topic.books)
    figures = metrics.figures(drawn, method, plain, twin, groups_of(material))
    return policy.markdown(derived, name, figure_lines(figures), book_lines(metrics.by_book(drawn, method, plain)))


def parser() -> argparse.ArgumentParser:
    """Build the parser."""
    deriving = command(
        "policy derive",
        "Derive a policy that makes a topic inaccessible through a server. Rows are trained towards a twin, the same "
        "model without the topic; its bundle must be served beside the model's own.",
        EXAMPLES,
    )
    deriving.add_argument("--corpus", type=Path, required=True, help=f"{CORPUS}, `glossary`")
    deriving.add_argument("--topic", nargs="+", required=True, help="books to forget")
    deriving.add_argument("--neighbours", nargs="*", default=[], help="books near them, to be spared")
    deriving.add_argument("--out", type=Path, required=True, help="YAML file of the policy; its stem is its name")
    deriving.add_argument("--rows", type=Path, help="folder of the rows' bundle (beside the policy)")
    deriving.add_argument("--version", type=integer(1), default=1, help="of the policy (%(default)s)")
    deriving.add_argument("--quick", action="store_true", help="a small sample: minutes")
    deriving.add_argument("--steps", type=integer(1), help="of training of the rows")
    deriving.add_argument("--threads", type=integer(1), help="of PyTorch")
    add_rig(deriving)
    return deriving


def figure_lines(figures: dict[str, Estimate]) -> list[str]:
    """Return a Markdown table of the figures, with the bars and whether both bounds are within."""
    bars = {bar.metric: bar for bar in metrics.BARS}
    lines = ["| figure | value | wanted | |", "|---|---|---|---|"]
    for name, figure in figures.items():
        bar = bars.get(name)
        wanted = f"{bar.low:g} to {bar.high:g}" if bar else ""
        verdict = ("reached" if bar.reached(figures) else "**missed**") if bar else ""
        lines.append(f"| {name.replace('_', ' ')} | {reports.cell(figure, False)} | {wanted} | {verdict} |")
    return lines


def book_lines(books: dict[str, dict[str, Estimate]]) -> list[str]:
    """Return a Markdown table of what each book loses."""
    lines = ["| book | top-1 points | loss, nats | tokens touched | texts opened |", "|---|---|---|---|---|"]
    for book, figures in books.items():
        cells = [
            reports.cell(figures["top1_drop"], True), reports.cell(figures["loss_rise"], False),
            reports.cell(figures["tokens_touched"], True), reports.cell(figures["texts_opened"], True),
        ]  # fmt: skip
        lines.append(f"| {book} | {' | '.join(cells)} |")
    return lines
