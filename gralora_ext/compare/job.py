# SPDX-License-Identifier: Apache-2.0
"""A run as a job of ``finetune``: the same stages, with what is measured in place of what is published."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..cli.group import Group
from ..cli.job import Job
from ..cli.launcher import Place
from ..cli.options import parse
from ..cli.report import peak_memory_mib
from ..program.errors import Diverged, JobError
from ..program.signals import stopper
from .plan import MEASURE, Run
from .progress import Progress
from .texts import file_of, read_general


def options_of(run: Run, texts: Path, output: Path) -> Any:
    """finetune's options for ``run``, whose rows lie in the folder ``texts``."""
    s = run.settings
    words: dict[str, Any] = {
        "output": output,
        "data": texts / file_of(run.part),
        "held-out": s.held_out_rows(run.part),
        "held-out-from": "end",
        "eval-rows": s.held_out_rows(run.part),
        "steps": s.steps,
        "eval-every": s.steps,
        "batch-size": s.batch_size,
        "max-length": s.max_length,
        "dtype": s.dtype,
        "seed": run.seed,
        "lr": run.rate or 1e-3,  # what trains nothing has none
    }
    if s.model is not None:
        words["model"] = s.model
    options = parse([w for name, value in words.items() for w in (f"--{name}", str(value))] + ["--no-merge"])
    adapter = {"alpha": 2 * (run.adapter["r"] + run.adapter["hybrid_r"]), **run.adapter}
    vars(options).update(adapter)
    return options


class RunJob(Job):
    """Checks and prepares as its parent does; then trains without checkpoints, and measures."""

    def __init__(self, run: Run, texts: Path, output: Path, progress: Progress):
        super().__init__(options_of(run, texts, output), Group(Place()))
        self.console = progress
        self.run = run
        self.texts = texts
        self.results: dict[str, Any] = {}

    def prepare(self) -> None:
        super().prepare()
        if self.run.kind != "adapter":
            self.model = self.model.unload()
            self.model.requires_grad_(self.run.kind == "full")
        self.parameters = sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def train(self) -> None:
        """Trains, and leaves in ``results`` the losses, the speed, and what memory this process has taken at most."""
        trainer = self._trainer()
        trainer.add_callback(_NoCheckpoints())
        result: dict[str, Any] = {"loss": None, "general_loss": None, "parameters": self.parameters}
        base = self.model.get_base_model() if self.run.kind == "adapter" else self.model
        of_adapter = self.parameters if self.run.kind == "adapter" else 0
        result["model_parameters"] = sum(p.numel() for p in base.parameters()) - of_adapter
        try:
            if self.run.kind != "base":
                with stopper.held(), self.console.bar("step", self.steps) as trainer.bar:
                    trainer.train()
            else:
                trainer.evaluate()
        except Diverged as error:
            self.diverged = str(error)
        trainer.unwrap()
        stopper.check()
        result |= {
            "loss": None if self.diverged else self.history.eval_losses[-1]["loss"],
            "tokens_per_second": None if self.diverged else self._speed(),
            "peak_memory_mib": peak_memory_mib(),
            "held_out_rows": len(self.batches.held_out),  # without those whose answer lies beyond --max-length
        }
        if self.run.part == MEASURE and self.diverged is None:
            result["general_loss"] = self._general_loss(trainer)
            if result["general_loss"] is None:
                self.diverged = "the loss on the general text is not finite"
        self.results = {**result, "diverged": self.diverged}

    def checkpoint_bytes(self, folder: Path) -> int:
        """What the trained part takes on disk: the adapter, or the whole model where all of it was trained."""
        if self.run.kind == "base":
            return 0
        how = {"save_embedding_layers": False} if self.run.kind == "adapter" else {}
        self.model.save_pretrained(folder, **how)
        return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and p.suffix == ".safetensors")

    def _speed(self) -> float | None:
        """Tokens per second of a step, the median: the first steps, which warm up, do not count."""
        steps = self.history.losses
        steps = steps[len(steps) // 3 :]
        return statistics.median((s["tokens"] or 0) / (s["seconds"] or 1) for s in steps) if steps else None

    def _general_loss(self, trainer: Any) -> float | None:
        """The loss per token on the general texts, by the evaluation that the held-out rows have."""
        from ..cli.data import IGNORED

        tokens = [self.tokenizer(text)["input_ids"][: self.options.max_length] for text in read_general(self.texts)]
        examples = [{"input_ids": t, "labels": [IGNORED, *t[1:]]} for t in tokens if len(t) > 1]
        if not examples:
            raise JobError("--general-text: expected a text of two tokens or more, got none")
        before = trainer.held_out, list(self.history.eval_losses)
        trainer.held_out = sorted(examples, key=lambda e: len(e["input_ids"]))
        try:
            loss = trainer.evaluate().get("eval_loss", math.nan)
        except Diverged:
            loss = math.nan
        finally:
            trainer.held_out, self.history.eval_losses[:] = before
        stopper.check()
        return loss if math.isfinite(loss) else None


class _NoCheckpoints(TrainerCallback):
    """A run that was stopped is begun anew, so that nothing is saved on the way."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = False

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = False
