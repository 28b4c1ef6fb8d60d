# SPDX-License-Identifier: Apache-2.0
"""What the plans of the CPU's passes promise: any number of tokens has one, its scratch is bounded, and what sums depend on does not
depend on the number of threads."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from helpers import run_python

import gralora_ext

if gralora_ext.build_info()["cpu_capability"] is None:
    pytest.skip("there are no kernels for the CPU", allow_module_level=True)

from gralora_ext import _C

CAPABILITIES = {"default": 16, "avx2": 32, "avx512": 64}  # bytes of a vector
MOST_COLUMNS = 256  # of a row of sums of a weight gradient (kMostColumns)
WAVE_BYTES = 64 << 20  # kWaveBytes of csrc/cpu/plan.cpp
# N, M, k, r, h: many and narrow blocks, wide layers, a hybrid part
LAYERS = [
    (576, 1536, 32, 64, 0),
    (4096, 14336, 4, 64, 0),
    (4096, 4096, 32, 128, 16),
    (8192, 28672, 2, 256, 0),
    (96, 96, 48, 48, 1),
]


def case(T: int, layer: tuple[int, ...], threads: int, dtype: str = "float32", **options: object) -> dict[str, object]:
    shape = dict(zip("NMkrh", layer, strict=True), T=T)
    return {**shape, "activations": dtype, "parameters": dtype, "threads": threads, "dropout": False, **options}


def scratch_of_a_wave(plan: dict[str, Any], k: int, r: int, h: int, vector_bytes: int) -> int:
    """Bytes of the sums of gradients, beside the first ones, of the latents, and of the places where these are summed, in float."""
    ranks, tokens = k * r + h, plan["wave"] * plan["segment"]
    columns = (plan["chunks_of_g"] + plan["chunks_of_x"]) * MOST_COLUMNS
    whole = plan["schedule"] == "by tokens" or plan["whole_blocks"]
    places = plan["threads"] * plan["segment"] if whole else max(plan["chunks_of_g"], plan["chunks_of_x"]) * tokens
    padded = sum(-(-n * 4 // vector_bytes) * vector_bytes for n in (r, h))
    return plan["wave"] * columns * (r + h) * 4 + 2 * tokens * ranks * 4 + places * padded


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("h", [0, 4])
def test_no_tokens_have_a_plan(h: int, threads: int) -> None:
    printed = run_python(
        f"from gralora_ext import _C; print(_C.explain({case(0, (64, 64, 2, 4, h), threads)})['forward'])"
    )
    assert "'schedule'" in printed


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_a_wave_of_several_segments_has_a_bounded_scratch(layer: tuple[int, ...], capability: str) -> None:
    for T, threads in itertools.product([2100, 65536, 2**21], [1, 2, 3, 8, 32, 64, 128]):
        plan = _C.explain(case(T, layer, threads), {"capability": capability})["backward_without_U"]
        if plan["wave"] > 1:
            assert scratch_of_a_wave(plan, *layer[2:], CAPABILITIES[capability]) <= WAVE_BYTES, (T, threads, plan)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("amx", [False, True], ids=["", "amx"])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_what_is_summed_together_does_not_depend_on_the_number_of_threads(
    layer: tuple[int, ...], amx: bool, dtype: str
) -> None:
    machine = {"capability": "avx512", "amx": amx}
    names = ("product", "segment", "segments", "chunk_of_g", "chunk_of_x", "remakes_U")
    for T in (1, 5, 127, 128, 191, 192, 193, 511, 512, 513, 1025, 2049):
        plans = [_C.explain(case(T, layer, threads, dtype), machine) for threads in (1, 2, 3, 5, 8, 64)]
        for name in ("backward", "backward_without_U"):
            assert len({tuple(plan[name][key] for key in names) for plan in plans}) == 1
        assert len({(plan["forward"]["product"], plan["forward"]["chunk"]) for plan in plans}) == 1
        few = {name: {plan[name]["schedule"] == "few tokens" for plan in plans} for name in ("forward", "backward")}
        assert all(len(either) == 1 for either in few.values())
        assert len({plan["linear"]["chunk"] for plan in plans}) == 1
