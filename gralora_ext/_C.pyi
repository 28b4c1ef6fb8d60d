# SPDX-License-Identifier: Apache-2.0
from typing import TypedDict

from torch import Tensor

class Build(TypedDict):
    mark: str
    torch: str
    compiler: str
    cxx_standard: int
    python: str
    cuda_archs: list[str]

def cpu_capability() -> str: ...
def cpu_amx() -> bool: ...
def tokens_for_one_operation() -> int: ...
def one_product_is_quicker() -> bool: ...
def explain(case: dict[str, object], machine: dict[str, object] = ...) -> dict[str, dict[str, object]]: ...
def gralora_into(
    x: Tensor,
    base: Tensor,
    A: Tensor,
    B: Tensor,
    A_general: Tensor | None,
    B_general: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    /,
) -> Tensor: ...
def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    A_general: Tensor | None,
    B_general: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    own_gemm: bool,
    /,
) -> Tensor: ...
def merge_into(
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    A_general: Tensor | None,
    B_general: Tensor | None,
    scaling: float,
    fan_in_fan_out: bool,
    /,
) -> None: ...
def needs_plain_torch() -> bool: ...
def may_be_one_operation(x: Tensor, least: int, /) -> bool: ...
def may_write_into(base: Tensor, x: Tensor, /) -> bool: ...
def compiled_capabilities() -> list[str]: ...
def num_threads() -> int: ...
def build() -> Build: ...
def run_cuda_instruction(name: str, arrays: list[int]) -> None: ...  # where cuda_archs is not empty
