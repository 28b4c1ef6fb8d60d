# SPDX-License-Identifier: Apache-2.0
"""A fine-tuning job from its options to the end of its training, in one process or in one of several."""

from __future__ import annotations

import argparse
import math
import shlex
from pathlib import Path
from typing import Any

from ..program.console import Console
from ..program.errors import Diverged, JobError
from ..program.files import CHECKPOINTS, check_unlocked, free_bytes, write_json
from ..program.signals import stopper
from ..program.silent import Silent
from . import launcher, resume
from .checkpoints import Checkpoints, History
from .checks import (
    check_backend,
    check_needed,
    check_output,
    check_shared,
    command,
    device,
    is_slow_in_bf16,
    quiet_libraries,
)
from .gather import gather
from .group import Group
from .kinds import LARGEST
from .options import SETTINGS, bits_of, decisive, settings
from .output import Output
from .reporters import open_reporters
from .source import find_model

SAMPLES = 2


class Job:
    """The stages, in the order in which `finetune.run` calls them; each leaves what the next ones need."""

    def __init__(self, options: argparse.Namespace, group: Group):
        self.options = options
        self.group = group
        group.timeout = options.process_timeout
        self.console = Console() if group.is_first else Silent()
        self.output = Output(Path(options.output), self.console.say)
        self.checkpoints = Checkpoints(self.output.folder / CHECKPOINTS, self.console.say)
        self.checkpoint: Path | None = None  # the one that the job goes on from, with what was done before it
        self.done = 0
        self.history = History()
        self.diverged: str | None = None
        self.written: list[str] = []

    def check(self) -> None:
        """All that can be wrong before a model is loaded, and what needs no torch before that is: it takes seconds."""
        o = self.options
        self._leave_to_launcher()
        self.group.engine = launcher.engine(self.group.place)
        check_output(self.output.folder)
        if self.group.is_first:
            check_unlocked(self.output.folder)
            self._announce()
        check_needed(o)
        check_shared(o, self.group.engine)
        self.source = find_model(o.model)
        self.rows = gather(o)
        for text in self.rows.said:
            self.console.say(text)
        self.state: dict[str, Any] = {"settings": decisive(settings(o)), "data_digest": self.rows.digest}
        self.state |= {"processes": self.group.size, "engine": self.group.engine}
        if o.resume and self.group.is_first:
            found = resume.find(self.checkpoints, self.state, self.rows.name, self._again())
            if found is None:
                self.console.say(f"--resume: {self.output.folder} has no checkpoint; starting from the first step")
            else:
                self.checkpoint, self.done, self.history = found
        self.console.say("importing transformers and peft")
        quiet_libraries()
        check_backend(o.backend)
        self.device = device(o, self.group.place)
        if is_slow_in_bf16(o, self.device):
            self.console.say(
                "torch has no quick bfloat16 products for this processor: in fp32 a step takes a fraction of the time"
            )
        self.group.join(cuda=self.device != "cpu")

    def _leave_to_launcher(self) -> None:
        """Another launcher than ours knows how many processes there are, and has accelerate's file."""
        o, size = self.options, self.group.size
        if self.group.place.of_our_launcher:
            return
        what = None
        if size > 1 and o.accelerate_config is not None:
            what = "--accelerate-config: another launcher has started the processes; `accelerate launch --config_file` takes the file"
        elif size > 1 and o.num_processes not in (None, size):
            what = f"--num-processes {o.num_processes}: another launcher has started {size}: leave the option out"
        if what is not None:
            if not o.resume:
                raise JobError(what)
            self.console.say(what)  # it may be in the settings that the job goes on with
        o.num_processes = o.accelerate_config = None

    def _announce(self) -> None:
        """Without --resume an earlier job's checkpoints are superseded: that is said before anything is deleted."""
        newest = self.checkpoints.newest()
        if newest is not None and not self.options.resume:
            self.console.say(
                f"{newest} is of an earlier job: this one begins anew, and deletes that when it saves its first checkpoint "
                "(--resume goes on from it)"
            )

    def meet(self) -> None:
        """Several processes see that they are at one job, and the others learn where it goes on."""
        own = self.checkpoint, self.done, vars(self.history)
        states = self.group.exchange((self.state, own))
        first, (self.checkpoint, self.done, history) = states[0]
        for rank, (state, _) in enumerate(states):
            if state != first:
                what = "options" if state["data_digest"] == first["data_digest"] else "rows"
                raise JobError(
                    f"process {rank} of {self.group.size} has other {what} than the first: start all with the same "
                    "options, on the same files"
                )
        self.history = History(history)

    def compare_content(self) -> None:
        """Several processes see that the files that each has read are the same: model and tokenizer may lie on several machines."""
        contents = self.group.exchange({n: self.state[n] for n in ("weights_digest", "tokens_digest")})
        for rank, content in enumerate(contents):
            for name, what in (("weights_digest", "weights of the base"), ("tokens_digest", "tokens of the same rows")):
                if content[name] != contents[0][name]:
                    raise JobError(
                        f"process {rank} of {self.group.size} has other {what} than the first: the files of --model differ "
                        "between the machines"
                    )

    def prepare(self) -> None:
        """The model with its adapter, the examples, and the number of steps."""
        from transformers import set_seed

        from . import sharded
        from .adapter import add_adapter, check_mergeable, trainable_parameters
        from .batches import make_batches
        from .data import Encoder
        from .model import load, save_memory, weights_digest

        o, say = self.options, self.console.say
        self.bits = bits_of(o)
        sharded.own_precision(o, self.group.size)
        if self.group.size > 1:
            sharded.prepare(o, self.group.engine, self.device)
        say(f"model: loading {self.source.name} in {o.dtype}{f', quantized to {self.bits} bits' if self.bits else ''}")
        self.model, self.tokenizer = load(self.source, o.dtype, say, self.bits, self.device, o.attn_implementation)
        self.state["weights_digest"] = weights_digest(self.model)
        longest = getattr(self.model.config, "max_position_embeddings", None)
        if longest and o.max_length > longest:
            raise JobError(f"--max-length {o.max_length} is more than the {longest} positions of {self.source.name}")
        if self.rows.template is not None:
            self.tokenizer.chat_template = self.rows.template
        self.encoder = Encoder(self.tokenizer, o.max_length, o.answers_only)
        # A model that is to be shared out need not fit a device as a whole.
        flash = (o.attn_implementation or "").startswith("flash")
        tried_on = "cpu" if self.group.shares_model and not flash else self.device
        self.batches = make_batches(self.rows, self.encoder, self.model, self.source, o, tried_on, say)
        self.state["tokens_digest"] = self.batches.digest
        if self.checkpoint is not None:
            resume.check_content(self.checkpoint, self.batches.digest, self.state["weights_digest"])
        self.rows_per_step = o.batch_size * o.grad_accum * self.group.size
        per_epoch = math.ceil(len(self.batches.items) / self.rows_per_step)
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

    def begin(self) -> None:
        """The trainer, with what a checkpoint holds of the adapter; the settings are written."""
        from transformers import set_seed

        from . import sharded
        from .adapter import load_adapter

        if self.group.is_first:
            self.output.read()  # a job that has ended since this one began may have written there
            if self.checkpoint is None and self.checkpoints.newest() is not None:
                # Until they are superseded, the file beside them is the one to go on from them with.
                self.checkpoints.before_clear = self._write_settings
            else:
                self._write_settings()
        self.trainer = self._trainer()
        sharded.check(self.trainer)
        if self.group.size > 1:
            set_seed(self.options.seed + self.group.rank)  # each draws its own dropout
        if self.checkpoint is not None:
            load_adapter(self.model, self.checkpoint)
            self.console.say(f"resuming from {self.checkpoint}, {self.done} of {self.steps} steps done")

    def _write_settings(self) -> None:
        with self.output.staged() as stage:
            write_json(stage / SETTINGS, settings(self.options))

    def train(self) -> None:
        """From the start or the checkpoint to the last step, with samples and held-out loss before and after."""
        from .trainer import NothingLeft

        trainer, group = self.trainer, self.group
        try:
            # A model that is shared out is in its place only when training begins.
            if group.shares_model:
                trainer.at_begin = self._look_before
            else:
                self._look_before()
            if self.done < self.steps or group.shares_model:
                what = "packs" if self.options.packing else "rows"
                each = f" ({group.size} processes, {group.engine})" if group.size > 1 else ""
                left, device = self.steps - self.done, trainer.args.device
                self.console.say(f"training {left} steps of {self.rows_per_step} {what} on {device}{each}")
                with stopper.held(), self.console.bar("step", self.steps, self.done, first=True) as trainer.bar:
                    trainer.train(resume_from_checkpoint=str(self.checkpoint) if self.checkpoint else None)
                group.check_signal()
                self._evaluate_where_due(self.steps)
        except NothingLeft:
            pass
        except Diverged as error:
            self.diverged = str(error)
            self.console.say(f"{error}: the job ends here")
        trainer.unwrap()

    def collect(self) -> None:
        """The last that takes all processes: sample answers after training, and what the first one is to write."""
        from .report import peak_memory_mib
        from .sharded import adapter_state

        peaks = self.group.exchange(peak_memory_mib())
        self.peak = {name: max(peak[name] for peak in peaks) for name in peaks[0]}
        after = [""] * len(self.history.samples)
        if self.diverged is None:
            self.console.say(f"{SAMPLES} sample answers of the trained model")
            after = self._answers()
        for sample, answer in zip(self.history.samples, after, strict=True):
            sample["after"] = answer
        self.adapter = adapter_state(self.model) if self.group.size > 1 else None
        self.group.check_signal()

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
        if self.group.is_first:
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
            group=self.group,
        )

    def _look_before(self) -> None:
        """Sample answers and the held-out loss before the first step, or what a signal cut short of that."""
        if not self.history.samples:
            self.console.say(f"{SAMPLES} sample answers of the model as it is")
            for sample, answer in zip(self._samples(), self._answers(), strict=True):
                self.history.samples.append({"prompt": sample.prompt, "reference": sample.reference, "before": answer})
        self.group.check_signal()
        self._evaluate_where_due(self.done)

    def _answers(self) -> list[str]:
        from .results import answers
        from .sharded import outside_training

        asked = [sample.tokens for sample in self._samples()]
        device = self.trainer.args.device if self.group.shares_model else None
        with outside_training(self.model):
            return answers(self.model, self.tokenizer, self.encoder, asked, self.options.sample_tokens, device)

    def _samples(self) -> list[Any]:
        """The questions of the first held-out rows; a conversation that the assistant opens has none."""
        samples = (self.encoder.sample(row) for row in self.rows.held_out[:SAMPLES])
        return [sample for sample in samples if sample.tokens]

    def _evaluate_where_due(self, step: int) -> None:
        """Before the first step; and after one whose evaluation a signal cut short."""
        due = step in (0, self.steps) or step % self.trainer.eval_every == 0
        if due and self.history.eval_loss(step) is None:
            self.trainer.state.global_step = step
            self.trainer.evaluate()
            self.group.check_signal()

    def _check_space(self) -> None:
        """The merged model is written last: that it does not fit should not show only then."""
        trained = 4 * self.parameters
        # Three checkpoints (the third is written before the first goes) of adapter and two moments,
        # the adapter, the rest.
        # Those that are there are deleted meanwhile.
        needed = max(10 * trained - self.checkpoints.bytes(), 4 * trained) + 2**23
        if self.options.merge:
            size = 2 if self.options.dtype == "bf16" else 4
            needed += size * self.model.num_parameters()
        free = free_bytes(self.output.folder)
        if free < needed:
            raise JobError(
                f"{self.output.folder}: its disk has {free / 2**20:,.0f} MiB free, and this job writes up to "
                f"{needed / 2**20:,.0f} MiB there: free some, or name another --output"
            )
