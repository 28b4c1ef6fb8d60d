# SPDX-License-Identifier: Apache-2.0
"""What each launch of a pass on tensor cores moves and multiplies: a formula of the shape, by the tiles of csrc/cuda.

Each access to global memory counts, whichever cache serves it. ``test_traffic.py`` compares with what the emulator counts.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from calls import ELEMENT, Shape

READ, WRITTEN = "read", "written"
FLOAT, SEED = 4, 8  # bytes
THREADS = 256  # of a block
TOKENS, COLUMNS, RANKS, DEPTH = 128, 64, 64, 32  # of tiles
ROW_BYTES = 128  # of a chunk of project
TILES = 8  # of columns, that a block of expand owns
WARPS = TOKENS // 16
PIECES = {"fp32": 3, "fp16": 2, "bf16": 1}
FLOAT_LEVEL = 3
FLOPS_OF_MMA = 2 * 16 * 8 * 16


def parts(size: int, part: int) -> int:
    return -(-size // part)


def pairs(left: int, right: int, level: int) -> int:
    """Of pieces whose products count"""
    return sum(i + j < level for i in range(left) for j in range(right))


@dataclass
class Work:
    """Of a launch: bytes by buffer and direction, those of them that were read before, and instructions of tensor cores."""

    moved: Counter[tuple[str, str]] = field(default_factory=Counter)
    again: Counter[str] = field(default_factory=Counter)
    mma: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.moved + other.moved, self.again + other.again, self.mma + other.mma)

    def read(self, buffer: str, size: int, times: int) -> None:
        """``size`` bytes, each ``times`` times"""
        self.moved[buffer, READ] += times * size
        self.again[buffer] += (times - 1) * size

    @property
    def flops(self) -> int:
        return self.mma * FLOPS_OF_MMA


@dataclass(frozen=True)
class Left:
    """Ranks as a kernel reads them: bytes of all tokens, and how often each is read where each block is asked for once."""

    buffer: str
    size: int
    times: int = 1


@dataclass(frozen=True)
class Plan:
    """A shape, cut into so many parts of columns and tokens."""

    shape: Shape
    column_splits: int
    token_splits: int

    def work(self, which: str) -> dict[str, Work]:
        """By the names of the launches, in their order"""
        return {"forward": self.forward, "backward": self.backward, "merge": self.merge}[which]()

    def forward(self) -> dict[str, Work]:
        s = self.shape
        project = self.project("x", s.N, "A", dropped=True)
        expand = self.expand(self.partial(), parts(s.T, TOKENS), s.M, "B")
        expand.moved["u", WRITTEN] += self.kept_bytes() * s.keep_u
        expand.moved["base", READ] = expand.moved["y", WRITTEN] = s.T * s.M * self.element
        return {"project": project, "expand": expand}

    def backward(self) -> dict[str, Work]:
        s = self.shape
        project = self.project("grad_y", s.M, "B", dropped=False)
        if not s.keep_u:
            project += self.project("x", s.N, "A", dropped=True)
        tiles = parts(s.T, TOKENS)
        expand = self.expand(self.partial(), tiles, s.N, "A")
        expand.moved["workspace", WRITTEN] += self.kept_bytes()  # dH
        expand.moved["dx", WRITTEN] = s.T * s.N * self.element
        expand.moved["dx", READ] = s.T * s.N * self.element * s.add_to_dx
        self.draw(expand, tiles * s.k * parts(s.N // s.k, COLUMNS))
        U, dH = self.kept("u") if s.keep_u else self.partial(), self.kept("workspace")
        gradients = self.weight_gradient("grad_y", s.M, U, dropped=False)
        gradients += self.weight_gradient("x", s.N, dH, dropped=True)
        reduce = self.reduce("A", s.N) + self.reduce("B", s.M)
        return {"project": project, "expand": expand, "weight_gradient": gradients, "reduce": reduce}

    def merge(self) -> dict[str, Work]:
        s = self.shape
        left = [Left("B", s.M * s.r * self.parameter), Left("B_general", s.M * s.h * self.parameter, s.k)]
        row_tiles = s.k * parts(s.M // s.k, TOKENS)
        work = self.expand(left, row_tiles, s.N, "A", row_blocks=s.k, factor_pieces=PIECES[s.adapter])
        work.moved["weight", READ] = work.moved["weight", WRITTEN] = s.N * s.M * self.element
        return {"merge": work}

    # Kernels

    def project(self, x: str, width: int, factor: str, *, dropped: bool) -> Work:
        """x once per group of ranks, the factor once per tile of tokens"""
        s, columns = self.shape, 16 if self.ranks <= 16 else 32
        groups, tiles, depth = parts(self.ranks, columns), parts(s.T, TOKENS), ROW_BYTES // self.element
        work = self.factor(factor, width, tiles)
        work.read(x, s.T * width * self.element, groups)
        work.moved["workspace", WRITTEN] += self.column_splits * s.T * s.k * self.ranks * FLOAT
        chunks = groups * tiles * s.k * parts(width // s.k, depth)
        self.draw(work, dropped * chunks)
        work.mma = chunks * WARPS * depth // 16 * columns // 8 * pairs(PIECES[s.dtype], PIECES[s.adapter], FLOAT_LEVEL)
        return work

    def expand(
        self,
        left: list[Left],
        row_tiles: int,
        width: int,
        factor: str,
        *,
        row_blocks: int = 1,
        factor_pieces: int | None = None,
    ) -> Work:
        """The ranks once per block of the grid, or per tile of columns where they do not fit into shared memory together;
        the factor once per tile of rows, whose blocks share out its ranks."""
        s, tiles = self.shape, parts(width // self.shape.k, COLUMNS)
        ranks = s.r // row_blocks + s.h
        of_block, fit = min(tiles, TILES), ranks <= RANKS
        work = self.factor(factor, width, row_tiles, row_blocks)
        for source in left:
            work.read(source.buffer, source.size, source.times * (parts(tiles, of_block) if fit else tiles))
        latent_pieces = 3 if s.dtype == "fp32" else 2
        factor_pieces = factor_pieces or min(PIECES[s.adapter], latent_pieces)
        steps = row_tiles * s.k * tiles * parts(ranks, 16)
        work.mma = steps * WARPS * COLUMNS // 8 * pairs(latent_pieces, factor_pieces, max(latent_pieces, factor_pieces))
        return work

    def weight_gradient(self, x: str, width: int, left: list[Left], *, dropped: bool) -> Work:
        """x once per tile of ranks, the ranks once per 64 columns"""
        s, work, ranks = self.shape, Work(), 32 if self.ranks <= 32 else RANKS
        rank_tiles, column_tiles = parts(self.ranks, ranks), s.k * parts(width // s.k, COLUMNS)
        work.read(x, s.T * width * self.element, rank_tiles)
        for source in left:
            work.read(source.buffer, source.size, source.times * column_tiles // s.k)
        work.moved["workspace", WRITTEN] += self.token_splits * width * self.ranks * FLOAT
        chunks = column_tiles * rank_tiles * parts(s.T, DEPTH)
        self.draw(work, dropped * chunks)
        work.mma = chunks * DEPTH // 16 * ranks // 16 * COLUMNS // 8 * pairs(3, PIECES[s.dtype], FLOAT_LEVEL)
        return work

    def reduce(self, name: str, width: int) -> Work:
        work = Work()
        work.moved["workspace", READ] += self.token_splits * width * self.ranks * FLOAT
        work.moved[f"d{name}", WRITTEN] += width * self.shape.r * self.parameter
        work.moved[f"d{name}_general", WRITTEN] += width * self.shape.h * self.parameter
        return work

    # What they share

    @property
    def ranks(self) -> int:
        return self.shape.r + self.shape.h

    @property
    def element(self) -> int:
        return ELEMENT[self.shape.dtype]

    @property
    def parameter(self) -> int:
        return ELEMENT[self.shape.adapter]

    def factor(self, name: str, width: int, times: int, row_blocks: int = 1) -> Work:
        """A or B with its general part"""
        work = Work()
        work.read(name, width * self.shape.r * self.parameter, times // row_blocks)
        work.read(f"{name}_general", width * self.shape.h * self.parameter, times)
        return work

    def draw(self, work: Work, tiles: int) -> None:
        """Each thread reads the seed once per tile that is dropped."""
        if self.shape.dropout:
            work.read("seed", SEED, tiles * THREADS)

    def partial(self) -> list[Left]:
        """A block reads the general part of all blocks."""
        s, of_rank = self.shape, self.column_splits * self.shape.T * self.shape.k * FLOAT
        return [Left("workspace", of_rank * s.r), Left("workspace", of_rank * s.h, s.k)]

    def kept(self, buffer: str) -> list[Left]:
        s, of_rank = self.shape, self.shape.T * FLOAT
        return [Left(buffer, of_rank * s.k * s.r), Left(buffer, of_rank * s.h, s.k)]

    def kept_bytes(self) -> int:
        return self.shape.T * (self.shape.k * self.shape.r + self.shape.h) * FLOAT
