# SPDX-License-Identifier: Apache-2.0
"""The sizes of what is measured, the least work of each pass, and which sizes the path's benches take at each level.

Letters: T tokens, N in_features, M out_features, k the grid, r the rank, h the rank of the plain
LoRA beside it; b bytes of an activation, p bytes of an adapter's element.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Shape:
    """One adapter path: ``x [1, T, N]`` and ``base [1, T, M]`` in ``activation``, A and B in ``adapter``."""

    N: int
    M: int
    T: int = 256
    r: int = 32
    k: int = 2
    h: int = 0
    activation: str = "fp32"
    adapter: str = "fp32"
    dropout: float = 0.0

    @property
    def key(self) -> str:
        dtypes = self.activation if self.activation == self.adapter else f"{self.activation}+{self.adapter}"
        hybrid = f" h={self.h}" if self.h else ""
        dropout = f" dropout={self.dropout:g}" if self.dropout else ""
        return f"{self.N}x{self.M} T={self.T} r={self.r} k={self.k}{hybrid} {dtypes}{dropout}"

    @property
    def x_dtype(self) -> torch.dtype:
        return DTYPES[self.activation]

    @property
    def adapter_dtype(self) -> torch.dtype:
        return DTYPES[self.adapter]

    @property
    def parameters(self) -> int:
        """(r+h)(N+M), the same for GraLoRA and for LoRA of rank r+h."""
        return (self.r + self.h) * (self.N + self.M)


@dataclass(frozen=True)
class Work:
    """The least that a pass does: ``flops``, ``bytes`` moved, and ``working_set``, bytes of distinct memory touched."""

    flops: int
    bytes: int
    working_set: int


def forward_work(s: Shape) -> Work:
    """Adding the path to base: 2(r+h)(N+M) FLOPs and b(N+2M) bytes per token.

    Beside the design's bytes per token stand the parameters, p(r+h)(N+M), read once: at T = 1 they
    are nearly all.
    """
    b, p = s.x_dtype.itemsize, s.adapter_dtype.itemsize
    return Work(
        flops=2 * s.parameters * s.T,
        bytes=b * (s.N + 2 * s.M) * s.T + p * s.parameters,
        working_set=b * (s.N + s.M) * s.T + p * s.parameters,
    )


def training_work(s: Shape) -> Work:
    """Forward, dx, and dA with dB: 2(r+h)(N+M) FLOPs each; b(N+2M), b(M+2N) and bN bytes per token.

    The parameters are read in forward and in backward, and their gradients written: 3p(r+h)(N+M)
    bytes.
    """
    b, p = s.x_dtype.itemsize, s.adapter_dtype.itemsize
    return Work(
        flops=6 * s.parameters * s.T,
        bytes=b * (4 * s.N + 3 * s.M) * s.T + 3 * p * s.parameters,
        working_set=2 * b * (s.N + s.M) * s.T + 2 * p * s.parameters,
    )


def layer_work(s: Shape) -> Work:
    """A frozen layer in training as one product (``ops.linear``): y and dx with W + ΔW made for each, and dA with dB.

    4NMT + 2(2NMr/k + 2NMh) FLOPs for y and dx; U and dU anew, dA and dB: 4(r+h)(N+M) per token.
    With dropout 4NMT, and the path's 6(r+h)(N+M). The weight and the parameters are read twice, x
    and g once, y, dx and the gradients written.
    """
    b, p = s.x_dtype.itemsize, s.adapter_dtype.itemsize
    products = 4 * s.N * s.M * s.T
    made, path = 4 * s.N * s.M * (s.r // s.k + s.h) + 4 * s.parameters * s.T, 6 * s.parameters * s.T
    return Work(
        flops=products + (path if s.dropout else made),
        bytes=2 * b * (s.N * s.M + s.T * (s.N + s.M)) + 3 * p * s.parameters,
        working_set=b * s.N * s.M + 2 * b * (s.N + s.M) * s.T + 2 * p * s.parameters,
    )


def merge_work(s: Shape) -> Work:
    """2NMr/k + 2NMh FLOPs; the weight (b bytes each) read and written once, the parameters read once."""
    b, p = s.x_dtype.itemsize, s.adapter_dtype.itemsize
    return Work(
        flops=2 * s.N * s.M * s.r // s.k + 2 * s.N * s.M * s.h,
        bytes=2 * b * s.N * s.M + p * s.parameters,
        working_set=b * s.N * s.M + p * s.parameters,
    )


# (N, M) as they occur: SmolLM2-135M's attention and MLP, a square of a 1B model, Llama-3-8B's
# attention and MLP.
WIDTHS = ((576, 576), (576, 1536), (1536, 576), (2048, 2048), (4096, 4096), (4096, 14336), (14336, 4096))
# (activations, adapter): a float32 model; PEFT's default beside a 16-bit base; everything in 16
# bits.
DTYPE_PAIRS = (("bf16", "fp32"), ("bf16", "bf16"), ("fp16", "fp32"))
SQUARE, SMALL = Shape(2048, 2048), Shape(576, 1536)
WITH_DROPOUT = replace(SQUARE, dropout=0.1)
ALL_BF16_WITH_DROPOUT = replace(WITH_DROPOUT, activation="bf16", adapter="bf16")
# The hardest: PEFT's GEMMs run at twice float32's rate there.
MANY_RANKS_OF_16_BITS = (
    Shape(4096, 4096, r=64, activation="bf16", adapter="bf16"),
    Shape(4096, 14336, T=512, r=128, k=4, activation="bf16", adapter="bf16"),
)
LONG = Shape(4096, 4096, T=8192, activation="bf16")  # with PEFT's default adapters: what a GPU is for


def shapes(level: str) -> list[Shape]:
    """The grid of forward and of forward+backward, without repetitions."""
    return list(dict.fromkeys(_GRIDS[level]()))


def compiled_shapes(level: str) -> set[Shape]:
    """Those of the grid that torch.compile takes part in: a few, since each compiles for many seconds."""
    of_widths = {*(Shape(n, m) for n, m in WIDTHS), replace(SQUARE, T=1), replace(SQUARE, T=2048)}
    return {"tiny": set(), "quick": {SQUARE}, "default": of_widths, "full": of_widths | {LONG}}[level]


def _tiny() -> list[Shape]:
    return [Shape(24, 36, T=3, r=4, k=2, h=2)]


def _quick() -> list[Shape]:
    return [
        *(replace(s, T=t) for s in (SMALL, SQUARE) for t in (1, 256)),
        replace(SQUARE, activation="bf16"),
        replace(SQUARE, h=16),
        WITH_DROPOUT,
        Shape(4096, 4096, T=1024),
    ]


def _default() -> list[Shape]:
    return [
        *(Shape(n, m, T=t) for n, m in WIDTHS for t in (1, 16, 256, 2048)),
        *(replace(SQUARE, r=r) for r in (16, 64, 128)),
        *(replace(SQUARE, k=k) for k in (4, 8)),
        *(replace(SQUARE, r=r, k=k) for r, k in ((16, 8), (64, 4), (128, 8))),
        *(replace(s, h=s.r // 2) for s in (SMALL, SQUARE)),
        *(replace(SQUARE, T=1, r=r, h=h) for r, h in ((8, 0), (8, 8))),
        *(_in(s, *dtypes, T=t) for s in (SMALL, Shape(4096, 4096)) for dtypes in DTYPE_PAIRS for t in (1, 256)),
        *MANY_RANKS_OF_16_BITS,
        WITH_DROPOUT,
        ALL_BF16_WITH_DROPOUT,
    ]


def _full() -> list[Shape]:
    return [
        *(Shape(n, m, T=t) for n, m in WIDTHS for t in (1, 16, 256, 2048, 8192)),
        *(replace(s, r=r, k=k) for s in (SMALL, SQUARE) for r in (16, 32, 64, 128) for k in (2, 4, 8)),
        *(Shape(n, m, h=16) for n, m in WIDTHS),
        *(_in(Shape(n, m), *dtypes, T=t) for n, m in WIDTHS for dtypes in DTYPE_PAIRS for t in (1, 256, 2048)),
        *MANY_RANKS_OF_16_BITS,
        Shape(4096, 4096, T=512, r=256, k=8, activation="bf16", adapter="bf16"),
        WITH_DROPOUT,
        ALL_BF16_WITH_DROPOUT,
        LONG,
    ]


def _in(shape: Shape, activation: str, adapter: str, T: int) -> Shape:
    return replace(shape, activation=activation, adapter=adapter, T=T)


_GRIDS = {"tiny": _tiny, "quick": _quick, "default": _default, "full": _full}
