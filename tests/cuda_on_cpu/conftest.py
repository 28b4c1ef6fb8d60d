# SPDX-License-Identifier: Apache-2.0
"""Where all of these tests run, what takes longest to compile is compiled meanwhile, on cores that tests leave idle."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import compilers
import pytest

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="session", autouse=True)
def compiled_meanwhile(request: pytest.FixtureRequest) -> Iterator[None]:
    toolkit = compilers.find_toolkit()
    wanted = {item.path for item in request.session.items} >= set(HERE.glob("test_*.py"))
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 1)) as pool:
        if wanted and toolkit is not None and compilers.compiler() is not None:
            for variant in ("asan", "tsan"):
                pool.submit(compilers.sanitized_kernels, variant)
            pool.submit(compilers.torch_device)
            if toolkit.nvcc is not None:
                for arch in compilers.ARCHS:
                    pool.submit(compilers.kernels_cubin, arch)
        yield  # whoever needs a build that failed tries again, and gets its error
        pool.shutdown(cancel_futures=True)
