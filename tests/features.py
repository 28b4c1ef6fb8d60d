# SPDX-License-Identifier: Apache-2.0
"""What users of LoRA do with an adapter, each as a function that tries it on a small model and checks its numbers.

``python tests/features.py`` rewrites docs/features.md: a feature counts where its function ends without an error.
"""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import peft.helpers
import peft.utils.hotswap
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from tuner_helpers import Mlp, llama, rows, tokens

import gralora_ext

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "features.md"
FEATURES: dict[str, Callable[[Tuner], None]] = {}


@dataclass(frozen=True)
class Tuner:
    """One of three: PEFT's LoRA, PEFT's GraLoRA, and ours."""

    title: str
    is_lora: bool = False
    is_ours: bool = False

    def config(self, **fields: Any) -> Any:
        """Of rank 8 and alpha 16, on the layers of ``Mlp``; the adapter begins at random."""
        if self.is_lora:
            names = {"init_weights": "init_lora_weights", "alpha": "lora_alpha", "dropout": "lora_dropout"}
            kind = peft.LoraConfig
        else:
            names = {"dropout": "gralora_dropout"}
            kind = gralora_ext.GraloraConfig if self.is_ours else peft.GraloraConfig
        values = {"r": 8, "alpha": 16, "target_modules": ["first", "second"], "init_weights": False, **fields}
        return kind(**{names.get(name, name): value for name, value in values.items()})

    def model(self, base: Any = Mlp, **fields: Any) -> PeftModel:
        torch.manual_seed(0)
        return get_peft_model(base().double(), self.config(**fields)).double().eval()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        with gralora_ext.enable() if self.is_ours else nullcontext():
            yield


TUNERS = [Tuner("LoRA", is_lora=True), Tuner("PEFT's GraLoRA"), Tuner("gralora_ext", is_ours=True)]
LATER = [
    "experts (`target_parameters`)",
    "embeddings",
    "convolutions",
    "DoRA",
    "starts from the weights (PiSSA, EVA, CorDA, LoftQ)",
]


def feature(title: str) -> Callable[[Callable[[Tuner], None]], Callable[[Tuner], None]]:
    def register(function: Callable[[Tuner], None]) -> Callable[[Tuner], None]:
        FEATURES[title] = function
        return function

    return register


def layer(model: PeftModel, name: str = "first") -> Any:
    found = model.base_model.model.get_submodule(name)
    assert isinstance(found, BaseTunerLayer), f"{name} has no adapter"
    return found


def delta(model: PeftModel, name: str = "first", adapter: str = "default") -> Tensor:
    return layer(model, name).get_delta_weight(adapter).detach().clone()


def near(actual: Tensor, expected: Tensor, bound: float = 1e-6) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=bound, atol=bound)


def output_is_base_plus(model: PeftModel, change: Tensor, name: str = "first") -> None:
    x = rows(5, width=change.shape[1])
    near(layer(model, name)(x), layer(model, name).get_base_layer()(x) + x @ change.T)


# ---------------------------------------------------------------- the configuration


@feature("`rank_pattern`")
def _(tuner: Tuner) -> None:
    model = tuner.model(rank_pattern={"second": 4})
    sizes = {
        n: sum(p.numel() for q, p in layer(model, n).named_parameters() if "base_layer" not in q)
        for n in ("first", "second")
    }
    assert sizes == {"first": 8 * (24 + 36), "second": 4 * (36 + 12)}


@feature("`alpha_pattern`")
def _(tuner: Tuner) -> None:
    near(delta(tuner.model(alpha_pattern={"first": 48})), 3 * delta(tuner.model()))


@feature("`use_rslora`")
def _(tuner: Tuner) -> None:
    near(delta(tuner.model(use_rslora=True)), 8**0.5 * delta(tuner.model()))


@feature("`exclude_modules`")
def _(tuner: Tuner) -> None:
    assert not isinstance(tuner.model(exclude_modules=["second"]).base_model.model.second, BaseTunerLayer)


@feature("`trainable_token_indices`")
def _(tuner: Tuner) -> None:
    model = tuner.model(llama, target_modules=["q_proj"], trainable_token_indices=[3, 5])
    trained = [name for name, p in model.named_parameters() if p.requires_grad and "token" in name]
    assert len(trained) == 1
    before = model(tokens(2, 6)).logits
    with torch.no_grad():
        model.get_parameter(trained[0]).add_(1.0)
    assert not torch.equal(model(torch.tensor([[3, 4]])).logits, before[:1, :2])
    saved_and_loaded(model, llama)


@feature("`ensure_weight_tying`")
def _(tuner: Tuner) -> None:
    def tied() -> nn.Module:
        model = llama()
        model.config.tie_word_embeddings = True
        model.tie_weights()
        return model

    model = tuner.model(tied, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    inner = model.base_model.model
    assert inner.lm_head.weight.data_ptr() == inner.model.embed_tokens.weight.data_ptr()


@feature('`init_weights="gaussian"`')
def _(tuner: Tuner) -> None:
    first = layer(tuner.model(init_weights="gaussian"))
    A = first.lora_A["default"].weight if tuner.is_lora else first.gralora_A["default"]
    assert abs(A.std().item() * 8 - 1) < 0.25 and not delta(tuner.model(init_weights="gaussian")).any()


@feature('`init_weights="orthogonal"`')
def _(tuner: Tuner) -> None:
    model = tuner.model(init_weights="orthogonal")
    B = layer(model).lora_B["default"].weight if tuner.is_lora else layer(model).gralora_B["default"]
    assert B.any() and delta(model).abs().max() < 1e-6


@feature("`modules_to_save`")
def _(tuner: Tuner) -> None:
    model = tuner.model(target_modules=["first"], modules_to_save=["second"])
    with torch.no_grad():
        model.base_model.model.second.modules_to_save["default"].weight.add_(1.0)
    saved_and_loaded(model, Mlp)


@feature("`layers_to_transform`")
def _(tuner: Tuner) -> None:
    model = tuner.model(llama, target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layers")
    assert [isinstance(each.self_attn.q_proj, BaseTunerLayer) for each in model.base_model.model.model.layers] == [
        False,
        True,
    ]


@feature("a name that is no way to begin is refused")
def _(tuner: Tuner) -> None:
    try:
        tuner.model(init_weights="no such way")
    except ValueError:
        return
    raise AssertionError("it was taken and ignored")


# ---------------------------------------------------------------- an adapter's life


def saved_and_loaded(model: PeftModel, base: Any) -> PeftModel:
    x = tokens(2, 6) if base is llama else rows(4)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        torch.manual_seed(0)
        again = PeftModel.from_pretrained(base().double(), folder).double().eval()
    y, expected = again(x), model(x)
    near(y.logits if base is llama else y, expected.logits if base is llama else expected)
    return again


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
    for how in ("ties", "dare_ties", "dare_linear", "magnitude_prune"):
        model.add_weighted_adapter(["default", "default"], [0.5, 0.5], how, combination_type=how, density=1.0)
        assert delta(model, adapter=how).abs().max() > 0.01


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
    assert tuner.is_lora or tuner.model().supports_lora_conversion()


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


# ---------------------------------------------------------------- the page


def works(tuner: Tuner, title: str) -> str:
    """ "", or why the feature does not work."""
    torch.manual_seed(0)
    with warnings.catch_warnings(), tuner.in_use():
        warnings.simplefilter("ignore")
        try:
            FEATURES[title](tuner)
        except Exception as error:  # noqa: BLE001  whatever a tuner without it raises
            return f"{type(error).__name__}: {error}"
    return ""


HEAD = """\
# What LoRA users do, with GraLoRA

Made by `python tests/features.py`, which tries each line on a small model and checks its numbers, and compared by a test. PEFT is the newest
version that this project is tested with.

"""


def page() -> str:
    lines = ["| | " + " | ".join(tuner.title for tuner in TUNERS) + " |", "| --- |" + " --- |" * len(TUNERS)]
    for title in FEATURES:
        lines.append(f"| {title} | " + " | ".join("–" if works(tuner, title) else "✓" for tuner in TUNERS) + " |")
    later = "\n".join(f"- {what}" for what in LATER)
    return HEAD + "\n".join(lines) + f"\n\nLater:\n\n{later}\n"


def main() -> int:
    for title in FEATURES:
        for tuner in TUNERS:
            if reason := works(tuner, title):
                print(f"{tuner.title}, {title}: {reason.splitlines()[0][:160]}")
    PAGE.write_text(page(), "utf-8")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
