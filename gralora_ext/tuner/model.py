# SPDX-License-Identifier: Apache-2.0
"""The fused tuner model: PEFT's GraLoRA tuner, building fused layers."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from peft.tuners import gralora as stock
from peft.tuners.gralora.layer import GraloraLayer, Linear
from peft.tuners.lora import LoraModel
from torch import nn

from . import init, injection, mixed_batch, patterns, quantized, transaction, weighted
from .combine import Svd
from .layer import GraloraLinear

# What layers get that are built from now on; set by enable().
NEW_LAYERS: dict[str, Any] = {"exact_unmerge": GraloraLinear.exact_unmerge}


class GraloraModel(stock.GraloraModel):
    """PEFT's :class:`peft.tuners.gralora.GraloraModel`, whose new layers are :class:`GraloraLinear`.

    Matching of target modules, initialization, state_dict keys and checkpoints are PEFT's own code, so the same seed and
    configuration give the same parameters. Installed for PEFT's GRALORA type by :func:`gralora_ext.tuner.enable`.
    """

    @staticmethod
    def _create_new_module(config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> nn.Module:
        # PEFT builds and initializes its layer, whatever its signature is in this release; only the
        # class changes.
        target, *rest = args
        linear = quantized.stand_in(target)
        module = stock.GraloraModel._create_new_module(config, adapter_name, linear or target, *rest, **kwargs)
        if linear is not None:
            module.base_layer = target
        if type(module) is Linear:
            module.__class__ = GraloraLinear
            if not NEW_LAYERS["exact_unmerge"]:
                module.exact_unmerge = False
            init.finish(module, adapter_name, config)
        return module

    def _create_and_replace(self, config: Any, adapter_name: str, target: nn.Module, *args: Any, **kwargs: Any) -> None:
        # PEFT's code makes the layer, from a configuration that says what this layer gets.
        own = patterns.of_layer(config, kwargs["current_key"], target)
        super()._create_and_replace(own, adapter_name, target, *args, **kwargs)
        if isinstance(target, GraloraLayer) and not isinstance(target, GraloraLinear):
            init.finish(target, adapter_name, own)  # PEFT's own layer has dropped what it does not know
        config.fan_in_fan_out = own.fan_in_fan_out  # which PEFT sets by the class of the layer

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        transaction.unmerge_before_adding(model)
        with injection.all_or_nothing(self):
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            patterns.warn_of_unmatched(self.peft_config[adapter_name], adapter_name, model)
            patterns.store_chosen_k(self.peft_config[adapter_name], adapter_name, model)
            quantized.prepare(model)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if not hasattr(new_module, "base_layer"):
            # A layer that is unloaded has its weight; PEFT's code would write it again, which fails
            # where it is quantized, and where tokens of it were trained.
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merges adapters into all layers that have them, or, where that is broken off, into none.

        An error or Ctrl-C leaves each weight as it was, bit for bit. For as long as it takes, that needs a byte for each weight,
        where ``exact_unmerge`` does not keep it anyway, and a copy of weights that are neither ours nor quantized.

        Args:
            adapter_names: the adapters to merge; None means the active ones.
            safe_merge: merge into a copy of each weight and keep it only if it is finite.

        Raises:
            ValueError: the model has no adapter of one of these names; a merged weight is not finite (``safe_merge``).
        """
        transaction.check_names(adapter_names, self.peft_config)
        merge = super().merge_adapter
        transaction.all_or_nothing(self.model, lambda: merge(adapter_names=adapter_names, safe_merge=safe_merge))

    def unmerge_adapter(self) -> None:
        """Takes the merged adapters off all layers, or, where that is broken off, off none; see :meth:`GraloraLinear.unmerge`."""
        transaction.unmerge(self.model)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        unload = partial(super()._unload_and_optionally_merge, merge, progressbar, safe_merge, adapter_names)
        if merge:
            transaction.check_names(adapter_names, self.peft_config)
            model = transaction.all_or_nothing(self.model, unload)
        else:
            model = unload()
        quantized.release(model)
        return model

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Adds the adapter ``ΔW = Σ weights[i] ΔW_i``, or what comes near to it, as LoRA's method of this name does.

        The new adapter is frozen, its scaling is 1, and PEFT's own tuner reads its checkpoint, unless layers differ in
        r or k. Nothing is done where ``adapter_name`` exists.

        Args:
            adapters: names. One is the same as ``"linear"``, whatever the type.
            weights: one for each; negative ones subtract.
            adapter_name: of the new one.
            combination_type: ``"cat"`` is exact: the ranks of each block, and those of the hybrid part, one adapter
                after the other, so that r and hybrid_r are the sums. ``"svd"`` makes ΔW of each layer dense, merges
                these, and keeps of each block its r/k largest singular values: no adapter of that r and k without a
                hybrid part is nearer. ``"linear"``, ``"ties"``, ``"dare_linear"``, ``"dare_ties"`` and
                ``"magnitude_prune"`` merge A with A and B with B, which is rough; each of the latter four with ``_svd``
                merges ΔW instead.
            svd_rank: r of the new adapter for the SVD types; without it the largest r + hybrid_r of the adapters.
            svd_clamp: the quantile to which the factors are clamped.
            svd_full_matrices: whether the full SVD is computed; the result is the same.
            svd_driver: cuSOLVER's method, on CUDA alone.
            density: the fraction of values that is kept, for all types but cat, linear and svd.
            majority_sign_method: ``"total"`` or ``"frequency"``, for the types with ties.

        Raises:
            ValueError: an argument is none of these; the adapters differ in a layer's gralora_k (but for SVD types), or
                in r or hybrid_r (for the types that merge A with A); two adapters have trained a copy of one module
                (modules_to_save), or one has trained tokens or biases. The model is then as it was.
            RuntimeError: PEFT is older than 0.21.
        """
        weighted.add(
            self,
            adapter_name,
            adapters,
            weights,
            combination_type,
            svd_rank=svd_rank,
            svd=Svd(svd_clamp, svd_full_matrices, svd_driver),
            density=density,
            majority_sign_method=majority_sign_method,
        )

    def _add_modules_to_save_to_tie(self, peft_config: Any, tied_weight_keys: list[str]) -> None:
        LoraModel._add_modules_to_save_to_tie(
            self, peft_config, tied_weight_keys
        )  # which touches the configuration alone

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        # PeftModel's forward and generate enter this and then drop adapter_names.
        return mixed_batch.hooks(self, kwargs.get("adapter_names"), kwargs.get("num_beams"))
