# SPDX-License-Identifier: Apache-2.0
"""``gralora-ext info --explain T N M r k DTYPE``: how this machine's kernels would carry out a layer's passes.

A plan is made from the shape and the machine alone (``csrc/cpu/plan.h``): nothing is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn, Protocol

METAVAR = ("T", "N", "M", "r", "k", "DTYPE")
HELP = (
    "print the plans of the CPU kernels, and which CUDA kernels there are, for a layer of N inputs and M outputs, T tokens, "
    "rank r and k x k blocks; DTYPE is that of "
    "activations and adapter, such as bfloat16, or both, such as bfloat16/float32"
)
DTYPES = ("float32", "bfloat16", "float16", "float64")
MOST = 10**6  # the kernels count in 64 bits, in which a product of three such sizes has room
PASSES = {
    "forward": "forward",
    "backward": "backward",
    "backward_without_U": "backward where forward did not keep U",
    "merge": "merge",
    "merge_fan_in_fan_out": "merge into a Conv1D's weight",
    "linear": "linear, W + dW as one product",
    "cuda": "on CUDA devices, where the build has kernels for them",
}


class _Parser(Protocol):
    def error(self, message: str) -> NoReturn: ...


def explain(words: Sequence[str], parser: _Parser) -> None:
    """Prints the plans; ends with an error of ``parser`` where a word is not understood."""
    case = _case(words, parser)
    try:
        from gralora_ext._loader import load

        native = load()
    except (ImportError, RuntimeError, ValueError) as error:
        parser.error(f"--explain: {error}")
    plans: dict[str, dict[str, Any]] = native.explain(
        {**case, "h": 0, "dropout": False, "threads": native.num_threads()}
    )
    title = f"{case['T']} tokens, {case['N']} -> {case['M']}, r {case['r']}, k {case['k']}"
    print(f"{title}, activations {case['activations']}, adapter {case['parameters']}")
    _table("this machine", plans["machine"])
    for name, heading in PASSES.items():
        if _occurs(name, case["activations"], case["parameters"]):
            _table(heading, {key: value for key, value in plans[name].items() if value != "absent"})


def _occurs(name: str, activations: str, parameters: str) -> bool:
    """Whether a layer of these dtypes has the pass: a U in bfloat16 is always kept, and W + ΔW is summed in W's own dtype."""
    if name == "backward_without_U":
        return (activations, parameters) != ("bfloat16", "bfloat16")
    if name == "linear":
        return activations == "float64" or (activations == "float32" and parameters != "float64")
    return True


def _case(words: Sequence[str], parser: _Parser) -> dict[str, Any]:
    numbers: dict[str, int] = {}
    for name, word in zip(METAVAR[:-1], words, strict=False):
        least = 0 if name == "T" else 1
        is_number = word.isascii() and word.isdigit() and len(word) <= len(str(MOST))
        if not is_number or not least <= int(word) <= MOST:
            parser.error(f"--explain: {name} must be a number from {least} to {MOST:,}, but it is '{word}'")
        numbers[name] = int(word)
    for name in ("N", "M", "r"):
        if numbers[name] % numbers["k"] != 0:
            parser.error(f"--explain: {name} must be divisible by k = {numbers['k']}, but it is {numbers[name]}")
    activations, _, parameters = words[-1].partition("/")
    for word in (activations, parameters or activations):
        if word not in DTYPES:
            parser.error(
                f"--explain: DTYPE must be of {', '.join(DTYPES)}, or two of them with a slash, but it is '{words[-1]}'"
            )
    return {**numbers, "activations": activations, "parameters": parameters or activations}


def _table(heading: str, values: dict[str, Any]) -> None:
    print(f"\n{heading}")
    width = max(map(len, values))
    for name, value in values.items():
        text = ("yes" if value else "no") if isinstance(value, bool) else value
        print(f"  {name:{width}}  {text}")
