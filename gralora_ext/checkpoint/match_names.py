# SPDX-License-Identifier: Apache-2.0
"""A program that matches names of layers with regular expressions from a file, in little time and memory.

A regular expression can take years to match, and all memory; Python's module knows no limit, and the system has one for a process.
``python match_names.py SECONDS BYTES`` reads ``[keys, names]`` as JSON, and writes as JSON, for each name, the place of the first
key that matches it, or null; or ``{"key": …, "reason": …}`` where a key is no regular expression. It imports nothing of the package,
so that it starts at once.
"""

from __future__ import annotations

import json
import re
import resource
import sys


def main() -> None:
    for kind, most in zip((resource.RLIMIT_CPU, resource.RLIMIT_AS), map(int, sys.argv[1:]), strict=True):
        resource.setrlimit(kind, (most, most))
    keys, names = json.load(sys.stdin)
    expressions = []
    for key in keys:
        try:
            expressions.append(re.compile(rf"(.*\.)?({key})$"))  # as peft.utils.other.get_pattern_key
        except (re.error, RecursionError, OverflowError) as error:
            print(json.dumps({"key": key, "reason": getattr(error, "msg", str(error))}))
            return
    print(json.dumps([next((i for i, each in enumerate(expressions) if each.match(name)), None) for name in names]))


if __name__ == "__main__":
    main()
