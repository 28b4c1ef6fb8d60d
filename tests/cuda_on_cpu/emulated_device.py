# SPDX-License-Identifier: Apache-2.0
"""Two devices for torch, ``emulated:0`` and ``emulated:1``, whose memory is the host's and on which the operations of
gralora_ext are the CUDA kernels on the emulator, reached by the C++ that calls them on CUDA devices.

A plugin of pytest: ``--device emulated`` takes it.
"""

from __future__ import annotations

import ctypes
import functools
from types import ModuleType

import compilers
import pytest
import torch

from gralora_ext import kernels, ops  # noqa: F401  the operations are registered before their kernels

NAME = "emulated"
# Not the current one: a pass that forgets to make it so is launched where its tensors are not.
DEVICE = f"{NAME}:1"
# Of the tests that take a device, by the beginnings of their names, and why
LEFT_OUT = {
    "test_opcheck_passes_gralora[": "opcheck of autograd knows devices of torch's own alone",
    "test_opcheck_passes_beside": "opcheck of autograd knows devices of torch's own alone",
    "test_saved_model_loads_in_a_process": "the process does not have this device",
    "test_an_exported_layer_takes": "the process does not have this device",
    "test_package_offers_the_plugin": "the process does not have this device",
    "test_both_masks_are_the_references_to_the_bit[(30, 1037)": "it takes 15 s",
    "test_gradients_of_a_model_are_the_slopes_of_its_loss[llama": "it takes 20 s, and gpt2's do the same",
}
KERNELS = ("project", "expand", "weight_gradient", "reduce", "merge", "products")


class DeviceModule(ModuleType):
    """What torch looks for in ``torch.emulated``; random numbers are the CPU generator's."""

    is_available = staticmethod(lambda: True)
    is_initialized = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 2)
    current_device = staticmethod(lambda: 0)
    device = staticmethod(lambda which: torch.accelerator.device_index(getattr(which, "index", which)))
    _is_in_bad_fork = staticmethod(lambda: False)
    manual_seed_all = staticmethod(lambda seed: None)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])
    get_rng_state = staticmethod(lambda device=None: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, device=None: torch.set_rng_state(state))


@functools.cache
def install() -> ctypes.CDLL:
    library = compilers.torch_device()
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, DeviceModule(f"torch.{NAME}"))
    torch.ops.load_library(library)
    torch.utils.generate_methods_for_privateuse1_backend(for_tensor=True, for_module=True, for_storage=True)
    # Neither the default stream nor that of another thread
    torch.accelerator.set_stream(torch.Stream(device=DEVICE))
    torch.accelerator.set_device_index(0)
    why_not = kernels._why_not
    kernels._why_not = lambda kind, index: None if kind == NAME else why_not(kind, index)
    loaded = ctypes.CDLL(str(library))
    loaded.gralora_device_launches.restype = ctypes.c_int64
    return loaded


def launches() -> dict[str, int]:
    """How often each kernel was launched so far"""
    return {name: install().gralora_device_launches(name.encode()) for name in KERNELS}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for name, reason in LEFT_OUT.items():
            if item.name.startswith(name):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counted = ", ".join(f"{name} {count}" for name, count in launches().items())
    terminalreporter.write_line(f"launched on the emulator: {counted}")
