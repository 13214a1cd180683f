"""Draw the dashboards from the series of a real Prometheus: `python -m tests.monitoring.pictures FOLDER [SECONDS]`.

Each panel is drawn by its own queries, in its place on the grid. What Grafana would add is left out.
"""

import math
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.dates import DateFormatter
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.transforms import Bbox

from tests.monitoring import files, rig
from tests.monitoring.files import DASHBOARDS, Panel, expanded
from tests.monitoring.prometheus import Prometheus

SECONDS, STEP_S, WINDOW = 180, 2.0, "20s"
# Inches of a cell of the grid, and cells above it.
CELL, MARGIN = (0.56, 0.32), 1.5
MAX_LEGEND, MAX_ROWS, MAX_CHARS = 8, 8, 44
INK, FAINT, PAPER = "#1f2430", "#7a8194", "#ffffff"
Series = tuple[str, np.ndarray, np.ndarray]


def shown(value: float, unit: str) -> str:
    """Return a value with its unit, as short as it can be."""
    if math.isnan(value):
        return "-"
    if unit == "s":
        return f"{value * 1000:.3g} ms" if abs(value) < 1 else f"{value:.3g} s"
    if unit == "percentunit":
        return f"{100 * value:.3g} %"
    if unit == "bytes":
        return f"{value / 2**20:.3g} MiB" if value >= 2**20 else f"{value / 2**10:.3g} KiB"
    return (f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}") + ("/s" if unit == "reqps" else "")


def legend(template: str, labels: Mapping[str, str]) -> str:
    """Fill in the labels of a legend, and shorten it."""
    for name, value in labels.items():
        template = template.replace(f"{{{{{name}}}}}", value)
    return template if len(template) <= MAX_CHARS else f"{template[: MAX_CHARS - 1]}…"


def series_of(prometheus: Prometheus, panel: Panel, begin: float, end: float) -> list[Series]:
    """Return the series of a panel, each with times and values, the highest at last first."""
    found = []
    for query, template in panel.queries:
        for labels, samples in prometheus.query_range(expanded(query, WINDOW), begin, end, STEP_S):
            times, values = np.array([[time, float(value)] for time, value in samples]).T
            found.append((legend(template, labels), times, values))
    return sorted(found, key=lambda each: -np.nan_to_num(each[2][-1])) if len(panel.queries) == 1 else found


def draw_lines(axes: Axes, panel: Panel, found: Sequence[Series], begin: float, end: float) -> None:
    """Draw a panel of time series, stacked if it says so."""
    stacked = bool(panel.body["fieldConfig"]["defaults"]["custom"].get("stacking"))
    grid = np.arange(begin, min([end, *(times[-1] for _, times, _ in found)]), STEP_S)
    base = np.zeros(len(grid))
    colors = pyplot.get_cmap("tab10").colors  # type: ignore[attr-defined]
    for number, (name, times, values) in enumerate(found):
        color = colors[number % len(colors)]
        label = f"{name}  {shown(values[-1], panel.unit)}".strip() if number < MAX_LEGEND else None
        if stacked:
            top = base + np.nan_to_num(np.interp(grid, times, values, left=0, right=0))
            axes.fill_between(dates(grid), base, top, color=color, alpha=0.75, linewidth=0, label=label)
            base = top
        else:
            axes.plot(dates(times), values, color=color, linewidth=1.3, label=label)
    axes.set_xlim(*dates(np.array([begin, end])))
    if "min" in panel.body["fieldConfig"]["defaults"]:
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(value, panel.unit)))
    axes.xaxis.set_major_formatter(DateFormatter("%H:%M:%S"))  # type: ignore[no-untyped-call]
    axes.grid(color="#e6e8ef", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(
        loc="upper left", bbox_to_anchor=(-0.01, -0.13), ncols=columns_of(panel, found), frameon=False, labelcolor=INK,
        handlelength=1.1, columnspacing=1.2, labelspacing=0.25, borderpad=0,
    )  # fmt: skip


def columns_of(panel: Panel, found: Sequence[Series]) -> int:
    """Return how many columns of the legend fit below a panel: characters of its width over those of an entry."""
    longest = max((len(name) for name, _, _ in found), default=0)
    return max(1, min(4, int(10 * panel.body["gridPos"]["w"] / (longest + 16))))


def dates(times: np.ndarray) -> Any:
    """Return times of Unix as dates."""
    return [datetime.fromtimestamp(value, UTC) for value in times]


def draw_figure(axes: Axes, panel: Panel, found: Sequence[Series]) -> None:
    """Draw a panel of one number."""
    value = found[0][2][-1] if found else math.nan
    steps = panel.body["fieldConfig"]["defaults"].get("thresholds", {}).get("steps", [])
    passed = [step["color"] for step in steps if step["value"] is None or value >= step["value"]]
    color = {"red": "#c4162a", "green": "#2a8c4a"}.get(passed[-1] if passed else "", INK)
    axes.text(0.5, 0.45, shown(value, panel.unit), ha="center", va="center", fontsize=19, color=color)
    axes.set_axis_off()


def draw_table(axes: Axes, panel: Panel, prometheus: Prometheus) -> None:
    """Draw a panel that is a table: the labels of each series, and its value."""
    found = prometheus.query(expanded(panel.queries[0][0], WINDOW))
    rows = sorted(found, key=lambda each: -each[1])[:MAX_ROWS]
    names = [name for name in (rows[0][0] if rows else {}) if name not in ("__name__", "job", "bundle", "site")]
    cells = [
        [legend(labels.get(name, ""), {}) for name in names] + [shown(value, panel.unit)] for labels, value in rows
    ]
    axes.set_axis_off()
    widths = [max(len(row[i]) for row in [[*names, "value"], *cells]) + 2 for i in range(len(names) + 1)]
    height = 0.115 * (len(cells) + 1)
    table = axes.table(
        cells, colLabels=[*names, "value"], colWidths=[width / sum(widths) for width in widths], loc="upper center",
        cellLoc="left", edges="horizontal", bbox=Bbox.from_bounds(0, 1 - height, 1, height),
    )  # fmt: skip
    table.auto_set_font_size(False)
    table.set_fontsize(7)
    for cell in table.get_celld().values():
        cell.set_edgecolor("#d5d8e2")
        cell.set_linewidth(0.5)


def draw(figure: Figure, path: Path, prometheus: Prometheus, begin: float, end: float) -> None:
    """Draw a dashboard."""
    document, panels = files.dashboard(path), iter(files.panels(path))
    total = height_of(path)
    for body in document["panels"]:
        top = 1 - (body["gridPos"]["y"] + MARGIN) / total
        if body["type"] == "row":
            figure.text(0.006, top - 0.55 / total, body["title"], fontsize=10, color=INK, weight="bold", va="center")
        else:
            draw_panel(figure, next(panels), prometheus, top, total, (begin, end))
    figure.text(0.006, 1 - 0.75 / total, document["title"], fontsize=13, color=INK, weight="bold", va="center")


def height_of(path: Path) -> float:
    """Return the height of a dashboard in cells, with a margin above for its title."""
    places = [body["gridPos"] for body in files.dashboard(path)["panels"]]
    cells: int = max(place["y"] + place["h"] for place in places)
    return MARGIN + cells


def draw_panel(
    figure: Figure, panel: Panel, prometheus: Prometheus, top: float, total: float, span: tuple[float, float]
) -> None:
    """Draw a panel whose upper edge is at `top` of a figure that is `total` cells high."""
    place, found = panel.body["gridPos"], [] if panel.kind == "table" else series_of(prometheus, panel, *span)
    centred = panel.kind == "stat"
    across = place["x"] + (place["w"] / 2 if centred else 0.25)
    align = "center" if centred else "left"
    figure.text(across / 24, top - 0.5 / total, panel.title, fontsize=8, color=INK, va="center", ha=align)
    left, right, above, below = 0.2, 0.2, 0.8, 0.1
    if panel.kind == "timeseries":
        left, right, above = 1.25, 0.35, 1.0
        below = 0.95 + 0.46 * math.ceil(min(len(found), MAX_LEGEND) / columns_of(panel, found))
    width, height = place["w"] - left - right, place["h"] - above - below
    axes = figure.add_axes(((place["x"] + left) / 24, top - (place["h"] - below) / total, width / 24, height / total))
    if panel.kind == "timeseries":
        draw_lines(axes, panel, found, *span)
    elif panel.kind == "stat":
        draw_figure(axes, panel, found)
    else:
        draw_table(axes, panel, prometheus)


def save_all(prometheus: Prometheus, folder: Path, begin: float, end: float) -> None:
    """Draw all dashboards into a folder, as PNG files of few colours, which are small."""
    style: Any = {
        "font.size": 7, "axes.edgecolor": "#c9cdd8", "axes.labelcolor": FAINT, "xtick.color": FAINT,
        "ytick.color": FAINT, "axes.spines.top": False, "axes.spines.right": False, "figure.facecolor": PAPER,
    }  # fmt: skip
    with mpl.rc_context(style):
        for path in DASHBOARDS:
            figure = Figure(figsize=(24 * CELL[0], height_of(path) * CELL[1]), dpi=100)
            draw(figure, path, prometheus, begin, end)
            save(figure, folder / f"{path.stem}.png")


def save(figure: Figure, path: Path) -> None:
    """Write a PNG with a palette."""
    from PIL import Image

    figure.savefig(path)
    with Image.open(path) as image:
        image.convert("RGB").quantize(32, dither=Image.Dither.NONE).save(path, optimize=True)


def main(arguments: Sequence[str]) -> None:
    """Run a server under traffic for a while, then draw."""
    folder, seconds = Path(arguments[0]), float(arguments[1]) if len(arguments) > 1 else SECONDS
    with tempfile.TemporaryDirectory(prefix="rudder-pictures-") as work, rig.running(Path(work)) as running:
        begin = time.time()
        time.sleep(seconds / 2)
        (running.policies / "broken.yaml").write_text("name: [")
        time.sleep(seconds / 2)
        save_all(running.prometheus, folder, begin + 10, time.time())


if __name__ == "__main__":
    main(sys.argv[1:])
