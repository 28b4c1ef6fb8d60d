# SPDX-License-Identifier: Apache-2.0
"""The benchmark suite: ``python -m benchmarks`` measures, ``compare`` and ``report`` read what was measured.

Read top-down, each level calls only the next: ``__main__`` (arguments) → ``run`` (plan, measure,
write) → ``path``, ``layer``, ``merge``, ``memory``, ``model`` (the benches) → ``contenders``,
``plain_torch`` → ``bench``, ``results`` → ``machine``, ``timing``, ``shapes``. From a run's file
``tables``, ``plots`` and ``report`` make what people read.
"""
