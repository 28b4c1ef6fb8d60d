# SPDX-License-Identifier: Apache-2.0
"""What a job leaves at its end, written by one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..program.files import write_json
from . import summary
from .job import Job
from .options import settings


def publish(job: Job) -> None:
    """The adapter, the merged model, the report: made beside, put in place together.

    A diverged job leaves its adapter and its report, and no merged model: there is nothing to compare that with.
    """
    from .report import draw
    from .results import write_merged

    o, say = job.options, job.console.say
    job.written = ["adapter", *(["merged"] if o.merge and not job.diverged else []), "metrics.json", "loss.png"]
    with job.output.staged() as stage:
        say("writing the adapter")
        job.model.save_pretrained(stage / "adapter", state_dict=job.adapter, save_embedding_layers=False)
        merged = None
        if "merged" in job.written:
            say("merging, writing the merged model, and comparing its logits with adapter + base")
            batch = job.encoder.collate(job.batches.held_out[:2])
            merged = write_merged(_to_merge(job, stage / "adapter"), job.tokenizer, batch, o.dtype, stage / "merged")
            say("the logits differ by at most {max_difference:.1e} in {max_logit:.1f}".format(**merged))
        metrics = summary.metrics(
            job.history,
            steps=job.steps,
            rows_per_step=job.rows_per_step,
            items=len(job.batches.items),
            train_rows=job.batches.rows,
            diverged=job.diverged,
            merged=merged,
            model=job.source.name,
            data=job.rows.name,
            eval_rows=len(job.batches.held_out),
            trainable_parameters=job.parameters,
            peak_memory_mib=job.peak,
            processes=job.group.size,
            config=settings(o),
        )
        write_json(stage / "metrics.json", metrics)
        draw(metrics, stage / "loss.png")
    if "merged" not in job.written:
        job.output.remove("merged")  # an earlier run's, of another adapter
    if job.diverged is None:
        print(summary.samples(metrics))
    say(summary.in_words(metrics))
    say(f"written: {', '.join(str(job.output.folder / name) for name in job.written)}")


def _to_merge(job: Job, adapter: Path) -> Any:
    """The model to merge: the trained one, or where that is quantized or shared out, its base as the files have it.

    Quantizing again would lose a part of the adapter, and the merged model is to load everywhere.
    """
    from . import sharded
    from .adapter import add_adapter, load_adapter
    from .model import load

    if job.bits is None and not job.group.shares_model:
        return job.model
    sharded.forget()
    job.console.say(
        f"loading {job.source.name} in {job.options.dtype}, whole and not quantized, to merge the adapter into it"
    )
    base = load(job.source, job.options.dtype, job.console.say, attention=job.options.attn_implementation)[0]
    model = add_adapter(base, job.source, job.options)
    load_adapter(model, adapter)
    return model.to(job.device)
