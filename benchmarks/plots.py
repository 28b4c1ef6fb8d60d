# SPDX-License-Identifier: Apache-2.0
"""The pictures of a run, drawn from the content of its JSON file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from gralora_ext.program.files import staged

from .results import LABELS

COLORS = {
    "ours": "tab:blue",
    "ours-op": "tab:cyan",
    "ours-path": "tab:purple",
    "peft": "tab:red",
    "peft-compiled": "tab:pink",
    "lora": "tab:orange",
    "torch": "tab:green",
    "base": "0.6",
}
BENCHES = {"forward": "forward", "training": "forward + backward"}

Record = dict[str, Any]


def draw(content: dict[str, Any], folder: Path) -> list[Path]:
    """Draws what the run has records for into ``folder``; returns the files."""
    records = content["records"]
    by_bench = {name: [r for r in records if r["bench"] == name] for name in {r["bench"] for r in records}}
    drawn = []
    with staged(folder) as stage:
        for name, picture in PICTURES.items():
            figure = picture(by_bench, content)
            if figure is not None:
                figure.savefig(stage / f"{name}.png")
                drawn.append(folder / f"{name}.png")
    return drawn


def roofline(by_bench: dict[str, list[Record]], content: dict[str, Any]) -> Figure | None:
    """FLOP/s over FLOPs per byte of the least traffic, under the measured peak and bandwidths."""
    benches = [name for name in BENCHES if name in by_bench]
    if not benches:
        return None
    floor = content["floor"]
    bandwidths = {name: max(floor[name].values()) for name in ("cached", "large")}
    figure, panels = _figure(len(benches), width=7, height=5.5)
    for axes, bench in zip(panels, benches, strict=True):
        records = by_bench[bench]
        intensities = [r["work"]["flops"] / r["work"]["bytes"] for r in records]
        for name in _contenders(records):
            points = [
                (x, r["work"]["flops"] / r["contenders"][name]["median"] / 1e9)
                for x, r in zip(intensities, records, strict=True)
                if name in r["contenders"]
            ]
            axes.scatter(*zip(*points, strict=True), s=18, color=COLORS[name], label=LABELS[name], alpha=0.75, zorder=3)
        span = [min(intensities) / 2, max(max(intensities), floor["gemm"] / bandwidths["large"]) * 2]
        axes.axhline(floor["gemm"] / 1e9, color="0.3", linewidth=1, label="fp32 GEMM peak")
        for key, style, label in (("cached", "--", "memory in cache"), ("large", ":", "memory out of cache")):
            axes.plot(
                span, [x * bandwidths[key] / 1e9 for x in span], color="0.3", linewidth=1, linestyle=style, label=label
            )
        axes.set(xscale="log", yscale="log", xlim=span, title=BENCHES[bench])
        axes.set(xlabel="FLOPs per byte of the least traffic", ylabel="GFLOP/s")
        axes.set_ylim(top=floor["gemm"] / 1e9 * 3)
    panels[0].legend(fontsize=8)
    return figure


def ratios(by_bench: dict[str, list[Record]], content: dict[str, Any]) -> Figure | None:
    """Time of ours over time of each peer, shape by shape: left of 1 ours takes less."""
    benches = [name for name in BENCHES if name in by_bench]
    if not benches:
        return None
    rows = max(len(by_bench[name]) for name in benches)
    figure, panels = _figure(len(benches), width=7.5, height=1.5 + 0.2 * rows)
    for axes, bench in zip(panels, benches, strict=True):
        records = by_bench[bench]
        for name in _contenders(records):
            points = [(r["ratios"][name], i) for i, r in enumerate(records) if r["ratios"].get(name)]
            if points:
                axes.scatter(*zip(*points, strict=True), s=22, color=COLORS[name], label=LABELS[name], zorder=3)
        axes.axvline(1, color="0.3", linewidth=1)
        axes.set(xscale="log", title=BENCHES[bench], xlabel="time of ours / time of the peer")
        axes.set_yticks(range(len(records)), [r["key"] for r in records], fontsize=7)
        axes.invert_yaxis()
        _log_ticks(axes.xaxis)
    panels[0].legend(fontsize=8)
    return figure


def growth(by_bench: dict[str, list[Record]], content: dict[str, Any]) -> Figure | None:
    """Time over each dimension, both axes logarithmic; the band is the interquartile range."""
    records = by_bench.get("growth")
    if not records:
        return None
    names = {"T": "T (tokens)", "N": "N = M (features)", "r": "r (rank)", "k": "k (blocks a side)"}
    axes_of = list(dict.fromkeys(r["case"]["axis"] for r in records))
    figure, panels = _figure(len(axes_of), width=4.5, height=4.5)
    for axes, axis in zip(panels, axes_of, strict=True):
        line = [r for r in records if r["case"]["axis"] == axis]
        _lines(axes, line, lambda r: r["case"]["value"])
        axes.set(xscale="log", yscale="log", xlabel=names[axis], ylabel="forward + backward (ms)")
        axes.minorticks_off()
        values = [r["case"]["value"] for r in line]
        axes.set_xticks(values, map(str, values), fontsize=8)
        _log_ticks(axes.yaxis)
    panels[0].legend(fontsize=8)
    return figure


def step(by_bench: dict[str, list[Record]], content: dict[str, Any]) -> Figure | None:
    """A training step's parts, and the frozen model's forward and backward as a line."""
    records = {(r["case"]["setting"], r["case"]["what"]): r["contenders"] for r in by_bench.get("step", [])}
    settings = list(dict.fromkeys(setting for setting, _ in records))
    if not settings:
        return None
    figure, panels = _figure(len(settings), width=5.5, height=3)
    for axes, setting in zip(panels, settings, strict=True):
        steps, optimizers = (records[setting, what] for what in ("step", "optimizer"))
        names = [name for name in COLORS if name in steps]
        passes = [steps[name]["median"] * 1e3 for name in names]
        updates = [optimizers[name]["median"] * 1e3 if name in optimizers else 0.0 for name in names]
        axes.barh(range(len(names)), passes, color="tab:blue", label="forward + backward")
        axes.barh(range(len(names)), updates, left=passes, color="tab:orange", label="optimizer")
        axes.axvline(steps["base"]["median"] * 1e3, color="0.3", linestyle="--", label="frozen model")
        axes.set_yticks(range(len(names)), [LABELS[name] for name in names], fontsize=8)
        axes.invert_yaxis()
        axes.set(
            title=f"{setting}, {next(iter(by_bench['step']))['case']['tokens']} tokens", xlabel="time of a step (ms)"
        )
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return figure


def threads(by_bench: dict[str, list[Record]], content: dict[str, Any]) -> Figure | None:
    """How many times faster than on one thread."""
    records = by_bench.get("threads")
    if not records:
        return None
    shapes = list(dict.fromkeys(r["key"].split(": ")[1] for r in records))
    figure, panels = _figure(len(shapes), width=5, height=4.5)
    for axes, shape in zip(panels, shapes, strict=True):
        line = [r for r in records if r["key"].split(": ")[1] == shape]
        counts = [r["case"]["threads"] for r in line]
        axes.plot(counts, counts, color="0.6", linestyle=":", label="linear")
        for name in _contenders(line):
            medians = [r["contenders"][name]["median"] for r in line]
            axes.plot(counts, [medians[0] / m for m in medians], marker="o", color=COLORS[name], label=LABELS[name])
        axes.set(title=shape, xlabel="threads", ylabel="speed-up over one thread")
        axes.set_xticks(counts)
    panels[0].legend(fontsize=8)
    return figure


PICTURES: dict[str, Callable[[dict[str, list[Record]], dict[str, Any]], Figure | None]] = {
    "roofline": roofline,
    "ratios": ratios,
    "growth": growth,
    "step": step,
    "threads": threads,
}


def _figure(columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width * columns, height), dpi=120, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(1, columns, squeeze=False).flat)
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    return figure, panels


def _contenders(records: list[Record]) -> list[str]:
    """Those that occur, in the order of COLORS."""
    return [name for name in COLORS if any(name in r["contenders"] for r in records)]


def _lines(axes: Axes, records: list[Record], x: Callable[[Record], float]) -> None:
    for name in _contenders(records):
        entries = [(x(r), r["contenders"][name]) for r in records if name in r["contenders"]]
        places = [place for place, _ in entries]
        q1, median, q3 = ([entry[key] * 1e3 for _, entry in entries] for key in ("q1", "median", "q3"))
        axes.fill_between(places, q1, q3, color=COLORS[name], alpha=0.2, linewidth=0)
        axes.plot(places, median, marker="o", markersize=4, color=COLORS[name], label=LABELS[name])


def _log_ticks(axis: Any) -> None:
    """Ticks at 1, 2 and 5 of each decade, written as plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())
