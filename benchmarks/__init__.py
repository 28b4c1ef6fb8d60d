"""The benchmark suite: ``python -m benchmarks`` measures, ``python -m benchmarks compare A B`` compares two runs.

Read top-down, each level calls only the next: ``cli`` (arguments) → ``run`` (plan, measure, write) → ``bench_*`` (what
is measured) → ``layer_path``, ``peers``, ``accuracy`` (the contenders and their error) → ``timing``, ``floor``,
``shapes``.
"""
