#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Sets up all and runs the fine-tuning job; without arguments SmolLM2-135M-Instruct on GSM8K, into
# runs/smollm2-gsm8k.
#
# usage: scripts/finetune.sh [options of `gralora-ext finetune`; --help lists them]
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"

set_up finetune
say "gralora-ext finetune $*"
exec "$environment/bin/gralora-ext" finetune "$@" # exec, so that Ctrl-C and SIGTERM reach the job itself
