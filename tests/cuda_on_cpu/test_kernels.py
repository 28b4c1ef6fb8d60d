# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels, executed on the CPU from the same source, against ``gralora_ext/reference.py`` in float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from calls import ALL_GRADIENTS
from checks import (
    AUTOCAST,
    CHOSEN,
    DTYPES,
    PAIRS,
    Way,
    check,
    check_choices,
    check_far,
    check_infinity,
    check_mask,
    check_memory,
    check_merge,
    results,
)
from compilers import ARCHS, compiler, emulated_library, find_toolkit, run, sanitized_kernels
from emulated import Library
from helpers import Case, assert_near
from hypothesis import given, settings
from hypothesis import strategies as st

import gralora_ext.ops  # noqa: F401  registers the operations
from gralora_ext.tolerances import tolerance

pytestmark = pytest.mark.skipif(find_toolkit() is None or compiler() is None, reason="needs CUDA's headers and g++")
HERE = Path(__file__).resolve().parent
ADAPTER_LAYOUTS = ("contiguous", "padded", "row_slice", "leading_permuted", "transposed", "column_stride")
CSRC = HERE.parent.parent / "csrc"


@pytest.fixture(scope="module")
def compiled() -> Library:
    return Library(emulated_library(HERE / "kernels.cu", include=[CSRC]))


@pytest.fixture
def library(compiled: Library) -> Library:
    compiled.device()
    compiled.configure()
    return compiled


@pytest.mark.parametrize("way", [Way(), Way(3, 2, 0.3)], ids=["", "split_dropout"])
@pytest.mark.parametrize("h", [0, 5], ids=["", "hybrid"])
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("dtypes", PAIRS, ids=lambda p: "_".join(str(d)[6:] for d in p))
def test_forward_and_backward(
    dtypes: tuple[torch.dtype, torch.dtype], k: int, h: int, way: Way, library: Library
) -> None:
    x, adapter = dtypes
    check(library, Case((131,), k, 72, 88, 6, h, x, x, adapter), way)
    assert library.launches() == ["project", "expand", "weight_gradient", "reduce"]


@given(
    T=st.one_of(st.sampled_from([0, 1, 127, 128, 129]), st.integers(0, 300)),
    k=st.integers(1, 8),
    widths=st.tuples(*[st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 130]))] * 2),
    rb=st.one_of(st.integers(1, 9), st.sampled_from([16, 33])),
    h=st.one_of(st.just(0), st.integers(1, 20)),
    dtypes=st.sampled_from([*((x, x, adapter) for x, adapter in PAIRS), *AUTOCAST]),
    way=st.builds(
        Way,
        *(st.integers(0, 3), st.integers(1, 3), st.sampled_from([0.0, 0.4]), st.integers(0, 2**62)),
        *(
            st.booleans(),
            st.integers(0, ALL_GRADIENTS),
            st.sampled_from([0, 1, 4, 8]),
            st.sampled_from([0, 1]),
            st.booleans(),
        ),
    ),
    adapter_layout=st.sampled_from(ADAPTER_LAYOUTS),
    order=st.tuples(
        st.sampled_from(["fifo", "lifo", "random"]), st.integers(1, 2**31), st.sampled_from(["lazy", "eager", "random"])
    ),
)
@settings(max_examples=30)
def test_random_shapes_orders_and_arrivals_of_copies(
    T: int,
    k: int,
    widths: tuple[int, int],
    rb: int,
    h: int,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    way: Way,
    adapter_layout: str,
    order: tuple[str, int, str],
    compiled: Library,
) -> None:
    compiled.device()
    compiled.configure(*order)
    check(compiled, Case((T,), k, *widths, rb, h, *dtypes, adapter_layout=adapter_layout, seed=T), way)


@pytest.mark.parametrize("h", [0, 3], ids=["", "hybrid"])
@pytest.mark.parametrize(
    ("k", "n", "m", "rb"), [(1, 64, 64, 4), (2, 64, 96, 16), (3, 22, 150, 4), (2, 260, 33, 80), (4, 40, 32, 6)]
)
@pytest.mark.parametrize("dtypes", PAIRS, ids=lambda p: "_".join(str(d)[6:] for d in p))
def test_merge(
    dtypes: tuple[torch.dtype, torch.dtype], k: int, n: int, m: int, rb: int, h: int, library: Library
) -> None:
    dtype, adapter_dtype = dtypes
    check_merge(library, Case((1,), k, n, m, rb, h, adapter_dtype=adapter_dtype), dtype)


@pytest.mark.parametrize("layout", ["columns", "neither"])
@pytest.mark.parametrize(("k", "n", "m", "rb", "h"), [(2, 64, 96, 16, 0), (3, 22, 50, 4, 3)])
def test_merge_into_a_weight_of_other_strides(
    k: int, n: int, m: int, rb: int, h: int, layout: str, library: Library
) -> None:
    check_merge(library, Case((1,), k, n, m, rb, h), torch.bfloat16, layout)
    assert library.launches() == ["merge" if layout == "columns" else "products"]


def test_a_call_gets_the_kernels_that_take_it(library: Library) -> None:
    check_choices(library)


def test_tensors_may_lie_anywhere(library: Library) -> None:
    check_memory(library)


def test_rows_and_latents_may_lie_beyond_what_32_bits_count(library: Library) -> None:
    check_far(library)


@pytest.mark.parametrize("needs", [1, 2, 4, 6, 8 + 16, 3, 5], ids=["x", "A", "B", "A_B", "general", "x_A", "x_B"])
@pytest.mark.parametrize("keep_u", [True, False], ids=["", "u_again"])
@pytest.mark.parametrize("capability", [75, 80])
def test_only_what_is_needed_is_computed(needs: int, keep_u: bool, capability: int, library: Library) -> None:
    library.device(capability)
    check(library, Case((131,), 2, 72, 88, 6, 3), Way(0, 0, 0.2, keep_u=keep_u, needs=needs))


@pytest.mark.parametrize("way", [CHOSEN, Way(0, 0, 0.3, keep_u=False, padding=3)], ids=["", "dropout"])
@pytest.mark.parametrize("dtypes", PAIRS, ids=lambda p: "_".join(str(d)[6:] for d in p))
def test_the_portable_kernels(dtypes: tuple[torch.dtype, torch.dtype], way: Way, library: Library) -> None:
    x, adapter = dtypes
    library.device(75)
    check(library, Case((131,), 2, 72, 88, 6, 5, x, x, adapter), way)
    assert set(library.launches()) == {"products"}
    check_merge(library, Case((1,), 3, 22, 50, 4, 3, adapter_dtype=adapter), x)


@given(
    T=st.one_of(st.sampled_from([0, 1, 63, 64, 65]), st.integers(0, 200)),
    k=st.integers(1, 8),
    widths=st.tuples(*[st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 130]))] * 2),
    rb=st.one_of(st.integers(1, 9), st.sampled_from([16, 33])),
    h=st.one_of(st.just(0), st.integers(1, 20)),
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 3),
    way=st.builds(
        Way,
        *(st.just(0), st.just(0), st.sampled_from([0.0, 0.4]), st.integers(0, 2**62)),
        *(st.booleans(), st.integers(0, ALL_GRADIENTS), st.sampled_from([0, 1]), st.just(0), st.booleans()),
    ),
    adapter_layout=st.sampled_from(ADAPTER_LAYOUTS),
    order=st.tuples(st.sampled_from(["fifo", "lifo", "random"]), st.integers(1, 2**31)),
)
@settings(max_examples=20)
def test_the_portable_kernels_take_any_dtypes(
    T: int,
    k: int,
    widths: tuple[int, int],
    rb: int,
    h: int,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    way: Way,
    adapter_layout: str,
    order: tuple[str, int],
    compiled: Library,
) -> None:
    compiled.device(75)
    compiled.configure(*order)
    check(compiled, Case((T,), k, *widths, rb, h, *dtypes, adapter_layout=adapter_layout, seed=T), way)


@pytest.mark.parametrize("keep_u", [True, False], ids=["", "u_again"])
@pytest.mark.parametrize("dtypes", AUTOCAST, ids=lambda d: "_".join(str(each)[6:] for each in d))
def test_what_autocast_makes_runs_on_tensor_cores(
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype], keep_u: bool, library: Library
) -> None:
    """g and x differ in dtype, so what reads both takes a launch for each."""
    check(library, Case((131,), 2, 72, 88, 6, 5, *dtypes), Way(0, 0, 0.2, keep_u=keep_u))
    projects = ["project"] if keep_u else ["project", "project"]
    assert library.launches() == [*projects, "expand", "weight_gradient", "weight_gradient", "reduce"]


@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["", "dropout"])
@pytest.mark.parametrize("capability", [75, 80])
@pytest.mark.parametrize("dtypes", PAIRS, ids=lambda p: "_".join(str(d)[6:] for d in p))
def test_dx_is_added_where_the_base_layers_is(
    dtypes: tuple[torch.dtype, torch.dtype], capability: int, dropout: float, library: Library
) -> None:
    x, adapter = dtypes
    library.device(capability)
    check(library, Case((131,), 2, 72, 88, 6, 5, x, x, adapter), Way(0, 0, dropout, add_to_dx=True))


def test_float64_goes_to_the_portable_kernels(library: Library) -> None:
    check(library, Case((40,), 2, 24, 40, 4, 3, torch.float64, torch.float64, torch.float64), CHOSEN)
    assert set(library.launches()) == {"products"}


@pytest.mark.parametrize("dtypes", PAIRS, ids=lambda p: "_".join(str(d)[6:] for d in p))
@pytest.mark.parametrize("capability", [75, *sorted(ARCHS)])
def test_each_pass_fits_into_the_shared_memory_of_every_device(
    capability: int, dtypes: tuple[torch.dtype, torch.dtype], library: Library
) -> None:
    """With as many ranks as each kernel takes, on both sides of each choice among them"""
    library.device(capability)
    x, adapter = dtypes
    for r in (16, 32, 64, 66):
        check(library, Case((3,), 2, 64, 64, r // 2, 0, x, x, adapter), CHOSEN)
        assert (library.launches() == ["products"] * 3) == (capability < 80)
        check_merge(library, Case((1,), 2, 64, 64, r // 2, adapter_dtype=adapter), x)


@pytest.mark.parametrize("T", [1, 300])
@pytest.mark.parametrize("multiprocessors", [1, 20, 132])
def test_a_device_of_any_size(T: int, multiprocessors: int, library: Library) -> None:
    """Splits are chosen by the number of multiprocessors."""
    library.device(90, multiprocessors)
    bf16 = (torch.bfloat16, torch.bfloat16, torch.float32)
    check(library, Case((T,), 2, 520, 392, 8, 0, *bf16), Way(0, 0, 0.1))
    assert library.launches() == ["project", "expand", "weight_gradient", "reduce"]


@pytest.mark.parametrize("capability", [75, 80])
@pytest.mark.parametrize("dtypes", PAIRS, ids=lambda p: "_".join(str(d)[6:] for d in p))
def test_the_kernels_for_the_cpu_agree(
    dtypes: tuple[torch.dtype, torch.dtype], capability: int, library: Library
) -> None:
    """Of the same seed: y within the table, and the same elements of dx dropped."""
    library.device(capability)
    x, adapter = dtypes
    inputs = Case((133,), 2, 72, 88, 6, 5, x, x, adapter).inputs()
    t, way = inputs.tensors, Way(0, 0, 0.25)
    actual = results(library, inputs, way)
    general = t["A_general"], t["B_general"]
    adapters = (t["A"], t["B"], *general, torch.tensor([way.seed]), inputs.scaling, way.dropout)
    y, *left = torch.ops.gralora_ext.gralora(t["x"], t["base"], *adapters)
    assert_near("y", actual["y"], y)
    gradients = torch.ops.gralora_ext.gralora_backward(inputs.grad, t["x"], *left, *adapters, [True] * 5)
    assert torch.equal(gradients[0] == 0, actual["x"] == 0)
    for name, gradient in zip(("x", "A", "B", "A_general", "B_general"), gradients, strict=True):
        assert_near(name, actual[name], gradient, bound=2 * tolerance(gradient, dtypes, gradient=True))  # both err


def test_an_infinity_stays_in_its_token(library: Library) -> None:
    check_infinity(library)


def test_an_infinity_stays_one_where_the_adapter_is_one_piece(library: Library) -> None:
    """Its first piece holds it, and the others are zero: NaN times anything would be NaN."""
    inputs = Case((3,), 1, 16, 16, 1, adapter_dtype=torch.bfloat16).inputs()
    inputs.tensors["A"].fill_(1.0), inputs.tensors["B"].fill_(1.0)
    inputs.tensors["x"][1, 5] = float("inf")
    y = results(library, inputs, Way())["y"]
    assert (y[1] == float("inf")).all() and y[::2].isfinite().all()


def test_the_mask_is_the_references(library: Library) -> None:
    check_mask(library)


# Tensor cores of 8.x add in one way and those from 9.0 on in another (emulator/tensor_core.h). Sums
# over ranks are promoted in float32 results alone, those over columns and tokens everywhere.
LONG_SUMS = [
    *((pair, Case((16,), 1, 8192, 32, 16)) for pair in PAIRS[:2]),
    *((pair, Case((4096,), 1, 16, 16, 16)) for pair in PAIRS[:2]),
    (PAIRS[0], Case((16,), 2, 2080, 24, 20, 4)),
    (PAIRS[0], Case((16,), 1, 64, 64, 1024)),
]


@pytest.mark.parametrize(
    ("dtypes", "case"),
    LONG_SUMS,
    ids=[f"{'_'.join(str(d)[6:] for d in pair)}-{c.leading[0]}x{c.k * c.n}-{c.k * c.rb}" for pair, c in LONG_SUMS],
)
@pytest.mark.parametrize("capability", [80, 90])
def test_long_sums_are_right_where_tensor_cores_cut(
    capability: int, dtypes: tuple[torch.dtype, torch.dtype], case: Case, library: Library
) -> None:
    """They would drift towards zero, ten times as far as they may, if no part of them were added to a total that rounds."""
    x, adapter = dtypes
    library.device(capability)
    library.truncate(True)
    try:
        check(library, replace(case, x_dtype=x, base_dtype=x, adapter_dtype=adapter), Way())
    finally:
        library.truncate(False)


@pytest.mark.parametrize(
    "order", ["2 8 2", *(pytest.param(order, marks=pytest.mark.exhaustive) for order in ("0 1 0", "1 1 1", "2 7 0"))]
)
@pytest.mark.parametrize(
    "shape",
    [
        "130 66 90 2 12 5 0 0 2 2 30",
        "65 96 72 1 20 0 1 0 1 3 0",
        "1 33 40 1 3 1 2 2 1 1 10",
        # More chunks of columns and tokens than stages of a ring, more tiles of y than in a block
        "161 328 200 1 16 0 1 0 1 1 30",
        # More ranks than are multiplied at once
        "20 33 145 1 70 0 0 0 1 1 0",
    ],
)
@pytest.mark.parametrize("variant", ["asan", "tsan"])
def test_the_sanitizers_find_nothing(variant: str, shape: str, order: str) -> None:
    done = run(sanitized_kernels(variant), *shape.split(), *order.split())
    assert (done.returncode, done.stderr) == (0, "")
