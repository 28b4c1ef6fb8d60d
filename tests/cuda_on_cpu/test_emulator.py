# SPDX-License-Identifier: Apache-2.0
"""The emulator sees what it is there to see, and nothing else: kernels with one defect each, and the same without."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import compilers
import numpy as np
import pytest
from emulated import COPIES, ORDERS, Bytes, EmulatorError, Library

pytestmark = [
    pytest.mark.skipif(compilers.find_toolkit() is None, reason="there are no CUDA headers"),
    pytest.mark.skipif(compilers.compiler() is None, reason="there is no C++ compiler"),
]

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
BLOCKS, LENGTH = 3, 64
HEALTHY = ("none", "none_copies", "none_refill", "none_warp", "none_matrix")


@pytest.fixture(scope="module")
def loaded() -> Library:
    return Library(compilers.emulated_library(HERE / "defects.cu"))


@pytest.fixture
def library(loaded: Library) -> Iterator[Library]:
    loaded.clear()
    loaded.configure()
    loaded.device()
    yield loaded
    loaded.clear()


@pytest.fixture
def x() -> np.ndarray:
    return np.arange(BLOCKS * LENGTH, dtype=np.float32).reshape(BLOCKS, LENGTH)


def rotated(library: Library, name: str, x: np.ndarray) -> np.ndarray:
    result = np.full_like(x, -1)
    library.launch("launch_defect", name.encode(), x, result, len(x))
    return result


def sanitized(variant: str, name: str, order: str = "random", seed: int = 1, copies: str = "lazy") -> tuple[int, str]:
    program = compilers.emulated_program([HERE / "defects_main.cpp", HERE / "defects.cu"], variant)
    done = compilers.run(program, name, str(ORDERS.index(order)), str(seed), str(COPIES.index(copies)))
    return done.returncode, done.stderr


@pytest.mark.parametrize("copies", COPIES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", HEALTHY)
def test_a_right_kernel_is_right_in_every_order(library, x, name, order, copies):
    for seed in range(5):
        library.configure(order, seed, copies)
        np.testing.assert_array_equal(rotated(library, name, x), np.roll(x, -1, axis=1))


@pytest.mark.parametrize("variant", ["asan", "tsan"])
@pytest.mark.parametrize("name", HEALTHY)
def test_the_sanitizers_accept_a_right_kernel(name, variant):
    for copies in COPIES:
        assert sanitized(variant, name, copies=copies) == (0, "")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("divergent_barrier", r"thread \(\d+,0,0\): divergent barrier: at .*defects\.cu:\d+ while others wait at "),
        ("early_return", r"barrier at .*defects\.cu:\d+( after threads of the block have returned)?$"),
        ("deadlock", r"(?s)deadlock:\n  block .* waits in (barrier|__syncwarp) at .*defects\.cu:\d+\n  and 60 more$"),
        (
            "divergent_warp",
            r"shfl\.xor at .*: a lane of the mask has returned|returns while its warp waits for it in shfl\.xor at ",
        ),
        ("misaligned_copy", r"cp\.async at .*defects\.cu:\d+: address not aligned to 16 bytes"),
        ("misaligned_matrix", r"ldmatrix at .*defects\.cu:\d+: address not aligned to 16 bytes"),
        ("too_much_shared", r"the block takes 4194304 bytes of shared memory, more than 166912"),
    ],
)
@pytest.mark.parametrize("order", ORDERS)
def test_a_launch_that_cannot_be_right_fails(library, x, order, name, message):
    library.configure(order)
    with pytest.raises(EmulatorError, match=message):
        rotated(library, name, x)
    # The emulator is fit for use afterwards.
    np.testing.assert_array_equal(rotated(library, "none", x), np.roll(x, -1, axis=1))


def test_a_missing_barrier_shows_in_some_order(library, x):
    for seed in range(3):
        library.configure("random", seed)
        assert np.isnan(rotated(library, "missing_barrier", x)).any()


def test_uninitialised_shared_memory_reads_as_nan(library, x):
    result = rotated(library, "uninitialised", x)
    assert np.isnan(result[:, 4]).all()
    assert np.isnan(result).sum() == BLOCKS


@pytest.mark.parametrize(("name", "first"), [("weak_wait", LENGTH // 2), ("missing_wait", 0)])
def test_a_copy_lands_no_sooner_than_its_wait(library, x, name, first):
    wrong = np.isnan(np.roll(rotated(library, name, x), 1, axis=1))
    assert wrong[:, first:].all() and not wrong[:, :first].any()
    library.configure(copies="eager")
    np.testing.assert_array_equal(rotated(library, name, x), np.roll(x, -1, axis=1))


@pytest.mark.parametrize(
    ("name", "access"), [("out_of_bounds", "4 bytes"), ("copy_out_of_bounds", "16 bytes")], ids=["load", "copy"]
)
def test_an_access_outside_of_the_named_buffers_fails(library, x, name, access):
    library.register(x=x)
    result = np.full_like(x, -1)
    library.register(result=result)
    with pytest.raises(EmulatorError, match=rf'defects\.cu:\d+: {access} outside of all registered buffers, .* "x"'):
        library.launch("launch_defect", name.encode(), x, result, len(x))


@pytest.mark.parametrize("name", HEALTHY[:2])
def test_traffic_is_counted_by_buffer(library, x, name):
    result = np.full_like(x, -1)
    library.register(x=x, result=result, other=np.zeros(5))
    library.launch("launch_defect", name.encode(), x, result, len(x))
    assert library.traffic("x") == Bytes(read=x.nbytes, written=0)
    assert library.traffic("result") == Bytes(read=0, written=x.nbytes)
    assert library.traffic("other") == Bytes(0, 0)
    library.launch("launch_defect", b"none", x, result, 1)
    assert library.traffic("x").read == x.nbytes + x[0].nbytes
    assert library.launches() == [name, "none"]
    library.clear()
    assert library.launches() == []
    with pytest.raises(EmulatorError, match='no buffer "x" is registered'):
        library.traffic("x")


def test_a_launch_is_kept_to_the_byte(library, x):
    result = np.full_like(x, -1)
    library.launch("launch_defect", b"none", x, result, 2)
    (launch,) = library.launched()
    assert launch.grid == (2, 1, 1) and launch.block == (LENGTH, 1, 1) and launch.dynamic_bytes == 0
    assert launch.arguments == [array.ctypes.data.to_bytes(8, "little") for array in (x, result)]


def test_buffers_are_disjoint_and_named_once(library, x):
    library.register(x=x)
    with pytest.raises(EmulatorError, match='"x" is registered already'):
        library.register(x=np.zeros(3))
    with pytest.raises(EmulatorError, match='buffer "row" overlaps "x"'):
        library.register(row=x[1])
    with pytest.raises(EmulatorError, match='buffer "result" overlaps "x"'):
        library.register(result=x)


def test_a_launch_of_no_blocks_fails(library, x):
    with pytest.raises(EmulatorError, match=r"none: no such launch: grid \(0,1,1\), block \(64,1,1\)"):
        rotated(library, "none", x[:0])


@pytest.mark.parametrize(
    ("capability", "limit"),
    [(70, 96), (75, 64), (80, 163), (86, 99), (89, 99), (90, 227), (100, 227), (120, 99)],
)
def test_a_block_takes_no_more_shared_memory_than_its_device_has(library, x, capability, limit):
    library.device(capability)
    result = np.full_like(x, -1)
    library.launch("launch_dynamic", limit * 1024, x, result, len(x))
    np.testing.assert_array_equal(result, np.roll(x, -1, axis=1))
    assert library.statistics().shared_bytes == limit * 1024
    with pytest.raises(
        EmulatorError, match=rf"takes {limit * 1024 + 4} bytes of shared memory, more than {limit * 1024}$"
    ):
        library.launch("launch_dynamic", limit * 1024 + 4, x, result, len(x))


def test_a_device_that_is_not_known_is_refused(library):
    with pytest.raises(EmulatorError, match="no device of capability 99 is known"):
        library.device(99)


@pytest.mark.parametrize(("name", "operation"), [("none_copies", r"cp\.async"), ("none_matrix", "ldmatrix")])
def test_an_older_device_lacks_what_came_with_ampere(library, x, name, operation):
    library.device(75)
    with pytest.raises(
        EmulatorError, match=rf"{operation} at .*defects\.cu:\d+: there is none before compute capability 8.0"
    ):
        rotated(library, name, x)


def test_libraries_share_nothing(library, x):
    other = Library(compilers.emulated_library(CSRC / "cuda" / "conformance.cu", include=[CSRC]))
    other.clear()
    library.register(x=x)
    with pytest.raises(EmulatorError, match='no buffer "x" is registered'):
        other.traffic("x")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "name", ["missing_barrier", "missing_warp_barrier", "blocks_race", "weak_wait", "missing_wait", "early_refill"]
)
def test_thread_sanitizer_sees_the_race(name, order):
    code, said = sanitized("tsan", name, order)
    assert code == 66, said
    assert "data race" in said and "defects.cu" in said


@pytest.mark.parametrize("variant", ["asan", "tsan"])
@pytest.mark.parametrize("name", ["divergent_barrier", "deadlock", "early_return", "misaligned_copy", "divergent_warp"])
def test_a_failure_is_told_as_such_under_a_sanitizer(name, variant):
    code, said = sanitized(variant, name)
    assert code == 3 and said.startswith(f"{name}: "), said


@pytest.mark.parametrize("name", ["out_of_bounds", "copy_out_of_bounds", "shared_out_of_bounds"])
def test_address_sanitizer_sees_the_bounds(name):
    code, said = sanitized("asan", name)
    assert code == 67, said
    assert "heap-buffer-overflow" in said or "index 64 out of bounds" in said
