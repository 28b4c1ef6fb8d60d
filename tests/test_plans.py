# SPDX-License-Identifier: Apache-2.0
"""The plans of the CPU kernels (csrc/cpu/plan.h): each is reached, those of this machine give right results, and bits and memory
are bounded as the plans say."""

from __future__ import annotations

import itertools
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import call, run
from helpers import Case, assert_results_near, threads, value_and_gradients

from gralora_ext import _loader, ops, reference

NATIVE = _loader.load()
CPU_SOURCES = Path(__file__).resolve().parent.parent / "csrc" / "cpu"
XEON = {"capability": "avx512", "vendor": "intel", "bf16_instructions": True, "amx": True}
ZEN = {"capability": "avx512", "vendor": "amd", "bf16_instructions": True, "amx": False}
OLD = {"capability": "avx2", "vendor": "amd", "bf16_instructions": False, "amx": False}
MACHINES = {"xeon": XEON, "zen": ZEN, "old": OLD}
DTYPES = [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16"), ("float64", "float64")]
TOKENS = [1, 4, 5, 64, 300, 700, 4096]
SHAPES = [  # N, M, r, k
    (2048, 2048, 32, 2),
    (2046, 1026, 66, 2),
    (1024, 512, 16, 8),
    (64, 64, 6, 2),
    (15, 21, 6, 3),
]


def plans(machine: dict[str, Any], **case: Any) -> dict[str, dict[str, Any]]:
    defaults = {"h": 0, "dropout": False, "threads": 1}
    return NATIVE.explain({**defaults, **case}, machine)


@cache
def grid() -> list[tuple[str, dict[str, Any], dict[str, dict[str, Any]]]]:
    """(machine, case, its plans) over machines, dtypes, shapes, tokens, threads, with hybrid part and dropout."""
    found = []
    for (name, machine), (x, adapter), (N, M, r, k), T, count, h, dropout in itertools.product(
        MACHINES.items(), DTYPES, SHAPES, TOKENS, [1, 2, 16], [0, 6], [False, True]
    ):
        case = {"T": T, "N": N, "M": M, "r": r, "k": k, "h": h, "activations": x, "parameters": adapter}
        case |= {"threads": count, "dropout": dropout}
        found.append((name, case, plans(machine, **case)))
    return found


PRODUCTS = {"float32", "float64", "bfloat16 pairs", "bfloat16 by AMX", "split bfloat16 by AMX"}


@pytest.mark.parametrize("a_pass", ["forward", "backward"])
def test_each_product_is_reached_with_each_schedule(a_pass: str) -> None:
    reached = {(plan[a_pass]["product"], plan[a_pass]["schedule"]) for _, _, plan in grid()}
    expected = set(itertools.product(PRODUCTS, ["by tokens", "by columns"]))
    assert reached == expected | {("float32", "few tokens"), ("float64", "few tokens")}


EVERY_PACKING = {"in place", "packed", "packed as pairs", "packed in pieces"}
REACHED = {
    "forward": {
        "x": {"in place", "copied", "copied with dropout"},
        "A": EVERY_PACKING,
        "B": EVERY_PACKING,
        "A_general": {"absent", "packed", "packed as pairs", "packed in pieces"},
        "B_general": {"absent", "packed", "packed as pairs", "packed in pieces"},
        "whole_blocks": {False, True},
    },
    "backward": {
        "g": {"in place", "copied"},
        "x": {"in place", "copied", "copied with dropout"},
        "A": {"packed", "packed as pairs", "packed in pieces"},
        "B": {"packed", "packed as pairs", "packed in pieces"},
        "A_general": {"absent", *EVERY_PACKING},
        "B_general": {"absent", *EVERY_PACKING},
        "remakes_U": {False},
        "whole_blocks": {False, True},
    },
    "backward_without_U": {"remakes_U": {True}, "A_for_U": EVERY_PACKING},
    "merge": {"along_N": {False}, "prefetches": {False, True}, "left": {"in place", "packed"}, "right": {"packed"}},
    "merge_fan_in_fan_out": {"along_N": {True}, "left": {"packed"}, "right": {"in place", "packed"}},
    "linear": {"in": {"in place", "copied"}, "left": {"packed"}, "left_general": {"absent", "in place", "packed"}},
}


@pytest.mark.parametrize(("a_pass", "field"), [(a, f) for a, fields in REACHED.items() for f in fields])
def test_each_way_of_an_operand_is_reached(a_pass: str, field: str) -> None:
    assert {plan[a_pass][field] for _, _, plan in grid()} == REACHED[a_pass][field]


@pytest.mark.parametrize("a_pass", ["forward", "backward"])
def test_counts_above_one_are_reached(a_pass: str) -> None:
    counted = {"forward": ["blocks_per_strip"], "backward": ["segments", "wave"]}[a_pass]
    for field in counted:
        assert {plan[a_pass][field] > 1 for _, _, plan in grid() if plan[a_pass]["schedule"] != "few tokens"} == {
            False,
            True,
        }


def test_every_plan_of_this_machine_gives_right_results() -> None:
    """One small case for each plan that differs in more than its numbers."""
    tried = set()
    for (x, adapter), (N, M, r, k), T, count, h, dropout in itertools.product(
        DTYPES[:3],
        [(66, 130, 6, 2), (96, 64, 32, 1), (512, 384, 16, 8), (15, 21, 6, 3)],
        [1, 5, 70, 450],
        [1, 2, 3],
        [0, 6],
        [0.0, 0.3],
    ):
        case = {"T": T, "N": N, "M": M, "r": r, "k": k, "h": h, "activations": x, "parameters": adapter}
        found = plans({}, **case, threads=count, dropout=dropout > 0)
        kind = tuple(
            value for a_pass in ("forward", "backward") for value in found[a_pass].values() if not type(value) is int
        )
        if (kind, count) in tried:
            continue
        tried.add((kind, count))
        dtypes = {
            "x_dtype": getattr(torch, x),
            "base_dtype": getattr(torch, x),
            "adapter_dtype": getattr(torch, adapter),
        }
        inputs = Case(leading=(T,), k=k, n=N // k, m=M // k, rb=r // k, h=h, **dtypes).inputs()
        with threads(count):
            torch.manual_seed(T)
            actual = value_and_gradients(ops.gralora, inputs, dropout_p=dropout)
        torch.manual_seed(T)
        assert_results_near(actual, inputs, dropout_p=dropout, seed=reference.draw_seed(torch.device("cpu")))
    assert len(tried) > 20


MOST_COLUMNS = 256  # kMostColumns: of a row of sums of a weight gradient
WAVE_BYTES = 64 << 20  # kWaveBytes
VECTOR_BYTES = {"default": 16, "avx2": 32, "avx512": 64}
LAYERS = [  # N, M, k, r, h: many and narrow blocks, wide layers, a hybrid part
    (576, 1536, 32, 64, 0),
    (4096, 14336, 4, 64, 0),
    (4096, 4096, 32, 128, 16),
    (8192, 28672, 2, 256, 0),
    (96, 96, 48, 48, 1),
]


def of_layer(layer: tuple[int, ...], T: int, count: int, dtype: str = "float32") -> dict[str, Any]:
    return {**dict(zip("NMkrh", layer, strict=True), T=T), "activations": dtype, "parameters": dtype, "threads": count}


@pytest.mark.parametrize("h", [0, 4])
@pytest.mark.parametrize("count", [1, 4])
def test_no_tokens_have_a_plan(h: int, count: int) -> None:
    assert plans({}, **of_layer((64, 64, 2, 4, h), 0, count))["forward"]["threads"] == 1


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_what_is_summed_together_does_not_depend_on_the_number_of_threads(
    layer: tuple[int, ...], dtype: str, machine: dict[str, Any]
) -> None:
    names = ("product", "segment", "segments", "chunk_of_g", "chunk_of_x", "remakes_U")
    for T in (1, 5, 127, 128, 191, 192, 193, 511, 512, 513, 1025, 2049):
        found = [plans(machine, **of_layer(layer, T, count, dtype)) for count in (1, 2, 3, 5, 8, 64)]
        for name in ("backward", "backward_without_U"):
            assert len({tuple(plan[name][key] for key in names) for plan in found}) == 1
        assert len({(plan["forward"]["product"], plan["forward"]["chunk"]) for plan in found}) == 1
        for name in ("forward", "backward"):
            assert len({plan[name]["schedule"] == "few tokens" for plan in found}) == 1
        assert len({plan["linear"]["chunk"] for plan in found}) == 1


def scratch_of_a_wave(plan: dict[str, Any], k: int, r: int, h: int, vector_bytes: int) -> int:
    """Bytes of the sums of gradients, beside the first ones, of the latents, and of the places where these are summed, in float."""
    ranks, tokens = k * r + h, plan["wave"] * plan["segment"]
    columns = (plan["chunks_of_g"] + plan["chunks_of_x"]) * MOST_COLUMNS
    whole = plan["schedule"] == "by tokens" or plan["whole_blocks"]
    places = plan["threads"] * plan["segment"] if whole else max(plan["chunks_of_g"], plan["chunks_of_x"]) * tokens
    padded = sum(-(-n * 4 // vector_bytes) * vector_bytes for n in (r, h))
    return plan["wave"] * columns * (r + h) * 4 + 2 * tokens * ranks * 4 + places * padded


@pytest.mark.parametrize("capability", VECTOR_BYTES)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_a_wave_of_several_segments_has_a_bounded_scratch(layer: tuple[int, ...], capability: str) -> None:
    for T, count in itertools.product([2100, 65536, 2**21], [1, 2, 3, 8, 32, 64, 128]):
        plan = plans({"capability": capability}, **of_layer(layer, T, count))["backward_without_U"]
        if plan["wave"] > 1:
            assert scratch_of_a_wave(plan, *layer[2:], VECTOR_BYTES[capability]) <= WAVE_BYTES, (T, count, plan)


def test_explain_prints_the_plans(tmp_path: Path) -> None:
    printed = call("info", "--explain", "512", "4096", "1024", "32", "2", "bfloat16/float32", cwd=tmp_path).stdout
    assert printed.startswith("512 tokens, 4096 -> 1024, r 32, k 2, activations bfloat16, adapter float32\n")
    found = NATIVE.explain(
        {"T": 512, "N": 4096, "M": 1024, "r": 32, "k": 2, "h": 0, "activations": "bfloat16", "parameters": "float32"}
        | {"dropout": False, "threads": 1}
    )
    assert re.search(rf"^  product +{found['forward']['product']}$", printed, re.MULTILINE)
    for heading in ("this machine", "forward", "backward", "merge"):
        assert f"\n{heading}\n" in printed
    assert "linear, W + dW as one product" not in printed, "which takes float32, or float64 alone"
    assert "backward where forward did not keep U" in printed
    printed = call("info", "--explain", "512", "4096", "1024", "32", "2", "bfloat16", cwd=tmp_path).stdout
    assert "backward where forward did not keep U" not in printed, "which it always does in bfloat16"
    largest = call("info", "--explain", *["1000000"] * 4, "8", "float32", cwd=tmp_path).stdout
    assert "linear, W + dW as one product" in largest and not re.search(r" -\d", largest), "no size has wrapped around"


@pytest.mark.parametrize(
    ("activations", "adapter", "kernels"),
    [
        ("bfloat16", "float32", "tensor cores"),
        ("float32", "float16", "tensor cores"),
        ("bfloat16", "float16", "plain kernels"),
        ("float64", "float64", "plain kernels"),
    ],
)
def test_explain_tells_which_dtypes_run_on_tensor_cores(activations: str, adapter: str, kernels: str) -> None:
    layer = {"T": 512, "N": 4096, "M": 1024, "r": 32, "k": 2, "h": 0, "dropout": False, "threads": 1}
    plans = NATIVE.explain({**layer, "activations": activations, "parameters": adapter})
    assert plans["cuda"]["from compute capability 8.0 on"] == kernels


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["512", "4096", "1023", "32", "2", "float32"], "M must be divisible by k = 2, but it is 1023"),
        (["512", "4096", "1024", "32", "0", "float32"], "k must be a number from 1 to 1,000,000, but it is '0'"),
        (["x", "4096", "1024", "32", "2", "float32"], "T must be a number from 0 to 1,000,000, but it is 'x'"),
        (["²", "4096", "1024", "32", "2", "float32"], "T must be a number from 0 to 1,000,000, but it is '²'"),
        (["512", f"{10**20}", "1024", "32", "2", "float32"], "N must be a number from 1 to 1,000,000, but it is "),
        (
            ["512", f"{10**6 + 1}", "1024", "32", "2", "float32"],
            "N must be a number from 1 to 1,000,000, but it is ",
        ),
        (["1", "4096", "1024", "32", "2", "int8"], "DTYPE must be of float32"),
    ],
)
def test_explain_refuses_what_is_no_layer(words: list[str], message: str, tmp_path: Path) -> None:
    assert message in run("info", "--explain", *words, cwd=tmp_path, code=2).stderr


def test_functions_are_short() -> None:
    """No function of the CPU kernels is longer than 45 lines, from its first line to its brace."""
    too_long = []
    for source in sorted([*CPU_SOURCES.glob("*.h"), *CPU_SOURCES.glob("*.cpp")]):
        lines = source.read_text(encoding="utf-8").splitlines()
        for first, line in enumerate(lines):
            indent = len(line) - len(line.lstrip())
            if (
                indent > 2
                or not re.search(r"\)( const)?( \{|$)", line)
                or line.lstrip().startswith(("if", "for", "//"))
            ):
                continue
            last = next(
                (i for i in range(first, len(lines)) if lines[i] in (" " * indent + "}", " " * indent + "};")), first
            )
            if last - first >= 45 and line.rstrip().endswith("{"):
                too_long.append(f"{source.name}:{first + 1}: {last - first + 1} lines")
    assert too_long == []
