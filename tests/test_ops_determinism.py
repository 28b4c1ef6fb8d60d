# SPDX-License-Identifier: Apache-2.0
"""The same bits for any number of threads, no growth over many calls, and every CPU capability within tolerance."""

from __future__ import annotations

import ast
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import NAMES, Case, assert_results_near, cases, run_python, same_bits, threads, value_and_gradients
from hypothesis import given, settings

from gralora_ext import build_info, ops, reference

DTYPES = [torch.float32, torch.bfloat16]
CAPABILITIES = ["default", "avx2", "avx512"]
# What a run by instruction set takes of them, below
FILES = ["forward", "backward", "merge", "dropout", "few_tokens", "linear"]
NAMES_OF_TESTS = ["gradients_are_right", "16_bit", "both_masks", "merge_takes_every", "few_tokens"]
NAMES_OF_TESTS += ["layout_of_the_weight", "several_chunks", "extreme_sizes"]
MOST_CASES = 12  # of each test
FP32, BF16 = DTYPES
each_pair = pytest.mark.parametrize(("dtype", "adapter"), [(FP32, FP32), (BF16, FP32), (BF16, BF16)], ids=NAMES.get)


def results_with(count: int, case: Case, device: torch.device, dropout_p: float) -> dict[str, torch.Tensor]:
    with threads(count):
        torch.manual_seed(case.seed)
        return value_and_gradients(ops.gralora, case.inputs(device), dropout_p=dropout_p)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3], ids=["", "dropout"])
@pytest.mark.parametrize("h", [0, 5], ids=["", "hybrid"])
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("leading", [(517,), (2, 3, 83), (4,)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_results_do_not_depend_on_the_number_of_threads(
    dtype: torch.dtype, leading: tuple[int, ...], k: int, h: int, dropout_p: float, device: torch.device
) -> None:
    case = Case(leading, k, 384 // k, 640 // k, 16 // k, h, x_dtype=dtype, base_dtype=dtype)
    one = results_with(1, case, device, dropout_p)
    for count in (2, 3):
        many = results_with(count, case, device, dropout_p)
        assert all(same_bits(many[name], one[name]) for name in one)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_a_few_tokens_of_a_wide_layer(dtype: torch.dtype, device: torch.device) -> None:
    """They are few, but their work is enough for threads; beside bfloat16, U is made again."""
    case = Case((3,), 2, 1100, 1500, 50, x_dtype=dtype, base_dtype=dtype)
    one = results_with(1, case, device, 0.3)
    for count in (2, 3):
        many = results_with(count, case, device, 0.3)
        assert all(same_bits(many[name], one[name]) for name in one)


@pytest.mark.parametrize("T", [60, 140])
@pytest.mark.parametrize("k", [2, 4])
@each_pair
def test_threads_that_share_columns(
    dtype: torch.dtype, adapter: torch.dtype, k: int, T: int, device: torch.device
) -> None:
    """Two take whole blocks, of several chunks of columns; so do four of k = 4; else they take chunks."""
    case = Case((T,), k, 600, 530, 16, x_dtype=dtype, base_dtype=dtype, adapter_dtype=adapter)
    one = results_with(1, case, device, 0.3)
    torch.manual_seed(case.seed)
    assert_results_near(one, case.inputs(device), dropout_p=0.3, seed=reference.draw_seed(device).cpu())
    for count in (2, 3, 4):
        many = results_with(count, case, device, 0.3)
        assert all(same_bits(many[name], one[name]) for name in one)


@pytest.mark.parametrize(("T", "k", "rb"), [(200, 2, 64), (282, 4, 16), (283, 4, 16), (512, 2, 64), (513, 2, 64)])
@each_pair
def test_threads_that_share_columns_of_many_tokens(
    dtype: torch.dtype, adapter: torch.dtype, T: int, k: int, rb: int, device: torch.device
) -> None:
    """Backward takes them as one segment where parameters are large beside ranks, up to bounds that 283 and 513
    tokens exceed by one."""
    case = Case((T,), k, 600, 530, rb, x_dtype=dtype, base_dtype=dtype, adapter_dtype=adapter)
    one = results_with(1, case, device, 0.3)
    torch.manual_seed(case.seed)
    assert_results_near(one, case.inputs(device), dropout_p=0.3, seed=reference.draw_seed(device).cpu())
    for count in (2, 3, 4):
        many = results_with(count, case, device, 0.3)
        assert all(same_bits(many[name], one[name]) for name in one)


@pytest.mark.parametrize("T", [43, 47, 63, 171])
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=NAMES.get)
@pytest.mark.parametrize("h", [0, 6, 5], ids=["", "hybrid", "odd_hybrid"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=NAMES.get)
def test_a_token_has_the_same_bits_wherever_it_stands(
    dtype: torch.dtype, h: int, adapter: torch.dtype, T: int, device: torch.device
) -> None:
    """By its place in a group of rows too: each row is the same token here, in groups of 12, 8, 4, 2, 1 or of 32 and what is left."""
    inputs = Case((T,), 2, 150, 130, 12, h, x_dtype=dtype, base_dtype=dtype, adapter_dtype=adapter).inputs(device)
    for name in ("x", "base"):
        inputs.tensors[name][:] = inputs.tensors[name][:1].clone()
    inputs.grad[:] = inputs.grad[:1].clone()
    results = value_and_gradients(ops.gralora, inputs)
    for name in ("y", "x"):
        assert same_bits(results[name], results[name][:1].expand_as(results[name])), name


@pytest.mark.parametrize("T", [200, 1300, 2100])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_sums_over_several_segments_of_tokens(dtype: torch.dtype, T: int, device: torch.device) -> None:
    """Waves of segments that fill the threads evenly, unevenly, or one by one; beside bfloat16, U is made again."""
    case = Case((T,), 2, 300, 70, 12, 3, x_dtype=dtype, base_dtype=dtype)
    one = results_with(1, case, device, 0.3)
    torch.manual_seed(case.seed)
    assert_results_near(one, case.inputs(device), dropout_p=0.3, seed=reference.draw_seed(device).cpu())
    for count in (2, 3, 4, 8):
        many = results_with(count, case, device, 0.3)
        assert all(same_bits(many[name], one[name]) for name in one)


@pytest.mark.parametrize("h", [0, 3], ids=["", "hybrid"])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_waves_of_segments_whose_columns_are_shared(dtype: torch.dtype, h: int, device: torch.device) -> None:
    """Six segments and eight chunks: one, two and three threads take segments, in waves as large as they are many; four
    share the columns of two segments in each wave, eight those of four, and then of two."""
    case = Case((2100,), 8, 40, 24, 2, h, x_dtype=dtype, base_dtype=dtype)
    one = results_with(1, case, device, 0.3)
    torch.manual_seed(case.seed)
    assert_results_near(one, case.inputs(device), dropout_p=0.3, seed=reference.draw_seed(device).cpu())
    for count in (2, 3, 4, 8):
        many = results_with(count, case, device, 0.3)
        assert all(same_bits(many[name], one[name]) for name in one)


def test_no_segment_is_empty_however_many_tokens_there_are(device: torch.device) -> None:
    case = Case((100_000,), 1, 3, 2, 1)
    for count in (1, 2):
        assert_results_near(results_with(count, case, device, 0.0), case.inputs(device))


@given(case=cases())
@settings(max_examples=60)
def test_results_do_not_depend_on_the_number_of_threads_in_random_cases(case: Case, device: torch.device) -> None:
    one, three = (results_with(count, case, device, 0.2) for count in (1, 3))
    assert all(same_bits(three[name], one[name]) for name in one)


@pytest.mark.parametrize("fan_in_fan_out", [False, True], ids=["", "fan_in_fan_out"])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_merge_does_not_depend_on_the_number_of_threads(
    dtype: torch.dtype, fan_in_fan_out: bool, device: torch.device
) -> None:
    case = Case(k=2, n=193, m=257, rb=8, h=3)
    adapter = case.inputs(device).adapter()
    options = {"scaling": 0.5, "fan_in_fan_out": fan_in_fan_out}
    shape = (386, 514) if fan_in_fan_out else (514, 386)
    merged, deltas = [], []
    for count in (1, 2, 3):
        with threads(count):
            weight = torch.linspace(-1, 1, 386 * 514).to(device, dtype).view(shape)
            merged.append(ops.merge_(weight, **adapter, **options))
            deltas.append(ops.delta_weight(**adapter, **options))
    assert all(same_bits(merged[0], other) for other in merged[1:])
    assert all(same_bits(deltas[0], other) for other in deltas[1:])


@pytest.mark.parametrize("leading", [(64,), (0,)], ids=str)
def test_results_do_not_depend_on_what_new_memory_holds(leading: tuple[int, ...], device: torch.device) -> None:
    """Results are written and never added to what an allocation happens to hold: here torch fills each with NaN."""
    case = Case(leading, 2, 31, 33, 4, 3)
    clean = results_with(1, case, device, 0.2)
    clean["dW"] = ops.delta_weight(**case.inputs(device).adapter(), scaling=0.5)
    torch.use_deterministic_algorithms(True)
    try:
        filled = results_with(1, case, device, 0.2)
        filled["dW"] = ops.delta_weight(**case.inputs(device).adapter(), scaling=0.5)
        assert torch.empty(3, device=device).isnan().all()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(same_bits(filled[name], clean[name]) for name in clean)


def test_calls_from_several_threads_do_not_disturb_each_other(device: torch.device) -> None:
    sizes = [Case((200 + 7 * n,), 2, 48, 40 + n, 4, n % 3) for n in range(4)]

    def gradients_twice(case: Case) -> bool:
        first, again = (value_and_gradients(ops.gralora, case.inputs(device)) for _ in range(2))
        return all(same_bits(again[name], alone[case][name]) and same_bits(first[name], again[name]) for name in first)

    alone = {case: value_and_gradients(ops.gralora, case.inputs(device)) for case in sizes}
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(gradients_twice, sizes * 10))


def test_ten_thousand_calls_grow_the_process_by_less_than_4_mib() -> None:
    grown = run_python(
        """
import torch
from helpers import Case
from gralora_ext import ops, reference

inputs = Case((8,), 2, 16, 24, 4, 2).inputs()
leaves = {name: t.requires_grad_() for name, t in inputs.tensors.items()}
weight = torch.zeros(48, 32)

def calls(count):
    for _ in range(count):
        y = ops.gralora(**leaves, scaling=0.5, dropout_p=0.1)
        torch.autograd.grad(y, list(leaves.values()), inputs.grad)
        ops.merge_(weight, **inputs.adapter(), scaling=0.5)
        ops.delta_weight(**inputs.adapter(), scaling=0.5)

def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096

calls(1000)
before = resident()
calls(10_000)
print(resident() - before)
""",
        timeout=170,
    )
    assert int(grown) < 4 * 2**20


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_each_cpu_capability_passes_the_tests_of_dtypes_sizes_and_rounding(capability: str) -> None:
    machine = torch.backends.cpu.get_cpu_capability().lower()
    highest = machine if machine in CAPABILITIES else "default"
    expected = min(capability, highest, key=CAPABILITIES.index)
    if expected == build_info()["cpu_capability"] and not build_info()["cpu_amx"]:
        pytest.skip("the tests of this process have run those kernels")
    files = [str(Path(__file__).with_name(f"test_ops_{name}.py")) for name in FILES]
    printed = run_python(
        f"""
import pytest
from gralora_ext import build_info

class Outcomes:
    passed, failed = [], []

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed.append(report.nodeid)
        elif report.when == "call" and report.passed:
            self.passed.append(report.nodeid)

options = ["-q", "-p", "no:cacheprovider", "--most-cases={MOST_CASES}", "-k", {" or ".join(NAMES_OF_TESTS)!r}]
pytest.main([*options, *{files}], [Outcomes()])
print()
print(repr((build_info()["cpu_capability"], Outcomes.passed, Outcomes.failed)))
""",
        GRALORA_EXT_CPU_CAPABILITY=capability,
        GRALORA_EXT_CPU_AMX="0",  # what else runs here has it
        OMP_NUM_THREADS="1",
    )
    used, passed, failed = ast.literal_eval(printed.splitlines()[-1])
    assert used == expected
    assert failed == [], printed
    for name in (*(f"test_ops_{name}.py" for name in FILES), *NAMES_OF_TESTS):
        assert any(name in test for test in passed), f"no test of {name} has run: {passed}"
