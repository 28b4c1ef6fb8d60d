"""Which shapes the benches of the adapter path measure at each level."""

from __future__ import annotations

from dataclasses import replace

from .levels import Level
from .shapes import Shape

# (N, M) as they occur: SmolLM2-135M's attention and MLP, a square of a 1B model, Llama-3-8B's attention and MLP.
WIDTHS = ((576, 576), (576, 1536), (1536, 576), (2048, 2048), (4096, 4096), (4096, 14336), (14336, 4096))
# (activations, adapter): a float32 model; PEFT's default beside a 16-bit base; everything in 16 bits.
DTYPES = (("bf16", "fp32"), ("bf16", "bf16"), ("fp16", "fp32"))
SQUARE, SMALL = Shape(2048, 2048), Shape(576, 1536)
WITH_DROPOUT = replace(SQUARE, dropout=0.1)
ALL_BF16_WITH_DROPOUT = replace(WITH_DROPOUT, activation="bf16", adapter="bf16")
# The hardest: PEFT's GEMMs run at twice float32's rate there.
MANY_RANKS_OF_16_BITS = (
    Shape(4096, 4096, r=64, activation="bf16", adapter="bf16"),
    Shape(4096, 14336, T=512, r=128, k=4, activation="bf16", adapter="bf16"),
)
LONG = Shape(4096, 4096, T=8192, activation="bf16")  # with PEFT's default adapters: what a GPU is for


def shapes(level: Level) -> list[Shape]:
    """The grid of forward and of forward+backward, without repetitions."""
    return list(dict.fromkeys(_GRIDS[level.name]()))


def compiled_shapes(level: Level) -> set[Shape]:
    """Those that torch.compile takes part in: only with ``--full``, since each compiles for many seconds."""
    if level.name != "full":
        return set()
    return {*(Shape(n, m) for n, m in WIDTHS), replace(SQUARE, T=1), replace(SQUARE, T=2048), LONG}


def _tiny() -> list[Shape]:
    return [Shape(24, 36, T=3, r=4, k=2, h=2)]


def _quick() -> list[Shape]:
    return [
        *(replace(s, T=t) for s in (SMALL, SQUARE) for t in (1, 256)),
        replace(SQUARE, activation="bf16"),
        replace(SQUARE, h=16),
        WITH_DROPOUT,
        Shape(4096, 4096, T=1024),
    ]


def _default() -> list[Shape]:
    return [
        *(Shape(n, m, T=t) for n, m in WIDTHS for t in (1, 16, 256, 2048)),
        *(replace(SQUARE, r=r) for r in (16, 64, 128)),
        *(replace(SQUARE, k=k) for k in (4, 8)),
        *(replace(SQUARE, r=r, k=k) for r, k in ((16, 8), (64, 4), (128, 8))),
        *(replace(s, h=s.r // 2) for s in (SMALL, SQUARE)),
        *(replace(SQUARE, T=1, r=r, h=h) for r, h in ((8, 0), (8, 8))),
        *(_in(s, *dtypes, T=t) for s in (SMALL, Shape(4096, 4096)) for dtypes in DTYPES for t in (1, 256)),
        *MANY_RANKS_OF_16_BITS,
        WITH_DROPOUT,
        ALL_BF16_WITH_DROPOUT,
    ]


def _full() -> list[Shape]:
    return [
        *(Shape(n, m, T=t) for n, m in WIDTHS for t in (1, 16, 256, 2048, 8192)),
        *(replace(s, r=r, k=k) for s in (SMALL, SQUARE) for r in (16, 32, 64, 128) for k in (2, 4, 8)),
        *(Shape(n, m, h=16) for n, m in WIDTHS),
        *(_in(Shape(n, m), *dtypes, T=t) for n, m in WIDTHS for dtypes in DTYPES for t in (1, 256, 2048)),
        *MANY_RANKS_OF_16_BITS,
        Shape(4096, 4096, T=512, r=256, k=8, activation="bf16", adapter="bf16"),
        WITH_DROPOUT,
        ALL_BF16_WITH_DROPOUT,
        LONG,
    ]


def _in(shape: Shape, activation: str, adapter: str, T: int) -> Shape:
    return replace(shape, activation=activation, adapter=adapter, T=T)


_GRIDS = {"tiny": _tiny, "quick": _quick, "default": _default, "full": _full}
