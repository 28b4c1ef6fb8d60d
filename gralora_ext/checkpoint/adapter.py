# SPDX-License-Identifier: Apache-2.0
"""An adapter's folder, GraLoRA's or LoRA's: what each layer has, and what is trained whole.

Names of layers are those of the modules that PEFT has put the adapter on. Tensors are read layer by layer, when they are asked for.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from .._gralora_k import plain_k
from ..program.errors import FileError
from .adapter_config import CONFIG, WEIGHTS, check_config, is_number, read_config, values_of_layers
from .header import TensorInfo
from .safetensors_file import HOW_TO_CONVERT, PICKLES, SafetensorsFile

_PREFIX = "base_model.model."
_PARTS = {
    "GRALORA": {
        "gralora_A": "A",
        "gralora_B": "B",
        "gralora_A_general.weight": "A_general",
        "gralora_B_general.weight": "B_general",
    },
    "LORA": {"lora_A.weight": "A", "lora_B.weight": "B"},
}
_FLOATS = ("F32", "BF16", "F16", "F64")


@dataclass(frozen=True)
class Layer:
    """What an adapter has for one layer: ``ΔW`` is that of :func:`gralora_ext.ops.merge_` with :meth:`stored` and ``scaling``."""

    name: str
    in_features: int  # N
    out_features: int  # M
    k: int
    r: int
    h: int
    scaling: float
    file: SafetensorsFile
    parts: dict[str, TensorInfo]  # A, B, and where h > 0 A_general and B_general
    is_lora: bool

    def stored(self) -> dict[str, Tensor]:
        """A ``[k, N/k, r]``, B ``[k, r, M/k]``, and where h > 0 A_general ``[h, N]`` and B_general ``[M, h]``.

        They have the file's dtype where all have one that float32 holds, and float32 else. A LoRA is a GraLoRA with k = 1.
        """
        read = {part: self.file.read(info.name) for part, info in self.parts.items()}
        dtypes = {tensor.dtype for tensor in read.values()}
        if len(dtypes) > 1 or torch.float64 in dtypes:
            read = {part: tensor.to(torch.float32) for part, tensor in read.items()}
        if self.is_lora:
            return {"A": read["A"].T.unsqueeze(0), "B": read["B"].T.unsqueeze(0)}
        return read

    @property
    def nbytes(self) -> int:
        return 4 * sum(info.numel for info in self.parts.values())


class Adapter:
    """An open adapter: ``layers`` by the names of their modules, and ``whole``, tensors by the names of the parameters
    that they take the place of (``modules_to_save``, trained biases, embeddings).

    Raises:
        FileError: a file cannot be read, a field or a tensor is not what it must be, or the adapter is of a kind that has no
            such layers; one sentence with the file, what was expected and what came.
    """

    def __init__(self, folder: Path, config: dict[str, Any] | None = None):
        """``config`` takes the place of the file's."""
        self.folder = folder
        self.config = read_config(folder) if config is None else config
        check_config(folder / CONFIG, self.config)
        self.kind = str(self.config["peft_type"])
        self.file = SafetensorsFile(weights_of(folder))
        try:
            parts, self.whole = self._sorted_tensors()
            self._patterns = {
                field: values_of_layers(folder / CONFIG, field, self.config.get(field), sorted(parts))
                for field in ("rank_pattern", "alpha_pattern", "k_pattern")
            }
            self.layers = {name: self._layer(name, parts[name]) for name in sorted(parts)}
            if not self.layers and not self.whole:
                raise FileError(f"{self.file.path} holds no tensor: expected those of a {self.kind} adapter")
        except BaseException:
            self.file.close()
            raise

    @property
    def fan_in_fan_out(self) -> bool:
        """What the configuration says of all layers; the shape of a weight that is not square says it better."""
        return bool(self.config.get("fan_in_fan_out"))

    @property
    def files(self) -> list[Path]:
        return [self.folder / CONFIG, self.file.path]

    def check_finite(self) -> None:
        """Reads all tensors once; a FileError with the first that holds a NaN or an infinity."""
        for info in self.file.tensors.values():
            if info.dtype in _FLOATS and not self.file.is_finite(info):
                raise FileError(
                    f"{self.file.path}: {info.name} holds NaN or infinity: its training diverged, or the file is damaged"
                )

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _sorted_tensors(self) -> tuple[dict[str, dict[str, TensorInfo]], dict[str, TensorInfo]]:
        parts: dict[str, dict[str, TensorInfo]] = {}
        whole: dict[str, TensorInfo] = {}
        for key, info in self.file.tensors.items():
            if not key.startswith(_PREFIX):
                raise FileError(
                    f"{self.file.path}: expected tensors whose names begin with {_PREFIX}, as PEFT writes them, got {key!r}"
                )
            name = key.removeprefix(_PREFIX)
            layer, part = _split(name, _PARTS[self.kind])
            if part:
                parts.setdefault(layer, {})[part] = info
                continue
            foreign = re.search(r"\b(gralora_|lora_|trainable_tokens_|token_adapter)\w*", name)
            if foreign:
                raise FileError(
                    f"{self.file.path}: {key} is not of a plain linear layer with a {self.kind} adapter, and cannot be merged "
                    "in files: load the model with PEFT and merge it there"
                )
            if ".original_module." not in name:  # what is frozen beside a module that is trained whole
                whole.setdefault(name.replace(".base_layer.", ".").replace(".modules_to_save.", "."), info)
        for info in (info for layer in parts.values() for info in layer.values()):
            if info.dtype not in _FLOATS:
                raise FileError(
                    f"{self.file.path}: {info.name} has dtype {info.dtype}: expected one of {', '.join(_FLOATS)}"
                )
        return parts, whole

    def _layer(self, name: str, parts: dict[str, TensorInfo]) -> Layer:
        path = self.file.path
        for part in ("A", "B"):
            if part not in parts:
                raise FileError(f"{path}: layer {name} has no {part}: expected both A and B")
        if ("A_general" in parts) != ("B_general" in parts):
            raise FileError(f"{path}: layer {name} has one of A_general and B_general: expected both or neither")
        shapes = {part: info.shape for part, info in parts.items()}
        if self.kind == "LORA":
            N, M, k, r, h = self._check_lora(name, shapes)
        else:
            N, M, k, r, h = self._check_gralora(name, shapes)
        return Layer(name, N, M, k, r, h, self._scaling(name, r + h), self.file, parts, self.kind == "LORA")

    def _check_lora(self, name: str, shapes: dict[str, tuple[int, ...]]) -> tuple[int, int, int, int, int]:
        A, B = shapes["A"], shapes["B"]
        if len(A) != 2 or len(B) != 2 or A[0] != B[1] or 0 in (*A, *B):
            raise FileError(
                f"{self.file.path}: layer {name}: expected lora_A [r, N] and lora_B [M, r] of a linear layer, got shapes "
                f"{list(A)} and {list(B)}"
            )
        self._check_rank(name, A[0])
        return A[1], B[0], 1, A[0], 0

    def _check_gralora(self, name: str, shapes: dict[str, tuple[int, ...]]) -> tuple[int, int, int, int, int]:
        A, B = shapes["A"], shapes["B"]
        if len(A) != 3 or len(B) != 3 or A[0] != B[0] or A[2] != B[1] or 0 in (*A, *B) or A[2] % A[0]:
            raise FileError(
                f"{self.file.path}: layer {name}: expected gralora_A [k, N/k, r] and gralora_B [k, r, M/k] with r divisible by "
                f"k, got shapes {list(A)} and {list(B)}"
            )
        k, N, M, r = A[0], A[0] * A[1], B[0] * B[2], A[2]
        h = 0
        if "A_general" in shapes:
            Ag, Bg = shapes["A_general"], shapes["B_general"]
            h = Ag[0] if Ag else 0
            if Ag != (h, N) or Bg != (M, h) or h == 0:
                raise FileError(
                    f"{self.file.path}: layer {name}: expected gralora_A_general [h, {N}] and gralora_B_general [{M}, h], got "
                    f"shapes {list(Ag)} and {list(Bg)}"
                )
        said = self.config.get("hybrid_r", 0)
        if h != said:
            raise FileError(
                f"{self.folder / CONFIG}: hybrid_r is {_short(said)}, but layer {name} has h = {h} in {WEIGHTS}"
            )
        self._check_rank(name, r)
        said = self._patterns["k_pattern"].get(name, plain_k(self.config.get("gralora_k", 2)))
        if said not in (k, "auto"):
            raise FileError(
                f"{self.folder / CONFIG}: gralora_k is {_short(said)}, but layer {name} has k = {k} in {WEIGHTS}"
            )
        return N, M, k, r, h

    def _check_rank(self, name: str, r: int) -> None:
        said = self._patterns["rank_pattern"].get(name, self.config.get("r"))
        if said != r or isinstance(said, bool):
            raise FileError(f"{self.folder / CONFIG}: r is {_short(said)}, but layer {name} has r = {r} in {WEIGHTS}")

    def _scaling(self, name: str, ranks: int) -> float:
        """s = alpha / (r + h), with rslora alpha / sqrt(r + h)."""
        field, default = ("lora_alpha", 8) if self.kind == "LORA" else ("alpha", 64)
        alpha = self._patterns["alpha_pattern"].get(name, self.config.get(field, default))
        if not is_number(alpha):
            raise FileError(
                f"{self.folder / CONFIG}: {field}: expected a number for layer {name}, got {str(alpha)[:60]}"
            )
        return alpha / math.sqrt(ranks) if self.config.get("use_rslora") else alpha / ranks


def weights_of(folder: Path) -> Path:
    """The file with the adapter's tensors, which need not be there; a FileError where there is a pickle in its place."""
    path = folder / WEIGHTS
    if not path.exists():
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES and p.stem == "adapter_model")
        if pickles:
            raise FileError(f"{folder} has {pickles[0]} in place of {WEIGHTS}: {HOW_TO_CONVERT}")
    return path


def _split(name: str, parts: dict[str, str]) -> tuple[str, str]:
    return next(((name[: -len(end) - 1], part) for end, part in parts.items() if name.endswith(f".{end}")), ("", ""))


def _short(value: object) -> str:
    return repr(value)[:60]
