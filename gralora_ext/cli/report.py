# SPDX-License-Identifier: Apache-2.0
"""What is told of a job at its end: metrics.json, and loss.png drawn from it."""

from __future__ import annotations

import importlib.metadata
import platform
import resource
import sys
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "safetensors",
    "tokenizers",
    "datasets",
    "gguf",
    "matplotlib",
)


def versions() -> dict[str, str]:
    """Of this package, of Python, and of the packages that a job uses, where they are installed."""
    import gralora_ext

    found = {"gralora_ext": gralora_ext.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def peak_memory_mib() -> dict[str, float]:
    """The greatest memory that this process has held: ``host``, and ``cuda`` where CUDA was used."""
    import torch

    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        peak["cuda"] = torch.cuda.max_memory_allocated() / 2**20
    return {name: round(value, 1) for name, value in peak.items()}


def draw(metrics: dict[str, Any], path: Path) -> None:
    """The loss of each step, and the held-out loss where it was measured; below, learning rate and gradient norm."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes, rates, norms = figure.subplots(3, sharex=True, height_ratios=(5, 1, 1))
    # A loss that is not finite has no place in the plot.
    losses, held_out = ([e for e in metrics[n] if e["loss"] is not None] for n in ("losses", "eval_losses"))
    line: dict[str, Any] = {"color": "0.6", "marker": "." if len(losses) < 60 else None, "linewidth": 1}
    axes.plot(*_series(losses, "loss"), label="training (one batch each)", **line)
    rates.plot(*_series(losses, "learning_rate"), **line)
    norms.plot(*_series(losses, "gradient_norm"), **line)
    axes.plot(
        *_series(held_out, "loss"),
        color="tab:blue",
        marker="o",
        linewidth=2,
        label=f"held out ({metrics['eval_rows']} rows)",
    )
    for point in held_out:
        axes.annotate(
            f"{point['loss']:.3f}",
            (point["step"], point["loss"]),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
            color="tab:blue",
            bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
        )
    config = metrics["config"]
    grid = "" if config["backend"] == "lora" else f", k = {config['k']}"
    hybrid = f", hybrid_r = {config['hybrid_r']}" if config["hybrid_r"] else ""
    axes.set_title(
        f"{' on '.join(Path(metrics[what]).name.split(' (')[0] for what in ('model', 'data'))}\n"
        f"backend {config['backend']}, r = {config['r']}{grid}{hybrid}, lr = {config['lr']:g}, "
        f"{metrics['tokens_per_second'] or 0:,.0f} tokens/s",
        fontsize=10,
        parse_math=False,  # a name may have dollar signs
    )
    axes.set_ylabel("loss per answer token (nats)")
    rates.set_ylabel("rate")
    norms.set_ylabel("gradient norm")
    norms.set_xlabel("optimizer step")
    axes.margins(y=0.12)
    for panel in (axes, rates, norms):
        panel.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def _series(entries: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of what was measured in them; an older job's checkpoint has losses alone."""
    found = [entry for entry in entries if entry.get(name) is not None]
    return [entry["step"] for entry in found], [entry[name] for entry in found]
