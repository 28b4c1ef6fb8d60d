from typing import TypedDict

class Build(TypedDict):
    mark: str
    torch: str
    compiler: str
    cxx_standard: int
    python: str
    cuda_archs: list[str]

def cpu_capability() -> str: ...
def compiled_capabilities() -> list[str]: ...
def num_threads() -> int: ...
def build() -> Build: ...
def run_cuda_instruction(name: str, arrays: list[int]) -> None: ...  # where cuda_archs is not empty
