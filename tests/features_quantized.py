# SPDX-License-Identifier: Apache-2.0
"""Base layers that a library has quantized. Where the library is missing, its rows stay as they are on the page."""

from __future__ import annotations

import torch
from feature_tuners import Tuner, feature, near
from peft import PeftModel, get_peft_model
from quantized_models import bits, dequantized, quantized
from torch import Tensor, nn
from tuner_helpers import tokens


def adapted(tuner: Tuner, kind: str) -> PeftModel:
    base = quantized(kind)
    torch.manual_seed(0)
    return get_peft_model(base, tuner.config(target_modules=["q_proj", "down_proj"]))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens(2, 8)).logits


def trains_merges_and_unmerges(tuner: Tuner, kind: str) -> None:
    model = adapted(tuner, kind)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 64, requires_grad=True)
    base, change = layer.get_base_layer(), layer.get_delta_weight("default").detach()
    weight = dequantized(base).float() + change
    y = layer(x)
    expected = nn.functional.linear(x.detach(), weight, base.bias.detach())
    y.sum().backward()
    assert (y - expected).norm() < 0.02 * expected.norm()  # 8-bit layers round x too
    near(x.grad, weight.sum(0).expand(3, -1), 1e-3)
    before = dequantized(base).float()
    model.merge_adapter()
    # The change, and what quantizing again has lost.
    added = dequantized(layer.get_base_layer()).float() - before
    assert 0.8 < (added * change).sum() / change.square().sum() < 1.2
    model.unmerge_adapter()
    left = dequantized(layer.get_base_layer()).float() - before
    assert left.norm() < 0.5 * change.norm()


@feature("bitsandbytes, 4 bit: training, merge, unmerge", needs="bitsandbytes")
def _(tuner: Tuner) -> None:
    trains_merges_and_unmerges(tuner, "nf4")


@feature("bitsandbytes, 8 bit: training, merge, unmerge", needs="bitsandbytes")
def _(tuner: Tuner) -> None:
    trains_merges_and_unmerges(tuner, "8 bit")


@feature("torchao, int8: training, merge, unmerge", needs="torchao")
def _(tuner: Tuner) -> None:
    trains_merges_and_unmerges(tuner, "torchao int8")


@feature("HQQ: training, merge, unmerge", needs="hqq")
def _(tuner: Tuner) -> None:
    trains_merges_and_unmerges(tuner, "hqq")


@feature(
    "evaluation between training steps of a 4-bit model (CPUs with AVX512-BF16)",
    needs="bitsandbytes",
    processor="avx512_bf16",
)
def _(tuner: Tuner) -> None:
    def loss_after(evaluate: bool) -> Tensor:
        model = adapted(tuner, "nf4")
        if evaluate:
            logits(model.eval())
        ids = tokens(2, 8)
        loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
        return loss.detach()

    near(loss_after(True), loss_after(False))


@feature("a 4-bit weight is the old one after unmerging, bit for bit", needs="bitsandbytes")
def _(tuner: Tuner) -> None:
    model = adapted(tuner, "nf4")
    before = bits(model.base_model.model.model.layers[0].self_attn.q_proj.get_base_layer())
    model.merge_adapter()
    model.unmerge_adapter()
    after = bits(model.base_model.model.model.layers[0].self_attn.q_proj.get_base_layer())
    assert all(torch.equal(after[name], before[name]) for name in before)
