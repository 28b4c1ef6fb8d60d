# SPDX-License-Identifier: Apache-2.0
"""The kernels under the sanitizers: no undefined behaviour, no access beyond an array, on the shapes of the C++ unit tests.

Not optimized, which takes a third of the time to compile.
"""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import build_helpers as helpers
import pytest

from gralora_ext import _build_config as config

pytestmark = pytest.mark.build
PROGRAMS = ("test_kernels", "test_bfloat16")
FLAGS = ["-O0", "-g0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unit tests of the kernels with all instruction sets, and AMX's tiles in C++."""
    place = tmp_path_factory.mktemp("sanitized")
    capabilities = config.capability_flags()
    have = [f"-DGRALORA_HAVE_{name.upper()}" for name in capabilities if name != "default"]
    # No folder of this checkout: ccache then has what another one compiled.
    common = ["-std=c++17", "-fopenmp", *FLAGS, "-DGRALORA_EMULATE_AMX", "-Icsrc", "-Itests/cpp"]
    commands = {
        f"{Path(source).stem}.{name}.o": [source, f"-DGRALORA_CPU_CAPABILITY={name}", *flags]
        for name, flags in capabilities.items()
        for source in config.KERNEL_SOURCES
    }
    choosing = [source for source in config.COMMON_SOURCES if source.startswith("csrc/cpu/")]
    commands |= {f"{Path(source).stem}.o": [source, *have] for source in choosing}
    commands |= {f"{name}.o": [f"tests/cpp/{name}.cpp"] for name in PROGRAMS}

    def compile_(item: tuple[str, list[str]]) -> None:
        name, (source, *flags) = item
        command = [*config.compiler(), *common, *flags, "-c", source, "-o", str(place / name)]
        done = subprocess.run(command, cwd=helpers.REPOSITORY, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "0")) or os.cpu_count()) as pool:
        list(pool.map(compile_, commands.items()))
    shared = [name for name in commands if name.removesuffix(".o") not in PROGRAMS]
    for program in PROGRAMS:
        objects = [str(place / name) for name in (f"{program}.o", *shared)]
        subprocess.run([*config.compiler(), *FLAGS, "-fopenmp", *objects, "-o", str(place / program)], check=True)
    return place


@pytest.mark.parametrize("amx", ["0", "auto"], ids=["", "tiles"])
@pytest.mark.parametrize("capability", config.capability_flags())
@pytest.mark.parametrize("program", PROGRAMS)
def test_kernels_run_clean(program: str, capability: str, amx: str, programs: Path) -> None:
    if amx == "auto" and capability != "avx512":
        pytest.skip("tiles are beside AVX-512 alone")
    env = {**os.environ, "GRALORA_EXT_CPU_CAPABILITY": capability, "GRALORA_EXT_CPU_AMX": amx, "OMP_NUM_THREADS": "2"}
    env["ASAN_OPTIONS"] = "detect_leaks=0"  # the scratch that a thread keeps until it ends
    done = subprocess.run([str(programs / program)], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
