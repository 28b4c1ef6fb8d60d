"""transformers' Trainer with what the job needs beside it: a history of losses, exact resuming, whole checkpoints."""

from __future__ import annotations

import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from .console import Bar, Console
from .data import IGNORED, Encoder
from .errors import JobError
from .files import staged, write_json
from .signals import stopper

STATE = "gralora_ext.json"  # the job's own part of a checkpoint: settings, data, history


class History:
    """What has happened so far; it lives in the checkpoint, so that a resumed job tells the whole story."""

    def __init__(self, values: dict[str, Any] | None = None):
        values = values or {}
        self.losses: list[dict[str, float]] = values.get("losses", [])
        self.eval_losses: list[dict[str, float]] = values.get("eval_losses", [])
        self.samples: list[dict[str, str]] = values.get("samples", [])
        self.tokens: int = values.get("tokens", 0)
        self.seconds: float = values.get("seconds", 0.0)

    def eval_loss(self, step: int) -> float | None:
        return next((e["loss"] for e in self.eval_losses if e["step"] == step), None)


class Checkpoints:
    """The folder ``checkpoints`` of an output folder. A checkpoint is renamed into it whole, so what is there counts."""

    def __init__(self, folder: Path, keep: int = 2):
        self.folder = folder
        self.keep = keep
        self._ours: set[str] = set()

    def last(self) -> Path | None:
        whole = [p for p in self.folder.glob("checkpoint-*") if (p / STATE).is_file()]
        return max(whole, key=_step, default=None)

    def last_of_run(self) -> Path | None:
        """The newest checkpoint that this run wrote or went on from."""
        return max((self.folder / name for name in self._ours), key=_step, default=None)

    def adopt(self, checkpoint: Path) -> None:
        """The job goes on from this one: it belongs to the run, and is not cleared as an earlier run's."""
        self._ours.add(checkpoint.name)

    def clear(self, newest: str) -> None:
        """Keeps the newest ones of this run; those of an earlier run have been superseded."""
        self._ours.add(newest)
        self._ours = set(sorted(self._ours, key=lambda name: _step(Path(name)))[-self.keep :])
        for path in self.folder.glob("checkpoint-*"):
            if path.name not in self._ours:
                shutil.rmtree(path, ignore_errors=True)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])


def arguments(options: Any, steps: int, use_cpu: bool) -> TrainingArguments:
    """Trainer's arguments: its own printing, saving, evaluating and reporting are off, since the job does them."""
    return TrainingArguments(
        output_dir=options.output,
        max_steps=steps,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.grad_accum,
        learning_rate=options.lr,
        lr_scheduler_type=options.lr_schedule if options.lr_schedule != "constant" else "constant_with_warmup",
        warmup_steps=options.warmup_steps,
        optim="adamw_torch",
        seed=options.seed,
        data_seed=options.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=False,
        use_cpu=use_cpu,
    )


class FinetuneTrainer(Trainer):
    """Trains with answers-only loss; every optimizer step is in ``history``; evaluation draws no random number."""

    def __init__(
        self,
        model: Any,
        arguments: TrainingArguments,
        train: list[dict[str, list[int]]],
        held_out: list[dict[str, list[int]]],
        encoder: Encoder,
        *,
        history: History,
        checkpoints: Checkpoints,
        state: dict[str, Any],
        eval_every: int,
        save_every: int,
        console: Console,
    ):
        super().__init__(model=model, args=arguments, train_dataset=train, data_collator=encoder.collate)
        self.remove_callback(PrinterCallback)
        self.add_callback(_Schedule(self))
        self.eval_every = eval_every
        self.save_every = save_every
        # Batches of like length need less padding; the loss is a mean over tokens and does not depend on the order.
        self.held_out = sorted(held_out, key=lambda e: len(e["input_ids"]))
        self.encoder = encoder
        self.history = history
        self.checkpoints = checkpoints
        self.job_state = state
        self.console = console
        self.bar: Bar | None = None
        self.step_started = 0.0
        self.step_tokens = 0

    def training_step(self, model: Any, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        self.step_tokens += int(inputs["attention_mask"].sum())
        return super().training_step(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().log(logs, *args, **kwargs)
        if "loss" not in logs:
            return
        step, seconds = self.state.global_step, time.perf_counter() - self.step_started
        self.history.losses.append({"step": step, "loss": logs["loss"], "tokens": self.step_tokens, "seconds": seconds})
        self.history.tokens += self.step_tokens
        self.history.seconds += seconds
        if not math.isfinite(logs["loss"]):
            raise JobError(
                f"the loss became {logs['loss']} at step {step}: try a lower --lr than {self.args.learning_rate:g}"
            )
        if self.bar:
            self.bar.update(step, f"loss {logs['loss']:.4f}, {self.step_tokens / seconds:,.0f} tokens/s")

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The mean loss per answer token over the held-out rows; a signal ends it early, without a result."""
        self.control.should_evaluate = False
        size, step = self.args.per_device_train_batch_size, self.state.global_step
        total, count = 0.0, 0
        self.model.eval()
        with torch.no_grad(), self.console.bar("held-out loss: row", len(self.held_out)) as bar:
            for start in range(0, len(self.held_out), size):
                if stopper.signum is not None:
                    self.control.should_save = self.control.should_training_stop = True
                    return {}
                examples = self.held_out[start : start + size]
                batch = {name: t.to(self.args.device) for name, t in self.encoder.collate(examples).items()}
                labels = batch.pop("labels")[:, 1:]
                logits = self.model(**batch, use_cache=False).logits[:, :-1]
                answer = labels != IGNORED
                total += cross_entropy(logits[answer].float(), labels[answer], reduction="sum").item()
                count += int(answer.sum())
                bar.update(start + len(examples))
        loss = total / count
        self.history.eval_losses.append({"step": step, "loss": loss})
        self.console.say(
            f"held-out loss {loss:.4f} after {step} steps ({len(self.held_out)} rows, {count:,} answer tokens)"
        )
        return {"eval_loss": loss}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Only the adapter: the base does not change, and stock code would look it up on the hub."""
        self.model.save_pretrained(output_dir, save_embedding_layers=False)

    def _save_checkpoint(self, model: Any, trial: Any, *args: Any, **kwargs: Any) -> None:
        name = f"checkpoint-{self.state.global_step}"
        output_dir = self.args.output_dir
        with staged(self.checkpoints.folder) as stage:
            self.args.output_dir = str(stage)
            try:
                super()._save_checkpoint(model, trial, *args, **kwargs)
            finally:
                self.args.output_dir = output_dir
            write_json(stage / name / STATE, {**self.job_state, "history": vars(self.history)})
        self.checkpoints.clear(name)


class _Schedule(TrainerCallback):
    """Decides when to evaluate, save and stop, and takes the time of each step."""

    def __init__(self, trainer: FinetuneTrainer):
        self.trainer = trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.step_started, self.trainer.step_tokens = time.perf_counter(), 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        last, stopped = state.global_step >= state.max_steps, stopper.signum is not None
        control.should_log = True
        control.should_evaluate = (last or state.global_step % self.trainer.eval_every == 0) and not stopped
        control.should_save = last or stopped or state.global_step % self.trainer.save_every == 0
        control.should_training_stop = last or stopped

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A signal that came during the evaluation or the save itself: the step before is saved, so the job can end.
        control.should_training_stop = control.should_training_stop or stopper.signum is not None
