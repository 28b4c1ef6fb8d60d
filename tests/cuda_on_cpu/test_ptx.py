# SPDX-License-Identifier: Apache-2.0
"""The PTX interpreter: single instructions against numpy, and the defects that it must see in what nvcc made."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import compilers
import numpy as np
import pytest
from ptx import Gpu, PtxError

HERE = Path(__file__).resolve().parent
RNG = np.random.default_rng(1)
U32 = RNG.integers(0, 1 << 32, (3, 64), np.uint64).astype(np.uint32)
S32 = U32.view(np.int32)
U64 = RNG.integers(0, 1 << 63, (3, 64), np.uint64)
F32 = RNG.standard_normal((3, 64)).astype(np.float32)

KERNEL = """
.version 9.0
.target sm_80
.visible .entry one(.param .u64 one_a, .param .u64 one_b, .param .u64 one_c, .param .u64 one_result) {{
  .reg .b64 %p<4>; .reg .b64 %offset; .reg .b32 %thread; .reg .pred %q<4>;
  .reg .b16 %h<8>; .reg .{type} %x<4>; .reg .{result} %y;
  mov.u32 %thread, %tid.x;
  ld.param.u64 %p0, [one_a]; ld.param.u64 %p1, [one_b]; ld.param.u64 %p2, [one_c]; ld.param.u64 %p3, [one_result];
  mul.wide.u32 %offset, %thread, {size};
  add.s64 %p0, %p0, %offset; add.s64 %p1, %p1, %offset; add.s64 %p2, %p2, %offset;
  ld.global.{type} %x0, [%p0]; ld.global.{type} %x1, [%p1]; ld.global.{type} %x2, [%p2];
  mul.wide.u32 %offset, %thread, {result_size};
  add.s64 %p3, %p3, %offset;
  {body}
  st.global.{result} [%p3], %y;
  ret;
}}
"""


def one(body: str, inputs: np.ndarray, result: type[np.generic]) -> np.ndarray:
    """``body`` makes %y of %x0, %x1, %x2, the rows of ``inputs``."""
    out = np.zeros(inputs.shape[1], result)
    types = {array.dtype: f"{array.dtype.kind.replace('i', 's')}{8 * array.itemsize}" for array in (inputs, out)}
    text = KERNEL.format(
        body=body,
        type=types[inputs.dtype],
        result=types[out.dtype],
        size=inputs.itemsize,
        result_size=out.itemsize,
    )
    gpu = Gpu(text)
    gpu.launch("one", (1,), (inputs.shape[1],), [gpu.upload(x) for x in (*inputs.copy(), out)])
    return out


def byte(values: np.ndarray, i: int) -> np.ndarray:
    return values >> np.uint32(8 * i) & np.uint32(255)


@pytest.mark.parametrize(
    ("body", "inputs", "expected"),
    [
        ("add.s32 %y, %x0, -5;", S32, S32[0] - 5),
        ("sub.s64 %y, %x0, %x1;", U64.view(np.int64), (U64[0] - U64[1]).view(np.int64)),
        ("mad.lo.s32 %y, %x0, %x1, %x2;", S32, S32[0] * S32[1] + S32[2]),
        ("mul.hi.u32 %y, %x0, %x1;", U32, (U32[0].astype(np.uint64) * U32[1] >> np.uint64(32)).astype(np.uint32)),
        ("mul.hi.s32 %y, %x0, %x1;", S32, (S32[0].astype(np.int64) * S32[1] >> 32).astype(np.int32)),
        ("mad.wide.s32 %y, %x0, %x1, 7;", S32, S32[0].astype(np.int64) * S32[1] + 7),
        ("div.s32 %y, %x0, 1000;", S32, np.trunc(S32[0] / 1000).astype(np.int32)),
        ("rem.s32 %y, %x0, 1000;", S32, np.fmod(S32[0], 1000)),
        ("div.s32 %y, %x0, -1000;", S32, np.trunc(S32[0] / -1000).astype(np.int32)),
        ("rem.u32 %y, %x0, 1000;", U32, U32[0] % 1000),
        ("fma.rn.f32 %y, %x0, %x1, %x2;", F32, (F32[0].astype(float) * F32[1] + F32[2]).astype(np.float32)),
        ("max.f32 %y, %x0, %x1;", F32, np.maximum(F32[0], F32[1])),
        ("max.f32 %y, %x0, 0f7FC00000;", F32, F32[0]),
        ("mul.f32 %y, %x0, 0f3F000000;", F32, F32[0] / 2),
        ("shl.b32 %y, %x0, 33;", U32, U32[0] * 0),
        ("shr.s32 %y, %x0, 40;", S32, np.where(S32[0] < 0, -1, 0).astype(np.int32)),
        ("shr.u32 %y, %x0, 3;", U32, U32[0] >> np.uint32(3)),
        ("shf.l.wrap.b32 %y, %x0, %x0, 13;", U32, U32[0] << np.uint32(13) | U32[0] >> np.uint32(19)),
        ("shf.r.clamp.b32 %y, %x0, %x1, 40;", U32, U32[1]),
        ("lop3.b32 %y, %x0, %x1, %x2, 0x96;", U32, U32[0] ^ U32[1] ^ U32[2]),
        ("lop3.b32 %y, %x0, %x1, %x2, 0xCA;", U32, U32[0] & U32[1] | ~U32[0] & U32[2]),
        ("bfe.u32 %y, %x0, 5, 9;", U32, U32[0] >> np.uint32(5) & np.uint32(511)),
        (
            "bfi.b32 %y, %x0, %x1, 5, 9;",
            U32,
            (U32[0] & np.uint32(511)) << np.uint32(5) | U32[1] & ~np.uint32(511 << 5),
        ),
        ("bfi.b32 %y, %x0, %x1, 24, 16;", U32, U32[0] << np.uint32(24) | U32[1] & np.uint32(0xFFFFFF)),
        ("bfi.b32 %y, %x0, %x1, 5, 0;", U32, U32[1]),
        ("bfi.b32 %y, %x0, %x1, 32, 8;", U32, U32[1]),
        ("bfi.b32 %y, %x0, %x1, 0, 32;", U32, U32[0]),
        (
            "prmt.b32 %y, %x0, %x1, 0x5410;",
            U32,
            U32[0] & np.uint32(0xFFFF) | U32[1] << np.uint32(16),
        ),
        (
            "prmt.b32 %y, %x0, %x1, 0x000F;",
            U32,
            byte(U32[0], 0) * np.uint32(0x01010100) | np.where(byte(U32[1], 3) >= 128, 255, 0).astype(np.uint32),
        ),
        (
            "setp.gt.and.s32 %q0|%q1, %x0, 3, !%q2; selp.s32 %y, 1, 2, %q0;",
            S32,
            np.where(S32[0] > 3, 1, 2).astype("i4"),
        ),
        ("setp.gt.s32 %q0|%q1, %x0, 3; selp.s32 %y, 1, 2, %q1;", S32, np.where(S32[0] > 3, 2, 1).astype("i4")),
        ("setp.ltu.f32 %q0, %x0, 0f7FC00000; selp.f32 %y, %x1, %x2, %q0;", F32, F32[1]),
        ("setp.ne.f32 %q0, %x0, 0f7FC00000; selp.f32 %y, %x1, %x2, %q0;", F32, F32[2]),
        ("mov.b32 {%h0, %h1}, %x0; mov.b32 %y, {%h1, %h0};", U32, U32[0] << np.uint32(16) | U32[0] >> np.uint32(16)),
        ("mov.f32 %y, %x1; @%q0 mov.f32 %y, %x0;", F32, F32[1]),
        ("mov.f32 %y, %x1; @!%q0 bra $L; mov.f32 %y, %x0; $L: add.f32 %y, %y, %x2;", F32, F32[1] + F32[2]),
        ("{ .reg .b16 low; cvt.rn.f16.f32 low, %x0; cvt.f32.f16 %y, low; }", F32, F32[0].astype("f2").astype("f4")),
        ("cvt.rn.f16x2.f32 %y, %x1, %x0;", F32, F32[:2].astype("f2").T.copy().view(np.uint32).ravel()),
        ("cvt.s64.s32 %y, %x0;", S32, S32[0].astype(np.int64)),
        ("cvt.u16.u32 %h0, %x0; cvt.s32.s16 %y, %h0;", U32, U32[0].astype(np.uint16).view(np.int16).astype(np.int32)),
        ("cvt.rzi.s32.f32 %y, %x0;", F32 * 1000, np.trunc(F32[0] * 1000).astype(np.int32)),
        (
            "cvt.rni.u32.f32 %y, %x0;",
            F32 * 1e10,
            np.clip(np.rint((F32 * 1e10)[0].astype("f8")), 0, 2**32 - 1).astype("u4"),
        ),
        ("cvt.rn.f32.s32 %y, %x0;", S32, S32[0].astype(np.float32)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_instruction_is_what_the_isa_says(body, inputs, expected):
    np.testing.assert_array_equal(one(body, np.ascontiguousarray(inputs), expected.dtype.type), expected)


@pytest.mark.parametrize("wide", [False, True], ids=["bf16", "bf16x2"])
def test_bf16_is_rounded_to_the_nearest_even(wide):
    x = np.array([[1.0, 1.00390625, 1.01171875, 1.0078125, -3.1415927, 1e-40, np.inf, 3.4e38]] * 3, np.float32)
    body = "cvt.rn.bf16x2.f32 %y, %x0, %x1;" if wide else "cvt.rn.bf16.f32 %h0, %x0; mov.b32 %y, {%h1, %h0};"
    high = one(body, x, np.uint32) >> np.uint32(16)
    np.testing.assert_array_equal(high, [0x3F80, 0x3F80, 0x3F82, 0x3F81, 0xC049, 0x0001, 0x7F80, 0x7F80])
    back = one("cvt.rn.bf16.f32 %h0, %x0; cvt.f32.bf16 %y, %h0;", x, np.float32)
    np.testing.assert_array_equal(back, (high.astype(np.uint32) << np.uint32(16)).view(np.float32))


def test_a_structure_is_passed_by_its_bytes():
    class Params(ctypes.Structure):
        _fields_ = [("result", ctypes.c_uint64), ("count", ctypes.c_int32), ("scale", ctypes.c_float)]

    text = """
    .entry scaled(.param .align 8 .b8 scaled_0[16]) {
      .reg .b64 %rd<2>; .reg .b32 %r<2>; .reg .f32 %f<3>;
      ld.param.u64 %rd1, [scaled_0]; ld.param.u32 %r1, [scaled_0+8]; ld.param.f32 %f1, [scaled_0+12];
      cvt.rn.f32.s32 %f2, %r1; mul.f32 %f2, %f2, %f1; st.global.f32 [%rd1], %f2; ret;
    }"""
    gpu = Gpu(text)
    result = np.zeros(1, np.float32)
    gpu.launch("scaled", (1,), (1,), [Params(gpu.upload(result), 3, 0.5)])
    assert result[0] == 1.5


PICK = """
.entry pick(.param .u64 pick_0, .param .align 4 .b8 pick_1[12]) {{
  .reg .b64 %rd<4>; .reg .b32 %r<3>;
  mov.u32 %r1, %tid.x; ld.param.u64 %rd1, [pick_0];
  mov.b64 %rd2, pick_1; mul.wide.u32 %rd3, %r1, 4; add.s64 %rd2, %rd2, %rd3; add.s64 %rd1, %rd1, %rd3;
  ld.param.u32 %r2, [%rd2+{offset}]; st.global.u32 [%rd1], %r2; ret;
}}"""


def test_a_parameter_has_an_address():
    gpu = Gpu(PICK.format(offset=4))
    result = np.zeros(2, np.uint32)
    gpu.launch("pick", (1,), (2,), [gpu.upload(result), np.arange(3, dtype=np.uint32).tobytes()])
    np.testing.assert_array_equal(result, [1, 2])


@pytest.mark.parametrize(("offset", "message"), [(8, "out of bounds"), (-8, "out of bounds"), (2, "misaligned")])
def test_a_parameter_has_an_end(offset, message):
    gpu = Gpu(PICK.format(offset=offset))
    with pytest.raises(PtxError, match=message):
        gpu.launch("pick", (1,), (2,), [gpu.upload(np.zeros(2, np.uint32)), bytes(12)])


def test_a_buffer_lies_where_it_is_said_to():
    gpu = Gpu(PICK.format(offset=0))
    result = np.zeros(3, np.uint32)
    assert gpu.upload(result, 1 << 20) == 1 << 20
    with pytest.raises(ValueError, match="there is a buffer at 0x100008"):
        gpu.upload(result, (1 << 20) + 8)
    gpu.launch("pick", (1,), (3,), [1 << 20, np.arange(3, dtype=np.uint32).tobytes()])
    np.testing.assert_array_equal(result, [0, 1, 2])


@pytest.mark.parametrize(
    "body", ["add.sat.f32 %y, %x0, %x1;", "madc.lo.f32 %y, %x0, %x1, %x2;", "cvt.rz.bf16.f32 %h0, %x0;"]
)
def test_what_is_not_known_is_not_passed_over(body):
    with pytest.raises(NotImplementedError, match=re.escape(body.rstrip(";"))):
        one(body, F32, np.float32)


@pytest.fixture(scope="module")
def defects() -> Gpu:
    toolkit = compilers.find_toolkit()
    if toolkit is None or toolkit.nvcc is None:
        pytest.skip("there is no nvcc")
    return Gpu(compilers.ptx(HERE / "defects.cu", 80))


def run_defect(gpu: Gpu, function: str, defect: str) -> tuple[np.ndarray, np.ndarray]:
    listed = re.search(r"enum class Defect \{(.*?)\}", (HERE / "defects.cu").read_text(), re.DOTALL)[1]
    number = [name.strip() for name in listed.split(",")].index(defect)
    mangled = re.compile(rf"\d{function}I\w*6DefectE{number}E")
    (name,) = (name for name in gpu.kernels if mangled.search(name))
    x = np.arange(192, dtype=np.float32).reshape(3, 64)
    result = np.full_like(x, -1)
    gpu.launch(name, (3,), (64,), [gpu.upload(x), gpu.upload(result)])
    return x, result


@pytest.mark.parametrize("function", ["rotate", "rotate_copies", "rotate_refill", "rotate_warp", "rotate_other"])
def test_a_right_kernel_is_right(defects, function):
    x, result = run_defect(defects, function, "None")
    np.testing.assert_array_equal(result, np.roll(x, -1, axis=1))


@pytest.mark.parametrize(
    ("function", "defect", "message"),
    [
        ("rotate", "MissingBarrier", "shared memory race: write then read"),
        ("rotate", "EarlyReturn", "a part of a warp"),
        ("rotate", "Deadlock", "a part of a warp"),
        ("rotate", "Uninitialised", "thread 4 reads uninitialised shared memory"),
        ("rotate", "OutOfBounds", "global access of 4 bytes out of bounds by thread 63"),
        ("rotate", "SharedOutOfBounds", "reads uninitialised shared memory"),
        ("rotate_copies", "WeakWait", "reads uninitialised shared memory"),
        ("rotate_copies", "MissingWait", "reads uninitialised shared memory"),
        ("rotate_copies", "MisalignedCopy", "misaligned access of 16 bytes"),
        ("rotate_copies", "CopyOutOfBounds", "global access of 16 bytes out of bounds"),
        ("rotate_refill", "EarlyRefill", "shared memory race: read then write"),
        ("rotate_warp", "MissingWarpBarrier", "shared memory race: write then read"),
        ("rotate_warp", "DivergentWarp", "the mask does not match the lanes that are here"),
        ("rotate_other", "MisalignedMatrix", "misaligned access of 16 bytes"),
    ],
)
def test_a_defect_is_seen(defects, function, defect, message):
    with pytest.raises(PtxError, match=message):
        run_defect(defects, function, defect)
