"""Loops over the threads of a team: every index once, whatever the number of threads, of pieces and of loops."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from chatglm_ov.native import native, unavailable

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"no native library: {unavailable()}")

ORDERS = pytest.mark.parametrize("shrinking", [False, True])


@ORDERS
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize(("count", "step"), [(0, 4), (1, 1), (3, 4), (5, 4), (64, 1), (1000, 7), (4096, 4)])
def test_every_index_is_visited_once_in_each_loop(threads, count, step, shrinking):
    visits = np.zeros(count, np.int32)
    native().run_loops(threads, 200, step, shrinking, None, visits)
    assert (visits == 200).all()


@ORDERS
@pytest.mark.parametrize("fail_at", [0, 500, 999])
def test_what_a_body_throws_reaches_the_caller(shrinking, fail_at):
    with pytest.raises(RuntimeError, match=f"failed at {fail_at}"):
        native().run_loops(4, 3, 1, shrinking, fail_at, np.zeros(1000, np.int32))


def test_callers_at_once_do_not_wait_for_each_others_threads():
    """More callers and threads than any machine here has processors."""
    visits = [np.zeros(100, np.int32) for _ in range(8)]
    callers = [threading.Thread(target=native().run_loops, args=(8, 50, 1, True, None, seen)) for seen in visits]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=120)
        assert not caller.is_alive()
    assert all((seen == 50).all() for seen in visits)
