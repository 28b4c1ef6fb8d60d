# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels, executed on the CPU from the same source, against ``gralora_ext/reference.py`` in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from calls import ALL_GRADIENTS, Shape, arrays_of
from calls import run as run_pass
from checks import CHOSEN, DTYPES, PAIRS, Way, check, check_infinity, check_mask, check_merge, check_one_launch, results
from compilers import ARCHS, compiler, emulated_library, find_toolkit, run, sanitized_kernels
from emulated import Library
from helpers import Case, assert_near
from hypothesis import given, settings
from hypothesis import strategies as st

import gralora_ext.ops  # noqa: F401  registers the operations
from gralora_ext.tolerances import tolerance

pytestmark = pytest.mark.skipif(find_toolkit() is None or compiler() is None, reason="needs CUDA's headers and g++")
HERE = Path(__file__).resolve().parent
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
    dtypes=st.sampled_from(PAIRS),
    way=st.builds(
        Way,
        *(st.integers(0, 3), st.integers(1, 3), st.sampled_from([0.0, 0.4]), st.integers(0, 2**62)),
        *(st.booleans(), st.integers(0, ALL_GRADIENTS), st.sampled_from([0, 1, 8])),
    ),
    order=st.tuples(
        st.sampled_from(["fifo", "lifo", "random"]), st.integers(1, 2**31), st.sampled_from(["lazy", "eager", "random"])
    ),
)
@settings(max_examples=60)
def test_random_shapes_orders_and_arrivals_of_copies(
    T: int,
    k: int,
    widths: tuple[int, int],
    rb: int,
    h: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    way: Way,
    order: tuple[str, int, str],
    compiled: Library,
) -> None:
    x, adapter = dtypes
    compiled.device()
    compiled.configure(*order)
    check(compiled, Case((T,), k, *widths, rb, h, x, x, adapter, seed=T), way)


@pytest.mark.parametrize("way", [Way(), Way(dropout=0.3, keep_u=False, padding=3)], ids=["", "dropout"])
@pytest.mark.parametrize(
    ("T", "k", "n", "m", "rb", "h"),
    [
        (131, 2, 72, 88, 6, 5),
        (128, 1, 64, 64, 32, 0),
        (257, 4, 40, 24, 4, 0),
        (1, 3, 22, 150, 4, 2),
        (70, 2, 33, 70, 16, 0),
    ],
)
@pytest.mark.parametrize("dtypes", PAIRS, ids=lambda p: "_".join(str(d)[6:] for d in p))
def test_forward_in_one_launch(
    dtypes: tuple[torch.dtype, torch.dtype], T: int, k: int, n: int, m: int, rb: int, h: int, way: Way, library: Library
) -> None:
    x, adapter = dtypes
    check_one_launch(library, Case((T,), k, n, m, rb, h, x, x, adapter), way)


@st.composite
def ranks_of_one_launch(draw: st.DrawFn) -> tuple[int, int, int]:
    """k, rb and h with k*rb + h <= 32 and at most 64 ranks in whole steps of 16 of all blocks"""
    k = draw(st.integers(1, 4))
    most = 32 if k <= 2 else 16
    rb = draw(st.integers(1, most // k))
    return k, rb, draw(st.integers(0, most - k * rb))


@given(
    T=st.one_of(st.sampled_from([0, 1, 127, 128, 129]), st.integers(0, 300)),
    widths=st.tuples(*[st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 130]))] * 2),
    ranks=ranks_of_one_launch(),
    dtypes=st.sampled_from(PAIRS),
    way=st.builds(
        Way,
        dropout=st.sampled_from([0.0, 0.4]),
        seed=st.integers(0, 2**62),
        keep_u=st.booleans(),
        needs=st.sampled_from([2, 4]),
        padding=st.sampled_from([0, 1, 8]),
    ),
    order=st.tuples(
        st.sampled_from(["fifo", "lifo", "random"]), st.integers(1, 2**31), st.sampled_from(["lazy", "eager", "random"])
    ),
)
@settings(max_examples=30)
def test_forward_in_one_launch_of_random_shapes(
    T: int,
    widths: tuple[int, int],
    ranks: tuple[int, int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    way: Way,
    order: tuple[str, int, str],
    compiled: Library,
) -> None:
    (k, rb, h), (x, adapter) = ranks, dtypes
    compiled.device()
    compiled.configure(*order)
    check_one_launch(compiled, Case((T,), k, *widths, rb, h, x, x, adapter, seed=T), way)


# (T, k, r, h) on 2 multiprocessors: two full rounds of tiles of 128 tokens, 7/8 of the last round of four, ranks that just fit
@pytest.mark.parametrize(
    ("T", "k", "r", "h", "launches"),
    [
        *((385, 1, 32, 0, 1), (384, 1, 32, 0, 2), (256, 1, 32, 0, 2), (897, 1, 32, 0, 1), (896, 1, 32, 0, 1)),
        *((640, 1, 32, 0, 2), (385, 2, 20, 12, 1), (385, 2, 20, 13, 2), (385, 4, 12, 4, 1), (385, 4, 12, 5, 2)),
        (385, 5, 5, 0, 2),
    ],
)
def test_forward_is_one_launch_where_its_tiles_fill_the_device(
    T: int, k: int, r: int, h: int, launches: int, library: Library
) -> None:
    library.device(80, 2)
    shape = Shape(T, 4 * k, 4 * k, k, r, h)
    run_pass(library, shape, "forward", arrays_of(library, shape, "forward"))
    assert library.launches() == (["fused_forward"] if launches == 1 else ["project", "expand"])


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
    dropout=st.sampled_from([0.0, 0.4]),
    order=st.tuples(st.sampled_from(["fifo", "lifo", "random"]), st.integers(1, 2**31)),
)
@settings(max_examples=30)
def test_the_portable_kernels_take_any_dtypes(
    T: int,
    k: int,
    widths: tuple[int, int],
    rb: int,
    h: int,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    dropout: float,
    order: tuple[str, int],
    compiled: Library,
) -> None:
    compiled.device(75)
    compiled.configure(*order)
    check(compiled, Case((T,), k, *widths, rb, h, *dtypes, seed=T), Way(0, 0, dropout))


def test_mixed_dtypes_go_to_the_portable_kernels(library: Library) -> None:
    check(library, Case((40,), 2, 24, 40, 4, 3, torch.bfloat16, torch.float32, torch.float32), CHOSEN)
    assert set(library.launches()) == {"products"}
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
        if capability >= 80 and r <= 32:
            check_one_launch(library, Case((3,), 2, 64, 64, r // 2, 0, x, x, adapter), Way())
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


def test_the_mask_is_the_references(library: Library) -> None:
    check_mask(library)


@pytest.mark.parametrize("order", ["0 1 0", "1 1 1", "2 7 0", "2 8 2"])
@pytest.mark.parametrize(
    "shape",
    [
        "130 66 90 2 12 5 0 0 2 2 30",
        "65 96 72 1 20 0 1 0 1 3 0",
        "1 33 40 1 3 1 2 2 1 1 10",
        "130 66 90 2 12 5 0 0 -1 2 30",
    ],
)
@pytest.mark.parametrize("variant", ["asan", "tsan"])
def test_the_sanitizers_find_nothing(variant: str, shape: str, order: str) -> None:
    done = run(sanitized_kernels(variant), *shape.split(), *order.split())
    assert (done.returncode, done.stderr) == (0, "")
