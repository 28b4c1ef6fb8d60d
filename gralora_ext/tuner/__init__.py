# SPDX-License-Identifier: Apache-2.0
"""GraLoRA for PEFT on fused kernels, in PEFT's own shape: config, layer, model, and the plug-in that puts them in use."""

from .config import GraloraConfig  # first: it tells what is missing where PEFT is too old
from .layer import GraloraLinear
from .model import GraloraModel
from .plugin import Report, accelerate, disable, enable, restore

__all__ = [
    "GraloraConfig",
    "GraloraLinear",
    "GraloraModel",
    "Report",
    "accelerate",
    "disable",
    "enable",
    "restore",
]
