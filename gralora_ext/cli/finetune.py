# SPDX-License-Identifier: Apache-2.0
"""``gralora-ext finetune``: the job from its options to the files it leaves, one stage after the other."""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..program.console import Console
from ..program.errors import Diverged, JobError, Stopped, first_sentence
from ..program.files import CHECKPOINTS, free_bytes, locked, write_json
from ..program.signals import stopper
from ..program.silent import Silent
from . import launcher, resume, summary
from .checkpoints import Checkpoints, History
from .checks import check_backend, check_output, check_quantization, command, device, quiet_libraries
from .group import Group, end_by
from .options import LARGEST, SETTINGS, bits_of, decisive, settings
from .output import Output
from .rows import read_rows
from .source import find_model

SAMPLES = 2
DIVERGED = 3  # the exit code of a job that ended, with its results, because its numbers were finite no more


def run(options: argparse.Namespace, group: Group) -> int:
    """Runs the job, or its part in one of several processes; returns the exit code. JobError is for what the user can mend.

    Of several processes the first one writes and speaks, and its exit code is the job's; the others return 0.
    """
    job = Job(options, group)
    try:
        with ExitStack() as lock:
            with group.together():
                job.check()
            with group.together():
                job.meet()
                job.prepare()
            with group.together():
                if group.is_first:
                    lock.enter_context(locked(job.output.folder, wait=False))
                job.begin()
            with group.held():
                job.train()
                job.gather()
            if not group.is_first:
                return 0
            job.publish()
    except Stopped as stop:
        if not group.is_first:
            return 0 if group.agreed else end_by(stop.signum)
        print(f"stopped by {stop.name}: {job.how_to_go_on()}", file=sys.stderr)
        return stop.exit_code
    except Exception as error:
        if not group.has_lost(error):
            raise
        group.leave_lost(f"a process of this job has ended, or did not answer in time: {job.how_to_go_on()}")
    if job.diverged is None:
        return 0
    print(f"gralora-ext: the job has diverged: {job.diverged}; {job.what_to_do_now()}", file=sys.stderr)
    return DIVERGED


class Job:
    """The stages, in the order in which :func:`run` calls them; each leaves what the next ones need."""

    def __init__(self, options: argparse.Namespace, group: Group):
        self.options = options
        self.group = group
        group.timeout = options.process_timeout
        if not group.place.of_our_launcher:  # another launcher knows how many, and has accelerate's file
            options.num_processes = options.accelerate_config = None
        self.console = Console() if group.is_first else Silent()
        self.output = Output(Path(options.output), self.console.say)
        self.checkpoints = Checkpoints(self.output.folder / CHECKPOINTS, self.console.say)
        self.checkpoint: Path | None = None  # the one that the job goes on from, with what was done before it
        self.done = 0
        self.history = History()
        self.diverged: str | None = None
        self.adapter: dict[str, Any] | None = None  # its whole tensors, where several processes trained it

    def check(self) -> None:
        """All that can be wrong before a model is loaded, and what needs no torch before that is: it takes seconds."""
        o = self.options
        self.group.engine = launcher.engine(self.group.place)
        check_output(self.output.folder)
        check_quantization(o)
        if self.group.shares_model and bits_of(o):
            raise JobError(
                f"--load-in-{bits_of(o)}bit needs a whole model in each process, and this is {self.group.engine}"
            )
        self.source = find_model(o.model)
        rows = read_rows(o.data, o.prompt_field, o.answer_field, o.data_config, o.data_split)
        self.pairs, held_out = rows.split(o.held_out or 0)
        self.held_out = held_out[: o.eval_rows]
        self.console.say(
            f"data: {rows.name}: {len(self.pairs):,} rows to train on, the last {len(held_out):,} held out "
            f"(each evaluation reads {len(self.held_out)})"
        )
        self.data_name = rows.name
        self.state: dict[str, Any] = {"settings": decisive(settings(o)), "data_digest": rows.digest}
        self.state |= {"processes": self.group.size, "engine": self.group.engine}
        if o.resume and self.group.is_first:
            found = resume.find(self.checkpoints, self.state, self.data_name, f"`{self._again()}`")
            if found is None:
                self.console.say(f"--resume: {self.output.folder} has no checkpoint; starting from the first step")
            else:
                self.checkpoint, self.done, self.history = found
        self.console.say("importing transformers and peft")
        quiet_libraries()
        check_backend(o.backend)
        self.device = device(o, self.group.place)
        self.group.join(cuda=self.device != "cpu")

    def meet(self) -> None:
        """Several processes see that they are at one job, and the others learn where it goes on."""
        own = self.checkpoint, self.done, vars(self.history)
        states = self.group.exchange((self.state, own))
        for rank, (state, _) in enumerate(states):
            if state != states[0][0] and self.group.is_first:
                what = "options" if state["data_digest"] == self.state["data_digest"] else "rows"
                raise JobError(
                    f"process {rank} of {self.group.size} has other {what} than the first: start all with the same options, "
                    "on the same files"
                )
        self.checkpoint, self.done, history = states[0][1]
        self.history = History(history)

    def prepare(self) -> None:
        """The model with its adapter, the examples, and the number of steps."""
        from transformers import set_seed

        from . import sharded
        from .data import Encoder
        from .model import add_adapter, check_vocabulary, load, trainable_parameters

        o, say = self.options, self.console.say
        self.bits = bits_of(o)
        sharded.prepare(self.group.engine, self.device)
        say(f"model: loading {self.source.name} in {o.dtype}{f', quantized to {self.bits} bits' if self.bits else ''}")
        self.model, self.tokenizer = load(self.source, o.dtype, say, self.bits, self.device)
        longest = getattr(self.model.config, "max_position_embeddings", None)
        if longest and o.max_length > longest:
            raise JobError(f"--max-length {o.max_length} is more than the {longest} positions of {self.source.name}")
        self.encoder = Encoder(self.tokenizer, o.max_length)
        self.train_examples, remark = self.encoder.examples(self.pairs, "training")
        self.held_out_examples, remark_held_out = self.encoder.examples(self.held_out, "held-out")
        for text in filter(None, (remark, remark_held_out)):
            say(text)
        check_vocabulary(self.model, self.source, [*self.train_examples, *self.held_out_examples])
        self.rows_per_step = o.batch_size * o.grad_accum * self.group.size
        per_epoch = math.ceil(len(self.train_examples) / self.rows_per_step)
        if not o.steps and o.epochs * per_epoch > LARGEST:
            raise JobError(f"--epochs {o.epochs:g} is more than {LARGEST} steps")
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

    def begin(self) -> None:
        """The trainer, with what a checkpoint holds of the adapter; the settings are written."""
        from transformers import set_seed

        from .model import load_adapter

        if self.group.is_first:
            with self.output.staged() as stage:
                write_json(stage / SETTINGS, settings(self.options))
        self.trainer = self._trainer()
        if self.group.size > 1:
            set_seed(self.options.seed + self.group.rank)  # each draws its own dropout
        if self.checkpoint is not None:
            load_adapter(self.model, self.checkpoint)
            self.console.say(f"resuming from {self.checkpoint}, {self.done} of {self.steps} steps done")

    def train(self) -> None:
        """From the start or the checkpoint to the last step, with samples and held-out loss before and after."""
        from .trainer import NothingLeft

        say, trainer = self.console.say, self.trainer
        try:
            # A model that is shared out is in its place only when training begins.
            if self.group.shares_model:
                trainer.at_begin = self._look_before
            else:
                self._look_before()
            if self.done < self.steps or self.group.shares_model:
                place = trainer.args.device
                each = f" ({self.group.size} processes, {self.group.engine})" if self.group.size > 1 else ""
                say(f"training {self.steps - self.done} steps of {self.rows_per_step} rows on {place}{each}")
                with stopper.held(), self.console.bar("step", self.steps, self.done, first=True) as trainer.bar:
                    trainer.train(resume_from_checkpoint=str(self.checkpoint) if self.checkpoint else None)
                self.group.check_signal()
                self._evaluate_where_due(self.steps)
        except NothingLeft:
            pass
        except Diverged as error:
            self.diverged = str(error)
            say(f"{error}: the job ends here")

    def _look_before(self) -> None:
        """Sample answers and the held-out loss before the first step, or what a signal cut short of that."""
        if not self.history.samples:
            self.console.say(f"{SAMPLES} sample answers of the model as it is")
            before = self._answers([prompt for prompt, _ in self.held_out[:SAMPLES]])
            for (prompt, reference), answer in zip(self.held_out[:SAMPLES], before, strict=True):
                self.history.samples.append({"prompt": prompt, "reference": reference, "before": answer})
        self.group.check_signal()
        self._evaluate_where_due(self.done)

    def _answers(self, prompts: list[str]) -> list[str]:
        from .results import answers
        from .sharded import outside_training

        device = self.trainer.args.device if self.group.shares_model else None
        with outside_training(self.model):
            return answers(self.model, self.tokenizer, self.encoder, prompts, self.options.sample_tokens, device)

    def gather(self) -> None:
        """The last that takes all processes: sample answers after training, and what the first one is to write."""
        from .report import peak_memory_mib

        peaks = self.group.exchange(peak_memory_mib())
        self.peak = {name: max(peak[name] for peak in peaks) for name in peaks[0]}
        after = [""] * len(self.history.samples)
        if self.diverged is None:
            self.console.say(f"{SAMPLES} sample answers of the trained model")
            after = self._answers([sample["prompt"] for sample in self.history.samples])
        for sample, answer in zip(self.history.samples, after, strict=True):
            sample["after"] = answer
        if self.group.size > 1:
            from .sharded import adapter_state

            self.adapter = adapter_state(self.model)
        self.group.check_signal()

    def publish(self) -> None:
        """The adapter, the merged model, the report: made beside, put in place together.

        A diverged job leaves its adapter and its report, and no merged model: there is nothing to compare that with.
        """
        from .report import draw
        from .results import write_merged

        o, say = self.options, self.console.say
        self.written = ["adapter", *(["merged"] if o.merge and not self.diverged else []), "metrics.json", "loss.png"]
        with self.output.staged() as stage:
            say("writing the adapter")
            self.model.save_pretrained(stage / "adapter", state_dict=self.adapter, save_embedding_layers=False)
            merged = None
            if "merged" in self.written:
                say("merging, writing the merged model, and comparing its logits with adapter + base")
                batch = self.encoder.collate(self.held_out_examples[:2])
                merged = write_merged(
                    self._to_merge(stage / "adapter"), self.tokenizer, batch, o.dtype, stage / "merged"
                )
                say("the logits differ by at most {max_difference:.1e} in {max_logit:.1f}".format(**merged))
            metrics = summary.metrics(
                self.history,
                steps=self.steps,
                rows_per_step=self.rows_per_step,
                train_rows=len(self.train_examples),
                diverged=self.diverged,
                merged=merged,
                model=self.source.name,
                data=self.data_name,
                eval_rows=len(self.held_out_examples),
                trainable_parameters=self.parameters,
                peak_memory_mib=self.peak,
                processes=self.group.size,
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
        """The model to merge: the trained one, or where that is quantized or shared out, its base as the files have it.

        Quantizing again would lose a part of the adapter, and the merged model is to load everywhere.
        """
        from . import sharded
        from .model import add_adapter, load, load_adapter

        if self.bits is None and not self.group.shares_model:
            return self.model
        sharded.forget()
        self.console.say(
            f"loading {self.source.name} in {self.options.dtype}, whole and not quantized, to merge the adapter into it"
        )
        model = add_adapter(load(self.source, self.options.dtype, self.console.say)[0], self.options)
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
        words = ["finetune", "--config", str(self.output.folder / SETTINGS), "--resume"]
        if self.group.size > 1 and not self.group.place.of_our_launcher:
            return launcher.again(words, self.group.place)
        return f"{command()} {shlex.join(words)}"

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
            group=self.group,
        )

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

    def _evaluate_where_due(self, step: int) -> None:
        """Before the first step; and after one whose evaluation a signal cut short."""
        due = step in (0, self.steps) or step % self.trainer.eval_every == 0
        if due and self.history.eval_loss(step) is None:
            self.trainer.state.global_step = step
            self.trainer.evaluate()
            self.group.check_signal()
