"""``gralora-ext finetune``: the job from its options to the files it leaves, one stage after the other."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from .checks import check_backend, check_output, command, device, quiet_libraries
from .console import Console
from .data import read_rows
from .errors import JobError, Stopped, first_sentence
from .files import free_bytes, locked, staged, write_json
from .options import SETTINGS, decisive, settings
from .signals import stopper

SAMPLES = 2


def run(options: argparse.Namespace) -> int:
    """Runs the job; returns the exit code. Raises JobError for what the user can mend."""
    job = Job(options)
    try:
        job.check()
        job.prepare()
        with locked(job.output, wait=False):
            job.train()
            job.publish()
    except Stopped as stop:
        print(f"stopped by {stop.name}: {job.how_to_go_on()}", file=sys.stderr)
        return stop.exit_code
    return 0


class Job:
    """The stages, in the order in which :func:`run` calls them; each leaves what the next ones need."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.output = Path(options.output)
        self.console = Console()
        self.checkpoints: Any = None  # known after check()

    def check(self) -> None:
        """All that can be wrong before a model is loaded: packages, the output folder, each row of the data."""
        check_output(self.output)
        o = self.options
        rows = read_rows(o.data, o.prompt_field, o.answer_field, o.data_config, o.data_split)
        self.pairs, held_out = rows.split(o.held_out or 0)
        self.held_out = held_out[: o.eval_rows]
        self.console.say(
            f"data: {rows.name}: {len(self.pairs):,} rows to train on, the last {len(held_out):,} held out "
            f"(each evaluation reads {len(self.held_out)})"
        )
        self.console.say("importing transformers and peft")
        quiet_libraries()
        from .model import find_model
        from .trainer import Checkpoints, History

        self.data_name = rows.name
        self.source = find_model(o.model)
        self.checkpoints = Checkpoints(self.output / "checkpoints")
        self.checkpoint: Path | None = None
        self.done = 0
        self.history = History()
        self.state = {"settings": decisive(settings(o)), "data_digest": rows.digest}
        if o.resume:
            self._resume()
        check_backend(o.backend)
        self.device = device(o)

    def prepare(self) -> None:
        """The model with its adapter, the examples, and the number of steps."""
        from transformers import set_seed

        from .data import Encoder
        from .model import add_adapter, load, trainable_parameters

        o, say = self.options, self.console.say
        say(f"model: loading {self.source.name} in {o.dtype}")
        self.model, self.tokenizer = load(self.source, o.dtype, say)
        longest = getattr(self.model.config, "max_position_embeddings", None)
        if longest and o.max_length > longest:
            raise JobError(f"--max-length {o.max_length} is more than the {longest} positions of {self.source.name}")
        self.encoder = Encoder(self.tokenizer, o.max_length)
        self.train_examples, remark = self.encoder.examples(self.pairs, "training")
        self.held_out_examples, remark_held_out = self.encoder.examples(self.held_out, "held-out")
        for text in filter(None, (remark, remark_held_out)):
            say(text)
        per_epoch = math.ceil(len(self.train_examples) / (o.batch_size * o.grad_accum))
        self.steps = o.steps or max(1, round(o.epochs * per_epoch))
        if self.done > self.steps:
            raise JobError(f"--resume: {self.checkpoint} is beyond the end of a job of --steps {self.steps}")
        set_seed(o.seed)
        try:
            self.model = add_adapter(self.model, o)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise JobError(f"the adapter does not fit {self.source.name}: {first_sentence(error)}") from error
        self.parameters = trainable_parameters(self.model)
        what = {"fused": "GraLoRA, fused", "peft": "PEFT's own GraLoRA", "lora": "PEFT's LoRA"}[o.backend]
        grid = "" if o.backend == "lora" else f", k = {o.k}"
        say(f"adapter: {what}, r = {o.r}{grid}, hybrid_r = {o.hybrid_r}: {self.parameters:,} parameters to train")
        self._check_space()

    def train(self) -> None:
        """From the start or the checkpoint to the last step, with samples and held-out loss before and after."""
        from .model import load_adapter
        from .results import answers

        o, say = self.options, self.console.say
        with staged(self.output) as stage:
            write_json(stage / SETTINGS, settings(o))
        trainer = self._trainer()
        if self.checkpoint is not None:
            load_adapter(self.model, self.checkpoint)
            say(f"resuming from {self.checkpoint}, {self.done} of {self.steps} steps done")
        if not self.history.samples:
            say(f"{SAMPLES} sample answers of the model as it is")
            prompts = [prompt for prompt, _ in self.held_out[:SAMPLES]]
            before = answers(self.model, self.tokenizer, self.encoder, prompts, o.sample_tokens)
            for (prompt, reference), answer in zip(self.held_out[:SAMPLES], before, strict=True):
                self.history.samples.append({"prompt": prompt, "reference": reference, "before": answer})
        self._evaluate_where_due(trainer, self.done)
        if self.done < self.steps:
            say(
                f"training {self.steps - self.done} steps of {o.batch_size * o.grad_accum} rows on {trainer.args.device}"
            )
            with stopper.held(), self.console.bar("step", self.steps, self.done, first=True) as trainer.bar:
                trainer.train(resume_from_checkpoint=str(self.checkpoint) if self.checkpoint else None)
            self._evaluate_where_due(trainer, self.steps)

    def publish(self) -> None:
        """Sample answers, the adapter, the merged model, the report: made beside, put in place together."""
        from .report import draw, peak_memory_mib
        from .results import answers, write_merged

        o, say = self.options, self.console.say
        peak = peak_memory_mib()
        say(f"{SAMPLES} sample answers of the trained model")
        prompts = [sample["prompt"] for sample in self.history.samples]
        after = answers(self.model, self.tokenizer, self.encoder, prompts, o.sample_tokens)
        for sample, answer in zip(self.history.samples, after, strict=True):
            sample["after"] = answer
        with staged(self.output) as stage:
            say("writing the adapter")
            self.model.save_pretrained(stage / "adapter", save_embedding_layers=False)
            merged = None
            if o.merge:
                say("merging, writing the merged model, and comparing its logits with adapter + base")
                batch = self.encoder.collate(self.held_out_examples[:2])
                merged = write_merged(self.model, self.tokenizer, batch, o.dtype, stage / "merged")
                say("the logits differ by at most {max_difference:.1e} in {max_logit:.1f}".format(**merged))
            metrics = self._metrics(peak, merged)
            write_json(stage / "metrics.json", metrics)
            draw(metrics, stage / "loss.png")
        if not o.merge:
            shutil.rmtree(self.output / "merged", ignore_errors=True)  # an earlier run's, of another adapter
        self._tell(metrics)

    def how_to_go_on(self) -> str:
        last = self.checkpoints.last_of_run() if self.checkpoints else None
        if last is None:
            return "nothing has been trained yet; run the same command again"
        return (
            f"{last} is saved; go on with `{command()} finetune "
            f"--config {shlex.quote(str(self.output / SETTINGS))} --resume`"
        )

    def _trainer(self) -> Any:
        from .trainer import FinetuneTrainer, arguments

        o = self.options
        return FinetuneTrainer(
            self.model,
            arguments(o, self.steps, use_cpu=self.device == "cpu"),
            self.train_examples,
            self.held_out_examples,
            self.encoder,
            history=self.history,
            checkpoints=self.checkpoints,
            state=self.state,
            eval_every=o.eval_every or math.ceil(self.steps / 2),
            save_every=o.save_every,
            console=self.console,
        )

    def _resume(self) -> None:
        self.checkpoint = self.checkpoints.last()
        if self.checkpoint is None:
            self.console.say(f"--resume: {self.output} has no checkpoint; starting from the first step")
            return
        from .trainer import STATE, History

        state = json.loads((self.checkpoint / STATE).read_text(encoding="utf-8"))
        then, now = state["settings"], self.state["settings"]
        other = [n for n in sorted(then.keys() | now.keys()) if then.get(n) != now.get(n)]
        if other:
            self._refuse(", ".join(f"--{n.replace('_', '-')} {then.get(n)} (now {now.get(n)})" for n in other))
        if state["data_digest"] != self.state["data_digest"]:
            self._refuse(f"other rows than {self.data_name} has now")
        self.checkpoints.adopt(self.checkpoint)
        self.done = int(self.checkpoint.name.rsplit("-", 1)[1])
        self.history = History(state["history"])

    def _refuse(self, difference: str) -> None:
        raise JobError(
            f"--resume: {self.checkpoint} was made with {difference}; go on with "
            f"`{command()} finetune --config {shlex.quote(str(self.output / SETTINGS))} --resume`, or leave out --resume"
        )

    def _check_space(self) -> None:
        """The merged model is written last: that it does not fit should not show only then."""
        trained = 4 * self.parameters
        # Three checkpoints (the third is written before the first goes) of adapter and two moments, the adapter, the rest.
        needed = 10 * trained + 2**23
        if self.options.merge:
            needed += sum(p.numel() * p.element_size() for p in self.model.parameters() if not p.requires_grad)
        free = free_bytes(self.output)
        if free < needed:
            raise JobError(
                f"{self.output}: its disk has {free / 2**20:,.0f} MiB free, and this job writes up to "
                f"{needed / 2**20:,.0f} MiB there: free some, or name another --output"
            )

    def _evaluate_where_due(self, trainer: Any, step: int) -> None:
        """Before the first step; and after one whose evaluation a signal cut short."""
        due = step in (0, self.steps) or step % trainer.eval_every == 0
        if due and self.history.eval_loss(step) is None:
            trainer.state.global_step = step
            trainer.evaluate()
            stopper.check()

    def _metrics(self, peak: dict[str, float], merged: dict[str, float] | None) -> dict[str, Any]:
        from .report import versions

        history, before = self.history, self.history.eval_loss(0)
        after = history.eval_loss(self.steps)
        return {
            "model": self.source.name,
            "data": self.data_name,
            "steps": self.steps,
            "epochs": self.steps * self.options.batch_size * self.options.grad_accum / len(self.train_examples),
            "train_rows": len(self.train_examples),
            "eval_rows": len(self.held_out_examples),
            "trainable_parameters": self.parameters,
            "eval_loss_before": before,
            "eval_loss_after": after,
            "eval_loss_fall": before - after,
            "losses": history.losses,
            "eval_losses": history.eval_losses,
            "tokens": history.tokens,
            "train_seconds": history.seconds,
            "tokens_per_second": history.tokens / history.seconds,
            "peak_memory_mib": peak,
            "merged_logits": merged,
            "samples": history.samples,
            "versions": versions(),
            "config": settings(self.options),
        }

    def _tell(self, metrics: dict[str, Any]) -> None:
        for sample in metrics["samples"]:
            print(f"\nQuestion:  {sample['prompt']}", end="")
            for what in ("before", "after", "reference"):
                print(f"\n{what}: ".ljust(12) + sample[what].replace("\n", "\n" + " " * 11), end="")
            print()
        print()
        self.console.say(
            f"held-out loss {metrics['eval_loss_before']:.4f} -> {metrics['eval_loss_after']:.4f} in {self.steps} steps, "
            f"{metrics['tokens_per_second']:,.0f} tokens/s, {metrics['peak_memory_mib']['host']:,.0f} MiB at most"
        )
        self.console.say(f"written: {', '.join(str(self.output / n) for n in self._written())}")

    def _written(self) -> list[str]:
        return ["adapter", *(["merged"] if self.options.merge else []), "metrics.json", "loss.png"]
