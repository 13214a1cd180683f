"""Report of a run as one self-contained HTML page: rudder report RUN

All content comes from config.yaml and metrics.jsonl of the run. Plots are drawn by matplotlib and embedded as SVG.
"""

import base64
import html
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from rudder.sae_models.errors import UserError
from rudder.sae_models.files import write_atomically
from rudder.sae_models.optional import import_optional
from rudder.sae_models.training.export import COSINE, DENSITY
from rudder.sae_models.training.record import METRICS, lines

REPORT = "report.html"
# The palette of Okabe and Ito, distinguishable with colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# Columns of the table: key of the figure, heading, format, meaning.
COLUMNS = (
    ("l0", "L0", ".1f", "mean number of active latents a token"),
    ("fvu", "FVU", ".4f", "fraction of variance unexplained"),
    ("ce_recovered", "CE recovered", ".4f", "share of the loss increase of mean ablation that the SAE recovers"),
    ("kl", "KL", ".4f", "divergence of the spliced model from the model, nats a token"),
    ("dead_share", "dead", ".2%", "share of latents that never fired on the held-out tokens"),
    (
        "dense_latents",
        "dense",
        "d",
        "latents active on more than 10% of the held-out tokens: few mean anything",
    ),
    ("dense_share", "share of dense", ".1%", "share of all activations that these latents carry"),
    ("frequent_share", "above 1%", ".1%", "share of all activations of latents active on more than 1% of the tokens"),
    ("outlier_share", "sinks", ".2%", "share of tokens left out: norm above 5 times the median (attention sinks)"),
    ("shrinkage", "shrinkage", ".3f", "relative reconstruction bias: below 1 the outputs are too small"),
    (
        "probe_1",
        "probe, 1",
        ".3f",
        "balanced accuracy for a window's book from 1 latent (small: 1 dimension of the input)",
    ),
    ("probe_5", "probe, 5", ".3f", "from 5 latents"),
    ("probe_20", "probe, 20", ".3f", "from 20 latents"),
)
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin-top: 2rem; } p.note { color: #555; }
table { border-collapse: collapse; } th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }
small { color: #777; }
th { border-bottom: 2px solid #888; cursor: help; } th:first-child, td:first-child { text-align: left; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(480px, 1fr)); gap: 1rem; }
figure { margin: 0; } figure img { width: 100%; } figcaption { color: #555; font-size: .9rem; }
ul.legend { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; }
ul.legend i { display: inline-block; width: 1rem; height: .25rem; margin-right: .4rem; vertical-align: middle; }
pre { background: #f6f6f6; padding: 1rem; overflow-x: auto; }
"""


@dataclass(frozen=True)
class History:
    """What metrics.jsonl holds of one SAE: tokens and training figures of each line, and its evaluation or {}."""

    name: str
    tokens: list[int]
    train: list[Mapping[str, float]]
    evaluation: Mapping[str, Any]


def write(folder: Path) -> Path:
    """Write report.html into a run's folder. Raise MissingPackage if matplotlib is not installed."""
    histories = read(folder)
    path = folder / REPORT
    write_atomically(path, page(folder, histories).encode())
    return path


def read(folder: Path) -> list[History]:
    """Read the histories of a run's SAEs. Raise ValueError if there are none."""
    by_name: dict[str, History] = {}
    for line in lines(folder / METRICS):
        history = by_name.setdefault(line["sae"], History(line["sae"], [], [], {}))
        if "train" in line:
            history.tokens.append(line["tokens"])
            history.train.append(line["train"])
        else:
            by_name[line["sae"]] = History(line["sae"], history.tokens, history.train, line["evaluation"])
    if not by_name:
        raise UserError(f"report: {folder / METRICS} holds no line")
    return list(by_name.values())


def page(folder: Path, histories: Sequence[History]) -> str:
    """Return the HTML page."""
    trained_tokens = max(tokens[-1] for tokens in (history.tokens for history in histories) if tokens)
    count = f"{len(histories)} SAE{'s' if len(histories) > 1 else ''}"
    name = html.escape(folder.resolve().name)
    config = html.escape((folder / "config.yaml").read_text(encoding="utf-8"))
    plots = "".join(figures(histories))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}</title><style>{STYLE}</style>'
        f'<h1>{name}</h1><p class="note">{count}, {trained_tokens:,} tokens of training each</p>'
        f"<h2>Held-out evaluation</h2>{table(histories)}"
        f'<h2>Plots</h2>{legend(histories)}<div class="figures">{plots}</div>'
        f"<h2>Configuration</h2><pre>{config}</pre></html>\n"
    )


def table(histories: Sequence[History]) -> str:
    """Return a table of the figures of each evaluated SAE; a column without values is left out."""
    shown = [column for column in COLUMNS if any(column[0] in history.evaluation for history in histories)]
    if not shown:
        return '<p class="note">The run is not finished: nothing has been evaluated yet.</p>'
    header = "".join(f'<th title="{html.escape(text)}">{heading}</th>' for _, heading, _, text in shown)
    short = strip_common_prefix([history.name for history in histories])
    records = "".join(_table_record(history, short[history.name], shown) for history in histories)
    meanings = "; ".join(f"{heading}: {text}" for _, heading, _, text in shown)
    causes = dict.fromkeys(cause for history in histories for cause in history.evaluation.get("left_out", ()))
    left_out = f'<p class="note">Left out: {html.escape("; ".join(causes))}.</p>' if causes else ""
    return (
        f'<table><tr><th>SAE</th>{header}</tr>{records}</table><p class="note">{html.escape(meanings)}.</p>{left_out}'
    )


def _table_record(history: History, name: str, shown: Sequence[tuple[str, str, str, str]]) -> str:
    cells = (_cell(history.evaluation, key, format_spec) for key, _, format_spec, _ in shown)
    return f'<tr><td title="{html.escape(history.name)}">{html.escape(name)}</td>{"".join(cells)}</tr>'


def _cell(evaluation: Mapping[str, Any], key: str, format_spec: str) -> str:
    """Return a table cell: a figure and, for a probe, the baseline on as many dimensions of the SAE input below it."""
    value, baseline = (evaluation.get(name) for name in (key, f"{key}_of_inputs"))
    suffix = "" if baseline is None else f"<br><small>{format(baseline, format_spec)}</small>"
    return f"<td>{'' if value is None else format(value, format_spec)}{suffix}</td>"


def figures(histories: Sequence[History]) -> Iterator[str]:
    """Yield each plot with its caption."""
    trained = [history for history in histories if history.train]
    evaluated = [history for history in histories if history.evaluation]
    colours = assign_colours([history.name for history in histories])
    fvu, l0 = "FVU: share of variance unexplained", "L0: active latents a token"
    yield _figure("Reconstruction on the training stream.", trained, colours, _curve("fvu", fvu, log=True))
    yield _figure("Sparsity on the training stream.", trained, colours, _curve("l0", l0))
    yield _figure("Share of dead latents.", trained, colours, _curve("dead_share", "share of latents", share=True))
    if len(evaluated) > 1:
        caption = "Sparsity against reconstruction on held-out vectors. The line is the Pareto front."
        yield _figure(caption, evaluated, colours, pareto)
    if evaluated:
        density = _histogram("density", DENSITY, "share of tokens on which a latent fires", log=True)
        caption = "Firing frequency of latents on held-out vectors; latents that never fire are excluded."
        yield _figure(caption, evaluated, colours, density)
        cosine = _histogram("decoder_cosine", COSINE, "largest cosine with another decoder vector")
        yield _figure("Cosine of each decoder vector with its nearest neighbour.", evaluated, colours, cosine)


Draw = Callable[[Any, Sequence[History], Mapping[str, str]], None]


def _figure(caption: str, histories: Sequence[History], colours: Mapping[str, str], draw: Draw) -> str:
    figure = import_optional("matplotlib.figure", "the report").Figure(figsize=(5.6, 3.6), layout="constrained")
    axes = figure.subplots()
    draw(axes, histories, colours)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    svg = io.BytesIO()
    figure.savefig(svg, format="svg")
    data = base64.b64encode(svg.getvalue()).decode()
    image = f'<img alt="{html.escape(caption)}" src="data:image/svg+xml;base64,{data}">'
    return f"<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>"


def assign_colours(names: Sequence[str]) -> dict[str, str]:
    """Assign a colour to each SAE: one of COLOURS or, with more SAEs, shades of one colour for those that differ in the
    last key only.
    """
    if len(names) <= len(COLOURS):
        return dict(zip(names, COLOURS, strict=False))
    matplotlib_colors = import_optional("matplotlib.colors", "the report")
    families: dict[str, list[str]] = {}
    for name in names:
        families.setdefault(name.rpartition("-")[0], []).append(name)
    colours = {}
    for number, family in enumerate(families.values()):
        rgb = matplotlib_colors.to_rgb(COLOURS[number % len(COLOURS)])
        for position, name in enumerate(family):
            pale = 0.7 * (1 - (position + 1) / len(family))
            colours[name] = matplotlib_colors.to_hex([pale + (1 - pale) * part for part in rgb])
    return colours


def strip_common_prefix(names: Sequence[str]) -> dict[str, str]:
    """Strip the hyphen-separated parts that all names share at the start; a single name stays whole."""
    parts = [name.split("-") for name in names]
    common = takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False))
    cut = min(len(list(common)), *map(len, parts)) if len(names) > 1 else 0
    return {name: "-".join(part[cut:]) or name for name, part in zip(names, parts, strict=True)}


def legend(histories: Sequence[History]) -> str:
    """Return the colour legend, one for all plots."""
    names = [history.name for history in histories]
    short, colours = strip_common_prefix(names), assign_colours(names)
    keys = (f'<li><i style="background:{colours[name]}"></i>{html.escape(short[name])}</li>' for name in names)
    return f'<ul class="legend">{"".join(keys)}</ul>'


def _curve(key: str, label: str, log: bool = False, share: bool = False) -> Draw:
    def draw(axes: Any, histories: Sequence[History], colours: Mapping[str, str]) -> None:
        for history in histories:
            axes.plot(history.tokens, [line[key] for line in history.train], color=colours[history.name], lw=1.4)
        axes.set(xlabel="tokens of training", ylabel=label, yscale="log" if log else "linear")
        ticker = import_optional("matplotlib.ticker", "the report")
        axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
        if log:
            _plain_ticks(axes.yaxis)
        else:
            axes.set_ylim(0, 1.1 * max(line[key] for history in histories for line in history.train) or 0.05)
        if share:
            axes.yaxis.set_major_formatter(ticker.PercentFormatter(1))

    return draw


def _plain_ticks(axis: Any) -> None:
    """Label a logarithmic axis with plain decimal numbers."""
    ticker = import_optional("matplotlib.ticker", "the report")
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5, 7)))
    axis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())


def _histogram(key: str, bounds: tuple[float, float, int], label: str, log: bool = False) -> Draw:
    """Plot counts between bounds; with `log` the bounds are exponents of ten."""
    low, high, bins = bounds
    edges = [low + (high - low) * index / bins for index in range(bins + 1)]
    edges = [10**edge for edge in edges] if log else edges

    def draw(axes: Any, histories: Sequence[History], colours: Mapping[str, str]) -> None:
        for history in histories:
            axes.stairs(history.evaluation[key], edges, color=colours[history.name], lw=1.4)
        axes.set(xlabel=label, ylabel="latents", xscale="log" if log else "linear")

    return draw


def pareto(axes: Any, histories: Sequence[History], colours: Mapping[str, str]) -> None:
    """Plot L0 against FVU, with the Pareto front of each site and the names of its points."""
    short = strip_common_prefix([history.name for history in histories])
    for site in {history.evaluation.get("site") for history in histories}:
        at = {(h.evaluation["l0"], h.evaluation["fvu"]): h.name for h in histories if h.evaluation.get("site") == site}
        best = pareto_front(list(at))
        axes.plot(*zip(*best, strict=True), color="#999999", lw=1, zorder=1)
        for number, point in enumerate(best):
            # Alternate above and below: adjacent labels would overlap.
            offset = (6, -10 if number % 2 else 5)
            axes.annotate(short[at[point]], point, textcoords="offset points", xytext=offset, fontsize=7)
    for history in histories:
        axes.scatter(history.evaluation["l0"], history.evaluation["fvu"], color=colours[history.name], zorder=2)
    axes.set(xlabel="L0: active latents a token", ylabel="FVU: share of variance unexplained", xscale="log")
    _plain_ticks(axes.xaxis)
    axes.margins(0.15)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other dominates in both coordinates (smaller is better), from left to right."""
    result: list[tuple[float, float]] = []
    for point in sorted(points):
        if not result or point[1] < result[-1][1]:
            result.append(point)
    return result
