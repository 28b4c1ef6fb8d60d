#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Sets up all and runs the tests. The long ones (pytest -m long) are left to .ci/run.
#
# Two processes share the files of tests, in the order of their names: the slowest come first.
#
# usage: scripts/test.sh [arguments of pytest, such as -k cli, or -n 0 for one process]
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"

set_up test
cd "$repo"
say "pytest -n 2 -m 'not long and not exhaustive' $*"
exec "$python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not long and not exhaustive' "$@"
