#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Sets up all and runs the tests. The long ones (pytest -m long) are left to .ci/run.
#
# usage: scripts/test.sh [arguments of pytest, such as -k cli]
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"

set_up test
cd "$repo"
say "pytest -m 'not long and not exhaustive' $*"
exec "$python" -m pytest -m 'not long and not exhaustive' "$@"
