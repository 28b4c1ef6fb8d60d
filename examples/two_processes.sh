#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Two processes that share the model out by FSDP2, on two GPUs or on the CPU. Options are passed on:
#   examples/two_processes.sh --model path/to/model --data train.jsonl --output out
set -euo pipefail
exec "${PYTHON:-python}" -m gralora_ext finetune --accelerate-config "$(dirname "$0")/fsdp2.yaml" --batch-size 2 "$@"
