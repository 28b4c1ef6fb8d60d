# SPDX-License-Identifier: Apache-2.0
"""The file layer: safetensors files and adapters' folders are checked before use, and read in pieces."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from gralora_ext.checkpoint.safetensors_file import SafetensorsFile, SafetensorsWriter
from gralora_ext.program.errors import FileError


def write_raw(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_reads_what_the_library_writes(tmp_path):
    tensors = {
        "bf16": torch.randn(3, 5).bfloat16(),
        "half": torch.randn(4).half(),
        "single": torch.randn(2, 2, 2),
        "whole": torch.arange(7),
        "scalar": torch.tensor(2.5),
        "nothing": torch.empty(0, 4),
        "truth": torch.tensor([True, False]),
        'name ü "quoted" \\': torch.ones(1),
    }
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    with SafetensorsFile(tmp_path / "a.safetensors") as file:
        assert file.metadata == {"format": "pt"}
        assert set(file.tensors) == set(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(file.read(name), tensor) and file.read(name).dtype == tensor.dtype


def test_reads_a_piece_of_a_tensor_into_a_given_buffer(tmp_path):
    save_file({"w": torch.arange(1000, dtype=torch.int32)}, tmp_path / "a.safetensors")
    with SafetensorsFile(tmp_path / "a.safetensors") as file:
        buffer = torch.empty(10, dtype=torch.int32)
        file.read_into(file.tensors["w"].begin + 4 * 500, buffer.numpy())
        assert buffer.tolist() == list(range(500, 510))


def test_the_library_reads_what_is_written_in_pieces(tmp_path):
    wide, odd, bytes_ = torch.randn(6, 4), torch.randn(3).bfloat16(), torch.arange(3, dtype=torch.uint8)
    path = tmp_path / "a.safetensors"
    writer = SafetensorsWriter(
        path, [("odd", "BF16", (3,)), ("bytes", "U8", (3,)), ("wide", "F32", (6, 4))], {"a": "b"}
    )
    flat = wide.reshape(-1).view(torch.uint8).numpy()
    begin = writer.tensors["wide"].begin
    writer.write(begin + 48, flat[48:])
    writer.write(begin, flat[:48])
    writer.write(writer.tensors["odd"].begin, odd.view(torch.uint8).numpy())
    writer.write(writer.tensors["bytes"].begin, bytes_.numpy())
    writer.finish()
    writer.close()
    read = load_file(path)
    assert torch.equal(read["wide"], wide) and torch.equal(read["odd"], odd) and torch.equal(read["bytes"], bytes_)


MALFORMED = {
    "empty file": (b"", None),
    "length beyond the file": ({}, 100),
    "length beyond the limit": ({}, 1 << 62),
    "no JSON": (b"[1, 2]", None),
    "cut JSON": (b'{"a":', None),
    "not UTF-8": (b'{"\xff\xff":1}', None),
    "half a surrogate": (b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', None),
    "behind the end": (b"{} {}", None),
    "two tensors of a name": (b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), None),
    "two fields of a name": (b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', None),
    "unknown dtype": ({"a": entry("F33")}, None),
    "dtype a number": ({"a": entry(1)}, None),
    "a field more": ({"a": {**entry(), "x": 1}}, None),
    "a field less": ({"a": {"dtype": "F32", "shape": [2]}}, None),
    "negative size": ({"a": entry(shape=(-2,))}, None),
    "size a float": (b'{"a":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}}', None),
    "size NaN": (b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', None),
    "size true": ({"a": entry(shape=(True, 2))}, None),
    "huge shape": ({"a": entry(shape=(2**62, 2**62))}, None),
    "huge shape that wraps to the span": ({"a": entry(shape=(2**63 - 1, 2**63 - 1))}, None),
    "huge with a zero": ({"a": entry(shape=(2**64, 0), offsets=(0, 0)), "b": entry()}, None),
    "digits without end": (b'{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,8]}}' % (b"9" * 4000), None),
    "hundreds of dimensions": ({"a": entry(shape=(1,) * 100 + (2,))}, None),
    "span other than shape": ({"a": entry(shape=(3,))}, None),
    "offsets backwards": ({"a": entry(offsets=(8, 0))}, None),
    "three offsets": ({"a": entry(offsets=(0, 8, 8))}, None),
    "beyond the end": ({"a": entry(offsets=(8, 16))}, None),
    "a hole": ({"a": entry("F32", (1,), (0, 4)), "b": entry("U8", (2,), (6, 8))}, None),
    "an overlap": ({"a": entry(), "b": entry("F32", (1,), (4, 8))}, None),
    "bytes behind": ({"a": entry("F32", (1,), (0, 4))}, None),
    "half a byte": ({"a": entry("F4", (1,), (0, 1)), "b": entry("U8", (7,), (1, 8))}, None),
    "a line break in a name": ({"a\nb": entry()}, None),
    "a long name": ({"a" * 600: entry()}, None),
    "metadata a number": ({"__metadata__": {"a": 1}, "a": entry()}, None),
    "nested deeply": (b'{"a":' + b"[" * 100_000, None),
    "nested in an entry": (b'{"a":{"dtype":' + b"[" * 4000 + b"}}", None),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_file_is_refused_with_its_name(tmp_path, name):
    header, length = MALFORMED[name]
    path = write_raw(tmp_path / "a.safetensors", header, bytes(8), length)
    if name == "empty file":
        path.write_bytes(b"")
    with pytest.raises(FileError, match="a.safetensors"):
        SafetensorsFile(path)


def test_what_is_no_file_is_refused(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder", "nothing"):
        with pytest.raises(FileError, match=name):
            SafetensorsFile(tmp_path / name)


def test_a_pickle_is_never_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (exec, ("raise SystemExit",))

    torch.save(Bomb(), tmp_path / "pytorch_model.bin")
    with pytest.raises(FileError, match="save_pretrained"):
        SafetensorsFile(tmp_path / "pytorch_model.bin")
