# SPDX-License-Identifier: Apache-2.0
"""Quantized base layers of each kind, made by the libraries themselves, and how they are read without this package."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

BLOCK = 64  # by which widths must divide


def bitsandbytes(dtype: torch.dtype, **settings: Any) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(bnb_4bit_compute_dtype=dtype, **settings)


def torchao(dtype: torch.dtype, name: str) -> TorchAoConfig:
    import torchao.quantization

    return TorchAoConfig(getattr(torchao.quantization, name)())


def nf4(**settings: Any) -> Any:
    return partial(bitsandbytes, load_in_4bit=True, bnb_4bit_quant_type="nf4", **settings)


CONFIGS = {
    "nf4": nf4(),
    "nf4 double": nf4(bnb_4bit_use_double_quant=True),
    "fp4": partial(bitsandbytes, load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "8 bit": partial(bitsandbytes, load_in_8bit=True),
    "torchao int8": partial(torchao, name="Int8WeightOnlyConfig"),
    "torchao int8 dynamic": partial(torchao, name="Int8DynamicActivationInt8WeightConfig"),
    "torchao float8": partial(torchao, name="Float8WeightOnlyConfig"),
    "hqq": None,
}
KINDS = tuple(CONFIGS)
BITSANDBYTES, TORCHAO = KINDS[:4], KINDS[4:7]


def need(kind: str) -> None:
    """Skips a test where the library of ``kind`` is not installed."""
    package = "hqq" if kind == "hqq" else "torchao" if kind in TORCHAO else "bitsandbytes"
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed (pip install 'gralora_ext[quantized]')")


def llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """A causal language model of 2 layers and 64 tokens, the same at every call; some of its layers have a bias."""
    torch.manual_seed(0)
    size = {"vocab_size": 64, "hidden_size": BLOCK, "intermediate_size": 2 * BLOCK, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    model = LlamaForCausalLM(LlamaConfig(**size, **heads, bos_token_id=1, eos_token_id=2, attention_bias=True))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model.to(dtype)


def hqq_layer(linear: nn.Linear, dtype: torch.dtype) -> nn.Module:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    linear.requires_grad_(False)  # or its bias cannot be copied
    return HQQLinear(linear, BaseQuantizeConfig(nbits=4, group_size=BLOCK), compute_dtype=dtype, device="cpu")


def quantized(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """:func:`llama` with each linear layer but the head quantized."""
    need(kind)
    model = llama(dtype)
    if kind == "hqq":  # made directly: some releases of transformers cannot
        for layer in model.model.layers:
            for parent in (layer.self_attn, layer.mlp):
                for name, linear in list(parent.named_children()):
                    if isinstance(linear, nn.Linear):
                        setattr(parent, name, hqq_layer(linear, dtype))
        return model
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=CONFIGS[kind](dtype), device_map="cpu", dtype=dtype
        )


def dequantized(base: Any) -> Tensor:
    """D(W) as the library of ``base`` computes it."""
    if hasattr(base, "W_q"):
        return base.dequantize()
    if hasattr(base.weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(base.weight.data, base.weight.quant_state)
    if hasattr(base.weight, "SCB"):
        statistics = base.weight.SCB if base.state.SCB is None else base.state.SCB
        return base.weight.data * statistics[:, None] * (1 / 127)
    return base.weight.dequantize()


def quantized_like(kind: str, base: Any, weight: Tensor) -> nn.Module:
    """Q(``weight``): a layer of its own, made from a linear layer as ``base`` once was."""
    out_features, in_features = weight.shape
    linear = nn.Linear(in_features, out_features, bias=base.bias is not None)
    linear.weight.data = weight
    if base.bias is not None:
        linear.bias.data = base.bias.detach().clone()
    if kind == "hqq":
        return hqq_layer(linear, base.compute_dtype)
    if kind in TORCHAO:
        from torchao import quantize_

        quantize_(linear, CONFIGS[kind](weight.dtype).quant_type)
        return linear
    import bitsandbytes as bnb

    if kind == "8 bit":
        made = bnb.nn.Linear8bitLt(in_features, out_features, linear.bias is not None, has_fp16_weights=False)
    else:
        made = bnb.nn.Linear4bit(
            in_features,
            out_features,
            linear.bias is not None,
            compress_statistics=kind == "nf4 double",
            quant_type=kind[:3],
        )
    made.load_state_dict(linear.state_dict())
    return made.to("cpu")


def bits(layer: nn.Module) -> dict[str, Tensor]:
    """A copy of every tensor of a quantized layer: packed weight, statistics, bias."""
    found = {}
    for name, tensor in layer.state_dict().items():
        if hasattr(tensor, "__tensor_flatten__"):
            found |= {f"{name}.{part}": getattr(tensor, part) for part in tensor.__tensor_flatten__()[0]}
        else:
            found[name] = tensor
    return {name: tensor.detach().clone() for name, tensor in found.items() if isinstance(tensor, Tensor)}
