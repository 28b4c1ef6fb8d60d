#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Sets up all and runs the tests.
#
# usage: scripts/test.sh [arguments of pytest, such as -k cli]
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"

set_up test
cd "$repo"
say "pytest $*"
exec "$python" -m pytest "$@"
