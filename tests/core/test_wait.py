"""`ray.wait`: which references are ready."""

import contextlib
import threading

import pytest

import ray
from tests.core.helpers import Gate


@pytest.fixture
def gate(tmp_path):
    gate = Gate(tmp_path)
    yield gate
    gate.open()


@ray.remote
def when_open(gate, value=None):
    gate.wait()
    return value


@ray.remote
def at_once(value=None):
    return value


def test_wait_splits_ready_from_pending(cluster, gate):
    late, early = when_open.remote(gate), at_once.remote()
    assert ray.wait([late, early]) == ([early], [late])


def test_wait_returns_one_reference_unless_asked_for_more(cluster):
    references = [ray.put(i) for i in range(5)]
    ready, pending = ray.wait(references)
    assert (len(ready), len(pending)) == (1, 4)
    assert set(ready + pending) == set(references)


def test_wait_returns_as_many_as_asked_for(cluster, gate):
    references = [at_once.remote(i) for i in range(3)] + [when_open.remote(gate)]
    ready, pending = ray.wait(references, num_returns=3)
    assert (ready, pending) == (references[:3], references[3:])


def test_wait_returns_ready_references_in_their_order(cluster):
    references = [ray.put(i) for i in range(20)]
    ready, pending = ray.wait(references, num_returns=20)
    assert (ready, pending) == (references, [])


def test_wait_ends_after_its_timeout_with_what_is_ready(cluster, gate):
    late, early = when_open.remote(gate), ray.put(1)
    ready, pending = ray.wait([late, early], num_returns=2, timeout=0.05)
    assert (ready, pending) == ([early], [late])


def test_a_timeout_of_zero_only_looks(cluster, gate):
    late, early = when_open.remote(gate), ray.put(1)
    assert ray.wait([late], timeout=0) == ([], [late])
    assert ray.wait([early], timeout=0) == ([early], [])


def test_a_timeout_of_minus_one_is_no_limit_for_get_only(cluster, gate):
    late = when_open.remote(gate, 7)
    with pytest.raises(ValueError, match="timeout"):
        ray.wait([late], timeout=-1)
    threading.Timer(0.2, gate.open).start()  # the task ends while both wait
    assert ray.get(late, timeout=-1) == 7
    assert ray.get([late], timeout=-1) == [7]


@pytest.mark.skate  # Ray's process aborts
def test_other_negative_timeouts_are_refused(cluster, gate):
    for timeout in (-0.5, -2):
        with pytest.raises(ValueError, match="timeout"):
            ray.get(when_open.remote(gate), timeout=timeout)


def test_a_failed_task_counts_as_ready(cluster):
    @ray.remote
    def fail():
        raise ValueError

    reference = fail.remote()
    assert ray.wait([reference]) == ([reference], [])


def test_wait_until_all_are_done_one_by_one(cluster):
    pending = [at_once.remote(i) for i in range(50)]
    seen = []
    while pending:
        (done,), pending = ray.wait(pending)
        seen.append(ray.get(done))
    assert sorted(seen) == list(range(50))


def test_wait_wakes_when_a_task_ends(cluster, gate):
    reference = when_open.remote(gate)
    timer = threading.Timer(0.1, gate.open)
    timer.start()
    assert ray.wait([reference], timeout=20) == ([reference], [])
    timer.join()


def test_wait_inside_a_task(cluster):
    @ray.remote
    def outer():
        references = [at_once.remote(i) for i in range(4)]
        ready, pending = ray.wait(references, num_returns=4)
        return len(ready), len(pending)

    assert ray.get(outer.remote()) == (4, 0)


def test_wait_for_actor_calls(cluster, gate):
    @ray.remote
    class Worker:
        def work(self, gate):
            gate.wait()

        def ping(self):
            return 1

    slow, quick = Worker.remote(), Worker.remote()
    late, early = slow.work.remote(gate), quick.ping.remote()
    assert ray.wait([late, early]) == ([early], [late])


def test_wait_without_fetching(cluster):
    reference = at_once.remote(bytes(1_000_000))
    assert ray.wait([reference], fetch_local=False) == ([reference], [])


def test_wait_for_nothing(cluster):
    # Ray says that no reference is an error only where one is asked for.
    with contextlib.suppress(ValueError):
        assert ray.wait([]) == ([], [])


def test_duplicates_are_refused(cluster):
    reference = ray.put(1)
    with pytest.raises(ValueError, match=r"(?i)unique|duplicate|twice"):
        ray.wait([reference, reference])


@pytest.mark.parametrize("num_returns", [0, -1, 3])
def test_num_returns_must_fit_the_list(cluster, num_returns):
    with pytest.raises(ValueError, match=r"num_returns|objects to return"):
        ray.wait([ray.put(1), ray.put(2)], num_returns=num_returns)


def test_a_negative_timeout_is_refused(cluster):
    with pytest.raises(ValueError, match="timeout"):
        ray.wait([ray.put(1)], timeout=-1)


def test_one_reference_is_not_a_list(cluster):
    with pytest.raises(TypeError, match="list"):
        ray.wait(ray.put(1))


def test_what_is_not_a_reference_is_refused(cluster):
    with pytest.raises(TypeError, match="ObjectRef"):
        ray.wait([1, 2])


def test_wait_over_a_thousand_references(cluster):
    pending = [ray.put(i) for i in range(1000)]
    count = 0
    while pending:
        ready, pending = ray.wait(pending, num_returns=min(100, len(pending)))
        count += len(ready)
    assert count == 1000
