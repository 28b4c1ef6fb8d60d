# SPDX-License-Identifier: Apache-2.0
"""What training engines and torch's own programs do to a layer, one mechanism each; the engines themselves: tests/engines."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_python
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from tuner_helpers import DEVICE, adapted, assert_same_output, gradients, pair, rows

FP32 = torch.float32


def first(model: nn.Module) -> nn.Module:
    return model.base_model.model.first


class GatheredParameters(dict):
    """As ZeRO-3's: a parameter is whole only for who reads it by its name, and empty between the reads."""

    def __init__(self, parameters: dict[str, nn.Parameter | None]):
        super().__init__(parameters)
        self.whole = {name: p.data for name, p in parameters.items() if p is not None}

    def __getitem__(self, name: str) -> nn.Parameter | None:
        parameter = super().__getitem__(name)
        if parameter is not None:
            parameter.data = self.whole[name]
        return parameter

    def release(self) -> None:
        for parameter in filter(None.__ne__, self.values()):
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)


@pytest.mark.parametrize("hybrid_r", [0, 2])
def test_parameters_are_read_where_an_engine_gathers_them(hybrid_r: int) -> None:
    layer, x = first(adapted("fused", hybrid_r=hybrid_r)), rows(5)
    expected, delta = layer(x), layer.get_delta_weight("default")
    for module in layer.modules():
        if module._parameters and module not in (layer, layer.base_layer):
            module._parameters = GatheredParameters(module._parameters)
            module._parameters.release()
    assert_same_output(layer(x), expected)
    for module in layer.modules():
        if isinstance(module._parameters, GatheredParameters):
            module._parameters.release()
    assert_same_output(layer.get_delta_weight("default"), delta)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("tokens", [5, 70])
def test_general_parts_are_called_where_somebody_listens(tokens: int, dropout: float) -> None:
    """An engine that shards each Linear by itself makes its weight whole in hooks around its forward."""
    layer, x = first(adapted("fused", hybrid_r=2, gralora_dropout=dropout)), rows(tokens).requires_grad_()
    results = []
    heard: list[nn.Module] = []
    for listening in (False, True):
        if listening:
            for part in (layer.gralora_A_general["default"], layer.gralora_B_general["default"]):
                part.register_forward_hook(lambda module, *_: heard.append(module))
        torch.manual_seed(3)
        y = layer(x)
        results.append(
            [y, *torch.autograd.grad(y.square().sum(), [x, *(p for p in layer.parameters() if p.requires_grad)])]
        )
    assert [type(module) for module in heard] == [nn.Linear, nn.Linear]
    for a, b in zip(*results, strict=True):
        assert_same_output(a, b)


class Halves(nn.Module):
    """A dropout that is not torch's."""

    def forward(self, x: Tensor) -> Tensor:
        return x / 2


@pytest.mark.parametrize("hybrid_r", [0, 2])
@pytest.mark.parametrize("tokens", [5, 70])
@pytest.mark.parametrize("dropout", [Halves(), nn.Dropout(1.0)], ids=["another module", "all is dropped"])
def test_a_dropout_that_the_kernels_do_not_draw_is_called(dropout: nn.Module, tokens: int, hybrid_r: int) -> None:
    results, x = [], rows(tokens).requires_grad_()
    for model in pair(hybrid_r=hybrid_r):
        layer = first(model)
        layer.gralora_dropout["default"] = dropout
        y = layer(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, layer.gralora_A["default"]])])
    for ours, pefts in zip(*reversed(results), strict=True):
        assert_same_output(ours, pefts)


def test_an_output_that_a_global_hook_has_kept_stays_as_it_was() -> None:
    layer, kept = first(adapted("fused")), []
    handle = register_module_forward_hook(lambda module, args, output: kept.append((output, output.clone())))
    with torch.no_grad():
        layer(rows(5))
    handle.remove()
    assert kept and all(torch.equal(output, copy) for output, copy in kept)


@pytest.mark.parametrize("kept", ["mm", "addmm"])
def test_selective_checkpointing_that_keeps_products_gives_the_same_gradients(kept: str) -> None:
    """It returns the outputs that it has kept a second time, so nothing may have been added into them."""
    layer, x = first(adapted("fused", hybrid_r=2)), rows(70).requires_grad_()
    layer.base_layer.bias = layer.base_layer.bias if kept == "addmm" else None
    keeps = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in keeps else CheckpointPolicy.PREFER_RECOMPUTE

    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]

    def loss(x: Tensor) -> Tensor:
        return layer(x).square().sin().sum()

    expected = torch.autograd.grad(loss(x), wanted)
    contexts = partial(create_selective_checkpoint_contexts, policy)
    found = torch.autograd.grad(checkpoint(loss, x, use_reentrant=False, context_fn=contexts), wanted)
    for a, b in zip(found, expected, strict=True):
        assert_same_output(a, b)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_tracing_a_layer_warns_of_nothing_of_ours(recwarn: pytest.WarningsRecorder) -> None:
    torch.jit.trace(first(adapted("fused", dtype=FP32)), (rows(70, dtype=FP32),))
    assert [str(w.message) for w in recwarn if "gralora_ext" in w.filename or "gralora_ext" in str(w.message)] == []


@pytest.mark.skipif(DEVICE.type != "cpu", reason="one operation is for the CPU")
@pytest.mark.parametrize("own_gemm", [False, True], ids=["torch's GEMM", "own GEMM"])
def test_one_graph_trains_every_number_of_tokens_as_one_operation(own_gemm: bool, monkeypatch) -> None:
    from gralora_ext.tuner import frozen

    monkeypatch.setattr(frozen, "_IS_QUICKER", own_gemm)
    torch.compiler.reset()
    layer = first(adapted("fused", dtype=FP32))
    graphs: list[torch.fx.GraphModule] = []
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=lambda g, _: graphs.append(g) or g)
    for tokens in (3, 40, 63, 64, 65, 130, 301, 512, 1000):
        x = rows(tokens, dtype=FP32).requires_grad_()
        y = compiled(x)
        y.sum().backward()
        torch.testing.assert_close(y, layer(x), rtol=1e-4, atol=1e-5)
        assert x.grad is not None and gradients(layer)
    assert len(graphs) == 1
    assert [n.args[-1] for n in graphs[0].graph.nodes if n.target is torch.ops.gralora_ext.linear.default] == [own_gemm]


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_layer_takes_any_number_of_tokens_in_a_fresh_process(strict: bool, tmp_path: Path) -> None:
    """Which only has imported the package."""
    layer, x = first(adapted("fused", dtype=FP32, hybrid_r=2)), rows(80, dtype=FP32)
    dynamic = ({0: torch.export.Dim("tokens", min=2, max=4096)},)
    program = torch.export.export(layer, (x,), dynamic_shapes=dynamic, strict=strict)
    longer = rows(131, dtype=FP32)
    torch.export.save(program, tmp_path / "layer.pt2")
    torch.save((longer, layer(longer).detach()), tmp_path / "expected.pt")
    run_python(
        f"""
import gralora_ext, torch
program = torch.export.load({str(tmp_path / "layer.pt2")!r}).module()
x, expected = torch.load({str(tmp_path / "expected.pt")!r})
torch.testing.assert_close(program(x), expected, rtol=1e-4, atol=1e-5)
"""
    )
