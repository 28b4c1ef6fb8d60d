# SPDX-License-Identifier: Apache-2.0
"""What a user reads when something is missing: one sentence with the command that mends it, and no traceback."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import build_helpers as helpers
import pytest

from gralora_ext import _build_config as config
from gralora_ext import _loader

LOAD = "from gralora_ext import _loader; _loader.load()"
INFO = "import gralora_ext; print(gralora_ext.build_info()['problem'])\n"


def problem(package: Path, **env: str) -> str:
    """What loading the extension of ``package`` says; build_info must say the same, without failing."""
    env = helpers.environment(PYTHONPATH=str(package.parent), **env)
    loaded = helpers.run(sys.executable, "-c", INFO + LOAD, env=env, cwd=package.parent, check=False)
    assert loaded.returncode == 1
    told, *_, raised = loaded.stdout.strip().splitlines()
    kind, message = raised.split(": ", 1)
    assert kind.rsplit(".")[-1] in ("RuntimeError", "BuildError", "ValueError")
    assert told == message
    return message


def library() -> Path:
    """The native library of this process, whichever way it was built."""
    return Path(_loader.load().__file__)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return helpers.copy_package(tmp_path)


def test_an_extension_that_is_not_built(package: Path) -> None:
    message = problem(package)
    assert message.startswith("the native extension of gralora_ext is not built for Python 3.")
    assert message.endswith("run `pip install --no-build-isolation .` in its source tree.")


def test_an_extension_for_another_python(package: Path) -> None:
    (package / "_C.cpython-38-x86_64-linux-gnu.so").touch()
    assert "it was built for another Python: _C.cpython-38-x86_64-linux-gnu.so" in problem(package)


def test_an_extension_for_another_torch(package: Path) -> None:
    import torch

    content, version = other_torch()
    (package / "_C.abi3.so").write_bytes(content)
    message = problem(package)
    assert f"was built for torch {version}, but torch {torch.__version__} is running" in message
    assert "`pip install --no-build-isolation .`" in message


def other_torch() -> tuple[bytes, str]:
    """The native library, as if it had been built for another torch, and that version."""
    mark = b"gralora_ext built for torch "
    built = library().read_bytes()
    at = built.index(mark) + len(mark)
    version = built[at : built.index(b"\0", at)]
    other = b"1.0" + b"1" * (len(version) - 3)
    return built[:at] + other + built[at + len(other) :], other.decode()


def test_a_checkout_takes_the_installed_extension_where_its_own_is_for_another_torch(
    tree: Path, tmp_path: Path
) -> None:
    own, installed = tree / "gralora_ext" / "_C.abi3.so", tmp_path / "site" / "gralora_ext"
    own.write_bytes(other_torch()[0])
    assert "run `pip install --no-build-isolation --editable .` again" in problem(tree / "gralora_ext")
    installed.mkdir(parents=True)
    shutil.copy(library(), installed / "_C.abi3.so")
    env = helpers.environment(PYTHONPATH=f"{tree}:{tmp_path / 'site'}")
    show = "import gralora_ext; print(gralora_ext.build_info()['path'])"
    assert helpers.run(sys.executable, "-c", show, env=env, cwd=tmp_path).stdout.strip() == str(installed / own.name)


def test_an_extension_of_other_sources_is_told_of(tree: Path, tmp_path: Path) -> None:
    own, source = tree / "gralora_ext" / "_C.abi3.so", tree / "csrc" / "cpu" / "plan.cpp"
    shutil.copyfile(library(), own)
    env = helpers.environment(PYTHONPATH=str(tree))
    os.utime(source)  # a fresh clone beside an extension that was built before is no other source
    assert helpers.run(sys.executable, "-c", LOAD, env=env, cwd=tmp_path).stdout == ""
    source.write_text(source.read_text() + "\n")
    said = helpers.run(sys.executable, "-c", LOAD, env=env, cwd=tmp_path).stdout
    assert f"UserWarning: the native extension of gralora_ext, {own}, was built from other sources than" in said
    assert f"those in {tree}: run `pip install --no-build-isolation --editable .` there." in said


def test_a_checkout_takes_the_installed_extension_where_its_own_is_of_other_sources(tree: Path, tmp_path: Path) -> None:
    own, installed = tree / "gralora_ext" / "_C.abi3.so", tmp_path / "site" / "gralora_ext"
    mark = config.SOURCES_MARK.encode()
    built = library().read_bytes()
    at = built.index(mark) + len(mark)
    own.write_bytes(built[:at] + b"0" * 64 + built[at + 64 :])
    installed.mkdir(parents=True)
    shutil.copy(library(), installed / "_C.abi3.so")
    env = helpers.environment(PYTHONPATH=f"{tree}:{tmp_path / 'site'}")
    show = "import gralora_ext; print(gralora_ext.build_info()['path'])"
    assert helpers.run(sys.executable, "-c", show, env=env, cwd=tmp_path).stdout.strip() == str(installed / own.name)


def test_jit_in_a_folder_that_cannot_be_written(tree: Path) -> None:
    message = problem(tree / "gralora_ext", GRALORA_EXT_JIT="1", TORCH_EXTENSIONS_DIR="/proc/nowhere")
    assert message.startswith("GRALORA_EXT_JIT=1 compiles in /proc/nowhere/gralora_ext-")
    assert message.endswith("set TORCH_EXTENSIONS_DIR to a folder that can.")


def test_an_extension_that_misses_a_symbol_of_torch(package: Path) -> None:
    built = library().read_bytes()
    symbol = b"_ZN2at15get_num_threadsEv\0"
    assert symbol in built
    (package / "_C.abi3.so").write_bytes(built.replace(symbol, b"_ZN2at15get_num_thread5Ev\0"))
    message = problem(package)
    assert "was built for torch" in message and "_ZN2at15get_num_thread5Ev" in message


def test_jit_without_the_source_tree(package: Path) -> None:
    message = problem(package, GRALORA_EXT_JIT="1")
    assert "compiles from the source tree, and there is none" in message
    assert "`unset GRALORA_EXT_JIT`" in message


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("JIT", "yes", "must be 0 or 1"),
        ("CPU_CAPABILITY", "sse9", "default, avx2 or avx512"),
        ("CPU_AMX", "1", "auto or 0"),
    ],
)
def test_a_wrong_word_in_the_environment(name: str, value: str, words: str, package: Path) -> None:
    shutil.copy(library(), package / "_C.abi3.so")
    message = problem(package, **{f"GRALORA_EXT_{name}": value})
    assert f"GRALORA_EXT_{name} must be" in message and words in message and f"'{value}'" in message


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A source tree without its objects, in which builds may fail."""
    helpers.copy_package(tmp_path / "tree")
    for name in ("csrc", "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        path = helpers.REPOSITORY / name
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / "tree" / name)
    return tmp_path / "tree"


def pip_error(python: object, tree: Path, **env: str) -> str:
    """The sentence in pip's output of a build that must fail, and fail without a traceback of ours."""
    output = helpers.pip(python, "wheel", tree, env=helpers.environment(**env), cwd=tree.parent, check=False)
    assert "Traceback" not in output
    (sentence,) = [
        line.split("error: ", 1)[1]
        for line in output.splitlines()
        if "error: gralora_ext" in line or "error: GRALORA" in line
    ]
    return sentence


def test_jit_without_a_compiler(tree: Path) -> None:
    message = problem(tree / "gralora_ext", GRALORA_EXT_JIT="1", CXX="/nonexistent/c++")
    assert message.startswith("gralora_ext needs a C++ compiler, and '/nonexistent/c++' does not run: run `")


def test_jit_with_a_source_that_does_not_compile(tree: Path, tmp_path: Path) -> None:
    (tree / "csrc/cpu/merge.cpp").write_text("#error broken on purpose\n")
    (tree / "csrc/cpu/forward.cpp").write_text("")
    (tree / "csrc/cpu/backward.cpp").write_text("")
    env = helpers.environment(
        PYTHONPATH=str(tree), GRALORA_EXT_JIT="1", TORCH_EXTENSIONS_DIR=str(tmp_path / "extensions")
    )
    output = helpers.run(sys.executable, "-c", LOAD, env=env, cwd=tmp_path, check=False).stdout
    assert "RuntimeError: the compiler refused a source of gralora_ext:" in output
    assert "merge.cpp:1:2: error: #error broken on purpose" in output


def test_install_without_a_compiler(tree: Path) -> None:
    assert "'/nonexistent/c++' does not run" in pip_error(sys.executable, tree, CXX="/nonexistent/c++")


def test_install_that_asks_for_cuda_without_a_toolkit(tree: Path, tmp_path: Path) -> None:
    sentence = pip_error(sys.executable, tree, GRALORA_EXT_CUDA="1", CUDA_HOME=str(tmp_path))
    assert "no CUDA toolkit (nvcc) was found" in sentence


def test_install_without_torch(tree: Path, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    # Not the folder of the script pytest, which is on the path too: there `pip` is a program.
    for folder in (Path(entry) for entry in sys.path if entry.endswith("-packages")):
        for name in ("pip", "setuptools", "setuptools-*.dist-info", "_distutils_hack", "ninja"):
            for path in folder.glob(name):
                (tools / path.name).symlink_to(path)
    python = helpers.make_environment(tmp_path / "bare", str(tools))
    sentence = pip_error(python, tree)
    assert "run `pip install torch`, then `pip install --no-build-isolation .`" in sentence


def test_install_with_an_old_setuptools(tree: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    (old / "setuptools" / "command").mkdir(parents=True)
    (old / "setuptools" / "__init__.py").write_text("__version__ = '65.5.0'\nclass Extension: ...\ndef setup(): ...\n")
    (old / "setuptools" / "command" / "build_py.py").write_text("class build_py: ...\n")
    output = helpers.run(
        sys.executable, "setup.py", env=helpers.environment(PYTHONPATH=str(old)), cwd=tree, check=False
    ).stdout
    assert output.strip().startswith("error: gralora_ext needs setuptools 77 or newer to build, and this is 65.5.0: ")
    assert "`pip install --upgrade setuptools`" in output
