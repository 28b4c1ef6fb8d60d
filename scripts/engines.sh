#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Sets up all and runs the engine matrix: DDP, FSDP, DeepSpeed, trainers, torch.compile,
# torch.export, quantized bases and more, each with PEFT's LoRA, PEFT's GraLoRA and ours. Writes
# tests/engines/table.md. Two processes on the CPU; about ten minutes.
#
# usage: scripts/engines.sh [arguments of tests/engines/matrix.py, such as --engines ddp fsdp2]
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"

set_up engines
cd "$repo"
table=(--table tests/engines/table.md)
[ $# -eq 0 ] || table=() # a part of the matrix is not its table
exec "$python" -W ignore tests/engines/matrix.py "${table[@]}" "$@"
