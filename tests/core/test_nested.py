"""Tasks that start tasks and wait for them. Nothing here may deadlock, whatever the number of CPUs."""

import pytest

import ray
from tests.core.helpers import Gate, Tally


@ray.remote
def identity(x):
    return x


@ray.remote
def down(depth):
    return 0 if depth == 0 else 1 + ray.get(down.remote(depth - 1))


def test_nesting_deeper_than_the_number_of_cpus(fresh_cluster):
    fresh_cluster(num_cpus=1)
    assert ray.get(down.remote(6)) == 6


def test_a_tree_of_tasks_wider_than_the_number_of_cpus(fresh_cluster):
    fresh_cluster(num_cpus=2)

    @ray.remote
    def tree(depth):
        return 1 if depth == 0 else sum(ray.get([tree.remote(depth - 1) for _ in range(2)]))

    assert ray.get(tree.remote(3)) == 8


def test_several_deep_chains_at_once_on_one_cpu(fresh_cluster):
    fresh_cluster(num_cpus=1)
    assert ray.get([down.remote(3) for _ in range(3)]) == [3, 3, 3]


def test_a_worker_blocked_in_wait_gives_its_cpu_back(fresh_cluster):
    fresh_cluster(num_cpus=1)

    @ray.remote
    def outer():
        ready, _ = ray.wait([identity.remote(1), identity.remote(2)], num_returns=2)
        return sum(ray.get(ready))

    assert ray.get(outer.remote()) == 3


def test_a_worker_that_awaits_an_actor_gives_its_cpu_back(fresh_cluster):
    fresh_cluster(num_cpus=1)

    @ray.remote(num_cpus=1)
    class Helper:
        def help(self):
            return "helped"

    @ray.remote
    def outer():
        return ray.get(Helper.remote().help.remote())

    assert ray.get(outer.remote()) == "helped"


@pytest.mark.skate  # on Ray an actor keeps its CPU, and this waits for ever
def test_an_actor_that_holds_the_only_cpu_can_use_tasks(fresh_cluster):
    fresh_cluster(num_cpus=1)

    @ray.remote(num_cpus=1)
    class Boss:
        def delegate(self):
            return ray.get([identity.remote(i) for i in range(5)])

    assert ray.get(Boss.remote().delegate.remote()) == [0, 1, 2, 3, 4]


def test_a_short_task_queued_behind_a_blocked_one_runs(fresh_cluster, tmp_path):
    fresh_cluster(num_cpus=1)
    ray.get([identity.remote(i) for i in range(100)])  # now many tasks are pushed to a worker at once
    tally = Tally(tmp_path)

    @ray.remote
    def work(number):
        if number == 0:
            return ray.get(identity.remote("inner"))
        tally.add()
        return number

    assert ray.get([work.remote(number) for number in range(20)]) == ["inner", *range(1, 20)]
    assert tally.count() == 19


def test_a_task_queued_behind_one_that_waits_for_it_runs(fresh_cluster, tmp_path):
    # The first task ends only when the second has run; both are of one class, so that an engine
    # which pipelines would put them on one worker.
    fresh_cluster(num_cpus=2)
    gate = Gate(tmp_path)

    @ray.remote
    def work(first):
        if first:
            gate.wait()
        else:
            gate.open()
        return first

    ray.get([identity.remote(i) for i in range(100)])
    gate_opener = Gate(tmp_path)
    gate_opener.open()
    assert ray.get([work.remote(True), work.remote(False)]) == [True, False]


def test_quick_tasks_do_not_wait_for_a_long_one_among_them(fresh_cluster, tmp_path):
    fresh_cluster(num_cpus=2)
    gate = Gate(tmp_path)

    @ray.remote
    def work(number):
        if number == 0:
            gate.wait()
        return number

    ray.get([work.remote(number) for number in range(1, 200)])
    references = [work.remote(number) for number in range(100)]
    assert ray.get(references[1:]) == list(range(1, 100))
    gate.open()
    assert ray.get(references[0]) == 0


def test_a_parent_blocked_on_many_children(fresh_cluster):
    fresh_cluster(num_cpus=2)

    @ray.remote
    def parent(n):
        return sum(ray.get([identity.remote(i) for i in range(n)]))

    assert ray.get([parent.remote(50) for _ in range(4)]) == [1225] * 4


def test_children_may_outlive_their_parent(cluster, tmp_path):
    gate = Gate(tmp_path)

    @ray.remote
    def child():
        gate.wait()
        return "child"

    @ray.remote
    def parent():
        return [child.remote()]

    (reference,) = ray.get(parent.remote())
    gate.open()
    assert ray.get(reference) == "child"


def test_a_child_nobody_waits_for_still_runs(cluster, tmp_path):
    gate = Gate(tmp_path)

    @ray.remote
    def child():
        gate.open()

    @ray.remote
    def parent():
        child.remote()

    ray.get(parent.remote())
    gate.wait()


def test_actors_calling_each_other_in_a_ring(cluster):
    @ray.remote
    class Member:
        def set_next(self, following):
            self.following = following

        def pass_on(self, hops):
            return "home" if hops == 0 else ray.get(self.following.pass_on.remote(hops - 1))

    members = [Member.remote() for _ in range(3)]
    ray.get([member.set_next.remote(members[(i + 1) % 3]) for i, member in enumerate(members)])
    assert ray.get(members[0].pass_on.remote(2)) == "home"


def test_a_task_gets_what_a_sibling_makes(cluster, tmp_path):
    @ray.remote
    def consume(references):
        return ray.get(references[0]) + 1

    @ray.remote
    def produce():
        return 1

    assert ray.get(consume.remote([produce.remote()])) == 2


def test_a_blocked_driver_thread_does_not_block_another(cluster, tmp_path):
    import threading

    gate = Gate(tmp_path)

    @ray.remote
    def late():
        gate.wait()
        return "late"

    results = []
    reference = late.remote()
    blocked = threading.Thread(target=lambda: results.append(ray.get(reference)))
    blocked.start()
    assert ray.get(identity.remote(1)) == 1
    gate.open()
    blocked.join()
    assert results == ["late"]


@pytest.mark.parametrize("cpus", [1, 2])
def test_actors_created_and_used_inside_nested_tasks(fresh_cluster, cpus):
    fresh_cluster(num_cpus=cpus)

    @ray.remote
    class Adder:
        def add(self, x):
            return x + 1

    @ray.remote
    def outer(x):
        adder = Adder.remote()
        return ray.get(adder.add.remote(identity.remote(x)))

    assert ray.get([outer.remote(i) for i in range(3)]) == [1, 2, 3]
