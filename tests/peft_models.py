# SPDX-License-Identifier: Apache-2.0
"""Builds the tiny models that PEFT's tests ask a hub for into a Hugging Face cache; see ``scripts/peft_tests.sh``.

``python peft_models.py HUB`` writes each model of :data:`MODELS`, with random weights of a fixed seed, to where
``from_pretrained`` looks for what it has downloaded before: ``HUB/models--ORG--NAME``, with ``HF_HUB_CACHE=HUB``. They are
models of the same architectures as those on the hub, not the same models: PEFT's tests compare a model with itself.

None has a tokenizer: no test on GraLoRA asks for one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig

# The folder of a snapshot is named for a commit; here there is one of each model.
COMMIT = "0" * 40

# Every width divides by the k of PEFT's tests (2 and 4), and a head has enough numbers for rotary
# embeddings. The vocabulary is larger than any token in the tests.
HIDDEN, FEED_FORWARD, LAYERS, HEADS, VOCABULARY, POSITIONS = 32, 64, 2, 4, 1024, 128
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": FEED_FORWARD,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": POSITIONS,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
GPT = {"vocab_size": VOCABULARY, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": POSITIONS}
SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": VOCABULARY - 2, "eos_token_id": VOCABULARY - 1}
DISENTANGLED = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False}


def opt() -> transformers.PreTrainedModel:
    """Its feed-forward width has a name of its own."""
    sizes = {name: size for name, size in SIZES.items() if name != "intermediate_size"}
    config = transformers.OPTConfig(**sizes, ffn_dim=FEED_FORWARD, word_embed_proj_dim=HIDDEN, **SPECIAL_TOKENS)
    return transformers.OPTForCausalLM(config)


def t5() -> transformers.PreTrainedModel:
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=HIDDEN,
        d_kv=HIDDEN // HEADS,
        d_ff=FEED_FORWARD,
        num_layers=LAYERS,
        num_heads=HEADS,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=VOCABULARY - 1,
    )
    return transformers.T5ForConditionalGeneration(config)


def bart() -> transformers.PreTrainedModel:
    both = {
        f"{part}_{name}": size
        for part in ("encoder", "decoder")
        for name, size in (("layers", LAYERS), ("attention_heads", HEADS), ("ffn_dim", FEED_FORWARD))
    }
    config = transformers.BartConfig(
        vocab_size=VOCABULARY,
        d_model=HIDDEN,
        max_position_embeddings=POSITIONS,
        decoder_start_token_id=SPECIAL_TOKENS["eos_token_id"],
        forced_eos_token_id=SPECIAL_TOKENS["eos_token_id"],
        **both,
        **SPECIAL_TOKENS,
    )
    return transformers.BartForConditionalGeneration(config)


def made(model: str, config: str, **fields: Any) -> Callable[[], transformers.PreTrainedModel]:
    """A function that makes transformers' class ``model`` from its class ``config``."""
    return lambda: getattr(transformers, model)(getattr(transformers, config)(**fields))


MODELS: dict[str, Callable[[], transformers.PreTrainedModel]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": opt,
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": made("GPT2LMHeadModel", "GPT2Config", **GPT, **SPECIAL_TOKENS),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": made(
        "GPTJForCausalLM", "GPTJConfig", **GPT, rotary_dim=HIDDEN // HEADS // 2, **SPECIAL_TOKENS
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": made(
        "LlamaForCausalLM", "LlamaConfig", **GROUPED, **SPECIAL_TOKENS
    ),
    "peft-internal-testing/tiny-dummy-qwen2": made("Qwen2ForCausalLM", "Qwen2Config", **GROUPED, **SPECIAL_TOKENS),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": made(
        "Gemma3ForCausalLM", "Gemma3TextConfig", **GROUPED, head_dim=HIDDEN // HEADS, **SPECIAL_TOKENS
    ),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": t5,
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": bart,
    "peft-internal-testing/tiny-random-BertModel": made("BertModel", "BertConfig", **SIZES),
    "peft-internal-testing/tiny-random-RobertaModel": made("RobertaModel", "RobertaConfig", **SIZES),
    "peft-internal-testing/tiny-random-DebertaModel": made("DebertaModel", "DebertaConfig", **SIZES, **DISENTANGLED),
    "peft-internal-testing/tiny-random-DebertaV2Model": made(
        "DebertaV2Model", "DebertaV2Config", **SIZES, **DISENTANGLED
    ),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": made(
        "BertForSequenceClassification", "BertConfig", **SIZES
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": made(
        "RobertaForSequenceClassification", "RobertaConfig", **SIZES
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": made(
        "LlamaForSequenceClassification", "LlamaConfig", **GROUPED, num_labels=1, **SPECIAL_TOKENS
    ),
}
# An adapter of which only the configuration is read, with the revision that is asked for.
ADAPTER, REVISION = "peft-internal-testing/tiny-opt-lora-revision", "test"


def snapshot(hub: Path, name: str, revision: str = "main") -> Path:
    """The folder, made here, that holds the files of the model ``name`` in the cache ``hub``."""
    folder = hub / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / revision).write_text(COMMIT)
    files = folder / "snapshots" / COMMIT
    files.mkdir(parents=True)
    return files


def build(hub: Path) -> None:
    """Writes all models and the adapter into ``hub``, where none of them may be yet."""
    transformers.logging.disable_progress_bar()
    for name, make in MODELS.items():
        torch.manual_seed(0)
        make().save_pretrained(snapshot(hub, name))
    config = LoraConfig(
        base_model_name_or_path="peft-internal-testing/tiny-random-OPTForCausalLM", task_type="CAUSAL_LM"
    )
    config.save_pretrained(snapshot(hub, ADAPTER, REVISION))


if __name__ == "__main__":
    build(Path(sys.argv[1]))
