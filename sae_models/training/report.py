"""A run as one HTML page with its pictures in it: python -m sae_models.training.report RUN

Everything on it comes from the run's config.yaml and metrics.jsonl. The pictures are drawn by matplotlib.
"""

import base64
import html
import io
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_models.extras import extra
from sae_models.training.evaluation import COSINE, DENSITY
from sae_models.training.files import write_whole
from sae_models.training.record import METRICS, lines

REPORT = "report.html"
# Okabe and Ito's colours, which the colour-blind can tell apart; more SAEs than these share a scale.
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
        raise ValueError(f"report: {folder / METRICS} holds no line")
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
        f"<h2>On held-out text</h2>{table(histories)}"
        f'<h2>Pictures</h2><div class="figures">{pictures}</div>'
        f"<h2>Configuration</h2><pre>{config}</pre></html>\n"
    )


def table(histories: Sequence[History]) -> str:
    """The figures of each evaluated SAE; a column that no SAE has is left out."""
    shown = [column for column in COLUMNS if any(column[0] in history.evaluation for history in histories)]
    if not shown:
        return '<p class="note">The run has not come to its end: nothing is measured yet.</p>'
    head = "".join(f'<th title="{html.escape(text)}">{heading}</th>' for _, heading, _, text in shown)
    rows = "".join(_row(history, shown) for history in histories)
    meanings = "; ".join(f"{heading}: {text}" for _, heading, _, text in shown)
    missing = dict.fromkeys(cause for history in histories for cause in history.evaluation.get("left_out", ()))
    left_out = f'<p class="note">Left out: {html.escape("; ".join(missing))}.</p>' if missing else ""
    return f'<table><tr><th>SAE</th>{head}</tr>{rows}</table><p class="note">{html.escape(meanings)}.</p>{left_out}'


def _row(history: History, shown: Sequence[tuple[str, str, str, str]]) -> str:
    cells = (_cell(history.evaluation, key, form) for key, _, form, _ in shown)
    return f"<tr><td>{html.escape(history.name)}</td>{''.join(cells)}</tr>"


def _cell(evaluation: Mapping[str, Any], key: str, form: str) -> str:
    """A figure, and under a probe's what as many dimensions of the SAE's own input would give."""
    told, plain = (evaluation.get(name) for name in (key, f"{key}_of_inputs"))
    beside = "" if plain is None else f"<br><small>{format(plain, form)}</small>"
    return f"<td>{'' if told is None else format(told, form)}{beside}</td>"


def figures(histories: Sequence[History]) -> Iterator[str]:
    """Each picture with its caption."""
    evaluated = [history for history in histories if history.evaluation]
    yield _figure("Fraction of variance unexplained on the training stream.", histories, _curve("fvu", "FVU", log=True))
    yield _figure("Mean active latents a token.", histories, _curve("l0", "L0"))
    yield _figure("Share of latents that count as dead.", histories, _curve("dead_share", "dead share"))
    if len(evaluated) > 1:
        yield _figure("Sparsity against fidelity on held-out text, and the Pareto front.", evaluated, pareto)
    if evaluated:
        density = _histogram("density", DENSITY, "log10 of the share of tokens on which a latent fires")
        yield _figure("How often latents fire on held-out text; those that never do are left out.", evaluated, density)
        cosine = _histogram("decoder_cosine", COSINE, "largest cosine with another decoder row")
        yield _figure("How close each latent's direction is to the nearest other.", evaluated, cosine)


Draw = Callable[[Any, Sequence[History], Sequence[Any]], None]


def _figure(caption: str, histories: Sequence[History], draw: Draw) -> str:
    figure = extra("matplotlib.figure", "the report").Figure(figsize=(5.6, 3.6), layout="constrained")
    axes = figure.subplots()
    draw(axes, histories, _colours(len(histories)))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    if len(histories) > 1 and draw is not pareto:
        axes.legend(fontsize=max(4, 8 - len(histories) // 6), frameon=False)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="svg")
    data = base64.b64encode(drawn.getvalue()).decode()
    image = f'<img alt="{html.escape(caption)}" src="data:image/svg+xml;base64,{data}">'
    return f"<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _colours(count: int) -> Sequence[Any]:
    if count <= len(COLOURS):
        return COLOURS
    scale = extra("matplotlib", "the report").colormaps["viridis"]
    return [scale(index / count) for index in range(count)]


def _curve(key: str, label: str, log: bool = False) -> Draw:
    def draw(axes: Any, histories: Sequence[History], colours: Sequence[Any]) -> None:
        for history, colour in zip(histories, colours, strict=False):
            axes.plot(history.tokens, [line[key] for line in history.train], color=colour, label=history.name, lw=1.4)
        axes.set(xlabel="tokens", ylabel=label, yscale="log" if log else "linear")
        ticker = extra("matplotlib.ticker", "the report")
        axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
        if log:
            axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5, 7)))
            axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_formatter(ticker.NullFormatter())
        else:
            axes.set_ylim(0, 1.1 * max(line[key] for history in histories for line in history.train) or 1)

    return draw


def _histogram(key: str, bounds: tuple[float, float, int], label: str) -> Draw:
    low, high, bins = bounds
    edges = [low + (high - low) * index / bins for index in range(bins + 1)]

    def draw(axes: Any, histories: Sequence[History], colours: Sequence[Any]) -> None:
        for history, colour in zip(histories, colours, strict=False):
            axes.stairs(history.evaluation[key], edges, color=colour, label=history.name, lw=1.4)
        axes.set(xlabel=label, ylabel="latents")

    return draw


def pareto(axes: Any, histories: Sequence[History], colours: Sequence[Any]) -> None:
    """L0 against FVU, with the front of each site: those that no other at the site beats in both."""
    for site in {history.evaluation.get("site") for history in histories}:
        points = [(h.evaluation["l0"], h.evaluation["fvu"]) for h in histories if h.evaluation.get("site") == site]
        axes.plot(*zip(*front(points), strict=True), color="#999999", lw=1, zorder=1)
    for history, colour in zip(histories, colours, strict=False):
        point = (history.evaluation["l0"], history.evaluation["fvu"])
        axes.scatter(*point, color=colour, zorder=2)
        axes.annotate(history.name, point, textcoords="offset points", xytext=(0, 6), fontsize=7, ha="center")
    axes.set(xlabel="L0", ylabel="FVU")
    axes.margins(0.2)


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats in both coordinates, smaller being better, from left to right."""
    kept: list[tuple[float, float]] = []
    for point in sorted(points):
        if not kept or point[1] < kept[-1][1]:
            kept.append(point)
    return kept


def main() -> int:
    """Writes the report of the run named on the command line."""
    try:
        print(write(Path(sys.argv[1])))
    except (IndexError, OSError, ValueError) as error:
        print(f"error: {error or 'name the folder of a run'}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
