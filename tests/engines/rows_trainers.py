# SPDX-License-Identifier: Apache-2.0
"""Trainers: transformers', TRL's SFTTrainer, Lightning's. All see one batch three times."""

from __future__ import annotations

from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch
from core import (
    LEARNING_RATE,
    STEPS,
    Outcome,
    Run,
    adapt,
    adapted,
    base_model,
    batches,
    difference,
    gradients,
    our_layers,
    reference,
    sgd,
    trainable,
    tuner_config,
)
from torch import Tensor, nn


def one_batch() -> Tensor:
    return next(iter(batches()))


class Recorder:
    """Keeps the loss of each forward of a model, and its gradients when asked."""

    def __init__(self, model: nn.Module) -> None:
        self.losses: list[float] = []
        self.gradients: dict[str, Tensor] = {}
        self.model = model
        model.register_forward_hook(self._keep_loss)

    def _keep_loss(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.losses.append(output.loss.item())

    def keep_gradients(self) -> None:
        self.gradients = gradients(self.model)

    def run(self) -> Run:
        return Run(self.losses, self.gradients)


def arguments(folder: str, checkpointing: bool, bf16: bool) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "max_steps": STEPS,
        "per_device_train_batch_size": len(one_batch()),
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "gradient_checkpointing": checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if checkpointing else None,
        "bf16": bf16,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }


def dataset() -> Any:
    from datasets import Dataset

    ids = one_batch().tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids, "attention_mask": [[1] * len(row) for row in ids]})


def with_recorder(trainer: Any) -> Recorder:
    from transformers import TrainerCallback

    recorder = Recorder(trainer.model)

    class AtStep(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            recorder.keep_gradients()

    trainer.add_callback(AtStep())
    return recorder


def transformers_trainer(
    tuner: str, *, checkpointing: bool = False, bf16: bool = False, hybrid: bool = False
) -> Outcome:
    from transformers import Trainer, TrainingArguments

    with TemporaryDirectory() as folder:
        trainer = Trainer(
            model=adapted(tuner, hybrid=hybrid),
            args=TrainingArguments(**arguments(folder, checkpointing, bf16)),
            train_dataset=dataset(),
        )
        recorder = with_recorder(trainer)
        trainer.train()
    return Outcome(difference(recorder.run(), reference(tuner, hybrid=hybrid, data=[one_batch()] * STEPS)))


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"<{i}>": i for i in range(64)}
    made = Tokenizer(models.WordLevel(words, unk_token="<0>"))
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<0>", bos_token="<1>", eos_token="<2>")


def sft_trainer(tuner: str, *, checkpointing: bool = False, bf16: bool = False, hybrid: bool = False) -> Outcome:
    """TRL makes the PeftModel itself, from a configuration."""
    from trl import SFTConfig, SFTTrainer

    with TemporaryDirectory() as folder:
        torch.manual_seed(1)
        with our_layers(tuner):
            trainer = SFTTrainer(
                model=base_model(),
                args=SFTConfig(**arguments(folder, checkpointing, bf16), dataset_kwargs={"skip_prepare_dataset": True}),
                train_dataset=dataset(),
                processing_class=tokenizer(),
                peft_config=tuner_config(tuner, hybrid=hybrid),
            )
        start = adapt(base_model(), "lora" if tuner == "lora" else "peft", hybrid=hybrid).state_dict()
        trainer.model.load_state_dict(start)
        recorder = with_recorder(trainer)
        trainer.train()
    return Outcome(difference(recorder.run(), reference(tuner, hybrid=hybrid, data=[one_batch()] * STEPS)))


def lightning_trainer(tuner: str, *, bf16: bool = False) -> Outcome:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = adapted(tuner).train()
            self.recorder = Recorder(self.model)

        def training_step(self, ids: Tensor) -> Tensor:
            return self.model(input_ids=ids, labels=ids).loss

        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            self.recorder.keep_gradients()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return sgd(trainable(self.model))

    module = Module()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=STEPS,
        precision="bf16-mixed" if bf16 else "32-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader([one_batch()] * STEPS, batch_size=None))
    return Outcome(difference(module.recorder.run(), reference(tuner, data=[one_batch()] * STEPS)))


ROWS = {
    "transformers' Trainer": transformers_trainer,
    "transformers' Trainer, hybrid, checkpointing": partial(transformers_trainer, hybrid=True, checkpointing=True),
    "transformers' Trainer, bf16": partial(transformers_trainer, bf16=True),
    "SFTTrainer": sft_trainer,
    "SFTTrainer, hybrid": partial(sft_trainer, hybrid=True),
    "SFTTrainer, checkpointing": partial(sft_trainer, checkpointing=True),
    "SFTTrainer, bf16": partial(sft_trainer, bf16=True),
    "Lightning": lightning_trainer,
    "Lightning, bf16": partial(lightning_trainer, bf16=True),
}
