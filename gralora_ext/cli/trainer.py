# SPDX-License-Identifier: Apache-2.0
"""transformers' Trainer with what the job needs beside it: a history of losses, exact resuming, whole checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from ..program.console import Bar, Console
from ..program.errors import Diverged
from ..program.files import staged, write_json
from .checkpoints import STATE, Checkpoints, History
from .data import IGNORED, Encoder, Example
from .group import Group
from .sharded import adapter_state, fsdp_on_cpu, outside_training, shared_optimizer, whole_optimizer
from .shares import ShareLoader, Shares, has_labels


def arguments(options: Any, steps: int, use_cpu: bool) -> TrainingArguments:
    """Trainer's arguments: its own printing, saving and evaluating are off, since the job does them."""
    warmup = math.ceil(options.warmup_ratio * steps) if options.warmup_ratio else options.warmup_steps
    made = TrainingArguments(
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
        ddp_timeout=options.process_timeout,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
    )
    if made.n_gpu > 1:
        made._n_gpu = 1  # one process trains on one device; with more Trainer would share each batch out to all
    return made


class NothingLeft(Exception):
    """The checkpoint that a job goes on from is that of its last step."""


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
        group: Group,
    ):
        self.group = group
        self.used_cache = getattr(model.config, "use_cache", None)
        super().__init__(  # which puts use_cache of the model's configuration off
            model=model,
            args=arguments,
            train_dataset=train,
            data_collator=collate,
            # A model that is not told the number of tokens in a step takes the mean of each batch.
            compute_loss_func=None if getattr(model, "accepts_loss_kwargs", True) else mean_loss,
        )
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
        self.at_begin: Callable[[], None] | None = None  # called when the model is in its place, before the first step

    def create_accelerator_and_postprocess(self) -> None:
        if self.group.engine == "fsdp2" and self.args.device.type == "cpu":
            fsdp_on_cpu()
        super().create_accelerator_and_postprocess()

    def get_train_dataloader(self) -> Any:
        if self.group.size == 1:
            return super().get_train_dataloader()
        shares = Shares(self.train_dataset, self._train_batch_size, self.args.data_seed, self.group.place)
        return ShareLoader(self.train_dataset, self.data_collator, shares)

    def training_step(self, model: Any, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.group.size == 1 or has_labels(inputs):
            tokens = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel()
            self.step_tokens += int(tokens)
        return super().training_step(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().log(logs, *args, **kwargs)
        if "loss" not in logs:
            return
        step, seconds = self.state.global_step, time.perf_counter() - self.step_started
        loss, norm = _finite(logs["loss"]), _finite(logs.get("grad_norm"))
        rate, tokens = logs["learning_rate"], int(self.group.total([self.step_tokens])[0])
        entry = {"step": step, "loss": loss, "learning_rate": rate, "gradient_norm": norm}
        self.history.losses.append({**entry, "tokens": tokens, "seconds": seconds})
        self.history.tokens += tokens
        self.history.seconds += seconds
        if loss is None:
            raise Diverged(f"the loss is {logs['loss']} at step {step}")
        if self.bar:
            notes = (
                f"loss {loss:.4f}",
                f"{tokens / seconds:,.0f} tokens/s",
                f"lr {rate:.1e}",
                f"norm {'not finite' if norm is None else f'{norm:.2g}'}",
            )
            self.bar.update(step, *notes)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The mean loss per answer token over the held-out rows; a signal ends it early, without a result."""
        self.control.should_evaluate = False
        size, step, group = self.args.per_device_train_batch_size, self.state.global_step, self.group
        batches = [self.held_out[i : i + size] for i in range(0, len(self.held_out), size)]
        total, count, others = 0.0, 0.0, 0.0  # others: batches of which not all logits are zero
        self.model.eval()
        rows = self.console.bar("held-out loss: row", len(self.held_out))
        with torch.no_grad(), self.accelerator.autocast(), outside_training(self.model), rows as bar:
            for start in range(0, len(batches), group.size):
                if group.signal() is not None:
                    self.control.should_save = self.control.should_training_stop = True
                    return {}
                # One without a batch takes another's, since a shared model needs all processes, and
                # counts nothing.
                examples = batches[min(start + group.rank, len(batches) - 1)]
                batch = {name: t.to(self.args.device) for name, t in self.encoder.collate(examples).items()}
                labels = batch.pop("labels")[:, 1:]
                logits = self.model(**batch, use_cache=False).logits[:, :-1]
                answer = labels != IGNORED
                if start + group.rank < len(batches):
                    others += logits[answer].any().item()
                    total += cross_entropy(logits[answer].float(), labels[answer], reduction="sum").item()
                    count += answer.sum().item()
                bar.update(min(len(self.held_out), (start + group.size) * size))
        total, count, others = group.total([total, count, others])
        loss = total / count
        self.history.eval_losses.append({"step": step, "loss": loss if math.isfinite(loss) else None})
        if not math.isfinite(loss):
            raise Diverged(f"the held-out loss is {loss} after {step} steps")
        if not others and step:  # weights so large that the norms behind them make zeros; the loss is finite then
            raise Diverged(f"all logits of the held-out rows are zero after {step} steps")
        self.console.say(
            f"held-out loss {loss:.4f} after {step} steps ({len(self.held_out)} rows, {int(count):,} answer tokens)"
        )
        if self.args.report_to:
            self.log({"eval_loss": loss})
        return {"eval_loss": loss}

    def unwrap(self) -> None:
        """Takes the autocast that training put around the model off again; its configuration is what it was."""
        if self.used_cache is not None:
            self.model.config.use_cache = self.used_cache
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the job has loaded the adapter and checked it, and stock code takes what else lies there too."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Only the adapter: the base does not change, and stock code would look it up on the hub."""
        save_adapter(self.model, output_dir, self.group)

    def _save_checkpoint(self, model: Any, trial: Any, *args: Any, **kwargs: Any) -> None:
        if self.group.is_first:
            with staged(self.checkpoints.folder, self.checkpoints) as stage:
                self._write_checkpoint(stage, model, trial)
            self.checkpoints.clear(f"checkpoint-{self.state.global_step}")
        else:
            self._write_checkpoint(None, model, trial)

    def _write_checkpoint(self, stage: Any, model: Any, trial: Any) -> None:
        """All processes write into the first one's ``stage``, where an engine has them do so; the first one seals it."""
        stage = self.group.exchange(stage)[0]
        name, output_dir = f"checkpoint-{self.state.global_step}", self.args.output_dir
        self.args.output_dir = str(stage)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.output_dir = output_dir
        self.group.exchange(None)  # all have written
        if self.group.is_first:
            write_json(stage / name / STATE, {**self.job_state, "history": vars(self.history)})
            self.checkpoints.seal(stage / name)

    def _save_rng_state(self, output_dir: str) -> None:
        """Each process has its own, and the first one writes them all."""
        if self.group.size == 1:
            return super()._save_rng_state(output_dir)
        with TemporaryDirectory() as folder:
            super()._save_rng_state(folder)
            (file,) = Path(folder).iterdir()
            files = self.group.exchange((file.name, file.read_bytes()))
        if self.group.is_first:
            for name, content in files:
                (Path(output_dir) / name).write_bytes(content)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        state = whole_optimizer(self.optimizer.state_dict())
        if self.group.is_first:
            torch.save(state, Path(output_dir) / "optimizer.pt")
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        self._load_engines_optimizer(checkpoint)
        scheduler = self.lr_scheduler
        if checkpoint is not None and hasattr(scheduler, "lr_lambdas"):
            # Those that were loaded are of a job of the old length.
            rates = zip(self.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
            for group, rate, part in rates:
                group["lr"] = rate * part(scheduler.last_epoch)
            scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def _load_engines_optimizer(self, checkpoint: str | None) -> None:
        if not self.is_fsdp_enabled or checkpoint is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        optimizer, scheduler = (
            torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True)
            for name in ("optimizer.pt", "scheduler.pt")
        )
        self.optimizer.load_state_dict(shared_optimizer(optimizer, self.optimizer))
        self.lr_scheduler.load_state_dict(scheduler)


def save_adapter(model: Any, folder: Any, group: Group) -> None:
    """Writes the adapter of a PeftModel into ``folder``, by the first process; all call this."""
    state = None if group.size == 1 else adapter_state(model)
    if group.is_first:
        model.save_pretrained(folder, state_dict=state, save_embedding_layers=False)


def mean_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """The cross entropy of the next tokens, summed and divided by the number of answer tokens in the whole step."""
    logits, wanted = outputs.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
    total = cross_entropy(logits, wanted.to(logits.device), ignore_index=IGNORED, reduction="sum")
    return total / ((wanted != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


class _Schedule(TrainerCallback):
    """Decides when to evaluate, save and stop, and takes the time of each step."""

    def __init__(self, trainer: FinetuneTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.at_begin is not None:
            self.trainer.at_begin()
        if state.global_step >= state.max_steps:
            raise NothingLeft

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.step_started, self.trainer.step_tokens = time.perf_counter(), 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        last, stopped = state.global_step >= state.max_steps, self.trainer.group.signal() is not None
        control.should_log = True
        control.should_evaluate = (last or state.global_step % self.trainer.eval_every == 0) and not stopped
        control.should_save = last or stopped or state.global_step % self.trainer.save_every == 0
        control.should_training_stop = last or stopped

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A signal that came during the evaluation or the save itself: the step before is saved, so
        # the job can end.
        stopped = self.trainer.group.signal() is not None
        control.should_training_stop = control.should_training_stop or stopped
