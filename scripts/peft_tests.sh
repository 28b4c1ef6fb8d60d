#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs PEFT's own tests on GraLoRA with our tuner, and those that do not pass once more with PEFT's.
# Fails if one of these passes there, or if our layer was hardly called. Two minutes.
#
# usage: scripts/peft_tests.sh [PYTHON]     PYTHON: an interpreter with gralora_ext[peft-tests] installed; default python
#
# The tests are those of the installed PEFT release, from its source distribution, which is kept in
# the user's cache. Some of them want models from a hub. It is not asked: tests/peft_models.py
# builds tiny models of the same architectures under the names that the tests ask for
# (HF_HUB_OFFLINE=0 lets the hub be asked instead). One test fails both ways without a hub: it
# downloads a configuration into an empty cache of its own.
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$("${1:-python}" -c 'import sys; print(sys.executable)')
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
export PYTHONPATH="$repo/tests${PYTHONPATH:+:$PYTHONPATH}"

"$python" -c 'import attr, datasets, diffusers, gralora_ext.tuner, pytest, scipy' || {
    echo "peft_tests.sh: something to import is missing; run: $python -m pip install --no-build-isolation '$repo[peft-tests]'" >&2
    exit 2
}

version=$("$python" -c 'import peft; print(peft.__version__)')
cache=${XDG_CACHE_HOME:-$HOME/.cache}/gralora_ext
sources=$cache/peft-$version
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if [ ! -d "$sources" ]; then
    "$python" -m pip download --quiet --no-deps --no-binary :all: --dest "$work" "peft==$version"
    tar -xzf "$work/peft-$version.tar.gz" -C "$work"
    touch "$work/peft-$version/tests/__init__.py" # the source distribution leaves it out, and the tests import each other
    mkdir -p "$cache"
    mv "$work/peft-$version" "$cache/" 2>/dev/null || [ -d "$sources" ] # another run may have been first
fi

if [ "$HF_HUB_OFFLINE" = 1 ]; then
    export HF_HUB_CACHE=$work/hub
    "$python" "$repo/tests/peft_models.py" "$HF_HUB_CACHE"
fi

cd "$sources"
# run TUNER TESTS...: pytest exits with 1 where tests fail, and with 5 where there are none: the
# comparison below decides about them. Others are errors.
run() {
    local tuner=$1
    shift
    echo "== PEFT $version, its tests on GraLoRA, tuner: $tuner"
    "$python" -m pytest -o addopts= -p no:cacheprovider -p peft_plugin -q -rN --tb=no --disable-warnings -k gralora \
        --gralora-tuner="$tuner" --gralora-report="$work/$tuner.json" "$@" || case $? in 1 | 5) ;; *) return 1 ;; esac
}

run fused tests/test_{custom_models,initialization,config,decoder_models,encoder_decoder_models}.py \
    tests/test_{seq_classifier,feature_extraction_models}.py
mapfile -t again < <("$python" "$repo/tests/peft_plugin.py" "$work/fused.json")
echo '{"outcomes": {}}' >"$work/stock.json"
[ ${#again[@]} -eq 0 ] || run stock "${again[@]}"
"$python" "$repo/tests/peft_plugin.py" "$work/fused.json" "$work/stock.json"
