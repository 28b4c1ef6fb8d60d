# SPDX-License-Identifier: Apache-2.0
"""Small models with GraLoRA adapters, built by PEFT's tuner and by ours from the same seed."""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import Any

import peft
import pytest
import torch
from packaging.version import Version
from peft import GraloraConfig, PeftModel, get_peft_model
from peft.tuners.gralora.layer import Linear as StockLinear
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from gralora_ext.tuner import GraloraLinear, enable
from gralora_ext.tuner.config import NEEDED_PEFT

needs_new_peft = pytest.mark.skipif(
    Version(peft.__version__) < Version(NEEDED_PEFT), reason=f"what LoRA users do needs PEFT {NEEDED_PEFT}"
)
DEVICE = torch.device(os.environ.get("GRALORA_TEST_DEVICE", "cpu"))


class Mlp(nn.Module):
    """Two linear layers, 24 → 36 → 12: every width divides by 1, 2, 3, 4, 6 and 12."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.relu, self.second = nn.Linear(24, 36), nn.ReLU(), nn.Linear(36, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.relu(self.first(x)))


class Conv1DMlp(Mlp):
    """The same with transformers' Conv1D, whose weight is stored as [N, M]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Conv1D(36, 24), Conv1D(12, 36)


class Single(nn.Module):
    """One linear layer, 24 → 36."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(24, 36)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x)


def llama() -> LlamaForCausalLM:
    """A causal language model of 2 layers and 64 tokens, with random weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def gpt2() -> GPT2LMHeadModel:
    """As :func:`llama`, with layers of type Conv1D."""
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    size = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**size, **no_dropout, bos_token_id=1, eos_token_id=2))


def config(**fields: Any) -> GraloraConfig:
    """A configuration whose adapters start at random, so that they change the output at once."""
    defaults = {"r": 12, "alpha": 24, "gralora_k": 2, "target_modules": ["first", "second"], "init_weights": False}
    return GraloraConfig(**{**defaults, **fields})


def adapted(tuner: str, base: Any = Mlp, dtype: torch.dtype = torch.float64, seed: int = 0, **fields: Any) -> PeftModel:
    """A PeftModel over ``base()`` in ``dtype``, built with the ``"stock"`` or the ``"fused"`` tuner."""
    torch.manual_seed(seed)
    model = base().to(dtype)
    if base is Conv1DMlp or base is gpt2:
        fields.setdefault("fan_in_fan_out", True)
    with enable() if tuner == "fused" else nullcontext():
        return get_peft_model(model, config(**fields)).to(DEVICE)


def pair(base: Any = Mlp, dtype: torch.dtype = torch.float64, **fields: Any) -> tuple[PeftModel, PeftModel]:
    """The stock and the fused model of the same seed; in float64 by default, where they agree to the last digits."""
    return adapted("stock", base, dtype, **fields), adapted("fused", base, dtype, **fields)


def fused_layers(model: nn.Module) -> list[str]:
    """The names of the fused layers in ``model``."""
    return [name for name, module in model.named_modules() if type(module) is GraloraLinear]


def stock_layers(model: nn.Module) -> list[str]:
    """The names of PEFT's own GraLoRA layers in ``model``."""
    return [name for name, module in model.named_modules() if type(module) is StockLinear]


def rows(*leading: int, width: int = 24, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    """Normal values, ``[*leading, width]``."""
    return torch.randn(*leading, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
        DEVICE, dtype
    )


def tokens(*shape: int, seed: int = 1) -> Tensor:
    """Token numbers of :func:`llama` and :func:`gpt2`, without their special ones."""
    return torch.randint(3, 64, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradient of each parameter that has one."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(model: nn.Module, other: nn.Module) -> None:
    """Both models have gradients of the same parameters, equal to 1e-11."""
    actual, expected = gradients(model), gradients(other)
    assert actual.keys() == expected.keys() and actual
    for name in expected:
        torch.testing.assert_close(
            actual[name], expected[name], rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_same_output(y: Tensor, expected: Tensor) -> None:
    """Equal to 1e-11, in the same dtype."""
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
