# SPDX-License-Identifier: Apache-2.0
"""A model's folder as transformers writes it: which file has which tensor, and what else is in it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from ..program.errors import FileError
from . import adapter_config
from .header import TensorInfo
from .json_text import Malformed, each_member, read_bytes, read_object, read_texts, skip
from .safetensors_file import HOW_TO_CONVERT, PICKLES, SafetensorsFile

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
MOST_INDEX_BYTES = 12 << 20
_MOST_METADATA = 64 << 10  # characters
MOST_SMALL_BYTES = 256 << 20  # tokenizers have up to some 40 MB; larger are weights of another name, or data
MOST_SMALL_FILES = 1000
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin.index.json", ".gguf", ".h5", ".msgpack", ".onnx", ".npz")
_QUANTIZATION = ("quantization_config", "compression_config")
_QUANTIZED = ("F8_", "F6_", "F4")


class Source(NamedTuple):
    """A tensor, the file that it is in, and that file's stamp when its header was read."""

    path: Path
    stamp: tuple[int, ...]
    info: TensorInfo


class BaseModel:
    """A base model's folder: ``tensors`` by name in the order of the files and of their bytes.

    Raises:
        FileError: a file is missing, or is not what it must be, or the weights are quantized; one sentence.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        if not folder.is_dir():
            raise FileError(f"{folder} is not a folder: expected a model's, as save_pretrained writes it")
        self.config = read_object(folder / CONFIG)
        parts = [self.config, *(part for part in self.config.values() if isinstance(part, dict))]
        found = next((part[key] for part in parts for key in _QUANTIZATION if part.get(key)), None)
        if found is not None:
            method = found.get("quant_method") if isinstance(found, dict) else found
            _refuse_quantized(folder / CONFIG, str(method)[:40])
        self.index_metadata: dict[str, Any] = {}
        names = self._file_names()
        self.sharded = names != [SINGLE]
        self.files: dict[str, tuple[int, ...]] = {}
        self.file_metadata: dict[str, dict[str, str]] = {}
        self.tensors: dict[str, Source] = {}
        for name in names:
            self._add_file(name)
        if not self.tensors:
            raise FileError(f"{folder} has no tensor in its files of weights: expected those of a model")
        self._check_index()

    def small_files(self) -> list[str]:
        """The files beside the weights that go with the model, by their names below its folder; not ``config.json``.

        Tokenizer, generation config, licence, code, and the same in folders that have no weights: those that have are other
        models, adapters or checkpoints. Nor an adapter's configuration that lies there too: transformers would look for the adapter
        beside the result.
        """
        not_small = (CONFIG, INDEX, adapter_config.CONFIG)
        found = [name for name in _plain_files(self.folder) if name not in not_small and not _is_weight(name)]
        found += _in_folders(self.folder)
        if len(found) > MOST_SMALL_FILES:
            raise FileError(
                f"{self.folder} has more than {MOST_SMALL_FILES:,} files beside its weights: expected those of a model, so move the "
                "others away"
            )
        return found

    def _file_names(self) -> list[str]:
        if (self.folder / SINGLE).exists():
            return [SINGLE]
        path = self.folder / INDEX
        if not path.exists():
            pickles = sorted(p.name for p in self.folder.iterdir() if p.suffix in PICKLES)
            if pickles:
                raise FileError(f"{self.folder} has {pickles[0]} in place of {SINGLE}: {HOW_TO_CONVERT}")
            raise FileError(
                f"{self.folder} has neither {SINGLE} nor {INDEX}: expected a model as save_pretrained writes it"
            )
        self._weight_map, self.index_metadata = _read_index(path)
        names = sorted(set(self._weight_map.values()))
        for name in names:
            is_name = name == Path(name).name and name.isprintable() and len(name) < 250 and not name.startswith(".")
            if not is_name or not name.endswith(".safetensors"):
                raise FileError(f"{path} names {name[:80]!r}: expected names of safetensors files beside it")
        if not names:
            raise FileError(f"{path} lists no tensor")
        return names

    def _add_file(self, name: str) -> None:
        path = self.folder / name
        with SafetensorsFile(path) as file:
            self.files[name] = file.stamp
            self.file_metadata[name] = file.metadata
            for info in file.tensors.values():
                if info.dtype.startswith(_QUANTIZED):
                    _refuse_quantized(path, f"{info.name} has dtype {info.dtype}")
                if info.name in self.tensors:
                    other = self.tensors[info.name].path.name
                    raise FileError(f"{path} and {other} both have a tensor {info.name[:80]!r}")
                self.tensors[info.name] = Source(path, file.stamp, info)

    def _check_index(self) -> None:
        if not self.sharded:
            return
        for tensor, file in self._weight_map.items():
            if tensor not in self.tensors or self.tensors[tensor].path.name != file:
                raise FileError(f"{self.folder / INDEX} says that {tensor[:80]!r} is in {file}, which does not have it")
        del self._weight_map


def _plain_files(folder: Path) -> list[str]:
    files = (path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith("."))
    return [path.name for path in files if path.stat().st_size <= MOST_SMALL_BYTES]


def _is_weight(name: str) -> bool:
    path = Path(name)
    return name.endswith(_WEIGHTS) or path.suffix in PICKLES or path.stem == "adapter_model"


def _in_folders(folder: Path) -> list[str]:
    """The files in the folders of a folder, by their names below it; not of those that have weights or cannot be read."""
    found: list[str] = []
    for path in sorted(folder.iterdir()):
        is_own = path.is_dir() and not path.is_symlink() and not path.name.startswith((".", "__"))
        if is_own and os.access(path, os.R_OK | os.X_OK) and not any(_is_weight(each.name) for each in path.rglob("*")):
            found += [f"{path.name}/{name}" for name in (*_plain_files(path), *_in_folders(path))]
    return found


def _refuse_quantized(path: Path, how: str) -> NoReturn:
    raise FileError(
        f"{path}: the model is quantized ({how}): merge into the model that it was made of, in bf16, fp16 or fp32, and quantize "
        "the result"
    )


def _read_index(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """The files by the names of their tensors, and the numbers and texts in the metadata."""
    found: dict[str, Any] = {}

    def take(key: str, at: int) -> int:
        if key in found:
            raise Malformed(f"has {key[:80]!r} twice")
        if key == "weight_map":
            found[key], at = read_texts(text, at)
            return at
        if key != "metadata":
            raise Malformed(f"has {key[:80]!r}: expected metadata and weight_map")
        begin = skip(text, at)
        try:
            found[key], length = json.JSONDecoder().raw_decode(text[begin : begin + _MOST_METADATA])
        except (ValueError, RecursionError):
            raise Malformed(f"has a metadata that is no JSON of at most {_MOST_METADATA:,} characters") from None
        return begin + length

    try:
        text = read_bytes(path, MOST_INDEX_BYTES).decode("utf-8")
        at = each_member(text, 0, take)
        if text[at:].strip():
            raise Malformed("has something behind the end of its JSON")
        if "weight_map" not in found:
            raise Malformed("has no weight_map")
    except (Malformed, UnicodeDecodeError) as error:
        raise FileError(f"{path} {error if isinstance(error, Malformed) else 'is not UTF-8'}") from None
    metadata = found.get("metadata", {})
    plain = (
        {key: value for key, value in metadata.items() if _is_plain(key) and _is_plain(value)}
        if isinstance(metadata, dict)
        else {}
    )
    return found["weight_map"], plain


def _is_plain(value: object) -> bool:
    """Whether it is a number or a text that can be written again."""
    return (isinstance(value, str) and value.isprintable()) or (isinstance(value, (int, float)) and abs(value) < 2**63)
