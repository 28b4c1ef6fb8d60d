# SPDX-License-Identifier: Apache-2.0
"""What the benchmark suite measures with: formulas against numbers worked out by hand, timing, contenders, memory."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import run_python

from benchmarks.contenders import Data, Path, compiled, layers, path_error, paths
from benchmarks.machine import CACHED_BYTES, LARGE_BYTES, Bandwidth, Floor
from benchmarks.memory import kept_bytes, saved_bytes
from benchmarks.merge import merge_error
from benchmarks.results import Record
from benchmarks.shapes import Shape, Work, compiled_shapes, forward_work, layer_work, merge_work, shapes, training_work
from benchmarks.tables import table
from benchmarks.timing import Contender, differences, interleave, quartiles, ratio

CPU = torch.device("cpu")
SMALL = Shape(24, 36, T=7, r=4, k=2)
FLOOR = Floor(gemm=1e9, cached=Bandwidth(4e9, 8e9), large=Bandwidth(2e9, 1e9), pace_seconds=1e-3)


# The least work and the roofline


def test_work_is_that_of_the_formulas():
    s = Shape(8, 16, T=5, r=4, k=2, h=2, activation="bf16", adapter="fp32")
    # 144 parameters of 4 bytes; 2 bytes an activation
    assert forward_work(s) == Work(flops=2 * 6 * 24 * 5, bytes=2 * 40 * 5 + 576, working_set=2 * 24 * 5 + 576)
    assert training_work(s) == Work(flops=4320, bytes=2 * (40 + 32 + 8) * 5 + 3 * 576, working_set=480 + 1152)
    assert merge_work(s) == Work(flops=512 + 512, bytes=512 + 576, working_set=256 + 576)
    layer = replace(s, activation="fp32")
    memory = {"bytes": 8 * (128 + 5 * 24) + 3 * 576, "working_set": 512 + 960 + 1152}
    assert layer_work(layer) == Work(flops=2560 + 2048 + 2880, **memory)
    assert layer_work(replace(layer, dropout=0.1)) == Work(flops=2560 + 4320, **memory)


def test_the_bandwidth_goes_from_that_in_cache_to_that_out_of_cache():
    middle = round((CACHED_BYTES * LARGE_BYTES) ** 0.5)
    found = [FLOOR.bandwidth(size) for size in (1, CACHED_BYTES, middle, LARGE_BYTES, 8 * LARGE_BYTES)]
    assert found == pytest.approx([8e9, 8e9, 5e9, 2e9, 2e9], rel=1e-6)


def test_the_least_time_is_the_larger_of_arithmetic_and_memory():
    assert FLOOR.least_seconds(Work(flops=2 * 10**9, bytes=8 * 10**9, working_set=1)) == pytest.approx(2.0)
    assert FLOOR.least_seconds(Work(flops=2 * 10**9, bytes=24 * 10**9, working_set=1)) == pytest.approx(3.0)


def test_a_record_holds_quartiles_ratios_and_the_share_of_the_roofline():
    samples = {"ours": [1.0, 2.0, 3.0, 4.0, 5.0], "peft": [2.0, 2.0, 12.0, 8.0, 10.0]}
    found = Record("forward", "case", "s", samples, errors={"ours": 1e-7}, least=0.75).as_dict()
    assert found["contenders"]["ours"] == {
        "median": 3.0,
        "q1": 2.0,
        "q3": 4.0,
        "rounds": 5,
        "error": 1e-7,
        "roofline": 0.25,
    }
    assert found["ratios"] == {"peft": 0.5}, "the median of the rounds' ratios, not the ratio of the medians"


def test_loss_and_gradient_norm_stand_beside_the_times():
    facts = {"ours": {"loss": 2.5, "gradient_norm": 0.25}, "base": {"loss": 2.5}}
    found = Record("step", "case", "s", {"ours": [1.0], "base": [2.0]}, facts=facts).as_dict()["contenders"]
    assert found["ours"]["loss"] == 2.5 and found["ours"]["gradient_norm"] == 0.25
    assert found["base"]["loss"] == 2.5 and "gradient_norm" not in found["base"]


def test_one_token_has_a_table_of_its_own():
    records = [Record("forward", f"T={T}", "s", {"ours": [1.0], "peft": [2.0]}, {"T": T}).as_dict() for T in (1, 256)]
    many, one = table(records).split("\n\n")
    assert "T=256" in many and "T=1" not in many.replace("T=256", "") and "T=1" in one


def test_the_pace_is_that_of_the_short_gemm_beside_the_floors():
    assert FLOOR.pace([1e-3, 4e-3, 2e-3]) == pytest.approx(0.5)
    assert Record("forward", "case", "s", {"ours": [1.0]}, pace=0.5).as_dict()["pace"] == 0.5


# Timing


def test_every_round_takes_one_sample_of_each_contender():
    calls: list[str] = []
    contenders = {
        name: Contender(partial(calls.append, name), partial(calls.append, f"prepare {name}")) for name in "ab"
    }
    samples = interleave(contenders, 0.0, 4, CPU)
    assert {name: len(values) for name, values in samples.items()} == {"a": 4, "b": 4}
    assert all(calls[i] == f"prepare {calls[i + 1]}" for i in range(0, len(calls), 2))
    rounds = [set(calls[i + 1 : i + 4 : 2]) for i in range(4, len(calls), 4)]  # the first four are the warm-up
    assert rounds == [{"a", "b"}] * 4


def test_preparing_is_not_timed_and_short_calls_are_averaged():
    samples = interleave(
        {"a": Contender(lambda: None, lambda: time.sleep(0.01)), "b": Contender(lambda: None)}, 0.0, 3, CPU
    )
    assert max(samples["a"] + samples["b"]) < 0.005


def test_statistics_of_samples():
    assert quartiles([3.0]) == (3.0, 3.0, 3.0)
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)
    assert differences({"base": [1.0, 2.0], "ours": [1.5, 4.0]}, "base") == {"ours": [0.5, 2.0]}
    assert ratio([1.0, 1.0, 3.0], [2.0, -1.0, 2.0]) == pytest.approx(1.0)
    assert ratio([1.0], [0.0]) is None


# The contenders


@pytest.mark.parametrize(
    ("shape", "largest"),
    [
        (SMALL, 1e-6),
        (replace(SMALL, h=2), 1e-6),
        (replace(SMALL, T=80), 1e-6),
        (replace(SMALL, activation="bf16"), 1e-2),
        (replace(SMALL, activation="bf16", adapter="bf16"), 3e-2),
        (replace(SMALL, activation="fp16"), 2e-3),
        (replace(SMALL, dropout=0.5), 1e-6),
    ],
    ids=lambda value: getattr(value, "key", None),
)
def test_every_contender_computes_what_the_reference_does(shape, largest):
    data = Data(shape, CPU)
    contenders = paths(data)
    assert list(contenders) == ["ours", "ours-op", "peft", "lora", "torch"]
    for name, path in contenders.items():
        error = path_error(path, data, gradients=True)
        if shape.dropout and not name.startswith("ours"):
            assert error is None, "the reference does not know its mask"
        else:
            assert 0 < error < largest, name


def test_the_error_shows_a_wrong_output_and_a_wrong_gradient():
    data = Data(SMALL, CPU)
    path = paths(data)["ours-op"]
    doubled = replace(path, call=lambda x, base: path.call(x, base) + 0.1 * base)
    assert path_error(doubled, data, gradients=False) > 0.01
    # The same output, but half of the gradient of x is lost.
    halved = replace(path, call=lambda x, base: path.call(0.5 * x + 0.5 * x.detach(), base))
    assert path_error(halved, data, gradients=False) < 1e-6
    assert path_error(halved, data, gradients=True) > 0.1


@pytest.mark.parametrize("level", ["quick", "default", "full"])
def test_torch_compile_takes_part_by_default(level):
    assert compiled_shapes(level) and compiled_shapes(level) <= set(shapes(level))


def test_every_shape_is_compiled(monkeypatch):
    """torch compiles a function for eight shapes at most, and runs it as it is for any further."""
    graphs = []
    compile_ = partial(torch.compile, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    monkeypatch.setattr(torch, "compile", compile_)
    for width in range(2, 12):
        path = compiled(Path(lambda x, base: x + base, (), dict))
        path.call(torch.zeros(3, width), torch.zeros(3, width))
    assert len(graphs) == 10


@pytest.mark.parametrize("shape", [replace(SMALL, T=1), replace(SMALL, T=1, h=2)], ids=lambda shape: shape.key)
def test_a_merge_is_compared_with_the_reference(shape):
    data = Data(shape, CPU)
    adapted = layers(data, "ours", "peft", "lora")
    weight = adapted["ours"].get_base_layer().weight
    before = weight.clone()
    for name, layer in adapted.items():
        assert merge_error(layer, data) < 1e-6, name
        torch.testing.assert_close(weight, before)
    adapted["ours"].merge = lambda: None
    adapted["ours"].unmerge = lambda: None
    assert merge_error(adapted["ours"], data) > 0.1


# Memory


def test_saved_bytes_counts_each_storage_once_and_not_what_was_there_before():
    x, w = (torch.randn(50, requires_grad=True) for _ in range(2))

    def call() -> torch.Tensor:
        y = (x * w).exp()  # keeps x, w and its own result
        return y * y  # keeps that result twice more

    assert saved_bytes(call, (x, w)) == 200
    assert saved_bytes(call, (x,)) == 400


def test_a_layer_keeps_x_and_u_alive_where_a_frozen_one_keeps_nothing():
    """bfloat16 beside float32 adapters: ours keeps x and U, PEFT's layers a float32 copy of x, whose x is then free."""
    s = Shape(256, 128, T=100, r=4, k=2, activation="bf16")  # so wide that U is small beside x, and kept
    x, u = 2 * s.T * s.N, 4 * s.T * s.k * s.r
    found = kept_bytes(Data(s, CPU))
    assert found["base"] == 0
    assert found["ours"] == found["ours-path"] == x + u
    assert found["peft"] >= 2 * x + u and found["lora"] >= 2 * x


def test_peak_bytes_is_what_a_call_needs_beside_what_was_there():
    """In a process of its own: another's freed memory may be used again, and no peak rises."""
    run_python("""
import torch
from benchmarks.memory import peak_bytes
from benchmarks.timing import Contender
before = torch.ones(8 << 20)
found = peak_bytes(Contender(lambda: before + 1.0), torch.device("cpu"))
assert 30 << 20 < found < 40 << 20, found
""")
