# SPDX-License-Identifier: Apache-2.0
"""The tables of what the console script's jobs left in the committed results: finetune, merge, compare and analyze."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from gralora_ext.cli.manifest import digest
from gralora_ext.compare.methods import k_of, of_k
from gralora_ext.compare.page import cells as cells_of
from gralora_ext.compare.plan import MEASURE
from gralora_ext.compare.summary import Spread
from gralora_ext.program.errors import JobError

from .results import markdown, read_json, same, when

JOB = "finetune-default"
FOUR_BIT = "finetune-4bit"
OF_ONE_JOB = ("backend", "seed", "output", "sample_tokens")  # settings in which FOUR_BIT's jobs may differ
FILE_MERGE = "file-merge"
# Tables of comparisons, and the folders they are in; analyses lie in analyze-rank and so on.
COMPARED = {"methods": "compare", "control": "compare-k1"}
ANALYSES = ("rank", "outlier", "grid")


def tables(folder: Path) -> dict[str, Callable[[Path], str]]:
    """Of what is committed in ``folder``, the functions that make a table of it, by name."""
    found: dict[str, Callable[[Path], str]] = {"job": job, "four-bit": four_bit, "file-merge": file_merge}
    for name, of in COMPARED.items():
        if (folder / of / "summary.json").exists():
            found[name] = partial(methods, of=of)
    for what in ANALYSES:
        if (folder / f"analyze-{what}" / f"{what}.json").exists():
            found[what] = partial(findings, what=what)
    return found


def job(folder: Path) -> str:
    """The default fine-tuning job, as it wrote its metrics; a file beside them, written by hand, says where it ran."""
    metrics, beside = folder / JOB / "metrics.json", folder / JOB / "measured.json"
    made, where = read_json(metrics), read_json(beside)
    if where["metrics_sha256"] != digest(metrics):
        raise JobError(
            f"{beside} tells where another {metrics.name} was made: write machine, date and commit anew, and as "
            f"metrics_sha256 {digest(metrics)}"
        )
    shown = {
        "model": made["model"],
        "data": made["data"],
        "steps": str(made["steps"]),
        "trainable parameters": f"{made['trainable_parameters']:,}",
        "held-out loss before": f"{made['eval_loss_before']:.3f}",
        "after": f"{made['eval_loss_after']:.3f}",
        "tokens/s": f"{made['tokens_per_second']:.0f}",
        "peak memory": ", ".join(f"{value:,.0f} MiB ({kind})" for kind, value in made["peak_memory_mib"].items()),
    }
    versions = f"torch {made['versions']['torch']}, PEFT {made['versions']['peft']}"
    table = markdown([list(shown), list(shown.values())])
    return f"{table}\n\nMeasured with {versions}: {where['machine']}, commit {where['commit']}, {where['date']}."


def four_bit(folder: Path) -> str:
    """The default fine-tuning job with the base in 4 bits, over seeds, beside PEFT's LoRA."""
    jobs = [read_json(file) for file in sorted((folder / FOUR_BIT).glob("*.json"))]

    def all_have(key: str) -> Any:
        return same(f"{folder / FOUR_BIT}: {key}", (job[key] for job in jobs))

    rows = [["adapter", "seeds", "held-out loss before", "after, mean (least to greatest)", "standard deviation"]]
    for backend, label in (("fused", "ours"), ("lora", "PEFT's LoRA")):
        after = [job["eval_loss_after"] for job in jobs if job["config"]["backend"] == backend]
        span = f"{statistics.mean(after):.3f} ({min(after):.3f} to {max(after):.3f})"
        spread = f"{statistics.stdev(after):.3f}" if len(after) > 1 else "one seed"
        rows.append([label, str(len(after)), f"{all_have('eval_loss_before'):.3f}", span, spread])
    for key in ("model", "data", "train_rows", "trainable_parameters"):
        all_have(key)
    settings = {  # an older job does not name what it could not be told yet
        key: same(f"{folder / FOUR_BIT}: {key}", (job["config"][key] for job in jobs if key in job["config"]))
        for key in sorted({key for job in jobs for key in job["config"]}.difference(OF_ONE_JOB))
    }
    versions = all_have("versions")
    sentence = (
        f"`gralora-ext finetune --load-in-4bit`, SmolLM2-135M in nf4, {all_have('steps')} steps on the CPU, "
        f"r = {settings['r']}, learning rate {settings['lr']} for both, {all_have('eval_rows')} held-out rows:"
    )
    measured = (
        f"Measured with torch {versions['torch']}, PEFT {versions['peft']}, bitsandbytes {versions['bitsandbytes']}."
    )
    return f"{sentence}\n\n{markdown(rows)}\n\n{measured}"


def file_merge(folder: Path) -> str:
    """A merge in files, beside copying the files and beside PEFT."""
    found = read_json(folder / FILE_MERGE / "measured.json")
    seconds = found["seconds"]
    names = {"merge": "`gralora-ext merge`", "cp": "`cp`, which merges nothing", "PEFT": "PEFT: load, merge, save"}
    rows = [
        ["each followed by `sync`", "turns", "median, s (least to greatest)", "GB/s", "merge / it, median of the turns"]
    ]
    for name, label in names.items():
        median = statistics.median(seconds[name])
        ratio = statistics.median(a / b for a, b in zip(seconds["merge"], seconds[name], strict=False))
        span = f"{median:.1f} ({min(seconds[name]):.1f} to {max(seconds[name]):.1f})"
        speed = f"{found['bytes'] / median / 1e9:.2f}"
        rows.append([label, str(len(seconds[name])), span, speed, "" if name == "merge" else f"{ratio:.2f}"])
    sentence = (
        f"A model of {found['bytes'] / 1e9:.1f} GB in bfloat16 with the shapes of an 8B Llama, r = 32, k = 2, in "
        f"turns. Our process grew by at most {found['growth'] / 2**20:.0f} MiB:"
    )
    where = f"{found['machine']['cpu']}, {found['machine']['cores']} cores of a virtual machine"
    versions = f"torch {found['versions']['torch']}, PEFT {found['versions']['peft']}"
    measured = f"Measured with {versions}: {where}, {when(found)}."
    return "\n\n".join([sentence, markdown(rows), *([] if "order" in found else [_fixed_order(seconds)]), measured])


def _fixed_order(seconds: dict[str, list[float]]) -> str:
    """What the order did to a run from before it was drawn: `cp`, the merge, and PEFT in the first turns alone."""
    slow = len(seconds["PEFT"])
    after, others = seconds["cp"][1 : slow + 1], [seconds["cp"][0], *seconds["cp"][slow + 1 :]]
    return (
        f"The order was the same in all turns: `cp`, `gralora-ext merge`, and in the first {slow} turns PEFT. In the "
        f"{len(after)} turns that follow a run of PEFT `cp` took {min(after):.1f} to {max(after):.1f} s, in the others "
        f"{min(others):.1f} to {max(others):.1f}. So what ran before decides what `cp` takes: its median is an effect of "
        f"the order, and does not show that a merge takes as long as a copy."
    )


def methods(folder: Path, of: str = COMPARED["methods"]) -> str:
    """The comparison's table, with what follows from it."""
    content = read_json(folder / of / "summary.json")
    table = [["method", "learning rate", "seeds", *(f"{m['label']} ({m['unit']})" for m in content["metrics"])]]
    table += [[row["label"], *cells_of(row)] for row in content["rows"]]
    s = content["settings"]
    sizes = (
        f"`gralora-ext compare{' --quick' if s['quick'] else ''}`: {s['model'].split(' (')[0]} on {s['data']}, "
        f"{s['steps']} steps of {s['batch_size']} rows of at most {s['max_length']} tokens, rank {s['rank']}, "
        f"{s['test_rows']} test rows; mean ± standard deviation over seeds."
    )
    busy = ["In some runs threads had to wait for a core, so that their speeds are too low, and not comparable."]
    mixed = ["Processor or threads differ between runs: speeds and memory are not comparable."]
    places = {_place(run) for run in _runs(folder / of) if run["run"]["part"] == MEASURE}
    said = content["sentences"] + (busy if content["busy"] else []) + (mixed if len(places) > 1 else [])
    return "\n\n".join([sizes, markdown(table), *said, _measured(folder / of)])


def findings(folder: Path, what: str) -> str:
    """An analysis: what the paper says, what was measured, and the sentence that follows."""
    content = read_json(folder / f"analyze-{what}" / f"{what}.json")
    table = [["the paper", "its number", "ours", "verdict"]]
    table += [[f["claim"], f["paper"], f["ours"], f["sentence"]] for f in content["findings"]]
    s = content["settings"]
    sizes = (
        f"`gralora-ext analyze {what}{' --quick' if s['quick'] else ''}`: {s['model'].split(' (')[0]}, {s['steps']} steps of "
        f"{s['batch_size']} rows, {s['seeds']} seeds."
    )
    more = _of_outlier(content["means"]) if what == "outlier" else _of_grid(content) if what == "grid" else []
    return "\n\n".join([sizes, markdown(table), *more, _measured(folder / f"analyze-{what}")])


def _of_outlier(means: dict[str, Any]) -> list[str]:
    """Of the outlier's analysis: cosines in the outlier's blocks, and what a step on A alone and one on B alone give."""
    in_blocks = {
        "block_cosines_without": "mean cosine of a block, without the outlier channel",
        "block_cosines_with": "with it",
    }
    by_parameter = {
        "cosine_of_a": "cosine of a step on A",
        "cosine_of_b": "cosine of a step on B",
        "size_of_a": "how far A's step moves ΔW, as a part of B's",
    }

    def table(heads: dict[str, str]) -> str:
        spreads = {what: {k: Spread(tuple(of["values"])) for k, of in means[what].items()} for what in heads}
        rows = [[k, *(spreads[what][k].text(3) for what in heads)] for k in means["cosine_of_a"]]
        return markdown([["k", *heads.values()], *rows])

    return [
        "In the blocks that have the outlier channel among their inputs:",
        table(in_blocks),
        "The direction of the whole, taken apart into a step on A alone and one on B alone:",
        table(by_parameter),
    ]


def _of_grid(content: dict[str, Any]) -> list[str]:
    """Of the grid: the losses of each rank and k, and those on the validation rows, by which the rates were chosen."""
    cells = {(cell["r"], cell["k"]): cell for cell in content["cells"]}
    choices = {(choice["rank"], k_of(choice["method"])): choice for choice in content["choices"]}
    ks = sorted({k for _, k in cells})
    heads = [of_k(k).label for k in ks]
    losses, tried = [["r", *heads]], [["r", "learning rate", *heads]]
    for r in sorted({r for r, _ in cells}):
        of_rank = [(cells[r, k], choices[r, k]) for k in ks]
        losses.append([str(r), *(f"{_loss(cell)} (lr {choice['rate']:g})" for cell, choice in of_rank)])
        by_rate = [{one["rate"]: one["loss"] for one in choice["tried"]} for _, choice in of_rank]
        for rate in sorted({rate for of_case in by_rate for rate in of_case}):
            of_rate = [f"{of_case[rate]:.4f}" if of_case.get(rate) else "" for of_case in by_rate]
            tried.append([str(r), f"{rate:g}", *of_rate])
    return [
        "Held-out loss, mean ± standard deviation over the seeds, and the learning rate that was chosen:",
        markdown(losses),
        "Loss on the validation rows, by which the rates were chosen, of one seed that is not among those above:",
        markdown(tried),
    ]


def _loss(cell: dict[str, Any]) -> str:
    return Spread(tuple(cell["values"])).text(4) if cell["values"] else "diverged"


def _runs(folder: Path) -> list[dict[str, Any]]:
    return sorted(map(read_json, (folder / "runs").glob("*.json")), key=lambda run: run["date"])


def _measured(folder: Path) -> str:
    """With what and where the runs in ``folder`` were made, which may be of several days and commits."""
    made = (f"{_with(run)}: {_place(run)}, {when(run)}" for run in _runs(folder))
    return f"Measured with {'; '.join(dict.fromkeys(made))}."


def _with(made: dict[str, Any]) -> str:
    return f"torch {made['versions']['torch']}, PEFT {made['versions']['peft']}"


def _place(made: dict[str, Any]) -> str:
    """The processor, by its instruction set too, since one name may stand for several kinds, a GPU, and the threads."""
    cpu = f"{made['machine']['cpu']} ({made['versions']['cpu_capability']})"
    return ", ".join(filter(None, (cpu, made["machine"].get("gpu"), f"{made['threads']} threads")))
