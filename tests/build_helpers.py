# SPDX-License-Identifier: Apache-2.0
"""What the build tests share: a source tree like an unpacked sdist, environments, and one probe run against every build."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "gralora_ext"

# What jobs leave beside committed results, and no sdist holds.
LEFT_BY_JOBS = [f"benchmarks/results/compare-tiny/{name}" for name in ("logs/run.log", "texts/lora.json", "runs/.lock")]

# Run in a process of its own: prints build_info and the bits of all ops' results as a line of JSON.
PROBE = """
import hashlib, json, torch
import gralora_ext
from gralora_ext import ops

torch.manual_seed(0)
digest = hashlib.sha256()

def take(*tensors):
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())

for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    x = torch.randn(2, 19, 60).to(dtype).requires_grad_()
    base = torch.randn(2, 19, 90).to(dtype)
    A, B = torch.randn(3, 20, 6, requires_grad=True), torch.randn(3, 6, 30, requires_grad=True)
    Ag, Bg = torch.randn(4, 60, requires_grad=True), torch.randn(90, 4, requires_grad=True)
    torch.manual_seed(1)
    y = ops.gralora(x, base, A, B, scaling=0.5, A_general=Ag, B_general=Bg, dropout_p=0.25)
    y.float().square().sum().backward()
    with torch.no_grad():
        weight = ops.merge_(torch.randn(90, 60).to(dtype), A, B, scaling=0.5, A_general=Ag, B_general=Bg)
        take(y, x.grad, A.grad, B.grad, Ag.grad, Bg.grad, weight, ops.delta_weight(A, B, scaling=0.5))
reference = gralora_ext.reference.delta_weight(A, B, scaling=0.5)
error = (ops.delta_weight(A, B, scaling=0.5) - reference).norm() / reference.norm()
print(json.dumps({
    "digest": digest.hexdigest(), "error": error.item(), "package": gralora_ext.__file__,
    "info": gralora_ext.build_info(), "torch_capability": torch.backends.cpu.get_cpu_capability(),
}))
"""


def environment(**changes: str) -> dict[str, str]:
    """This process's environment without what would steer a build or an import, then ``changes``.

    Without optimization it takes a quarter of the time; what the tests compare is compiled with the same flags everywhere.
    """
    steering = (
        "PYTHONPATH",
        "CPPFLAGS",
        "CFLAGS",
        "CC",
        "CXX",
        "DEBUG",
        "CUDA_HOME",
        "CUDA_PATH",
        "TORCH_CUDA_ARCH_LIST",
    )
    kept = {k: v for k, v in os.environ.items() if k not in steering and not k.startswith("GRALORA_EXT_")}
    path = os.pathsep.join((str(Path(sys.executable).parent), kept.get("PATH", os.defpath)))
    quick = {"CXXFLAGS": "-O0", "NVCC_APPEND_FLAGS": "-Xcicc -O0 -Xptxas -O1"}
    # Where c++ is ccache, it has the objects of earlier runs, which lay in other temporary folders.
    quick |= {"CCACHE_BASEDIR": tempfile.gettempdir(), "CCACHE_NOHASHDIR": "1"}
    return {**kept, "PATH": path, **quick, "OMP_NUM_THREADS": "2", **changes}


def run(*command: object, env: dict[str, str], cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs ``command`` and captures its output, which a failure shows."""
    result = subprocess.run(
        [str(part) for part in command],
        check=False,
        env=env,
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=600,
    )
    assert not check or result.returncode == 0, f"{command} exited with {result.returncode}:\n{result.stdout[-8000:]}"
    return result


def probe(python: object = sys.executable, *, env: dict[str, str], cwd: Path) -> dict[str, Any]:
    """What :data:`PROBE` printed under ``env``, run outside the repository so that nothing is imported by accident."""
    return json.loads(run(python, "-c", PROBE, env=env, cwd=cwd).stdout.splitlines()[-1])


def make_sdist(folder: Path) -> Path:
    """The sdist of the repository, made by setuptools' own hook."""
    # From a copy: the hook leaves files beside the sources, and other tests read those.
    copy = folder / "copy"
    left = (".git", ".*venv", "venv", "build", "dist", "*.egg-info", "__pycache__", "*.so", ".*_cache")
    named = shutil.ignore_patterns(*left)

    def ignore(folder: str, names: list[str]) -> set[str]:
        return named(folder, names) | ({"runs", "outputs"} if Path(folder) == REPOSITORY else set())

    shutil.copytree(REPOSITORY, copy, ignore=ignore, symlinks=True)
    for name in LEFT_BY_JOBS:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).touch()
    hook = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    run(sys.executable, "-c", hook, env=environment(), cwd=copy)
    (sdist,) = folder.glob("*.tar.gz")
    return sdist


def unpack(sdist: Path, folder: Path) -> Path:
    """The source tree in ``sdist``, unpacked below ``folder``."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (tree,) = folder.iterdir()
    return tree


def make_environment(folder: Path, *shared: str) -> Path:
    """A virtual environment that also sees ``shared`` folders (default: this one's packages); returns its Python."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, env=environment(), cwd=folder.parent)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    shared = shared or tuple(path for path in sys.path if path.endswith(("site-packages", "dist-packages")))
    (site_packages / "shared.pth").write_text("\n".join(shared) + "\n")
    return folder / "bin" / "python"


def pip(python: object, *arguments: object, env: dict[str, str], cwd: Path, check: bool = True) -> str:
    """pip without build isolation and without the network; returns what it printed."""
    offline = ("--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check")
    return run(python, "-m", "pip", *arguments, *offline, env=env, cwd=cwd, check=check).stdout


def copy_package(folder: Path) -> Path:
    """The Python half of the package alone, in ``folder``."""
    shutil.copytree(PACKAGE, folder / "gralora_ext", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    return folder / "gralora_ext"
