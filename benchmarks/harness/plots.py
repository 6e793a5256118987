"""Images of results: bars of times relative to ours, and times over sizes."""

from collections.abc import Mapping, Sequence

from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks.harness.growth import Fit

# Okabe and Ito's colors, which the color-blind can tell apart.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
_MARKERS = "os^Dv*P"

Quantiles = tuple[float, float, float]


def bars(title: str, cases: Mapping[str, Mapping[str, Quantiles]]) -> Figure:
    """A bar for each provider of each case, from 1, which is ours, to its median.

    Args:
        cases: by label the other providers, with quantiles (20, 50, 80 %) of their time over ours.
    """
    providers = dict.fromkeys(name for case in cases.values() for name in case)
    colors = {name: _COLORS[i % len(_COLORS)] for i, name in enumerate(providers)}
    height = 1.5 + 0.2 * sum(len(case) + 1 for case in cases.values())
    figure = Figure(figsize=(7.5, height), dpi=100, layout="constrained")
    axes = figure.subplots()
    y, ticks, ends = 0.0, [], [1.0]
    for case in cases.values():
        ticks.append(y + (len(case) - 1) / 2)
        for provider, (p20, p50, p80) in case.items():
            axes.barh(
                y, p50 - 1, left=1, height=0.9, color=colors[provider],
                xerr=[[p50 - p20], [p80 - p50]], error_kw={"lw": 0.8, "ecolor": "0.3"},
            )  # fmt: skip
            end, shift, side = (p80, 3, "left") if p50 >= 1 else (p20, -3, "right")
            axes.annotate(
                f"{p50:.3g}×", (end, y), (shift, 0), textcoords="offset points", ha=side,
                va="center", fontsize=7,
            )  # fmt: skip
            ends.append(end)
            y += 1
        y += 0.8
    axes.set_yticks(ticks, list(cases), fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1, color="black", lw=1)
    axes.set_xscale("log")
    axes.set_xlim(min(ends) / 1.6, max(ends) * 1.6)
    _without_powers(axes.xaxis)
    axes.set_xlabel("time of a call, ours = 1; bars to the left are faster than ours", fontsize=8)
    figure.suptitle(title, fontsize="medium")
    patches = [Patch(color=color, label=name) for name, color in colors.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=3, fontsize=8)
    return figure


def growth(title: str, fits: Sequence[Fit]) -> Figure:
    """Time over size, both logarithmic, a panel for each kind of size."""
    extents = list(dict.fromkeys(fit.extent for fit in fits))
    columns = min(2, len(extents))
    rows = -(-len(extents) // columns)
    figure = Figure(figsize=(4.2 * columns, 4 * rows), dpi=100, layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, extent in zip(panels, extents, strict=False):
        for i, fit in enumerate(fit for fit in fits if fit.extent == extent):
            label = f"{fit.case} {fit.variant}".strip() + f": {fit.exponent:.2f}"
            look = {"color": _COLORS[i % len(_COLORS)], "marker": _MARKERS[i % len(_MARKERS)]}
            axes.loglog(fit.sizes, fit.times, ms=4, lw=1.2, label=label, **look)
        axes.set_xlabel(extent, fontsize=8)
        axes.set_ylabel("µs", fontsize=8)
        _without_powers(axes.xaxis)
        _without_powers(axes.yaxis)
        axes.legend(
            title="exponents", fontsize=7, title_fontsize=7, loc="upper center",
            bbox_to_anchor=(0.5, -0.15),
        )  # fmt: skip
    for axes in panels[len(extents) :]:
        axes.set_axis_off()
    figure.suptitle(title, fontsize="medium")
    return figure


def _without_powers(axis: Axis) -> None:
    """0.1, 0.2, 0.5, 1 beside the ticks."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_formatter(NullFormatter())
    axis.set_tick_params(labelsize=7)
