"""The sizes of what is measured, and the least work of each pass (the design's "What it must cost").

Letters: T tokens, N in_features, M out_features, k the grid, r the rank, h the rank of the plain LoRA beside it; b bytes
of an activation, p bytes of an adapter's element.
"""

from __future__ import annotations

from dataclasses import dataclass

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

    Beside the design's bytes per token stand the parameters, p(r+h)(N+M), read once: at T = 1 they are nearly all.
    """
    b, p = s.x_dtype.itemsize, s.adapter_dtype.itemsize
    return Work(
        flops=2 * s.parameters * s.T,
        bytes=b * (s.N + 2 * s.M) * s.T + p * s.parameters,
        working_set=b * (s.N + s.M) * s.T + p * s.parameters,
    )


def training_work(s: Shape) -> Work:
    """Forward, dx, and dA with dB: 2(r+h)(N+M) FLOPs each; b(N+2M), b(M+2N) and bN bytes per token.

    The parameters are read in forward and in backward, and their gradients written: 3p(r+h)(N+M) bytes.
    """
    b, p = s.x_dtype.itemsize, s.adapter_dtype.itemsize
    return Work(
        flops=6 * s.parameters * s.T,
        bytes=b * (4 * s.N + 3 * s.M) * s.T + 3 * p * s.parameters,
        working_set=2 * b * (s.N + s.M) * s.T + 2 * p * s.parameters,
    )


def layer_work(s: Shape) -> Work:
    """A frozen layer in training as one product (``ops.linear``): y and dx with W + ΔW made for each, and dA with dB.

    4NMT + 2(2NMr/k + 2NMh) FLOPs for y and dx; U and dU anew, dA and dB: 4(r+h)(N+M) per token. With dropout 4NMT, and the
    path's 6(r+h)(N+M). The weight and the parameters are read twice, x and g once, y, dx and the gradients written.
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
