# SPDX-License-Identifier: Apache-2.0
"""Builds ``gralora_ext._C``; sources, flags and every decision are in ``gralora_ext/_build_config.py``."""

import importlib.util
import shutil
import sys
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def load_build_config():
    """The module by its file: importing the package would want the extension that is about to be built."""
    spec = importlib.util.spec_from_file_location("_build_config", ROOT / "gralora_ext" / "_build_config.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


config = load_build_config()

if int(setuptools.__version__.split(".")[0]) < 77:  # pip does not look at pyproject's `requires` without isolation
    raise SystemExit(
        f"error: gralora_ext needs setuptools 77 or newer to build, and this is {setuptools.__version__}: "
        f"run `pip install --upgrade setuptools`, then `{config.INSTALL_COMMAND}`."
    )

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:  # an sdist needs no torch
    from setuptools.command.build_ext import build_ext as BuildExtension

    torch = None


class BuildPackage(build_py):
    """setuptools' own, into an empty folder: modules of earlier builds would come into the wheel."""

    def run(self):
        package = Path(self.build_lib).resolve() / "gralora_ext"
        if package != ROOT / "gralora_ext":  # never the sources themselves
            shutil.rmtree(package, ignore_errors=True)
        super().run()


class BuildGralora(BuildExtension):
    """torch's builder, with the kernel objects made first and one sentence where something is missing."""

    def __init__(self, *args, **kwargs):
        config.put_ninja_on_path()  # torch's builder looks for it here
        super().__init__(*args, **kwargs)

    def finalize_options(self):
        super().finalize_options()
        # Always in the tree: an editable install would take a temporary folder and compile everything anew each time.
        self.build_temp = str(ROOT / "build" / f"temp.{self.plat_name}-{sys.implementation.cache_tag}")

    def run(self):
        try:
            if torch is None:
                raise config.BuildError(config.NO_TORCH)
            config.check_tools()
            self.cuda = config.cuda_build(torch.__version__, torch.version.cuda)
        except config.BuildError as error:
            raise SystemExit(f"error: {error}") from None
        super().run()

    def build_extensions(self):
        (extension,) = self.extensions
        # Shared by all Pythons, and all versions of torch: these objects know neither.
        kernels = config.compile_kernels(ROOT / "build" / "kernels", self.cuda)
        extension.extra_objects = [str(path) for path in kernels]
        extension.extra_compile_args += config.common_flags(torch.__version__, cuda=self.cuda)
        extension.extra_link_args += self.cuda.link_flags if self.cuda else []
        super().build_extensions()


def extension():
    if torch is None:
        return Extension("gralora_ext._C", config.COMMON_SOURCES)
    ext = CppExtension("gralora_ext._C", config.COMMON_SOURCES)
    # As system headers, torch's own warnings are not ours.
    ext.extra_compile_args = [f"-isystem{path}" for path in ext.include_dirs]
    ext.include_dirs = [str(ROOT / config.INCLUDE_DIR)]
    return ext


setup(ext_modules=[extension()], cmdclass={"build_ext": BuildGralora, "build_py": BuildPackage})
