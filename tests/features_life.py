# SPDX-License-Identifier: Apache-2.0
"""What is done with adapters that there are."""

from __future__ import annotations

import tempfile
from typing import Any

import peft
import peft.helpers
import peft.utils.hotswap
import torch
from feature_tuners import Tuner, delta, feature, layer, near, output_is_base_plus, saved_and_loaded
from peft import PeftModel, get_peft_model
from tuner_helpers import Mlp, llama, rows, tokens


@feature("save and load")
def _(tuner: Tuner) -> None:
    saved_and_loaded(tuner.model(), Mlp)


@feature("several adapters, `set_adapter`")
def _(tuner: Tuner) -> None:
    model = with_second(tuner)
    for name in ("default", "second"):
        model.set_adapter(name)
        output_is_base_plus(model, delta(model, adapter=name))


def with_second(tuner: Tuner, **fields: Any) -> PeftModel:
    model = tuner.model()
    model.add_adapter("second", tuner.config(**fields))
    return model.double().eval()


@feature("`delete_adapter`")
def _(tuner: Tuner) -> None:
    model = with_second(tuner)
    model.delete_adapter("second")
    assert not any(
        "second." in name or name.endswith(".second")
        for name, _ in layer(model).named_parameters()
        if "gralora" in name or "lora" in name
    )


@feature("`disable_adapter`")
def _(tuner: Tuner) -> None:
    model, x = tuner.model(), rows(3)
    with model.disable_adapter():
        off = model(x)
    torch.manual_seed(0)
    near(off, Mlp().double()(x))


@feature("merge and unmerge")
def _(tuner: Tuner) -> None:
    model, x = tuner.model(), rows(3)
    y = model(x)
    model.merge_adapter()
    near(model(x), y)
    model.unmerge_adapter()
    near(model(x), y)


@feature("`merge_and_unload`")
def _(tuner: Tuner) -> None:
    model, x = tuner.model(), rows(3)
    y = model(x)
    near(model.merge_and_unload()(x), y)


@feature("mixed batches (`adapter_names`)")
def _(tuner: Tuner) -> None:
    model, x = with_second(tuner), rows(3)
    y = model(x, adapter_names=["second", "default", "__base__"])
    model.set_adapter("second")
    near(y[:1], model(x[:1]))
    model.set_adapter("default")
    near(y[1:2], model(x[1:2]))


@feature("mixed batches in `generate`, with beams")
def _(tuner: Tuner) -> None:
    model = tuner.model(llama, target_modules=["q_proj", "down_proj"])
    model.add_adapter("second", tuner.config(target_modules=["q_proj", "down_proj"]))
    model = model.double().eval()
    options = {"max_new_tokens": 3, "num_beams": 2, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    batch = tokens(2, 5)
    y = model.generate(input_ids=batch, adapter_names=["second", "default"], **options)
    model.set_adapter("second")
    assert torch.equal(y[:1], model.generate(input_ids=batch[:1], **options))


@feature('`add_weighted_adapter`: "cat", exact')
def _(tuner: Tuner) -> None:
    model = with_second(tuner, r=4)
    model.add_weighted_adapter(["default", "second"], [0.5, -2.0], "sum", combination_type="cat")
    near(delta(model, adapter="sum"), 0.5 * delta(model) - 2 * delta(model, adapter="second"))


@feature('`add_weighted_adapter`: "linear"')
def _(tuner: Tuner) -> None:
    model = with_second(tuner)
    model.add_weighted_adapter(["default"], [3.0], "sum", combination_type="linear")
    near(delta(model, adapter="sum"), 3 * delta(model))


@feature('`add_weighted_adapter`: "svd"')
def _(tuner: Tuner) -> None:
    model = with_second(tuner)
    model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum", combination_type="svd", svd_rank=16)
    near(delta(model, adapter="sum"), delta(model) + delta(model, adapter="second"))


@feature('`add_weighted_adapter`: "ties", "dare_ties", "dare_linear", "magnitude_prune"')
def _(tuner: Tuner) -> None:
    model = with_second(tuner)
    # The same adapter twice, with nothing left out: A and B are each a mean, or a sum, of two
    # roots of a half.
    for how, factor in {"ties": 0.5, "dare_ties": 0.5, "dare_linear": 2, "magnitude_prune": 2}.items():
        model.add_weighted_adapter(["default", "default"], [0.5, 0.5], how, combination_type=how, density=1.0)
        near(delta(model, adapter=how), factor * delta(model))


@feature("`set_scale`, `scale_layer`, `unscale_layer`")
def _(tuner: Tuner) -> None:
    model = tuner.model()
    before = delta(model)
    layer(model).set_scale("default", 3.0)
    near(delta(model), 3 * before)
    layer(model).scale_layer(0.5)
    near(delta(model), 1.5 * before)
    layer(model).unscale_layer()
    near(delta(model), before)


@feature("`rescale_adapter_scale`")
def _(tuner: Tuner) -> None:
    model = tuner.model()
    before = delta(model)
    with peft.helpers.rescale_adapter_scale(model, 0.25):
        near(delta(model), before / 4)
    near(delta(model), before)


@feature("`hotswap_adapter`")
def _(tuner: Tuner) -> None:
    other, model = tuner.model(alpha=8), tuner.model(r=16)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.mul_(2.0)
    with tempfile.TemporaryDirectory() as folder:
        other.save_pretrained(folder)
        peft.utils.hotswap.hotswap_adapter(model, folder, "default", torch_device="cpu")
    near(delta(model), delta(other))


@feature("conversion to LoRA")
def _(tuner: Tuner) -> None:
    model = tuner.model(target_modules=["first"])
    if tuner.is_lora:
        return
    config, state_dict = peft.convert_to_lora(model, rank=16)  # k·r, so that nothing is lost
    torch.manual_seed(0)
    lora = get_peft_model(Mlp().double(), config).double().eval()
    peft.set_peft_model_state_dict(lora, state_dict)
    near(lora(rows(4)), model(rows(4)), 1e-5)


@feature("conversion to LoRA, exact")
def _(tuner: Tuner) -> None:
    model = tuner.model(target_modules=["first"])
    if tuner.is_lora:
        return
    config, state_dict = peft.convert_to_lora(model, rank=1.0)
    A, B = (state_dict[f"base_model.model.first.lora_{letter}.weight"] for letter in "AB")
    near(config.alpha_pattern["first"] / config.rank_pattern["first"] * (B @ A), delta(model), 1e-12)


@feature("`low_cpu_mem_usage`")
def _(tuner: Tuner) -> None:
    model = tuner.model()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        torch.manual_seed(0)
        again = PeftModel.from_pretrained(Mlp().double(), folder, low_cpu_mem_usage=True).double().eval()
    near(again(rows(4)), model(rows(4)))


@feature("x of any number of dimensions")
def _(tuner: Tuner) -> None:
    model = tuner.model()
    for shape in ((), (3,), (2, 3), (2, 2, 3)):
        near(layer(model)(rows(*shape)), layer(model).get_base_layer()(rows(*shape)) + rows(*shape) @ delta(model).T)
