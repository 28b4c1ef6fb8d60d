# SPDX-License-Identifier: Apache-2.0
"""``gralora-ext finetune``: the job from its options to the files it leaves, one stage after the other."""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from pathlib import Path
from typing import Any

from ..program.console import Console
from ..program.errors import Diverged, JobError, Stopped
from ..program.files import CHECKPOINTS, free_bytes, locked, write_json
from ..program.signals import stopper
from . import resume, summary
from .checkpoints import Checkpoints, History
from .checks import check_backend, check_needed, check_output, command, device, quiet_libraries
from .gather import gather
from .kinds import LARGEST
from .options import SETTINGS, bits_of, decisive, settings
from .output import Output
from .reporters import open_reporters
from .source import find_model

SAMPLES = 2
DIVERGED = 3  # the exit code of a job that ended, with its results, because its numbers were finite no more


def run(options: argparse.Namespace) -> int:
    """Runs the job; returns the exit code. Raises JobError for what the user can mend."""
    job = Job(options)
    try:
        job.check()
        job.prepare()
        with locked(job.output.folder, wait=False):
            job.train()
            job.publish()
    except Stopped as stop:
        print(f"stopped by {stop.name}: {job.how_to_go_on()}", file=sys.stderr)
        return stop.exit_code
    if job.diverged is None:
        return 0
    print(f"gralora-ext: the job has diverged: {job.diverged}; {job.what_to_do_now()}", file=sys.stderr)
    return DIVERGED


class Job:
    """The stages, in the order in which :func:`run` calls them; each leaves what the next ones need."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.console = Console()
        self.output = Output(Path(options.output), self.console.say)
        self.checkpoints = Checkpoints(self.output.folder / CHECKPOINTS, self.console.say)
        self.checkpoint: Path | None = None  # the one that the job goes on from, with what was done before it
        self.done = 0
        self.history = History()
        self.diverged: str | None = None

    def check(self) -> None:
        """All that can be wrong before a model is loaded, and what needs no torch before that is: it takes seconds."""
        o = self.options
        check_output(self.output.folder)
        check_needed(o)
        self.source = find_model(o.model)
        self.rows = gather(o)
        for text in self.rows.said:
            self.console.say(text)
        self.state = {"settings": decisive(settings(o)), "data_digest": self.rows.digest}
        if o.resume:
            found = resume.find(self.checkpoints, self.state, self.rows.name, self._again())
            if found is None:
                self.console.say(f"--resume: {self.output.folder} has no checkpoint; starting from the first step")
            else:
                self.checkpoint, self.done, self.history = found
        self.console.say("importing transformers and peft")
        quiet_libraries()
        check_backend(o.backend)
        self.device = device(o)

    def prepare(self) -> None:
        """The model with its adapter, the examples, and the number of steps."""
        from transformers import set_seed

        from .adapter import add_adapter, check_mergeable, trainable_parameters
        from .batches import make_batches
        from .data import Encoder
        from .model import load, save_memory

        o, say = self.options, self.console.say
        self.bits = bits_of(o)
        say(f"model: loading {self.source.name} in {o.dtype}{f', quantized to {self.bits} bits' if self.bits else ''}")
        self.model, self.tokenizer = load(self.source, o.dtype, say, self.bits, self.device, o.attn_implementation)
        longest = getattr(self.model.config, "max_position_embeddings", None)
        if longest and o.max_length > longest:
            raise JobError(f"--max-length {o.max_length} is more than the {longest} positions of {self.source.name}")
        if self.rows.template is not None:
            self.tokenizer.chat_template = self.rows.template
        self.encoder = Encoder(self.tokenizer, o.max_length, o.answers_only)
        self.batches = make_batches(self.rows, self.encoder, self.model, self.source, o, self.device, say)
        per_epoch = math.ceil(len(self.batches.items) / (o.batch_size * o.grad_accum))
        if not o.steps and o.epochs * per_epoch > LARGEST:
            raise JobError(f"--epochs {o.epochs:g} is more than {LARGEST} steps")
        self.steps = o.steps or max(1, round(o.epochs * per_epoch))
        if self.done > self.steps:
            raise JobError(f"--resume: {self.checkpoint} is beyond the end of a job of --steps {self.steps}")
        set_seed(o.seed)
        self.model = add_adapter(self.model, self.source, o)
        check_mergeable(self.model, o)
        if o.gradient_checkpointing:
            save_memory(self.model, self.source)
        self.parameters = trainable_parameters(self.model)
        what = {"fused": "GraLoRA, fused", "peft": "PEFT's own GraLoRA", "lora": "PEFT's LoRA"}[o.backend]
        grid = "" if o.backend == "lora" else f", k = {o.k}"
        say(f"adapter: {what}, r = {o.r}{grid}, hybrid_r = {o.hybrid_r}: {self.parameters:,} parameters to train")
        self._check_space()

    def train(self) -> None:
        """From the start or the checkpoint to the last step, with samples and held-out loss before and after."""
        from .adapter import load_adapter
        from .results import answers

        o, say = self.options, self.console.say
        with self.output.staged() as stage:
            write_json(stage / SETTINGS, settings(o))
        trainer = self._trainer()
        if self.checkpoint is not None:
            load_adapter(self.model, self.checkpoint)
            say(f"resuming from {self.checkpoint}, {self.done} of {self.steps} steps done")
        samples = self._samples()
        if not self.history.samples:
            say(f"{SAMPLES} sample answers of the model as it is")
            before = answers(self.model, self.tokenizer, self.encoder, [s.tokens for s in samples], o.sample_tokens)
            for sample, answer in zip(samples, before, strict=True):
                self.history.samples.append({"prompt": sample.prompt, "reference": sample.reference, "before": answer})
        try:
            self._evaluate_where_due(trainer, self.done)
            if self.done < self.steps:
                rows, place = o.batch_size * o.grad_accum, trainer.args.device
                what = "packs" if o.packing else "rows"
                say(f"training {self.steps - self.done} steps of {rows} {what} on {place}")
                with stopper.held(), self.console.bar("step", self.steps, self.done, first=True) as trainer.bar:
                    trainer.train(resume_from_checkpoint=str(self.checkpoint) if self.checkpoint else None)
                self._evaluate_where_due(trainer, self.steps)
        except Diverged as error:
            self.diverged = str(error)
            say(f"{error}: the job ends here")
        trainer.unwrap()

    def publish(self) -> None:
        """Sample answers, the adapter, the merged model, the report: made beside, put in place together.

        A diverged job leaves its adapter and its report, and no merged model: there is nothing to compare that with.
        """
        from .report import draw, peak_memory_mib
        from .results import answers, write_merged

        o, say = self.options, self.console.say
        peak = peak_memory_mib()
        self.written = ["adapter", *(["merged"] if o.merge and not self.diverged else []), "metrics.json", "loss.png"]
        after = [""] * len(self.history.samples)
        if self.diverged is None:
            say(f"{SAMPLES} sample answers of the trained model")
            asked = [sample.tokens for sample in self._samples()]
            after = answers(self.model, self.tokenizer, self.encoder, asked, o.sample_tokens)
        for sample, answer in zip(self.history.samples, after, strict=True):
            sample["after"] = answer
        with self.output.staged() as stage:
            say("writing the adapter")
            self.model.save_pretrained(stage / "adapter", save_embedding_layers=False)
            merged = None
            if "merged" in self.written:
                say("merging, writing the merged model, and comparing its logits with adapter + base")
                batch = self.encoder.collate(self.batches.held_out[:2])
                merged = write_merged(
                    self._to_merge(stage / "adapter"), self.tokenizer, batch, o.dtype, stage / "merged"
                )
                say("the logits differ by at most {max_difference:.1e} in {max_logit:.1f}".format(**merged))
            metrics = summary.metrics(
                self.history,
                steps=self.steps,
                rows_per_step=o.batch_size * o.grad_accum,
                items=len(self.batches.items),
                train_rows=self.batches.rows,
                diverged=self.diverged,
                merged=merged,
                model=self.source.name,
                data=self.rows.name,
                eval_rows=len(self.batches.held_out),
                trainable_parameters=self.parameters,
                peak_memory_mib=peak,
                config=settings(o),
            )
            write_json(stage / "metrics.json", metrics)
            draw(metrics, stage / "loss.png")
        if "merged" not in self.written:
            self.output.remove("merged")  # an earlier run's, of another adapter
        if self.diverged is None:
            print(summary.samples(metrics))
        say(summary.in_words(metrics))
        say(f"written: {', '.join(str(self.output.folder / name) for name in self.written)}")

    def _to_merge(self, adapter: Path) -> Any:
        """The model that the adapter is merged into: the trained one, or where that is quantized its base as the files have it.

        Quantizing again would lose a part of the adapter, and the merged model is to load everywhere.
        """
        from .adapter import add_adapter, load_adapter
        from .model import load

        if self.bits is None:
            return self.model
        self.console.say(
            f"loading {self.source.name} in {self.options.dtype}, not quantized, to merge the adapter into it"
        )
        base = load(self.source, self.options.dtype, self.console.say, attention=self.options.attn_implementation)[0]
        model = add_adapter(base, self.source, self.options)
        load_adapter(model, adapter)
        return model.to(self.device)

    def how_to_go_on(self) -> str:
        last = self.checkpoints.last_of_run()
        if last is None:
            return "nothing has been trained yet; run the same command again"
        return f"{last} is saved; go on with `{self._again()}`"

    def what_to_do_now(self) -> str:
        """After a job has diverged: before the first step it is the model's fault, later most often the rate's."""
        lr = f"try a lower --lr than {self.options.lr:g}"
        cure = lr if self.history.losses else "the model is not fit for training as it is, or not in this --dtype"
        names = ", ".join(self.written)
        return f"{names} in {self.output.folder} show how it ended, and no merged model was written; {cure}"

    def _again(self) -> str:
        return f"{command()} finetune --config {shlex.quote(str(self.output.folder / SETTINGS))} --resume"

    def _trainer(self) -> Any:
        from .trainer import FinetuneTrainer, arguments

        o = self.options
        open_reporters(o, self.output.folder)
        return FinetuneTrainer(
            self.model,
            arguments(o, self.steps, use_cpu=self.device == "cpu"),
            self.batches.items,
            self.batches.held_out,
            self.encoder,
            collate=self.batches.collate,
            history=self.history,
            checkpoints=self.checkpoints,
            state=self.state,
            eval_every=o.eval_every or math.ceil(self.steps / 2),
            save_every=o.save_every,
            console=self.console,
        )

    def _samples(self) -> list[Any]:
        """The questions of the first held-out rows; a conversation that the assistant opens has none."""
        samples = (self.encoder.sample(row) for row in self.rows.held_out[:SAMPLES])
        return [sample for sample in samples if sample.tokens]

    def _check_space(self) -> None:
        """The merged model is written last: that it does not fit should not show only then."""
        trained = 4 * self.parameters
        # Three checkpoints (the third is written before the first goes) of adapter and two moments,
        # the adapter, the rest.
        needed = 10 * trained + 2**23
        if self.options.merge:
            size = 2 if self.options.dtype == "bf16" else 4
            needed += size * self.model.num_parameters()
        free = free_bytes(self.output.folder)
        if free < needed:
            raise JobError(
                f"{self.output.folder}: its disk has {free / 2**20:,.0f} MiB free, and this job writes up to "
                f"{needed / 2**20:,.0f} MiB there: free some, or name another --output"
            )

    def _evaluate_where_due(self, trainer: Any, step: int) -> None:
        """Before the first step; and after one whose evaluation a signal cut short."""
        due = step in (0, self.steps) or step % trainer.eval_every == 0
        if due and self.history.eval_loss(step) is None:
            trainer.state.global_step = step
            trainer.evaluate()
            stopper.check()
