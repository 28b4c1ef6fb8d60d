# SPDX-License-Identifier: Apache-2.0
"""What :func:`peft.convert_to_lora` and :func:`peft.save_as_lora` make of a GraLoRA layer: LoRA's factors, without a dense ΔW.

PEFT makes ΔW and decomposes that, which takes tens of seconds for a large layer and is not exact. :func:`gralora_ext.enable` puts this function
where PEFT has its own, which still serves all other layers.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.gralora import GraloraLayer
from peft.tuners.lora import conversion
from torch import Tensor

from .. import lora_factors
from . import weighted

_pefts = conversion._convert_module_to_lora


@torch.no_grad()
def module_to_lora(module: Any, rank: float, adapter_name: str = "default") -> tuple[Tensor, Tensor, int]:
    """lora_A, lora_B and their rank, with the scaling in lora_B, in the adapter's dtype.

    A whole ``rank`` of k·r + h or more, and 1.0, give the exact factors, of rank k·r + h. A smaller whole ``rank`` gives the nearest ones
    of that rank; a fraction, the fewest that hold that part of ‖ΔW‖².
    """
    if not isinstance(module, GraloraLayer):
        return _pefts(module, rank, adapter_name)
    if rank <= 0:
        raise ValueError(f"rank: expected a positive integer, or a fraction of at most 1, got {rank}")
    if adapter_name not in module.gralora_A:  # PEFT leaves out a layer of rank 0
        return torch.empty(0, module.in_features), torch.empty(module.out_features, 0), 0
    tensors = weighted.weights_of(module, adapter_name)
    if rank >= (lora_factors.exact_rank(*tensors) if isinstance(rank, int) else 1.0):
        factors = lora_factors.exact(*tensors)
    else:
        parts = lora_factors.decompose(*tensors)
        kept = rank if isinstance(rank, int) else conversion._find_cutoff_index(parts.S, threshold=rank)
        factors = parts.factors(min(kept, len(parts.S)))
    lora_A, lora_B = lora_factors.scaled(factors, module.scaling[adapter_name], tensors.A.dtype)
    return lora_A.contiguous(), lora_B.contiguous(), lora_A.shape[0]
