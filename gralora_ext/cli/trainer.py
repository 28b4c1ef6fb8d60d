# SPDX-License-Identifier: Apache-2.0
"""transformers' Trainer with what the job needs beside it: a history of losses, exact resuming, whole checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from ..program.console import Bar, Console
from ..program.errors import Diverged
from ..program.files import staged, write_json
from ..program.signals import stopper
from .checkpoints import STATE, Checkpoints, History
from .data import IGNORED, Encoder, Example


def arguments(options: Any, steps: int, use_cpu: bool) -> TrainingArguments:
    """Trainer's arguments: its own printing, saving and evaluating are off, since the job does them."""
    warmup = options.warmup_steps if options.warmup_ratio is None else math.ceil(options.warmup_ratio * steps)
    return TrainingArguments(
        output_dir=options.output,
        max_steps=steps,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.grad_accum,
        learning_rate=options.lr,
        lr_scheduler_type=options.lr_schedule if options.lr_schedule != "constant" else "constant_with_warmup",
        warmup_steps=warmup,
        optim=options.optim,
        weight_decay=options.weight_decay,
        adam_beta1=options.adam_beta1,
        adam_beta2=options.adam_beta2,
        adam_epsilon=options.adam_epsilon,
        max_grad_norm=options.max_grad_norm,
        neftune_noise_alpha=options.neftune_noise_alpha,
        bf16=options.bf16,
        fp16=options.fp16,
        seed=options.seed,
        data_seed=options.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="no",
        save_strategy="no",
        report_to=options.report_to or [],
        run_name=options.run_name,
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=False,
        use_cpu=use_cpu,
    )


class FinetuneTrainer(Trainer):
    """Every optimizer step is in ``history``; evaluation draws no random number.

    ``train`` are examples, or groups of them, of which ``collate`` makes a batch.
    """

    def __init__(
        self,
        model: Any,
        arguments: TrainingArguments,
        train: list[Any],
        held_out: list[Example],
        encoder: Encoder,
        *,
        collate: Callable[[list[Any]], dict[str, torch.Tensor]],
        history: History,
        checkpoints: Checkpoints,
        state: dict[str, Any],
        eval_every: int,
        save_every: int,
        console: Console,
    ):
        super().__init__(model=model, args=arguments, train_dataset=train, data_collator=collate)
        self.remove_callback(PrinterCallback)
        self.add_callback(_Schedule(self))
        self.eval_every = eval_every
        self.save_every = save_every
        # Batches of like length need less padding; the loss is a mean over tokens and does not
        # depend on the order.
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
        tokens = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel()
        self.step_tokens += int(tokens)
        return super().training_step(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().log(logs, *args, **kwargs)
        if "loss" not in logs:
            return
        step, seconds = self.state.global_step, time.perf_counter() - self.step_started
        loss, norm = _finite(logs["loss"]), _finite(logs.get("grad_norm"))
        rate, tokens = logs["learning_rate"], self.step_tokens
        entry = {"step": step, "loss": loss, "learning_rate": rate, "gradient_norm": norm}
        self.history.losses.append({**entry, "tokens": tokens, "seconds": seconds})
        self.history.tokens += tokens
        self.history.seconds += seconds
        if loss is None:
            raise Diverged(f"the loss is {logs['loss']} at step {step}")
        if self.bar:
            notes = (f"loss {loss:.4f}", f"{tokens / seconds:,.0f} tokens/s", f"lr {rate:.1e}", f"norm {norm or 0:.2g}")
            self.bar.update(step, *notes)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The mean loss per answer token over the held-out rows; a signal ends it early, without a result."""
        self.control.should_evaluate = False
        size, step = self.args.per_device_train_batch_size, self.state.global_step
        total, count, all_zero = 0.0, 0, True
        self.model.eval()
        rows = self.console.bar("held-out loss: row", len(self.held_out))
        with torch.no_grad(), self.accelerator.autocast(), rows as bar:
            for start in range(0, len(self.held_out), size):
                if stopper.signum is not None:
                    self.control.should_save = self.control.should_training_stop = True
                    return {}
                examples = self.held_out[start : start + size]
                batch = {name: t.to(self.args.device) for name, t in self.encoder.collate(examples).items()}
                labels = batch.pop("labels")[:, 1:]
                logits = self.model(**batch, use_cache=False).logits[:, :-1]
                answer = labels != IGNORED
                all_zero = all_zero and not logits[answer].any().item()
                total += cross_entropy(logits[answer].float(), labels[answer], reduction="sum").item()
                count += int(answer.sum())
                bar.update(start + len(examples))
        loss = total / count
        self.history.eval_losses.append({"step": step, "loss": loss if math.isfinite(loss) else None})
        if not math.isfinite(loss):
            raise Diverged(f"the held-out loss is {loss} after {step} steps")
        if all_zero and step:  # weights so large that the norms behind them make zeros; the loss is finite then
            raise Diverged(f"all logits of the held-out rows are zero after {step} steps")
        self.console.say(
            f"held-out loss {loss:.4f} after {step} steps ({len(self.held_out)} rows, {count:,} answer tokens)"
        )
        if self.args.report_to:
            self.log({"eval_loss": loss})
        return {"eval_loss": loss}

    def unwrap(self) -> None:
        """Takes the autocast that training put around the model off again."""
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the job has loaded the adapter and checked it, and stock code takes what else lies there too."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Only the adapter: the base does not change, and stock code would look it up on the hub."""
        self.model.save_pretrained(output_dir, save_embedding_layers=False)

    def _save_checkpoint(self, model: Any, trial: Any, *args: Any, **kwargs: Any) -> None:
        name = f"checkpoint-{self.state.global_step}"
        output_dir = self.args.output_dir
        with staged(self.checkpoints.folder, self.checkpoints) as stage:
            self.args.output_dir = str(stage)
            try:
                super()._save_checkpoint(model, trial, *args, **kwargs)
            finally:
                self.args.output_dir = output_dir
            write_json(stage / name / STATE, {**self.job_state, "history": vars(self.history)})
            self.checkpoints.seal(stage / name)
        self.checkpoints.clear(name)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


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
        # A signal that came during the evaluation or the save itself: the step before is saved, so
        # the job can end.
        control.should_training_stop = control.should_training_stop or stopper.signum is not None
