#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Fine-tunes a chat model on conversations, its base quantized to 4 bits, packed and with gradient checkpointing, by one command.
# Needs `pip install bitsandbytes`. Without --model it takes SmolLM2-135M-Instruct; chat.jsonl has some conversations to try it with.
#
# usage: examples/chat_4bit.sh [options of `gralora-ext finetune`, such as --model and --data]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

gralora-ext finetune --data "$here/chat.jsonl" --load-in-4bit --packing --gradient-checkpointing \
    --batch-size 1 --grad-accum 2 --max-length 256 --r 16 --gralora-k 2 --lr 5e-4 --steps 20 \
    --output runs/chat-4bit "$@"
