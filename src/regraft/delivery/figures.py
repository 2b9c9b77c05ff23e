"""The figures of the report: inline SVG in the colours of the page, light or dark."""

import html
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Stand-ins that matplotlib draws with; the page's own CSS variables replace them in the SVG.
INK, MUTED, RULE, TRANSFER, SCRATCH = "#010101", "#020202", "#030303", "#040404", "#050505"
VARIABLES = {INK: "ink", MUTED: "muted", RULE: "rule", TRANSFER: "transfer", SCRATCH: "scratch"}
MARKERS = {"transfer": "o", "scratch": "s", "probe_transplanted": "D", "probe_random": "^"}
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "regraft",
    "text.parse_math": False,
    "text.color": INK,
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
}


@dataclass(frozen=True)
class Series:
    """The epochs of one Run, as a line of one arm.

    Attributes:
        best_epoch: Marked on the line; None where there is none.
    """

    arm: str
    epochs: Sequence[Mapping[str, Any]]
    best_epoch: int | None


def curves(series: Sequence[Series], field: str, label: str) -> str:
    """Returns one field of every Run over its epochs: an arm has one colour and one dash."""

    def draw(axes: "Axes") -> None:
        from matplotlib.ticker import MaxNLocator

        for one in series:
            known = [epoch for epoch in one.epochs if epoch[field] is not None]
            axes.plot(
                [epoch["epoch"] for epoch in known],
                [epoch[field] for epoch in known],
                color=_colour(one.arm),
                linestyle=(0, (4, 1.6)) if one.arm == "scratch" and len(series) > 1 else "solid",
                linewidth=0.9 if len(series) > 2 else 1.5,
                marker=MARKERS[one.arm],
                markersize=4,
                markevery=[i for i, epoch in enumerate(known) if epoch["epoch"] == one.best_epoch],
            )
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set(title=label, xlabel="epoch")
        axes.grid(axis="y")

    return _svg(draw, (3.7, 2.6), f"{label} over the epochs of {len(series)} runs")


def paired_differences(comparison: Mapping[str, Any], seeds: Sequence[str], label: str) -> str:
    """Returns transfer - scratch for each seed, and their mean with its 95 % interval."""
    differences = comparison["per_seed"]
    rows = range(1, len(differences) + 1)

    def draw(axes: "Axes") -> None:
        axes.axvline(0, color=INK, linewidth=1)
        axes.plot(differences, rows, "o", color=TRANSFER, markersize=5)
        interval = [comparison["low"], comparison["high"]]
        if None not in interval:
            axes.plot(interval, [0, 0], color=INK, linewidth=2.5, marker="|", markersize=9)
        axes.plot([comparison["difference"]], [0], "D", color=INK, markersize=7)
        axes.set_yticks([0, *rows], ["mean", *seeds])
        axes.set_ylim(len(differences) + 0.6, -0.6)
        axes.locator_params(axis="x", nbins=6)
        axes.margins(x=0.08)
        axes.set_xlabel(f"{label}: transfer \u2212 scratch")
        axes.grid(axis="x")

    told = [f"{seed} {value:+.3f}" for seed, value in zip(seeds, differences, strict=True)]
    description = f"{label}, transfer minus scratch: {', '.join(told)}"
    return _svg(draw, (4.6, 1.1 + 0.27 * (len(differences) + 1)), description)


def arms(comparison: Mapping[str, Any], names: Mapping[str, str], label: str) -> str:
    """Returns the value of every arm: each seed as a mark, the mean as a line."""
    metric = comparison["metric"]
    values = {arm: comparison["arms"][arm][metric] for arm in names}

    def draw(axes: "Axes") -> None:
        if metric == "balanced_accuracy":
            axes.axvline(
                comparison["chance_balanced_accuracy"], color=MUTED, linewidth=1.2, dashes=(3, 2)
            )
        for row, (arm, value) in enumerate(values.items()):
            seeds = value["values"]
            axes.plot(
                seeds, [row] * len(seeds), MARKERS[arm], color=_colour(arm), markersize=5, alpha=0.6
            )
            axes.plot([value["mean"]], [row], "|", color=INK, markersize=20, markeredgewidth=1.6)
        axes.set_yticks(range(len(values)), [names[arm] for arm in values])
        axes.set_ylim(len(values) - 0.4, -0.6)
        axes.locator_params(axis="x", nbins=6)
        axes.set_xlabel(label)
        axes.grid(axis="x")

    return _svg(draw, (4.6, 1.1 + 0.5 * len(values)), f"{label} of {len(values)} arms")


def _colour(arm: str) -> str:
    return {"transfer": TRANSFER, "scratch": SCRATCH}.get(arm, MUTED)


def label_efficiency(comparison: Mapping[str, Any], label: str) -> str:
    """Returns the metric of both arms against the number of training images."""
    curve = comparison["curve"]
    numbers = [point["num_images"] for point in curve]

    def draw(axes: "Axes") -> None:
        for arm in ("transfer", "scratch"):
            colour, marker = _colour(arm), MARKERS[arm]
            dash: Any = (0, (4, 1.6)) if arm == "scratch" else "solid"
            means = [point[arm]["mean"] for point in curve]
            axes.plot(numbers, means, color=colour, linestyle=dash, label=arm)
            for number, point in zip(numbers, curve, strict=True):
                values = point[arm]["values"]
                axes.plot([number] * len(values), values, marker, color=colour, markersize=3)
        axes.set_xscale("log")
        axes.set_xticks(numbers, [f"{number:,}" for number in numbers], minor=False)
        axes.minorticks_off()
        axes.set(title=label, xlabel="training images")
        axes.grid(axis="y")
        axes.legend(frameon=False)

    return _svg(draw, (4.6, 3.0), f"{label} against the number of training images")


def _svg(draw: Callable[["Axes"], None], size: tuple[float, float], description: str) -> str:
    import matplotlib.style
    from matplotlib.figure import Figure

    # From the defaults on: a matplotlibrc of the user must not change the page.
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=size, layout="constrained")
        figure.patch.set_visible(False)
        axes = figure.add_subplot()
        axes.patch.set_visible(False)
        axes.tick_params(length=0)
        draw(axes)
        buffer = BytesIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=nothing)
    return _inline(buffer.getvalue().decode("utf-8"), description)


def _inline(svg: str, description: str) -> str:
    """Returns the SVG as a part of a page: no prologue, no URL, no ids but those referred to."""
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None
    body = svg[svg.index(">", box.end()) + 1 :]
    body = re.sub(r"<style.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = re.sub(r" font-family: [^;]*;", "", body)  # the page's own font
    # As attributes: the policy of a page allows no `style` but the sheet that it names.
    body = re.sub(r' style="([^"]*)"', lambda found: _attributes(found[1]), body)
    for stand_in, variable in VARIABLES.items():
        body = body.replace(stand_in, f"var(--{variable})")
    return f'<svg {box.group()} role="img" aria-label="{html.escape(description)}">{body}'


def _attributes(style: str) -> str:
    pairs = (part.split(":", 1) for part in style.split(";") if part.strip())
    return "".join(f' {name.strip()}="{value.strip()}"' for name, value in pairs)
