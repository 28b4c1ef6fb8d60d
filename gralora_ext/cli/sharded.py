# SPDX-License-Identifier: Apache-2.0
"""How the processes of a job hold the model: each all of it (DDP), or a share of each tensor (FSDP2, DeepSpeed's ZeRO).

Accelerate takes that from its environment variables, which its launcher or ``--accelerate-config``
has set. What is written is of whole tensors, so that any number of processes can read it; only
ZeRO's optimizer is left to DeepSpeed's own checkpoints.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from ..program.errors import JobError


def prepare(options: argparse.Namespace, engine: str, device: str) -> None:
    """What libraries must find in the environment before they load a model, or are imported."""
    if engine == "deepspeed":
        os.environ.setdefault("DS_ACCELERATOR", "cpu" if device == "cpu" else "cuda")
        os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = os.environ["ACCELERATE_GRADIENT_CLIPPING"] = "auto"
    # Otherwise all but the first process load a model without weights, and look at those.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"


def own_precision(options: argparse.Namespace, size: int) -> None:
    """The job's options decide how it computes, and not what ``accelerate launch`` has put into the environment."""
    name = "ACCELERATE_MIXED_PRECISION"
    if size > 1 or name in os.environ:
        os.environ[name] = "bf16" if options.bf16 else "fp16" if options.fp16 else "no"


def check(trainer: Any) -> None:
    """That a configuration file of DeepSpeed's own does not contradict the job's options."""
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    differences = plugin.hf_ds_config.mismatches if plugin is not None else []
    if differences:
        said = "; ".join(differences).replace("- ds ", "").replace("vs hf ", "there, and here ")
        raise JobError(f"DeepSpeed's configuration contradicts the job's options, write auto there: {said}")


def forget() -> None:
    """From here on models are loaded whole, by this process alone."""
    from transformers.integrations import deepspeed

    deepspeed.unset_hf_deepspeed_config()


def fsdp_on_cpu() -> None:
    """Accelerate leaves FSDP out where processes are on the CPU; torch's own has no such limit.

    To be called between TrainingArguments, which make Accelerate's state, and its Accelerator.
    """
    from accelerate.state import DistributedType, PartialState

    if PartialState().distributed_type == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which each process may have a share; they all call this. A plain tensor is what it is."""
    if hasattr(tensor, "ds_id"):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([tensor]):
            return tensor.detach().cpu().clone()
    return tensor.full_tensor().detach().cpu() if isinstance(tensor, DTensor) else tensor.detach()


@contextmanager
def outside_training(model: Any) -> Iterator[None]:
    """Forward passes that are no training steps; all processes call this.

    ZeRO-3 gathers a layer's own tensors before its forward, and those that lie in a dictionary of
    the layer only in a step of its engine: here those of the adapter are whole all the time.
    """
    shares = [p for p in model.parameters() if p.requires_grad and hasattr(p, "ds_id")]
    if not shares:
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(shares):
        yield


def adapter_state(model: Any) -> dict[str, Tensor]:
    """The trained tensors of a PeftModel, whole, by their names; all processes call this."""
    return {name: whole(p) for name, p in model.named_parameters() if p.requires_grad}


def whole_optimizer(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's ``state_dict`` with whole tensors, as one process has it; all processes call this."""
    tensors = {
        index: {name: whole(value) if isinstance(value, Tensor) else value for name, value in values.items()}
        for index, values in state["state"].items()
    }
    return {**state, "state": tensors}


def shared_optimizer(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The same with shares of those tensors that have the shape of a parameter of which ``optimizer`` has a share."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def share(value: Any, parameter: Tensor) -> Any:
        if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
            return value
        value = value.to(parameter.device_mesh.device_type)
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)

    tensors = {
        index: {name: share(value, parameters[index]) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    return {**state, "state": tensors}
