#!/usr/bin/env bash
# Sets up all and runs the tests.
#
# usage: scripts/test.sh [arguments of pytest, such as -k cli]
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"

set_up test
cd "$repo"
say "pytest $*"
# The script, not `python -m pytest`, which would put the repository before the installed package on the import path.
exec "$environment/bin/pytest" "$@"
