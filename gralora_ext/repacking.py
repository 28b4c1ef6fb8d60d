# SPDX-License-Identifier: Apache-2.0
"""bitsandbytes' second layout of 4-bit weights on CPUs with AVX512-BF16, and how a model that is trained is kept from it.

There ``Linear4bit`` repacks its weight at the first evaluation. Its statistics are rounded to bfloat16 for good, the library's own
``dequantize_4bit`` reads the new layout as if it were the old one, and the product with it has no derivative: training after an
evaluation fails, or goes on without the gradients of the layers below. One attribute of the layer switches it off. Needs no extension.
"""

from __future__ import annotations

from typing import Any

from torch import nn

_SWITCH = "support_avx512bf16_for_cpu"


def stop(model: nn.Module) -> None:
    """The 4-bit layers of ``model`` keep the layout in which they are stored; those that were repacked get it back."""
    for module in model.modules():
        if _SWITCH in vars(module):
            setattr(module, _SWITCH, False)
            _undo(module)


def allow(model: nn.Module) -> None:
    """The 4-bit layers of ``model`` are as bitsandbytes made them: what :func:`stop` did, undone."""
    for module in model.modules():
        if _SWITCH in vars(module):
            from bitsandbytes.functional import has_avx512bf16

            setattr(module, _SWITCH, has_avx512bf16())


def _undo(layer: Any) -> None:
    """bitsandbytes' own way back, which leaves statistics that are not quantized themselves as bfloat16 and transposed."""
    state = getattr(layer.weight, "quant_state", None)
    if not getattr(state, "packing_format_for_cpu", False):
        return
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    layer.weight.data, state = _convert_weight_packed_for_cpu_inverse(layer.weight.data, state)
    if state.absmax.dim() == 2:
        state.absmax = state.absmax.t().reshape(-1).float()
    layer.weight.quant_state = layer.quant_state = state
