# SPDX-License-Identifier: Apache-2.0
"""torch.export and AOTInductor: a program for any number of tokens, loaded where only gralora_ext is imported."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from core import Mlp, Outcome, adapt, adapted, relative
from torch import Tensor, nn

_LENGTH = 16
# Fewer and more than 64 tokens, and one sequence alone: with any length, and with one
_SIZES = {True: ((2, 8), (3, 5), (1, 33), (8, 16)), False: ((1, _LENGTH), (2, _LENGTH), (8, _LENGTH))}
_LOADERS = {
    "program": "torch.export.load(file).module()",
    "package": "torch._inductor.aoti_load_package(file)",
}


class Logits(nn.Module):
    """Token numbers to a tensor; a PeftModel itself takes any arguments, for which sizes are hard to name."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        result = self.model(ids)
        return result if isinstance(result, Tensor) else result.logits


def model_of(tuner: str, kind: str, hybrid: bool) -> nn.Module:
    if kind == "Llama":
        return Logits(adapted(tuner, hybrid=hybrid)).eval()
    return Logits(adapt(Mlp(), tuner, hybrid=hybrid, target_modules=["first", "second"], task_type=None)).eval()


def run(
    tuner: str, *, strict: bool, kind: str = "MLP", form: str = "program", hybrid: bool = False, any_length: bool = True
) -> Outcome:
    """Exported for any batch and perhaps any length, saved, and loaded in another process, where other sizes are given."""
    with torch.no_grad(), TemporaryDirectory() as folder:
        inputs = [torch.randint(3, 64, size, generator=torch.Generator().manual_seed(1)) for size in _SIZES[any_length]]
        expected_model = model_of("lora" if tuner == "lora" else "peft", kind, hybrid)
        expected = [expected_model(ids) for ids in inputs]

        dims = {0: torch.export.Dim("batch", max=1024)}
        if any_length:
            dims[1] = torch.export.Dim("length", max=64)
        example = torch.randint(3, 64, (4, _LENGTH))
        model = model_of(tuner, kind, hybrid)
        program = torch.export.export(model, (example,), dynamic_shapes=(dims,), strict=strict)
        file = str(Path(folder) / "program.pt2")
        if form == "program":
            torch.export.save(program, file)
        else:
            torch._inductor.aoti_compile_and_package(program, package_path=file)
        torch.save(inputs, f"{folder}/inputs.pt")
        code = f"""
import torch
{"import gralora_ext" if tuner == "ours" else ""}
file, folder = {file!r}, {folder!r}
program = {_LOADERS[form]}
with torch.no_grad():
    torch.save([program(ids) for ids in torch.load(folder + "/inputs.pt")], folder + "/outputs.pt")
"""
        loaded = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=300)
        if loaded.returncode:
            raise RuntimeError(f"in a fresh process: {loaded.stderr.strip().splitlines()[-1]}")
        outputs = torch.load(f"{folder}/outputs.pt")
    return Outcome(max(relative(a, e) for a, e in zip(outputs, expected, strict=True)))


ROWS = {
    "strict, MLP": partial(run, strict=True),
    "strict, MLP, hybrid": partial(run, strict=True, hybrid=True),
    "strict, MLP, one length": partial(run, strict=True, any_length=False),
    "not strict, MLP": partial(run, strict=False),
    "not strict, MLP, hybrid": partial(run, strict=False, hybrid=True),
    "strict, Llama": partial(run, strict=True, kind="Llama"),
    "not strict, Llama": partial(run, strict=False, kind="Llama"),
    "AOTInductor package, MLP": partial(run, strict=False, form="package"),
    "AOTInductor package, MLP, hybrid": partial(run, strict=False, form="package", hybrid=True),
    "AOTInductor package, Llama": partial(run, strict=False, form="package", kind="Llama"),
}
