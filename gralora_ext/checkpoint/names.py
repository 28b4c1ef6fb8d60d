# SPDX-License-Identifier: Apache-2.0
"""Which tensor of a base model's files is which parameter of the model in memory, whose names adapters use.

They are mostly the same. Where they are not, transformers itself says how it renames while it loads: the model is made without
memory (on ``meta``), and transformers' conversion mapping is asked about each tensor. The files keep their names.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.hooks import RemovableHandle

from ..program.errors import FileError
from .adapter import Adapter
from .base import CONFIG, BaseModel

_PROGRAM = "from gralora_ext.checkpoint.names import main; main()"
_LOADED = "transformers.modeling_utils"
_SECONDS = 600
_MORE_PARAMETERS = 1000  # those of a head, or of a part that the files do not have


@dataclass
class Names:
    """Of the parameters that adapters name, and those that share memory with them:"""

    tensors: dict[str, str]  # the names in the base's files
    tied: dict[str, str] = field(default_factory=dict)  # parameters by those that they share memory with
    converted: list[str] = field(default_factory=list)  # what transformers computes from tensors of other names
    new: dict[str, list[int]] = field(default_factory=dict)  # shapes of what the model has and the files lack
    transposed: dict[str, bool] = field(default_factory=dict)  # by layer, where transformers was asked: a Conv1D
    model_class: str = ""  # where transformers was asked
    num_labels: int = 0

    def of(self, parameter: str, adapter: Adapter, base: BaseModel) -> str:
        """The tensor of a parameter that ``adapter`` names; a FileError with both names where there is none."""
        found = self.tensors.get(parameter)
        if found is not None:
            return found
        file = adapter.file.path
        if parameter in self.converted:
            raise FileError(
                f"{file}: {parameter} is made by transformers from tensors of other names and shapes in {base.folder}, and cannot "
                "be merged in files: load the model with PEFT and merge it there"
            )
        raise FileError(
            f"{file}: expected the base model of this adapter, with a tensor {parameter}, but {base.folder} has none of that "
            f"name; the one that is most like it is {_nearest(parameter, base)}"
        )


def names_of(base: BaseModel, adapters: list[Adapter]) -> Names:
    """The names of ``base`` as the ``adapters`` use them; a FileError where transformers fails over the question."""
    needed = [parameter for adapter in adapters for parameter in parameters_of(adapter)]
    if (
        all(name in base.tensors for name in needed)
        and not any(_may_be_tied(adapter) for adapter in adapters)
        and not _may_be_transposed(base, adapters)
    ):
        return Names({name: name for name in needed})
    if _LOADED in sys.modules or not sys.executable:
        return _ask_transformers(base, adapters)
    # transformers and a model take more memory than a merge may.
    folders = [str(folder.absolute()) for folder in (base.folder, *(adapter.folder for adapter in adapters))]
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM, *folders],
            capture_output=True,
            text=True,
            check=True,
            timeout=_SECONDS,
            cwd="/",
            env={**os.environ, **environment},
        )
        return Names(**json.loads(done.stdout.splitlines()[-1]))
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or [f"exit code {error.returncode}"])[-1][:400]
    except subprocess.TimeoutExpired:
        reason = f"no answer in {_SECONDS} s"
    raise FileError(f"{base.folder}: transformers could not be asked for the names of its parameters: {reason}")


def main() -> None:
    """Prints the names of the model in the first folder of the command line, as the adapters in the others use them."""
    folder, *others = map(Path, sys.argv[1:])
    try:
        names = _ask_transformers(BaseModel(folder), [Adapter(other) for other in others])
    except FileError as error:
        sys.exit(str(error))
    print(json.dumps(asdict(names)))


def parameters_of(adapter: Adapter) -> Iterator[str]:
    """The parameters that an adapter changes."""
    yield from (f"{layer}.weight" for layer in adapter.layers)
    yield from adapter.whole


def _may_be_tied(adapter: Adapter) -> bool:
    """Whether an adapter changes a matrix that may share memory with another one: one trained whole, or outside the blocks."""
    is_head = any(re.search(r"\.\d+\.", layer) is None for layer in adapter.layers)
    return is_head or any(len(info.shape) == 2 for info in adapter.whole.values())


def _may_be_transposed(base: BaseModel, adapters: list[Adapter]) -> bool:
    """Whether an adapter has a layer whose weight is square, and the model has weights that are stored as Conv1D does."""
    square = [
        adapter for adapter in adapters for layer in adapter.layers.values() if layer.in_features == layer.out_features
    ]
    return bool(square) and (any(adapter.fan_in_fan_out for adapter in square) or _has_conv1d(base))


def _has_conv1d(base: BaseModel) -> bool:
    """A bias is as long as its layer's outputs, which are the columns of a Conv1D's weight and the rows of any other's."""
    for name, source in base.tensors.items():
        bias = base.tensors.get(f"{name.removesuffix('weight')}bias")
        shape = source.info.shape
        if bias is not None and len(shape) == 2 and bias.info.shape == shape[1:] != shape[:1]:
            return True
    return False


def _ask_transformers(base: BaseModel, adapters: list[Adapter]) -> Names:
    needed = {parameter for adapter in adapters for parameter in parameters_of(adapter)}
    whole = {parameter for adapter in adapters for parameter in adapter.whole}
    best = Names({name: name for name in needed if name in base.tensors})
    for model in _models(base, adapters):
        names = _renamed(base, model, needed, whole)
        if needed <= {*names.tensors, *names.tied, *names.converted, *names.new}:
            return names
        best = best if len(best.tensors) >= len(names.tensors) else names
    return best


def _models(base: BaseModel, adapters: list[Adapter]) -> Iterator[Any]:
    """The base model on ``meta``, in each class that the adapters and the configuration speak of."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(base.folder, trust_remote_code=False, local_files_only=True)
    except Exception:  # noqa: BLE001  whatever it is, transformers does not know the model: names are taken as they are
        return
    for make in _classes(transformers, base, adapters):
        try:
            with torch.device("meta"), warnings.catch_warnings(), _few_parameters(base):
                warnings.simplefilter("ignore")
                model = make(config)
        except FileError:
            raise
        except Exception:  # noqa: BLE001, S112  a class that does not go with this configuration
            continue
        yield model


def _few_parameters(base: BaseModel) -> RemovableHandle:
    """While it is entered, making a model with many more parameters than the files have tensors is a FileError.

    A configuration may tell of layers without end, which would never be made.
    """
    most = 2 * len(base.tensors) + _MORE_PARAMETERS
    count = 0

    def counted(module: torch.nn.Module, name: str, parameter: torch.Tensor | None) -> None:
        nonlocal count
        count += parameter is not None and parameter.is_meta
        if count > most:
            raise FileError(
                f"{base.folder / CONFIG} tells of a model with more than {most:,} parameters, and its files have "
                f"{len(base.tensors):,} tensors: expected the configuration of these weights"
            )

    return register_module_parameter_registration_hook(counted)


def _classes(transformers: Any, base: BaseModel, adapters: list[Adapter]) -> Iterator[Any]:
    names: list[str] = []
    for adapter in adapters:
        mapping = adapter.config.get("auto_mapping")
        names.append(mapping.get("base_model_class", "") if isinstance(mapping, dict) else "")
    architectures = base.config.get("architectures")
    names += architectures if isinstance(architectures, list) else []
    tasks = {
        "CAUSAL_LM": "AutoModelForCausalLM",
        "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
        "SEQ_CLS": "AutoModelForSequenceClassification",
        "TOKEN_CLS": "AutoModelForTokenClassification",
        "QUESTION_ANS": "AutoModelForQuestionAnswering",
    }
    names += [tasks.get(str(adapter.config.get("task_type")), "") for adapter in adapters]
    for name in dict.fromkeys([*names, "AutoModel"]):
        found = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
        if isinstance(found, type) and hasattr(found, "from_config"):
            yield found.from_config
        elif isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            yield found


def _renamed(base: BaseModel, model: Any, needed: set[str], whole: set[str]) -> Names:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
    from transformers.pytorch_utils import Conv1D

    state = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    asked = {*needed, *tied, *tied.values()}
    tensors: dict[str, str] = {}
    converted: set[str] = set()
    for key in sorted(base.tensors, key=dot_natural_key):  # the order in which transformers renames
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], model.base_model_prefix, state)
        if pattern is None:
            if name in asked:
                tensors[name] = key
            continue
        converter = next(each for each in converters if pattern in each.source_patterns)
        made = {name.replace(converter.target_patterns[0], other) for other in converter.target_patterns}
        converted |= made & asked
    converted -= tensors.keys()
    new = {name for name in whole if name in state} - {*tensors, *tied, *converted}
    shapes = {name: list(state[name].shape) for name in sorted(new)}
    transposed = {
        name: isinstance(module, Conv1D) for name, module in model.named_modules() if f"{name}.weight" in needed
    }
    labels = getattr(model.config, "num_labels", 0)
    return Names(tensors, tied, sorted(converted), shapes, transposed, type(model).__name__, labels)


def _nearest(parameter: str, base: BaseModel) -> str:
    end = parameter.rpartition(".")[2]
    alike = [name for name in base.tensors if name.rpartition(".")[2] == end] or list(base.tensors)
    return next(iter(difflib.get_close_matches(parameter, alike[:2000], n=1, cutoff=0.0)), "none")
