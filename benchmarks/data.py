"""The tensors of a case, the same for all contenders."""

from __future__ import annotations

import torch
from torch import Tensor

from .shapes import Shape

SEED = 0


class Data:
    """``x``, ``base``, ``grad`` (the gradient of y) and the adapter, with the adapter's share of y as large as base's.

    All contenders add into the one ``base``, as into the output of a base layer. Its values grow from call to call,
    which changes no time; :mod:`benchmarks.accuracy` works on copies.
    """

    def __init__(self, shape: Shape, device: torch.device):
        self.shape, self.device = shape, device
        self._generator = torch.Generator(device).manual_seed(SEED)
        s = shape
        self.x = self.normal(1, s.T, s.N, dtype=s.x_dtype).requires_grad_()
        self.base = self.normal(1, s.T, s.M, dtype=s.x_dtype)
        self.grad = self.normal(1, s.T, s.M, dtype=s.x_dtype)
        self.adapter = {
            "A": self.parameter(s.k, s.N // s.k, s.r, scale=(s.N / s.k) ** -0.5),
            "B": self.parameter(s.k, s.r, s.M // s.k, scale=s.r**-0.5),
        }
        if s.h:
            self.adapter["A_general"] = self.parameter(s.h, s.N, scale=s.N**-0.5)
            self.adapter["B_general"] = self.parameter(s.M, s.h, scale=s.h**-0.5)

    def parameter(self, *size: int, scale: float) -> torch.nn.Parameter:
        """Normal values of deviation ``scale`` in the adapter's dtype."""
        return torch.nn.Parameter(self.normal(*size, dtype=self.shape.adapter_dtype, scale=scale))

    def normal(self, *size: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=self._generator, device=self.device) * scale).to(dtype)
