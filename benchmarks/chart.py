"""The measurements as a picture: for each workload the seconds of a whole run by phase, and the steady rate by its limit."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes

PHASES = {"startup_s": ("start-up", "#c9d6e8"), "steady_s": ("first to last vectors", "#4a78b5"), "end_s": ("end", "#9fb8d8")}
OURS, PEERS, LIMIT = "#d9772b", "#8a94a3", "#b02a2a"


def draw(found: dict[str, Any], path: Path) -> None:
    """A row of two panels for each workload that has contestants; none, no picture. The ending names the format."""
    rows = {name: of for name, of in found["workloads"].items() if "contestants" in of}
    rows = {name: of for name, of in rows.items() if any("median" in one for one in of["contestants"].values())}
    if not rows:
        return
    heights = [1.2 + 0.34 * len(of["contestants"]) for of in rows.values()]
    settings: dict[str, Any] = {"height_ratios": heights}
    figure, axes = pyplot.subplots(len(rows), 2, figsize=(11, sum(heights)), squeeze=False, gridspec_kw=settings)
    for (name, of), (left, right) in zip(rows.items(), axes, strict=True):
        medians = {who: one for who, one in reversed(of["contestants"].items()) if "median" in one}
        _draw_seconds(left, medians)
        left.set_title(f"{name}: {of['about']}, {of['images']:,} images", loc="left", fontsize=9)
        _draw_rates(right, medians, [limit["both"] for limit in of["limits_images_per_s"]])
    axes[0][0].legend(fontsize=8, frameon=False, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=120, facecolor="white")
    pyplot.close(figure)


def _draw_seconds(axes: Axes, medians: dict[str, Any]) -> None:
    left = [0.0] * len(medians)
    for key, (label, color) in PHASES.items():
        widths = [_phase(of["median"], key) for of in medians.values()]
        axes.barh(list(medians), widths, left=left, label=label, color=color)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for place, (start, of) in enumerate(zip(left, medians.values(), strict=True)):
        least, most = of["spread"]["whole_s"]
        axes.plot([least, most], [place, place], color="#333333", linewidth=1)
        axes.annotate(f" {of['median']['whole_s']:.1f}", (max(start, most), place), va="center", fontsize=8)
    axes.set_xlabel("seconds of the whole run", fontsize=8)
    _plain(axes)


def _phase(median: dict[str, float], key: str) -> float:
    return median["whole_s"] - median["startup_s"] - median["end_s"] if key == "steady_s" else median[key]


def _draw_rates(axes: Axes, medians: dict[str, Any], limits: list[float]) -> None:
    colors = [OURS if who.startswith("lora-embed") else PEERS for who in medians]
    axes.barh(list(medians), [of["median"]["steady_images_per_s"] for of in medians.values()], color=colors)
    for place, of in enumerate(medians.values()):
        least, most = of["spread"]["steady_images_per_s"]
        axes.plot([least, most], [place, place], color="#333333", linewidth=1)
        axes.annotate(f" {of['median']['steady_images_per_s']:,.1f}", (most, place), va="center", fontsize=8)
    axes.axvspan(min(limits), max(limits), color=LIMIT, alpha=0.15)
    axes.axvline(sum(limits) / len(limits), color=LIMIT, linestyle="--", linewidth=1)
    axes.set_xlabel("steady images/s; dashed: what decoding and model allow on the same cores", fontsize=8)
    axes.set_yticklabels([])
    _plain(axes)


def _plain(axes: Axes) -> None:
    axes.margins(x=0.12)
    axes.tick_params(labelsize=8, length=0)
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
