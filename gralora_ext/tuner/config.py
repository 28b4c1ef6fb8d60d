# SPDX-License-Identifier: Apache-2.0
"""The configuration of the fused tuner: PEFT's own, with the fields of LoraConfig that GraLoRA lacks there.

A field at its default is not written, so that such a checkpoint is the same file as PEFT's and is read there without a warning.
Where one of ours changes what the weights mean, ``gralora_k`` is written as a text that names it: PEFT's own class, which would drop the
field with a warning and compute other numbers, fails on that.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

import peft
from packaging.version import Version
from typing_extensions import Self

from .._gralora_k import plain_k

try:
    from peft import GraloraConfig as PeftsConfig
except ImportError as error:
    raise ImportError(
        f"gralora_ext needs peft 0.19.0 or newer (the first release with GraLoRA), found {peft.__version__}: "
        "run `pip install --upgrade peft`"
    ) from error

__all__ = ["GraloraConfig", "PeftsConfig"]

NEEDED_PEFT = "0.21.0"  # for what PEFT's GraLoRA does not have
CHANGES_NUMBERS = ("rank_pattern", "alpha_pattern", "k_pattern", "use_rslora", "trainable_token_indices")
_OTHER_NAMES = {"lora_alpha": "alpha", "lora_dropout": "gralora_dropout", "init_lora_weights": "init_weights"}


@dataclass
class GraloraConfig(PeftsConfig):
    """``peft.GraloraConfig`` with fields of LoraConfig, which mean what they mean there. They need PEFT 0.21 and
    :func:`gralora_ext.enable`.

    Args:
        gralora_k: k, or ``"auto"``: per layer the k of 1, 2, 4 and 8 that divides r, N and M and brings r/k² nearest to 8, the value
            of the paper's settings. When the layers are made, what was chosen takes its place here and in ``k_pattern``.
        init_weights: True (A as in PEFT, B zero), False (both random), ``"gaussian"`` (A normal with deviation 1/r, B zero) or
            ``"orthogonal"`` (A and B random with A_n B_j = 0 for each block; r/k must be even).
        rank_pattern: r of layers by name or regular expression.
        alpha_pattern: alpha of layers by name or regular expression.
        k_pattern: k of layers by name or regular expression.
        use_rslora: the scaling is alpha/√(r + hybrid_r), not alpha/(r + hybrid_r).
        exclude_modules: names, or a regular expression, of modules that are not adapted.
        trainable_token_indices: tokens whose embeddings are trained too.
        ensure_weight_tying: whether what is tied in the base model stays tied in ``modules_to_save`` and trained tokens.

    Raises:
        ValueError: a value is not of those above, or the field is one of LoraConfig's that GraLoRA does not have.
        RuntimeError: a field needs :func:`gralora_ext.enable`, or a newer PEFT.
    """

    gralora_k: int | str = field(default=2, metadata={"help": "k of the k x k blocks, or 'auto'"})
    init_weights: bool | str = field(
        default=True, metadata={"help": "True, False, 'gaussian' or 'orthogonal': how A and B begin"}
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "r of layers by name or regular expression"}
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict, metadata={"help": "alpha of layers by name or regular expression"}
    )
    k_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "gralora_k of layers by name or regular expression"}
    )
    use_rslora: bool = field(default=False, metadata={"help": "scale by alpha/sqrt(r + hybrid_r)"})
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "names, or a regular expression, of modules that are not adapted"}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "tokens whose embeddings are trained too"}
    )
    ensure_weight_tying: bool = field(
        default=False, metadata={"help": "whether what is tied in the base model stays tied where it is trained"}
    )

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        _refuse_fields_of_others(cls, kwargs)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self.gralora_k = plain_k(self.gralora_k)
        chosen_later, self.gralora_k = self.gralora_k == "auto", 1 if self.gralora_k == "auto" else self.gralora_k
        if not _is_whole(self.gralora_k):
            raise ValueError(f"gralora_k: expected a positive integer or 'auto', got {self.gralora_k!r}")
        super().__post_init__()
        if chosen_later:
            self.gralora_k = "auto"
        check_init_weights(self)
        self.exclude_modules = (
            set(self.exclude_modules) if isinstance(self.exclude_modules, list) else self.exclude_modules
        )
        for name, is_right in (("rank_pattern", _is_whole), ("alpha_pattern", _is_positive), ("k_pattern", _is_whole)):
            setattr(self, name, _checked_pattern(name, getattr(self, name), is_right))
        _check_usable(self.fields_in_use())

    def fields_in_use(self) -> list[str]:
        """The names of our own fields that are not at their defaults, ``gralora_k`` and ``init_weights`` too where PEFT has no such
        value."""
        used = [f.name for f in _own_fields() if getattr(self, f.name) != _default(f)]
        beyond = {"gralora_k": self.gralora_k == "auto", "init_weights": isinstance(self.init_weights, str)}
        return [name for name, is_ours in beyond.items() if is_ours] + used

    def marks(self) -> list[str]:
        """The fields in use with which PEFT's own tuner, which would drop them, would compute other numbers."""
        return [name for name in CHANGES_NUMBERS if name in self.fields_in_use()]

    def misread(self) -> list[str]:
        """The fields in use with which PEFT's own tuner, given this object, would train or compute something else."""
        return [name for name in (*CHANGES_NUMBERS, "init_weights") if name in self.fields_in_use()]

    def to_dict(self) -> dict[str, Any]:
        """As PEFT's, without our fields that are at their defaults."""
        used = self.fields_in_use()
        values = {
            name: value
            for name, value in super().to_dict().items()
            if name in used or name not in {f.name for f in _own_fields()}
        }
        if marks := self.marks():
            values["gralora_k"] = f"{self.gralora_k} (needs gralora_ext: {', '.join(marks)})"
        return values


def check_init_weights(config: PeftsConfig) -> None:
    """Raises a ValueError for a value that PEFT's class takes for True, whatever it says."""
    how = config.init_weights
    if not isinstance(how, bool) and how not in ("gaussian", "orthogonal"):
        raise ValueError(
            f"init_weights: expected True, False, 'gaussian' or 'orthogonal', got {how!r}: GraLoRA has no other way to begin"
        )


def check_peft(who_needs: str) -> None:
    """Raises a RuntimeError, which begins with ``who_needs``, where PEFT is older than what this package adds to it."""
    if Version(peft.__version__) < Version(NEEDED_PEFT):
        raise RuntimeError(
            f"{who_needs} peft {NEEDED_PEFT} or newer, found {peft.__version__}: run `pip install --upgrade peft`"
        )


def _own_fields() -> list[Any]:
    theirs = {f.name for f in fields(PeftsConfig)}
    return [f for f in fields(GraloraConfig) if f.name not in theirs]


def _default(of: Any) -> Any:
    return of.default_factory() if of.default_factory is not MISSING else of.default


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def _checked_pattern(name: str, pattern: Any, is_right: Callable[[object], bool]) -> dict[str, Any]:
    if pattern is None:
        return {}
    if not isinstance(pattern, dict):
        raise TypeError(f"{name}: expected a dict from names of layers to numbers, got {pattern!r}")
    for key, value in pattern.items():
        if not is_right(value):
            kind = "number" if is_right is _is_positive else "integer"
            raise ValueError(f"{name}: expected a positive {kind} for {key!r}, got {value!r}")
        try:
            re.compile(key)
        except (re.error, TypeError) as error:
            raise ValueError(f"{name}: {key!r} is no name and no regular expression: {error}") from error
    return pattern


def _check_usable(used: list[str]) -> None:
    if not used:
        return
    names, is_one = ", ".join(used), len(used) == 1
    check_peft(f"{names}: {'this field needs' if is_one else 'these fields need'}")
    from .patches import is_enabled

    if not is_enabled():
        raise RuntimeError(
            f"{names}: PEFT's own tuner would ignore {'this field' if is_one else 'these fields'}: call "
            "gralora_ext.enable() first"
        )


def _refuse_fields_of_others(cls: type, given: dict[str, Any]) -> None:
    """Raises for fields of LoraConfig that GraLoRA does not have, and for a checkpoint of the paper's own repository.

    A field of LoraConfig at a false value asks for nothing: PEFT drops it from a file.
    """
    if "gralora_alpha" in given:
        raise ValueError(
            "gralora_alpha is a field of the paper's repository (SqueezeBits/GraLoRA), whose r counts the hybrid ranks too: convert "
            "such a checkpoint with `gralora-ext import-official ADAPTER OUT`; in a new configuration it is 'alpha'"
        )
    ours = {f.name for f in fields(cls)}
    lora = {f.name for f in fields(peft.LoraConfig)}
    for name, value in given.items():
        if name in lora and name not in ours and value:
            here = (
                f": here it is {_OTHER_NAMES[name]!r}" if name in _OTHER_NAMES else ", and GraLoRA has nothing like it"
            )
            raise ValueError(f"{name} is a field of LoraConfig{here}")
