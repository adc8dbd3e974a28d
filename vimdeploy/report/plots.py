"""The paper's two efficiency figures, speed and memory against resolution, drawn from rows of a benchmark as SVG.

Colours are Okabe and Ito's, which stay apart for colour-blind readers; each line has its own marker and its name at its
end, so none needs the legend's colours at all.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vimdeploy.bench.results import ARTIFACT, Results, Row
from vimdeploy.errors import RuntimeMissing

_OURS = ("#0072B2", "#009E73", "#56B4E9")
_THEIRS = ("#D55E00", "#E69F00", "#CC79A7", "#999999", "#000000")
_MARKERS = "osD^vP*X"


@dataclass(frozen=True)
class Quantity:
    """What a figure shows of a row, and how its axis is called."""

    key: str
    label: str
    of: Callable[[Row], float | None]


LATENCY = Quantity("latency", "milliseconds an image", lambda row: row.ms / row.batch if row.ms else None)
MEMORY = Quantity("memory", "peak memory, MiB", lambda row: row.peak_mib)
QUANTITIES = (LATENCY, MEMORY)


def has_curve(results: Results, batch: int, quantity: Quantity) -> bool:
    """Whether there is anything to draw: one contender at two sizes."""
    return any(len(points) > 1 for points in _curves(results, batch, quantity).values())


def curves_svg(results: Results, batch: int, quantity: Quantity, *, background: str = "none") -> str:
    """One figure as an SVG element: a line a contender, resolution across, both axes logarithmic.

    Text stays text. The same results give the same bytes. ``background``: a colour, for a file that is shown on any.
    Raises RuntimeMissing without matplotlib.
    """
    matplotlib = _import()
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

    curves = _curves(results, batch, quantity)
    roles = {row.contender: row.role for row in results.rows}
    with matplotlib.rc_context({**_STYLE, "savefig.facecolor": background}):
        figure = Figure(figsize=(6.4, 4.8), layout="constrained")
        axes = figure.add_subplot()
        sides: set[int] = set()
        for name, colour, marker in _styles(curves, roles):
            points = curves[name]
            sides |= points.keys()
            ours = roles[name] == ARTIFACT
            axes.plot(
                list(points), list(points.values()), color=colour, marker=marker, label=name, zorder=3 if ours else 2,
                linewidth=2.4 if ours else 1.6, linestyle="-" if ours else "--",
            )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sorted(sides), [str(side) for side in sorted(sides)])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        _few_ticks(axes)
        axes.set_xlabel("image side, pixels")
        axes.set_ylabel(quantity.label)
        axes.grid(visible=True, which="major", color="#dddddd", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        # Above the axes, where no line can run through it.
        axes.legend(frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(-0.02, 1.0), borderaxespad=0.2)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    svg = stream.getvalue()
    return svg[svg.index("<svg") :]


def _curves(results: Results, batch: int, quantity: Quantity) -> dict[str, dict[int, float]]:
    """contender -> {side: value}, ascending, of square images at that batch."""
    found: dict[str, dict[int, float]] = {}
    for row in results.rows:
        value = quantity.of(row)
        if row.batch == batch and row.failed is None and value and row.img_size[0] == row.img_size[1]:
            found.setdefault(row.contender, {})[row.img_size[0]] = value
    return {name: dict(sorted(points.items())) for name, points in found.items()}


def _styles(curves: Sequence[str] | Mapping[str, Any], roles: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """(contender, colour, marker): blues and greens for artifacts, reds and greys for what they are compared with."""
    styled = []
    counts = {True: 0, False: 0}
    for position, name in enumerate(curves):
        ours = roles[name] == ARTIFACT
        palette = _OURS if ours else _THEIRS
        styled.append((name, palette[counts[ours] % len(palette)], _MARKERS[position % len(_MARKERS)]))
        counts[ours] += 1
    return styled


def _few_ticks(axes: Any) -> None:
    """1, 2, 5 a decade where the axis spans little, powers of ten where it spans much."""
    from matplotlib.ticker import LogLocator

    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 2000 else (1,)))


_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "vimdeploy",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


def _import() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise RuntimeMissing(
            f"the report's figures need matplotlib, which is not installed ({error})",
            hint="pip install 'vimdeploy[report]'",
        ) from error
    return matplotlib
