# SPDX-License-Identifier: Apache-2.0
"""Figures, each as PNG and SVG, drawn from what the files of runs say."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .methods import of_k

COLOURS = (
    "#0b6e99",
    "#d9730d",
    "#448361",
    "#9065b0",
    "#c14c8a",
    "#9f6b53",
    "#787774",
    "#cb912f",
    "#337ea9",
    "#d44c47",
    "#5a8f29",
    "#6f5bd0",
)


@contextmanager
def figure(path: Path, width: float, height: float) -> Iterator[Any]:
    """A figure to draw into, then written as ``path`` with .png and .svg at its end."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "gralora_ext", "font.size": 9, "axes.spines.top": False}):
        drawn = Figure(figsize=(width, height), dpi=120, layout="constrained")
        FigureCanvasAgg(drawn)
        yield drawn
        drawn.savefig(path.with_name(f"{path.name}.png"))
        drawn.savefig(path.with_name(f"{path.name}.svg"), metadata={"Date": None})


def colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def comparison(content: dict[str, Any], path: Path) -> None:
    """Held-out loss of each method with its spread, and beside it what it forgets."""
    rows = [r for r in content["rows"] if r["method"] != "base"]
    with figure(path, 11, max(3.0, 0.45 * len(rows) + 1.4)) as drawn:
        left, right = drawn.subplots(1, 2)
        for i, row in enumerate(rows):
            if not {"loss", "forgetting"} <= row["metrics"].keys():
                continue
            loss, forgetting = row["metrics"]["loss"], row["metrics"]["forgetting"]
            errors = {"xerr": loss["deviation"] or 0, "capsize": 3, "color": colour(i), "fmt": "o"}
            left.errorbar(loss["mean"], i, **errors)
            errors |= {"xerr": forgetting["deviation"] or 0, "yerr": loss["deviation"] or 0}
            right.errorbar(forgetting["mean"], loss["mean"], **errors)
        remark = {row["method"]: "diverged" if row["diverged"] else f"lr {row['rate']:g}" for row in rows}
        left.set_yticks(range(len(rows)), [f"{row['label']}, {remark[row['method']]}" for row in rows])
        left.invert_yaxis()
        left.set_xlabel("held-out loss (nats per answer token)")
        right.set_xlabel("forgetting: loss on general text, after less before")
        right.set_ylabel("held-out loss (colours as on the left)")
        right.margins(0.15)
        for axes in (left, right):
            axes.grid(alpha=0.3)
        s = content["settings"]
        drawn.suptitle(
            f"{s['model'].split(' (')[0]}, rank {s['rank']}, {s['steps']} steps of {s['batch_size']} rows; "
            f"mean and standard deviation over {min(row['seeds'] for row in rows)} seeds",
            fontsize=10,
            parse_math=False,  # a model's name may have dollar signs
        )


def rank(content: dict[str, Any], path: Path) -> None:
    """The measured rank of ΔW over k beside k·r: in the model's layers, and in one wide layer beside the paper's."""
    from .findings import PAPERS_RANKS

    parts = (("in_model", content["rank"], "layers of the model"), ("wide", content["wide_rank"], "one wide layer"))
    with figure(path, 10, 5.2) as drawn:
        for axes, (part, r, what) in zip(drawn.subplots(1, 2), parts, strict=True):
            ks = sorted(map(int, content[part]))
            axes.plot(ks, [k * r for k in ks], color="0.6", linestyle="--", label=f"k·r, r = {r}")
            for k in ks:
                found = [layer["float64"] for layer in content[part][str(k)]]
                label = f"measured, {len(found)} layers and seeds for each k" if k == ks[0] else None
                axes.scatter([k] * len(found), found, color=colour(0), alpha=0.6, zorder=3, label=label)
                axes.annotate(
                    f"{max(found):,}", (k, max(found)), xytext=(-6, 6), textcoords="offset points", ha="right"
                )
            if part == "wide":
                paper = PAPERS_RANKS.items()
                axes.scatter(*zip(*paper, strict=True), marker="x", s=60, color=colour(1), zorder=4, label="paper")
                for k, value in paper:
                    axes.annotate(
                        f"{value:,}", (k, value), xytext=(7, -12), textcoords="offset points", color=colour(1)
                    )
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=2)
            axes.set_xticks(ks, map(str, ks))
            axes.yaxis.set_major_formatter("{x:,.0f}")
            axes.set_xlabel("k")
            axes.set_ylabel("rank of ΔW in float64")
            axes.set_title(what, fontsize=10)
            axes.margins(0.15)
            axes.grid(alpha=0.3)
            axes.legend(loc="upper left", fontsize=8)
        _say(drawn, content)


def outlier(content: dict[str, Any], path: Path) -> None:
    """By block, how much an outlier channel changes the gradient of ΔW; and how near that is to full fine-tuning's."""
    from matplotlib.colors import LogNorm

    layers = content["layers"]
    strongest = max(layers, key=lambda layer: layer["times_median"])["layer"]
    ks = sorted({layer["k"] for layer in layers})
    names = {k: of_k(k).label for k in ks}

    def mean(k: int, key: str) -> list[list[float]]:
        found = [layer[key] for layer in layers if layer["layer"] == strongest and layer["k"] == k]
        return [[sum(c) / len(c) for c in zip(*rows, strict=True)] for rows in zip(*found, strict=True)]

    maps = {"full fine-tuning": mean(ks[0], "change_of_full"), **{names[k]: mean(k, "change") for k in ks}}
    with figure(path, 12, 6.6) as drawn:
        above, below = drawn.subfigures(2, 1, height_ratios=(1, 1.1))
        norm = LogNorm(1e-3, 10, clip=True)
        for axes, (name, values) in zip(above.subplots(1, len(maps)), maps.items(), strict=True):
            image = axes.imshow([[max(v, 1e-9) for v in row] for row in values], cmap="viridis", norm=norm)
            axes.set_title(name, fontsize=9)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_xlabel("inputs", fontsize=8)
        above.axes[0].set_ylabel("outputs", fontsize=8)
        above.colorbar(image, ax=above.axes, shrink=0.8, label="change of the block's\ngradient, relative")
        short = strongest.removeprefix("base_model.model.")
        above.suptitle(f"what the strongest input channel of {short} changes, block by block", fontsize=10)
        parts = {"cosine": "of the whole matrix", "block_cosines": "of the outlier's blocks, their mean"}
        for axes, (name, part) in zip(below.subplots(1, 2, sharey=True), parts.items(), strict=True):
            for i, what in enumerate(("without", "with")):
                found = [content["means"][f"{name}_{what}"][str(k)] for k in ks]
                axes.bar(
                    [place + 0.36 * (i - 0.5) for place in range(len(ks))],
                    [f["mean"] for f in found],
                    0.34,
                    yerr=[f["deviation"] or 0 for f in found],
                    capsize=3,
                    color=colour(i),
                    label=f"{what} the outlier channel",
                )
            axes.set_xticks(range(len(ks)), [names[k] for k in ks], fontsize=8)
            axes.set_title(part, fontsize=9)
            axes.margins(y=0.3)
            axes.grid(axis="y", alpha=0.3)
        below.axes[0].set_ylabel("cosine with full\nfine-tuning's gradient")
        below.axes[0].legend(fontsize=8, loc="upper right", ncols=2)
        _say(drawn, content)


def grid(content: dict[str, Any], path: Path) -> None:
    """The held-out loss over rank, a line for each k; a ring marks the k with r/k² nearest to 8."""
    cells = [cell for cell in content["cells"] if cell["mean"] is not None]  # what diverged stands in the sentences
    with figure(path, 9, 5.8) as drawn:
        axes = drawn.subplots()
        for i, k in enumerate(sorted({cell["k"] for cell in cells})):
            line = sorted((cell for cell in cells if cell["k"] == k), key=lambda cell: cell["r"])
            axes.errorbar(
                [cell["r"] for cell in line],
                [cell["mean"] for cell in line],
                yerr=[cell["deviation"] or 0 for cell in line],
                color=colour(i),
                marker="o",
                capsize=3,
                label=of_k(k).label,
            )
        ringed = [cell for cell in cells if cell["predicted"]]
        axes.scatter(
            [cell["r"] for cell in ringed],
            [cell["mean"] for cell in ringed],
            s=150,
            facecolors="none",
            edgecolors="0.35",
            label="r/k² nearest to the paper's 8",
            zorder=4,
        )
        ranks = sorted({cell["r"] for cell in cells})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ranks, map(str, ranks))
        axes.set_xlabel("rank r")
        axes.set_ylabel("held-out loss (nats per answer token)")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        _say(drawn, content)


def _say(drawn: Any, content: dict[str, Any]) -> None:
    """The paper's number, ours and the sentence of each finding, below the figure."""
    s = content["settings"]
    lines = [line for f in content["findings"] for line in (f"Paper: {f['paper']}. Ours: {f['ours']}.", f["sentence"])]
    lines.append(f"{s['model'].split(' (')[0]}, {s['steps']} steps, {s['seeds']} seed{'s' if s['seeds'] > 1 else ''}.")
    drawn.supxlabel(
        "\n".join(textwrap.fill(line, 150) for line in lines), fontsize=8, x=0.02, ha="left", parse_math=False
    )
