"""What nvcc and ptxas say of the kernels for real devices: no warning, no spill, no local memory."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import compilers
import pytest

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
STRICT = ("-Xptxas", "-v,-warn-spills,-warn-lmem-usage", "-Werror", "all-warnings")


@pytest.mark.skipif(
    compilers.find_toolkit() is None or compilers.find_toolkit().nvcc is None, reason="there is no nvcc"
)
@pytest.mark.parametrize("arch", [80, 90])
def test_kernels_compile_without_warnings_spills_or_local_memory(arch: int, tmp_path: Path) -> None:
    nvcc = compilers.find_toolkit().nvcc
    command = [str(nvcc), "-std=c++17", "-O3", f"-arch=sm_{arch}", *STRICT, f"-I{CSRC}", f"-I{CSRC / 'cuda'}"]
    done = subprocess.run(
        [*command, "-cubin", str(HERE / "kernels.cu"), "-o", str(tmp_path / "kernels.cubin")],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert len(frames) >= 30
    assert set(frames) == {("0", "0", "0")}


def test_kernels_hold_no_atomics() -> None:
    """Sums would depend on the order in which blocks run."""
    sources = sorted((CSRC / "cuda").glob("*.cuh"))
    assert len(sources) > 5
    assert [path.name for path in sources if "atomic" in path.read_text().replace("no atomics", "")] == []
