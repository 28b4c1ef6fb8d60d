# SPDX-License-Identifier: Apache-2.0
"""Adapters over a model's life: scaled, loaded and deleted many times, restored; and what is replaced in PEFT."""

from __future__ import annotations

import gc
import math
import re
import tracemalloc
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_helpers import SMALL, config, delta, layers, two
from helpers import run_python
from peft import LoraConfig, PeftModel, PeftType, get_peft_model, helpers
from peft.helpers import rescale_adapter_scale  # before enable(), as a user's file may have it
from peft.tuners.lora import LoraLayer
from peft.utils import hotswap
from tuner_helpers import DEVICE, Mlp, adapted, assert_same_output, needs_new_peft, rows

from gralora_ext.tuner import accelerate, disable, enable, patches, restore

pytestmark = needs_new_peft


@pytest.fixture
def enabled() -> Iterator[None]:
    with enable():
        yield


# ---------------------------------------------------------------- scaling


def lora() -> PeftModel:
    """LoRA's layers with the scalings of :func:`two`."""
    fields = {"target_modules": ["first", "second"], "init_lora_weights": False}
    model = get_peft_model(Mlp().double(), LoraConfig(r=12, lora_alpha=24, use_rslora=True, **fields), "one")
    model.add_adapter("two", LoraConfig(r=9, lora_alpha=5, **fields))
    return model


@pytest.mark.usefixtures("enabled")
def test_scale_methods_do_what_loras_do() -> None:
    ours, loras = two({"use_rslora": True}), lora()
    for model in (ours, loras):
        model.base_model.set_adapter(["one", "two"])
        model.add_adapter("elsewhere", type(model.peft_config["one"])(r=2, target_modules=["second"]))
    steps: list[Any] = [
        lambda layer: layer.set_scale("two", 0.5),
        lambda layer: layer.scale_layer(3),
        lambda layer: layer.set_scale("one", 2),
        lambda layer: layer.unscale_layer(4),
        lambda layer: layer.set_scale("elsewhere", 5.0),  # which the first layer does not have
        lambda layer: layer.set_adapter("two"),
        lambda layer: layer.scale_layer(7),
        lambda layer: layer.unscale_layer(None),
        lambda layer: layer.set_adapter(["one", "two"]),
        lambda layer: layer.unscale_layer(),
    ]
    seen = set()
    for step in steps:
        for name in ("first", "second"):
            layer, expected = layers(ours)[name], layers(loras)[name]
            step(layer)
            step(expected)
            got = {each: layer.scaling[each] for each in ("one", "two")}
            assert got == pytest.approx({each: expected.scaling[each] for each in got}, rel=1e-15)
            assert ("elsewhere" in layer.scaling) == (name == "second")
            seen.add(tuple(got.values()))
    assert len(seen) >= 6 and layers(ours)["first"].scaling == {"one": 24 / math.sqrt(12), "two": 5 / 9}


def test_a_scale_reaches_the_output_and_the_merge() -> None:
    model, x = adapted("fused", hybrid_r=2), rows(5)
    layer = layers(model)["first"]
    plain, base = layer(x), layer.base_layer(x)
    layer.set_scale("default", -0.5)
    assert_same_output(layer(x), base - 0.5 * (plain - base))
    expected = layer(x)
    layer.merge()
    assert_same_output(layer(x), expected)


@pytest.mark.usefixtures("enabled")
def test_a_deleted_adapter_leaves_no_root_scaling_to_its_name() -> None:
    model = two({}, {**SMALL, "use_rslora": True})
    model.delete_adapter("two")
    model.add_adapter("two", config(**SMALL))
    layer = layers(model)["first"]
    layer.set_scale("two", 1.0)
    assert layer.scaling["two"] == 5 / 9


@pytest.mark.parametrize("tuner", ["fused", "stock"])
def test_rescale_adapter_scale_takes_gralora_and_lora(tuner: str) -> None:
    for model in (adapted(tuner, hybrid_r=2), lora()):
        x, before = rows(5), model(rows(5)).detach()
        with enable():
            with pytest.raises(KeyError), rescale_adapter_scale(model, 0.5):
                rescaled = model(x)
                raise KeyError
            assert_same_output(model(x), before)
        for layer in layers(model).values():
            layer.scaling = {name: 0.5 * scaling for name, scaling in layer.scaling.items()}
        assert_same_output(rescaled, model(x))
        assert not torch.allclose(rescaled, before)


def test_rescale_adapter_scale_refuses_what_it_refused() -> None:
    with enable():
        with pytest.raises(ValueError, match="only supported for models with"), rescale_adapter_scale(Mlp(), 2):
            pass
        with pytest.raises(TypeError, match="multiplier"), rescale_adapter_scale(adapted("fused"), "2"):
            pass
    with pytest.raises(ValueError, match="only supported for models with"), rescale_adapter_scale(adapted("fused"), 2):
        pass


# ---------------------------------------------------------------- many adapters


def held() -> dict[str, int]:
    """What the process holds: objects, tensors, and the bytes of the tensors' storages."""
    re.purge()  # Python keeps the last 512 patterns, and PEFT makes some with the names of adapters
    gc.collect()
    objects = gc.get_objects()
    tensors = [
        each for each in objects if type(each) in (torch.Tensor, torch.nn.Parameter)
    ]  # none that only tells a shape
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return {"objects": len(objects), "tensors": len(tensors), "bytes": sum(storages.values())}


def live(model: PeftModel, folder: Path, names: list[str]) -> None:
    """Loads adapters and a sum of two of them, switches to each, and deletes them all."""
    for name in names:
        model.load_adapter(folder, name, torch_device=str(DEVICE))
    model.add_weighted_adapter(names[:2], [1.0] * len(names[:2]), "sum", combination_type="cat")
    for name in ["sum", *names]:
        model.set_adapter(name)
        model(rows(4))
    for name in ["sum", *names]:
        model.delete_adapter(name)
    model.set_adapter("one")
    model(rows(4))


def test_adapters_that_come_and_go_leave_nothing_behind(tmp_path: Path) -> None:
    """In a process of its own: it counts all objects and what is allocated, and what other tests have left comes and goes."""
    run_python(f"import test_tuner_adapter_life as life; life.come_and_go({str(tmp_path)!r})")


def come_and_go(place: str) -> None:
    warnings.filterwarnings("ignore", "Adapter .* was active which is now deleted")
    enable()
    tmp_path = Path(place)
    model = two({"hybrid_r": 2}, {**SMALL, "use_rslora": True})
    model.save_pretrained(tmp_path, selected_adapters=["two"])
    expected = model(rows(4)).detach().clone()
    for i in range(4):
        live(model, tmp_path / "two", [f"early_{i}", f"also_{i}"])
    for at_once in (1, 40):
        before = held()
        for i in range(0, 40, at_once):
            live(model, tmp_path / "two", [f"number_{j}" for j in range(i, i + at_once)])
        after = held()
        assert (after["tensors"], after["bytes"]) == (before["tensors"], before["bytes"])
        assert after["objects"] - before["objects"] < 20  # of forty adapters, each of which is some hundred objects
    assert list(model.peft_config) == ["one", "two"]
    for layer in layers(model).values():
        own = {n: v for n, v in vars(layer).items() if isinstance(v, dict) and not n.startswith("_")}
        assert own and all(set(entries) <= {"one", "two"} for entries in own.values())
    assert torch.equal(model(rows(4)), expected)
    tracemalloc.start()
    try:
        for i in range(20):
            live(model, tmp_path / "two", [f"again_{i}"])
        held()
        snapshot = tracemalloc.take_snapshot()
    finally:
        tracemalloc.stop()
    # safetensors keeps some 450 bytes of each file that it reads.
    ours = snapshot.filter_traces([tracemalloc.Filter(False, "*safetensors*")])
    assert sum(trace.size for trace in ours.traces) < 40 * 1024  # an adapter is 10 KiB


# ---------------------------------------------------------------- restore


@pytest.mark.usefixtures("enabled")
def test_pefts_layers_compute_the_same_after_all_of_it(tmp_path: Path) -> None:
    """Nothing here needs a layer of ours: sums, scalings and swapped weights are plain tensors and numbers."""
    model = two({"hybrid_r": 3}, {**SMALL, "hybrid_r": 2})
    model.add_weighted_adapter(["one", "two"], [0.5, -2.0], "sum", combination_type="cat")
    model.save_pretrained(tmp_path, selected_adapters=["two"])
    hotswap.prepare_model_for_compiled_hotswap(model, target_rank=20)
    model.set_adapter("one")
    hotswap.hotswap_adapter(model, str(tmp_path / "two"), "one", torch_device=str(DEVICE))
    layers(model)["first"].set_scale("sum", 3.0)
    for active in (["one"], ["two"], ["sum"], ["one", "sum"]):
        model.base_model.set_adapter(active)
        expected = model(rows(5))
        assert restore(model).converted == 2 and not restore(model).skipped
        assert_same_output(model(rows(5)), expected)
        assert accelerate(model).converted == 2
        assert_same_output(model(rows(5)), expected)
    model.base_model.set_adapter(["sum"])
    expected_delta = [delta(layer, "sum") for layer in layers(model).values()]
    layers(model)["first"].unscale_layer()
    torch.testing.assert_close(delta(layers(model)["first"], "sum"), expected_delta[0] / 3)


# ---------------------------------------------------------------- what of PEFT is replaced


def in_use() -> dict[str, Any]:
    return {
        "LoraLayer": helpers.LoraLayer,
        "keys": dict(hotswap.CONFIG_KEYS_TO_CHECK),
        "swap": hotswap.hotswap_adapter_from_state_dict,
        "prepare": hotswap.prepare_model_for_compiled_hotswap,
    }


def test_functions_of_peft_are_put_back_by_disable_and_at_the_end_of_nested_blocks() -> None:
    pefts = in_use()
    assert pefts["LoraLayer"] is LoraLayer and PeftType.GRALORA not in pefts["keys"]
    assert pefts["swap"].__module__ == pefts["prepare"].__module__ == "peft.utils.hotswap"
    with enable():
        ours = in_use()
        assert all(ours[name] is not pefts[name] and ours[name] != pefts[name] for name in pefts)
        with enable():
            assert in_use() == ours
            disable()
            assert in_use() == pefts
            with enable():
                assert in_use() == ours
            assert in_use() == pefts
        assert in_use() == ours
    assert in_use() == pefts
    enable()
    enable()
    disable()
    assert in_use() == pefts and not patches.is_enabled()


def test_disable_leaves_a_function_of_somebody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    enable()
    monkeypatch.setattr(hotswap, "prepare_model_for_compiled_hotswap", print)
    disable()
    assert hotswap.prepare_model_for_compiled_hotswap is print
    assert hotswap.hotswap_adapter_from_state_dict.__module__ == "peft.utils.hotswap"
