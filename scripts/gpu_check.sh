#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# All that only a GPU can show, by one command: builds the extension for the cards that are here,
# tries their instructions and all passes (self-test), runs the tests of operations and layers on
# CUDA, those under autocast once more by themselves, compute-sanitizer's four tools, and the
# benchmarks. Leaves one folder to commit, with a page to read first: REPORT.md. Goes on after a
# step that failed; the exit code is then 1.
#
# usage: scripts/gpu_check.sh [FOLDER]      FOLDER: benchmarks/results/cuda-<date>-<card> where it is left out
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"

export GRALORA_EXT_CUDA=1
set_up test
cd "$repo"
card=$("$python" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")')
[ -n "$card" ] || fail "torch sees no CUDA device here."
slug=$(printf '%s' "$card" | tr '[:upper:]' '[:lower:]' | tr -cs '[:alnum:]' '-')
folder=${1:-benchmarks/results/cuda-$(date +%F)-${slug%-}}
mkdir -p "$folder"
: >"$folder/steps.tsv"
failed=()

# step NAME COMMAND...: its output goes to the folder, and its end to the terminal.
step() {
    local name=$1 code=0 start=$SECONDS
    shift
    say "$name: $*"
    "$@" >"$folder/$name.txt" 2>&1 || code=$?
    [ "$code" -eq 0 ] || failed+=("$name")
    printf '%s\t%s\t%s\n' "$name" "$code" $((SECONDS - start)) >>"$folder/steps.tsv"
    tail -n 3 "$folder/$name.txt"
}

# Facts for the report, a line each, and then whatever else may explain a result.
machine() {
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | sed 's/^/card, driver, memory: /'
    "$python" -c 'import torch; print("torch:", torch.__version__, "for CUDA", torch.version.cuda)'
    printf 'commit: %s\n\n' "$(git describe --always --dirty)"
    nvidia-smi
    "$python" -m gralora_ext info
}

on_cuda=("$python" -m pytest --device cuda -m 'not build')
machine >"$folder/machine.txt" 2>&1 || true
step selftest "$python" -m gralora_ext info --selftest
step tests "${on_cuda[@]}" tests/test_cuda.py tests/test_ops_*.py tests/test_tuner_*.py tests/test_model_gradients.py
step autocast "${on_cuda[@]}" tests/test_ops_compile.py tests/test_tuner_*.py -k autocast
if command -v compute-sanitizer >/dev/null; then
    # Without torch's cache each tensor is an allocation of its own, and what lies beyond its end is
    # seen. initcheck must watch torch's kernels too: they write what ours read.
    for tool in memcheck racecheck initcheck synccheck; do
        only=(--kernel-name kns=gralora)
        [ "$tool" = initcheck ] && only=()
        step "$tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" "${only[@]}" \
            --error-exitcode 1 "$python" -m pytest --device cuda tests/test_cuda.py -k sanitized
    done
else # it comes with the CUDA toolkit
    step compute-sanitizer compute-sanitizer
fi
step benchmarks "$python" -m benchmarks --full --device cuda --out "$folder"
"$python" scripts/gpu_report.py "$folder"

if [ ${#failed[@]} -gt 0 ]; then
    say "failed: ${failed[*]} (see $folder/REPORT.md)"
    exit 1
fi
say "all is well on $card; read $folder/REPORT.md and commit $folder"
