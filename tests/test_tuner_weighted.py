# SPDX-License-Identifier: Apache-2.0
"""add_weighted_adapter: what comes out, compared with dense sums of ΔW, and as it is saved and loaded."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_helpers import NAMES, SMALL, WEIGHTS, WithHead, assert_loads_the_same, config, delta, layers, summed, two
from helpers import same_bits
from peft import PeftModel
from peft.utils import merge_utils
from torch import Tensor
from tuner_helpers import DEVICE, Conv1DMlp, Mlp, llama, needs_new_peft, rows, tokens

from gralora_ext.tuner import disable, enable

pytestmark = needs_new_peft


@pytest.fixture(autouse=True)
def enabled() -> Iterator[None]:
    with enable():
        yield


# ---------------------------------------------------------------- cat


@pytest.mark.parametrize("base", [Mlp, Conv1DMlp])
def test_cat_is_the_sum_to_the_last_digits_and_stock_peft_reads_it(base: Any, tmp_path: Path) -> None:
    model = two({"hybrid_r": 2}, base=base)
    model.add_weighted_adapter(["one", "two"], WEIGHTS, "sum", combination_type="cat")
    for layer in layers(model).values():
        assert layer.r["sum"] == 18 and layer.hybrid_r["sum"] == 5 and layer.scaling["sum"] == 1.0
        torch.testing.assert_close(delta(layer, "sum"), summed(layer), rtol=1e-12, atol=1e-14)
        assert not any(p.requires_grad for n, p in layer.named_parameters() if ".sum" in n)
    assert model.active_adapters == ["one"]
    disable()
    assert type(assert_loads_the_same(model, "sum", tmp_path, base).base_model) is peft.tuners.gralora.GraloraModel
    written = json.loads((tmp_path / "sum" / "adapter_config.json").read_text())
    assert (written["r"], written["alpha"], written["hybrid_r"], written["gralora_k"]) == (18, 23, 5, 2)


def test_cat_keeps_the_order_of_ranks_within_each_block() -> None:
    model = two()
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "sum", combination_type="cat")
    layer = layers(model)["first"]
    A, parts = layer.gralora_A["sum"], [layer.gralora_A[n] * layer.scaling[n] for n in NAMES]
    for n in range(2):
        for j in range(2):
            torch.testing.assert_close(A[n, :, 9 * j : 9 * j + 6], parts[0][n, :, 6 * j : 6 * j + 6])
            torch.testing.assert_close(A[n, :, 9 * j + 6 : 9 * j + 9], parts[1][n, :, 3 * j : 3 * j + 3])


def test_cat_follows_a_scaling_that_was_set_and_root_scaling() -> None:
    model = two({"use_rslora": True})
    for layer in layers(model).values():
        layer.set_scale("two", 0.5)
    model.add_weighted_adapter(["one", "two"], WEIGHTS, "sum", combination_type="cat")
    for layer in layers(model).values():
        assert layer.scaling["one"] == 24 / math.sqrt(12) and layer.scaling["two"] == 2.5 / 9
        torch.testing.assert_close(delta(layer, "sum"), summed(layer), rtol=1e-12, atol=1e-14)


def test_a_k_is_stored_that_divides_the_r_that_is(tmp_path: Path) -> None:
    fields = {"r": 2, "gralora_k": 1, "target_modules": ["q_proj", "k_proj"]}
    ranks, ks = {"0.self_attn.k_proj": 4, "1.self_attn.k_proj": 8}, {"k_proj": 4, "1.self_attn.q_proj": 2}
    one = {**fields, "rank_pattern": ranks, "k_pattern": ks}
    model = two(one, {**fields, "hybrid_r": 0}, base=llama)
    model.add_weighted_adapter(["one"], [1.0], "sum")
    stored = model.peft_config["sum"]
    assert (stored.r, stored.gralora_k) == (2, 1)
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(llama().double().to(DEVICE), tmp_path / "sum")
    assert same_bits(again(tokens(2, 6)).logits, model(tokens(2, 6)).logits)


def test_adapters_of_different_layers_stay_readable_by_stock_peft(tmp_path: Path) -> None:
    model = two({"target_modules": ["first"]}, {**SMALL, "target_modules": ["second"]})
    model.add_weighted_adapter(["one", "two"], WEIGHTS, "sum", combination_type="cat")
    for layer in layers(model).values():
        assert layer.r["sum"] == 18
        torch.testing.assert_close(delta(layer, "sum"), summed(layer), rtol=1e-12, atol=1e-14)
    assert model.peft_config["sum"].fields_in_use() == []
    disable()
    assert_loads_the_same(model, "sum", tmp_path)


def test_patterns_of_the_parts_become_patterns_of_the_sum(tmp_path: Path) -> None:
    a = {"rank_pattern": {"first": 4}, "k_pattern": {"second": 3}, "alpha_pattern": {"second": 7}}
    model = two(a, {**SMALL, "k_pattern": {"second": 3}})
    disable()  # a model that was built in a `with` block is used behind it
    model.add_weighted_adapter(["one", "two"], WEIGHTS, "sum", combination_type="cat")
    enable()
    for layer in layers(model).values():
        torch.testing.assert_close(delta(layer, "sum"), summed(layer), rtol=1e-12, atol=1e-14)
    assert [layer.r["sum"] for layer in layers(model).values()] == [10, 18]
    assert set(model.peft_config["sum"].fields_in_use()) == {"rank_pattern", "alpha_pattern", "k_pattern"}
    assert_loads_the_same(model, "sum", tmp_path)


@pytest.mark.parametrize("exclude", [{"exclude_modules": ["second"]}, {"exclude_modules": "sec.*"}])
def test_what_one_adapter_excludes_the_other_may_have(exclude: Any, tmp_path: Path) -> None:
    model = two(exclude, {**SMALL, "exclude_modules": ["first"]})
    model.add_weighted_adapter(["one", "two"], WEIGHTS, "sum", combination_type="cat")
    for layer in layers(model).values():
        torch.testing.assert_close(delta(layer, "sum"), summed(layer), rtol=1e-12, atol=1e-14)
        assert delta(layer, "sum").any()
    assert_loads_the_same(model, "sum", tmp_path)


def test_three_adapters_and_bfloat16() -> None:
    model = two(dtype=torch.bfloat16)
    model.add_adapter("third", config(r=2), autocast_adapter_dtype=False)
    model.add_weighted_adapter(["one", "two", "third"], [0.5, 2.0, -1.0], "sum", combination_type="cat")
    for layer in layers(model).values():
        assert layer.gralora_A["sum"].dtype == torch.bfloat16
        expected = summed(layer, (*NAMES, "third"), [0.5, 2.0, -1.0])
        assert (delta(layer, "sum") - expected).norm() < 2**-8 * expected.norm()


# ---------------------------------------------------------------- svd


def test_svd_with_room_for_all_ranks_is_exact_and_stock_peft_reads_it(tmp_path: Path) -> None:
    model = two({"gralora_k": 3}, SMALL)  # which cat could not combine
    model.add_weighted_adapter(["one", "two"], WEIGHTS, "sum", svd_rank=36)
    for layer in layers(model).values():
        assert layer.hybrid_r["sum"] == 0 and layer.gralora_k["sum"] == 3
        torch.testing.assert_close(delta(layer, "sum"), summed(layer), rtol=1e-12, atol=1e-13)
    disable()
    assert_loads_the_same(model, "sum", tmp_path)


def test_svd_keeps_the_largest_singular_values_of_each_block() -> None:
    model = two()
    model.add_weighted_adapter(["one", "two"], WEIGHTS, "sum", "svd", svd_full_matrices=False)
    for layer in layers(model).values():
        assert layer.r["sum"] == 12  # the largest r + hybrid_r
        expected, got = summed(layer), delta(layer, "sum")
        for rows_, got_rows in zip(expected.chunk(2), got.chunk(2), strict=True):
            for block, got_block in zip(rows_.chunk(2, dim=1), got_rows.chunk(2, dim=1), strict=True):
                lost = torch.linalg.svdvals(block)[6:].square().sum().sqrt()
                torch.testing.assert_close((block - got_block).norm(), lost, rtol=1e-9, atol=1e-12)


def test_svd_clamp_limits_the_factors() -> None:
    model = two()
    model.add_weighted_adapter(["one", "two"], WEIGHTS, "free")
    model.add_weighted_adapter(["one", "two"], WEIGHTS, "clamped", svd_clamp=0.9)
    layer = layers(model)["first"]
    largest = [max(layer.gralora_A[n].abs().max(), layer.gralora_B[n].abs().max()) for n in ("free", "clamped")]
    assert largest[1] < largest[0] and not torch.equal(delta(layer, "clamped"), delta(layer, "free"))


# ---------------------------------------------------------------- A with A and B with B


@pytest.mark.parametrize("kind", ["linear", "ties", "dare_ties", "dare_linear", "magnitude_prune"])
def test_types_that_merge_A_with_A_do_what_loras_do(kind: str, tmp_path: Path) -> None:
    model = two({"hybrid_r": 3}, {"alpha": 5, "hybrid_r": 3})
    more = {} if kind == "linear" else {"density": 0.6, "majority_sign_method": "frequency"}
    torch.manual_seed(4)
    model.add_weighted_adapter(["one", "two"], WEIGHTS, "sum", combination_type=kind, **more)
    torch.manual_seed(4)
    for layer in layers(model).values():
        roots = [math.sqrt(abs(w) * layer.scaling[n]) for n, w in zip(NAMES, WEIGHTS, strict=True)]
        for name in ("gralora_A", "gralora_B", "gralora_A_general", "gralora_B_general"):
            tensors = [getattr(layer, name)[n] for n in ("one", "two", "sum")]
            a, b, got = (t if isinstance(t, Tensor) else t.weight for t in tensors)
            signed = torch.tensor([roots[0], -roots[1] if "_A" in name else roots[1]], dtype=torch.float64)
            merge = getattr(merge_utils, "task_arithmetic" if kind == "linear" else kind)
            allowed = dict(more) if "ties" in kind else {n: v for n, v in more.items() if n == "density"}
            assert same_bits(got.detach(), merge([a.detach(), b.detach()], signed.to(DEVICE), **allowed))
        assert layer.scaling["sum"] == 1.0
    disable()
    assert_loads_the_same(model, "sum", tmp_path)


@pytest.mark.parametrize("kind", ["ties_svd", "dare_ties_svd", "dare_linear_svd", "magnitude_prune_svd"])
def test_their_svd_forms_merge_delta_weights(kind: str) -> None:
    model = two()
    more = {"majority_sign_method": "total"} if "ties" in kind else {}
    expected = []
    torch.manual_seed(4)
    for layer in layers(model).values():
        merge = getattr(merge_utils, kind.removesuffix("_svd"))
        weights = torch.tensor(WEIGHTS, dtype=torch.float64, device=DEVICE)
        expected.append(merge([layer.get_delta_weight(n) for n in NAMES], weights, density=0.5, **more))
    torch.manual_seed(4)
    model.add_weighted_adapter(["one", "two"], WEIGHTS, "sum", kind, svd_rank=36, density=0.5)
    for layer, dense in zip(layers(model).values(), expected, strict=True):
        torch.testing.assert_close(delta(layer, "sum"), dense, rtol=1e-10, atol=1e-12)


def test_one_adapter_is_itself_times_its_weight_whatever_the_type() -> None:
    model = two()
    model.add_weighted_adapter(["two"], [-0.5], "minus_half", combination_type="cat")
    for layer in layers(model).values():
        assert layer.r["minus_half"] == 6
        torch.testing.assert_close(delta(layer, "minus_half"), -0.5 * delta(layer, "two"), rtol=1e-12, atol=1e-14)


# ---------------------------------------------------------------- the rest of the model


def test_a_trained_copy_of_a_module_goes_with_the_sum(tmp_path: Path) -> None:
    model = two(b={**SMALL, "modules_to_save": ["head"]}, base=WithHead)
    with torch.no_grad():
        model.base_model.model.head.modules_to_save["two"].weight.normal_()
    model.add_weighted_adapter(["one", "two"], WEIGHTS, "sum", combination_type="cat")
    head = model.base_model.model.head.modules_to_save
    assert same_bits(head["sum"].weight.detach(), head["two"].weight.detach()) and head["sum"] is not head["two"]
    disable()
    assert_loads_the_same(model, "sum", tmp_path, WithHead)


def test_a_name_that_exists_changes_nothing_as_with_lora() -> None:
    model = two()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.add_weighted_adapter(["one"], [2.0], "two")
    assert all(same_bits(p.detach(), before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("training", [False, True])
def test_the_dropout_of_the_new_adapter_is_on_only_where_the_model_trains(training: bool) -> None:
    model = two({"gralora_dropout": 0.5}).train(training)
    model.add_weighted_adapter(["one", "two"], WEIGHTS, "sum", combination_type="cat")
    model.set_adapter("sum")
    assert {layer.gralora_dropout["sum"].training for layer in layers(model).values()} == {training}
    assert same_bits(model(rows(5)), model(rows(5))) is not training
