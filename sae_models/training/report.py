"""A run as one HTML page with its pictures in it: rudder report RUN

Everything on it comes from the run's config.yaml and metrics.jsonl. The pictures are drawn by matplotlib.
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
from rudder.sae_models.files import write_whole
from rudder.sae_models.optional import extra
from rudder.sae_models.training.export import COSINE, DENSITY
from rudder.sae_models.training.record import METRICS, lines

REPORT = "report.html"
# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# Columns of the table: the figure, its heading, how it is written, and what it means.
COLUMNS = (
    ("l0", "L0", ".1f", "mean number of active latents a token"),
    ("fvu", "FVU", ".4f", "fraction of variance unexplained"),
    ("ce_recovered", "CE recovered", ".4f", "share of the loss of mean ablation that the SAE saves"),
    ("kl", "KL", ".4f", "divergence of the spliced model from the model, nats a token"),
    ("dead_share", "dead", ".2%", "share of latents that never fired on the held-out tokens"),
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
    """What metrics.jsonl tells of one SAE: tokens seen and figures at each line, and its evaluation, if it has one."""

    name: str
    tokens: list[int]
    train: list[Mapping[str, float]]
    evaluation: Mapping[str, Any]


def write(folder: Path) -> Path:
    """Writes report.html into a run's folder. MissingPackage: matplotlib is not there."""
    histories = read(folder)
    path = folder / REPORT
    write_whole(path, page(folder, histories).encode())
    return path


def read(folder: Path) -> list[History]:
    """The histories of a run's SAEs. ValueError: there is nothing to tell."""
    found: dict[str, History] = {}
    for line in lines(folder / METRICS):
        history = found.setdefault(line["sae"], History(line["sae"], [], [], {}))
        if "train" in line:
            history.tokens.append(line["tokens"])
            history.train.append(line["train"])
        else:
            found[line["sae"]] = History(line["sae"], history.tokens, history.train, line["evaluation"])
    if not found:
        raise UserError(f"report: {folder / METRICS} holds no line")
    return list(found.values())


def page(folder: Path, histories: Sequence[History]) -> str:
    """The HTML."""
    seen = max(tokens[-1] for tokens in (history.tokens for history in histories) if tokens)
    count = f"{len(histories)} SAE{'s' if len(histories) > 1 else ''}"
    name = html.escape(folder.resolve().name)
    config = html.escape((folder / "config.yaml").read_text(encoding="utf-8"))
    pictures = "".join(figures(histories))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}</title><style>{STYLE}</style>'
        f'<h1>{name}</h1><p class="note">{count}, {seen:,} tokens of training each</p>'
        f"<h2>On what was held out</h2>{table(histories)}"
        f'<h2>Pictures</h2>{legend(histories)}<div class="figures">{pictures}</div>'
        f"<h2>Configuration</h2><pre>{config}</pre></html>\n"
    )


def table(histories: Sequence[History]) -> str:
    """The figures of each evaluated SAE; a column that no SAE has is left out."""
    shown = [column for column in COLUMNS if any(column[0] in history.evaluation for history in histories)]
    if not shown:
        return '<p class="note">The run has not come to its end: nothing is measured yet.</p>'
    head = "".join(f'<th title="{html.escape(text)}">{heading}</th>' for _, heading, _, text in shown)
    short = shortened([history.name for history in histories])
    rows = "".join(_row(history, short[history.name], shown) for history in histories)
    meanings = "; ".join(f"{heading}: {text}" for _, heading, _, text in shown)
    missing = dict.fromkeys(cause for history in histories for cause in history.evaluation.get("left_out", ()))
    left_out = f'<p class="note">Left out: {html.escape("; ".join(missing))}.</p>' if missing else ""
    return f'<table><tr><th>SAE</th>{head}</tr>{rows}</table><p class="note">{html.escape(meanings)}.</p>{left_out}'


def _row(history: History, name: str, shown: Sequence[tuple[str, str, str, str]]) -> str:
    cells = (_cell(history.evaluation, key, form) for key, _, form, _ in shown)
    return f'<tr><td title="{html.escape(history.name)}">{html.escape(name)}</td>{"".join(cells)}</tr>'


def _cell(evaluation: Mapping[str, Any], key: str, form: str) -> str:
    """A figure, and under a probe's what as many dimensions of the SAE's own input would give."""
    told, plain = (evaluation.get(name) for name in (key, f"{key}_of_inputs"))
    beside = "" if plain is None else f"<br><small>{format(plain, form)}</small>"
    return f"<td>{'' if told is None else format(told, form)}{beside}</td>"


def figures(histories: Sequence[History]) -> Iterator[str]:
    """Each picture with its caption."""
    trained = [history for history in histories if history.train]
    evaluated = [history for history in histories if history.evaluation]
    colours = colours_of([history.name for history in histories])
    fvu, l0 = "FVU: share of variance unexplained", "L0: active latents a token"
    yield _figure("Reconstruction on the training stream.", trained, colours, _curve("fvu", fvu, log=True))
    yield _figure("Sparsity on the training stream.", trained, colours, _curve("l0", l0))
    yield _figure("Latents that count as dead.", trained, colours, _curve("dead_share", "share of latents", share=True))
    if len(evaluated) > 1:
        caption = "Sparsity against reconstruction on held-out vectors. The line joins what no other beats in both."
        yield _figure(caption, evaluated, colours, pareto)
    if evaluated:
        density = _histogram("density", DENSITY, "share of tokens on which a latent fires", log=True)
        caption = "How often latents fire on held-out vectors; those that never do are left out."
        yield _figure(caption, evaluated, colours, density)
        cosine = _histogram("decoder_cosine", COSINE, "largest cosine with another decoder row")
        yield _figure("How close each latent's direction is to the nearest other.", evaluated, colours, cosine)


Draw = Callable[[Any, Sequence[History], Mapping[str, str]], None]


def _figure(caption: str, histories: Sequence[History], colours: Mapping[str, str], draw: Draw) -> str:
    figure = extra("matplotlib.figure", "the report").Figure(figsize=(5.6, 3.6), layout="constrained")
    axes = figure.subplots()
    draw(axes, histories, colours)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="svg")
    data = base64.b64encode(drawn.getvalue()).decode()
    image = f'<img alt="{html.escape(caption)}" src="data:image/svg+xml;base64,{data}">'
    return f"<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>"


def colours_of(names: Sequence[str]) -> dict[str, str]:
    """A colour for each SAE: one of COLOURS; of more SAEs, those that differ in the last key have shades of one."""
    if len(names) <= len(COLOURS):
        return dict(zip(names, COLOURS, strict=False))
    mixed = extra("matplotlib.colors", "the report")
    families: dict[str, list[str]] = {}
    for name in names:
        families.setdefault(name.rpartition("-")[0], []).append(name)
    found = {}
    for number, family in enumerate(families.values()):
        rgb = mixed.to_rgb(COLOURS[number % len(COLOURS)])
        for place, name in enumerate(family):
            pale = 0.7 * (1 - (place + 1) / len(family))
            found[name] = mixed.to_hex([pale + (1 - pale) * part for part in rgb])
    return found


def shortened(names: Sequence[str]) -> dict[str, str]:
    """The names without the parts, joined by hyphens, that all begin with; a name alone is whole."""
    parts = [name.split("-") for name in names]
    alike = takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False))
    cut = min(len(list(alike)), *map(len, parts)) if len(names) > 1 else 0
    return {name: "-".join(part[cut:]) or name for name, part in zip(names, parts, strict=True)}


def legend(histories: Sequence[History]) -> str:
    """Which colour is which SAE, once for all pictures."""
    names = [history.name for history in histories]
    short, colours = shortened(names), colours_of(names)
    keys = (f'<li><i style="background:{colours[name]}"></i>{html.escape(short[name])}</li>' for name in names)
    return f'<ul class="legend">{"".join(keys)}</ul>'


def _curve(key: str, label: str, log: bool = False, share: bool = False) -> Draw:
    def draw(axes: Any, histories: Sequence[History], colours: Mapping[str, str]) -> None:
        for history in histories:
            axes.plot(history.tokens, [line[key] for line in history.train], color=colours[history.name], lw=1.4)
        axes.set(xlabel="tokens of training", ylabel=label, yscale="log" if log else "linear")
        ticker = extra("matplotlib.ticker", "the report")
        axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
        if log:
            _plain_ticks(axes.yaxis)
        else:
            axes.set_ylim(0, 1.1 * max(line[key] for history in histories for line in history.train) or 0.05)
        if share:
            axes.yaxis.set_major_formatter(ticker.PercentFormatter(1))

    return draw


def _plain_ticks(axis: Any) -> None:
    """Numbers as people write them on a logarithmic axis."""
    ticker = extra("matplotlib.ticker", "the report")
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5, 7)))
    axis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())


def _histogram(key: str, bounds: tuple[float, float, int], label: str, log: bool = False) -> Draw:
    """Counts between bounds; `log`: which are powers of ten."""
    low, high, bins = bounds
    edges = [low + (high - low) * index / bins for index in range(bins + 1)]
    edges = [10**edge for edge in edges] if log else edges

    def draw(axes: Any, histories: Sequence[History], colours: Mapping[str, str]) -> None:
        for history in histories:
            axes.stairs(history.evaluation[key], edges, color=colours[history.name], lw=1.4)
        axes.set(xlabel=label, ylabel="latents", xscale="log" if log else "linear")

    return draw


def pareto(axes: Any, histories: Sequence[History], colours: Mapping[str, str]) -> None:
    """L0 against FVU, with the front of each site, whose points are named: those that no other at the site beats."""
    short = shortened([history.name for history in histories])
    for site in {history.evaluation.get("site") for history in histories}:
        at = {(h.evaluation["l0"], h.evaluation["fvu"]): h.name for h in histories if h.evaluation.get("site") == site}
        best = front(list(at))
        axes.plot(*zip(*best, strict=True), color="#999999", lw=1, zorder=1)
        for number, point in enumerate(best):
            # Above and below in turn: neighbours may be near.
            place = (6, -10 if number % 2 else 5)
            axes.annotate(short[at[point]], point, textcoords="offset points", xytext=place, fontsize=7)
    for history in histories:
        axes.scatter(history.evaluation["l0"], history.evaluation["fvu"], color=colours[history.name], zorder=2)
    axes.set(xlabel="L0: active latents a token", ylabel="FVU: share of variance unexplained", xscale="log")
    _plain_ticks(axes.xaxis)
    axes.margins(0.15)


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats in both coordinates, smaller being better, from left to right."""
    kept: list[tuple[float, float]] = []
    for point in sorted(points):
        if not kept or point[1] < kept[-1][1]:
            kept.append(point)
    return kept
