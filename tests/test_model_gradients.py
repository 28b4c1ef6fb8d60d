# SPDX-License-Identifier: Apache-2.0
"""The gradients of whole models with fused layers, against central differences of their losses in float64."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from peft import GraloraConfig, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import gralora_ext

DEVICE = torch.device(os.environ.get("GRALORA_TEST_DEVICE", "cpu"))


def mlp() -> tuple[nn.Module, list[str], Callable[[nn.Module], Tensor]]:
    model = nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 20), nn.GELU(), nn.Linear(20, 8))
    x, target = torch.randn(9, 12).double().to(DEVICE), torch.randn(9, 8).double().to(DEVICE)
    return model, ["0", "2", "4"], lambda model: (model(x) - target).square().mean()


def language_loss() -> Callable[[nn.Module], Tensor]:
    """The next-token loss on random tokens, in the dtype of the logits (transformers' own is in float32)."""
    tokens = torch.randint(0, 40, (2, 11)).to(DEVICE)

    def loss(model: nn.Module) -> Tensor:
        logits = model(input_ids=tokens).logits
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    return loss


def llama() -> tuple[nn.Module, list[str], Callable[[nn.Module], Tensor]]:
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:  # transformers' own norm computes in float32, whatever the dtype of the model
        layer.input_layernorm, layer.post_attention_layernorm = nn.RMSNorm(16), nn.RMSNorm(16)
    model.model.norm = nn.RMSNorm(16)
    return model, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], language_loss()


def gpt2() -> tuple[nn.Module, list[str], Callable[[nn.Module], Tensor]]:
    """Its layers are ``Conv1D``, which store the weight transposed."""
    config = GPT2Config(
        vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    return GPT2LMHeadModel(config), ["c_attn", "c_fc"], language_loss()


@pytest.mark.parametrize("dropout", [0.0, 0.2], ids=["", "dropout"])
@pytest.mark.parametrize("hybrid_r", [0, 3], ids=["", "hybrid"])
@pytest.mark.parametrize("build", [mlp, llama, gpt2])
def test_gradients_of_a_model_are_the_slopes_of_its_loss(build: Callable, hybrid_r: int, dropout: float) -> None:
    torch.manual_seed(0)
    model, names, loss_of = build()
    config = GraloraConfig(
        r=4,
        hybrid_r=hybrid_r,
        gralora_k=2,
        alpha=8,
        target_modules=names,
        gralora_dropout=dropout,
        init_weights=False,
        fan_in_fan_out=build is gpt2,
    )
    with gralora_ext.enable():
        model = get_peft_model(model, config).double().train().to(DEVICE)
    layers = [module for module in model.modules() if isinstance(module, gralora_ext.GraloraLinear)]
    assert len(layers) >= len(names)

    def loss() -> Tensor:
        torch.manual_seed(1)  # the same masks in every evaluation
        return loss_of(model)

    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = dict(zip(parameters, torch.autograd.grad(loss(), list(parameters.values())), strict=True))
    for name, parameter in parameters.items():
        direction = torch.randn_like(parameter)
        slopes = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameter.add_(direction, alpha=step)
                slopes.append(loss())
                parameter.sub_(direction, alpha=step)
        slope = (slopes[0] - slopes[1]) / 2e-5
        along = (gradients[name] * direction).sum()
        scale = gradients[name].norm() * direction.norm()
        assert abs(slope - along) <= 1e-6 * scale, name
