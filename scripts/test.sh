#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Sets up all and runs the tests: all that are quick, the long ones of what differs from
# origin/main, and of the other long ones those whose turn it is today. With --all every test, as
# before a release; the last lines then say what would have been left out.
#
# Two processes share the files of tests, in the order of their names: the slowest come first.
#
# usage: scripts/test.sh [--all] [arguments of pytest, such as -k cli, or -n 0 for one process]
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"

set_up test
cd "$repo"
tests=changed
if [ "${1:-}" = --all ]; then
    tests=all
    shift
fi
say "pytest -n 2 --tests $tests $*"
exec "$python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder --tests "$tests" "$@"
