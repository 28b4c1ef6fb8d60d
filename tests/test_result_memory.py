# SPDX-License-Identifier: Apache-2.0
"""Where large results live: memory comes back from the pool, never while a tensor uses it, and the pool stays small."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import run_python
from torch import Tensor

from gralora_ext import ops

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the pool is for results on the CPU")
A, B = torch.randn(1, 4, 2), torch.randn(1, 2, 256)


def result(rows: int, value: float = 0.0) -> Tensor:
    """A result of 1 KiB a row: ``value`` plus an update of zero."""
    return ops.gralora(torch.zeros(rows, 4), torch.full((rows, 256), float(value)), A, B, scaling=1.0)


def test_which_freed_memory_serves_the_next_result():
    """In a process of its own: memory that other tests have freed might fit better."""
    printed = run_python("""
from test_result_memory import result
import torch
first = result(1000)
place = first.data_ptr()
del first
print("of about that size", result(950).data_ptr() == place)
print("not where most were wasted", result(100).data_ptr() != place)
kept = [result(1000) for _ in range(3)]
order = [1, 2, 0]
places = [kept[i].data_ptr() for i in order]
for i in order:
    kept[i] = None
found = [result(1000) for _ in range(3)]
print("the one freed last, which caches may still hold", [y.data_ptr() for y in found] == places[::-1])
del found
place = result(1000).data_ptr()
large = result(140_000)  # 137 MiB, more than the pool
del large
others = [torch.empty(1000, 256) for _ in range(4)]  # would take the place, were it free
print("a result larger than the pool leaves the others there", result(1000).data_ptr() == place)
""")
    assert [line.rpartition(" ")[2] for line in printed.splitlines()] == ["True"] * 4, printed


def test_memory_in_use_is_never_handed_out_again():
    first = result(1000, 1.0)
    view = first[10:20]
    del first
    others = [result(1000, 2.0) for _ in range(5)]
    assert len({t.data_ptr() for t in others}) == 5
    assert (view == 1.0).all() and all((t == 2.0).all() for t in others)


def test_a_result_is_a_tensor_like_any_other():
    y = result(1000, 3.0)
    grown = y.resize_(2000, 256)
    assert (grown[:1000] == 3.0).all()
    assert (grown.clone()[:1000] == 3.0).all()  # the rest is what new memory holds, NaN perhaps
    base = torch.ones(256, 1000).t()
    strided = ops.gralora(torch.zeros(1000, 4), base, A, B, scaling=1.0)
    assert strided.stride() == base.stride() and (strided == 1.0).all()


def test_threads_share_the_pool():
    def work(value: int) -> bool:
        return all((result(500 + 7 * i, value) == value).all() for i in range(50))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


def test_a_child_that_is_forked_while_threads_allocate_has_a_pool_that_works():
    """Each child makes and frees results; one whose pool was locked when it was forked would wait for ever."""
    printed = run_python(
        """
import os, signal, threading
import torch
torch.set_num_threads(1)  # OpenMP's own threads do not survive a fork
from gralora_ext import ops
from test_result_memory import result
stop, running = threading.Event(), threading.Semaphore(0)
idle = [result(128) for _ in range(1000)]
del idle  # whoever looks for memory looks at all of these, with the lock
def allocate():  # without the interpreter's lock: the dx of 100 calls, one after the other
    x, y = torch.randn(200, 256, requires_grad=True), torch.zeros(200, 4)
    for _ in range(100):
        y = ops.gralora(x, y, torch.randn(1, 256, 2), torch.randn(1, 2, 4), scaling=1.0)
    while not stop.is_set():
        y.sum().backward(retain_graph=True)
        running.release()
threads = [threading.Thread(target=allocate) for _ in range(2)]
for thread in threads: thread.start()
for _ in range(4): running.acquire(timeout=60)
failed = 0
for _ in range(20):
    child = os.fork()
    if child == 0:
        signal.alarm(15)
        kept = [result(150, i) for i in range(3)]
        os._exit(0 if all((t == i).all() for i, t in enumerate(kept)) else 1)
    failed += os.waitpid(child, 0)[1] != 0
    if failed: break
stop.set()
for thread in threads: thread.join()
print(failed)
""",
        OMP_NUM_THREADS="1",
    )
    assert printed.split() == ["0"]


def test_the_pool_holds_at_most_128_mib():
    grown = run_python(
        """
import os, re, torch
from gralora_ext import ops
A, B = torch.randn(1, 4, 2), torch.randn(1, 2, 256)
def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) >> 10
def result(rows):
    return ops.gralora(torch.zeros(rows, 4), torch.zeros(rows, 256), A, B, scaling=1.0)
result(10)
before = resident()
results = [result(20_000 + 4_000 * i) for i in range(9)]  # 316 MiB, no two of one size
during = resident()
del results
print(during - before, resident() - before)
""",
        MALLOC_MMAP_THRESHOLD_=str(1 << 16),
    )
    during, after = map(int, grown.split())
    assert during > 300
    assert after < 128 + 32
