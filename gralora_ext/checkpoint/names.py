# SPDX-License-Identifier: Apache-2.0
"""Which tensor of a base model's files is which parameter of the model in memory, whose names adapters use.

They are mostly the same. Where they are not, transformers itself says how it renames while it loads: the model is made without
memory (on ``meta``), and transformers' conversion mapping is asked about each tensor. The files keep their names.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from ..program.errors import FileError
from .adapter import Adapter
from .base import BaseModel


class Names:
    """``tensors``: names in the base's files, by names of parameters. ``tied``: parameters by those that they share memory with.

    ``converted``: parameters that transformers computes from tensors of other names, so that no tensor in a file is theirs.
    ``model``: the model on ``meta``, where transformers was asked.
    """

    def __init__(
        self,
        tensors: dict[str, str],
        tied: dict[str, str] | None = None,
        converted: Iterable[str] = (),
        model: Any = None,
    ):
        self.tensors = tensors
        self.tied = tied or {}
        self.converted = frozenset(converted)
        self.model = model
        self.shapes = {} if model is None else {name: tuple(t.shape) for name, t in model.state_dict().items()}

    def is_new(self, parameter: str) -> bool:
        """Whether the model has a parameter that the base's files lack, as the head of another task."""
        known = parameter in self.tensors or parameter in self.tied or parameter in self.converted
        return parameter in self.shapes and not known

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
        nearest = difflib.get_close_matches(parameter, list(self.tensors), n=1, cutoff=0.0)
        like = f"the one that is most like it is {nearest[0]}" if nearest else "it has none"
        raise FileError(
            f"{file}: expected the base model of this adapter, with a tensor {parameter}, but {base.folder} has none of that "
            f"name; {like}"
        )


def names_of(base: BaseModel, adapters: list[Adapter]) -> Names:
    """The names of ``base`` as the ``adapters`` use them."""
    needed = [parameter for adapter in adapters for parameter in parameters_of(adapter)]
    same = {name: name for name in base.tensors}
    whole = [parameter for adapter in adapters for parameter in adapter.whole]
    # A matrix that is trained whole may be tied to another one, of which only transformers knows.
    may_be_tied = any(len(info.shape) == 2 for adapter in adapters for info in adapter.whole.values())
    if all(name in same for name in needed) and not may_be_tied:
        return Names(same)
    best = Names(same)
    for model in _models(base, adapters):
        names = _renamed(base, model)
        known = {*names.tensors, *names.tied, *names.converted, *filter(names.is_new, whole)}
        if all(name in known for name in needed):
            return names
        best = best if any(name in best.tensors for name in needed) else names
    return best


def parameters_of(adapter: Adapter) -> Iterator[str]:
    """The parameters that an adapter changes."""
    yield from (f"{layer}.weight" for layer in adapter.layers)
    yield from adapter.whole


def _models(base: BaseModel, adapters: list[Adapter]) -> Iterator[Any]:
    """The base model on ``meta``, in each class that the adapters and the configuration speak of."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(base.folder, trust_remote_code=False, local_files_only=True)
    except Exception:  # noqa: BLE001  whatever it is, transformers does not know the model: names are taken as they are
        return
    for make in _classes(transformers, base, adapters):
        try:
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield make(config)
        except Exception:  # noqa: BLE001, S112  a class that does not go with this configuration
            continue


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


def _renamed(base: BaseModel, model: Any) -> Names:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    state = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    tensors: dict[str, str] = {}
    converted: set[str] = set()
    for key in sorted(base.tensors, key=dot_natural_key):  # the order in which transformers renames
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], model.base_model_prefix, state)
        if pattern is None:
            tensors[name] = key
            continue
        converter = next(each for each in converters if pattern in each.source_patterns)
        converted.update(name.replace(converter.target_patterns[0], other) for other in converter.target_patterns)
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    return Names(tensors, tied, converted - tensors.keys(), model)
