# SPDX-License-Identifier: Apache-2.0
"""What all rows share: a tiny model with adapters, its data, one run without an engine, and how far two runs are apart.

A run is some steps of gradient descent on a Llama of two layers: the loss of each step, and the
adapters' gradients in the last. Rows with several processes give each its share of the batch, so
that the mean over processes is what one process computes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import GraloraConfig, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

TUNERS = ("lora", "peft", "ours")
STEPS = 3
# 64 tokens a process: from there on our layer may be one operation with its base layer.
SEQUENCES, LENGTH, PROCESSES = 4, 16, 2
LEARNING_RATE = 0.5

# What engines put before a parameter's name, or between its parts.
_WRAPPERS = re.compile(
    r"(^|\.)(module|_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod|_forward_module|model_under_test)(?=\.)"
)


@dataclass(frozen=True)
class Outcome:
    """What a row has shown: how far it is from the run without an engine.

    ``count``, where there is one, may not exceed that of PEFT's layer; ``note`` says what it counts.
    """

    difference: float
    count: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Run:
    """The losses of all steps, and the gradient of each adapter parameter in the last one, in float32."""

    losses: list[float]
    gradients: dict[str, Tensor]


def base_model(dtype: torch.dtype = torch.float32, intermediate_size: int = 96) -> LlamaForCausalLM:
    """A Llama of 2 layers and 64 tokens, the same at every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(dtype)


class Mlp(nn.Module):
    """Token numbers through two linear layers, for what would take too long or does not work on a whole model."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.first, self.second = nn.Embedding(64, 64), nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, ids: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(self.embedding(ids))))


def tuner_config(
    tuner: str, *, hybrid: bool = False, dropout: float = 0.0, **fields: Any
) -> LoraConfig | GraloraConfig:
    """The adapters of a row: at random from the start, so that every parameter has a gradient."""
    fields = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", **fields}
    if tuner == "lora":
        return LoraConfig(r=8, lora_alpha=16, lora_dropout=dropout, init_lora_weights=False, **fields)
    rank = {"r": 8, "alpha": 16, "gralora_k": 2, "hybrid_r": 4 if hybrid else 0}
    return GraloraConfig(**rank, gralora_dropout=dropout, init_weights=False, **fields)


def our_layers(tuner: str) -> Any:
    """Within this, PEFT builds our layers where the tuner is ours."""
    if tuner != "ours":
        return nullcontext()
    import gralora_ext

    return gralora_ext.enable()


def adapt(base: nn.Module, tuner: str, *, autocast_adapter_dtype: bool = True, **fields: Any) -> PeftModel:
    """``base`` with adapters of the tuner, the same at every call."""
    torch.manual_seed(1)
    with our_layers(tuner):
        return get_peft_model(base, tuner_config(tuner, **fields), autocast_adapter_dtype=autocast_adapter_dtype)


def adapted(tuner: str, *, dtype: torch.dtype = torch.float32, **fields: Any) -> PeftModel:
    return adapt(base_model(dtype), tuner, **fields)


def batches(rank: int | None = None) -> Iterator[Tensor]:
    """The token numbers of each step: those of one process, or of all."""
    for step in range(STEPS):
        ids = torch.randint(3, 64, (PROCESSES * SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(step))
        yield ids if rank is None else ids[rank * SEQUENCES : (rank + 1) * SEQUENCES]


def plain_name(name: str) -> str:
    """A parameter's name without what engines put in."""
    return _WRAPPERS.sub("", name).lstrip(".")


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.SGD:
    """Plain gradient descent: Adam's first steps are the signs of gradients, and blow rounding up."""
    return torch.optim.SGD(list(parameters), lr=LEARNING_RATE)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of a model whose parameters are plain tensors."""
    return {
        plain_name(name): p.grad.detach().float().clone() for name, p in model.named_parameters() if p.grad is not None
    }


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Iterable[Tensor],
    *,
    gather: Callable[[nn.Module], dict[str, Tensor]] = gradients,
    around: Callable[[], Any] = nullcontext,
) -> Run:
    """Some steps; ``around`` makes a context for each forward, ``gather`` reads the gradients after each backward."""
    losses, kept = [], {}
    for ids in data:
        optimizer.zero_grad()
        with around():
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(mean_over_processes(loss))
        kept = gather(model)
        optimizer.step()
    return Run(losses, kept)


def mean_over_processes(loss: Tensor) -> float:
    value = loss.detach().float().clone()
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(value)
        value /= torch.distributed.get_world_size()
    return value.item()


def reference(tuner: str, *, data: Iterable[Tensor] | None = None, **fields: Any) -> Run:
    """The run in one process, in float32, without an engine, and for GraLoRA with PEFT's own layer.

    With a ``dtype`` among the fields, of the weights that the model has in this dtype.
    """
    model = adapted("lora" if tuner == "lora" else "peft", **fields).float().train()
    return train(model, sgd(trainable(model)), batches() if data is None else data)


def relative(actual: Tensor, expected: Tensor) -> float:
    """``‖actual - expected‖ / ‖expected‖``; infinite where a value is missing or is not finite."""
    if actual.shape != expected.shape or not torch.isfinite(actual).all():
        return float("inf")
    expected = expected.double()
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def difference(run: Run, expected: Run) -> float:
    """The largest relative difference of a loss or of a gradient.

    Raises:
        AssertionError: other parameters than the expected ones have a gradient, or a step is missing.
    """
    assert len(run.losses) == len(expected.losses), f"{len(run.losses)} steps instead of {len(expected.losses)}"
    missing = expected.gradients.keys() - run.gradients.keys()
    assert not missing, f"{len(missing)} of {len(expected.gradients)} parameters have no gradient, as {min(missing)}"
    added = run.gradients.keys() - expected.gradients.keys()
    assert not added, f"{len(added)} parameters have a gradient that should have none, as {min(added)}"
    of_losses = [abs(a - b) / abs(b) for a, b in zip(run.losses, expected.losses, strict=True)]
    of_gradients = [relative(run.gradients[name], g) for name, g in expected.gradients.items()]
    worst = of_losses + of_gradients
    return float("inf") if any(math.isnan(d) for d in worst) else max(worst)


def checkpoint_activations(model: PeftModel, use_reentrant: bool = False) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
