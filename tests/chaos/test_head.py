"""The head is killed again and again under a workload that checks its own answers.

Calls to running actors must not notice. What was acknowledged (a named actor that has answered, a key, a placement
group that was created) must be there after every kill, and what is asked while there is no head must be answered by the
next one. In the end everything is free again. The seed decides when:

    SKATE_CHAOS_SEED=7 SKATE_CHAOS_KILLS=50 pytest tests/chaos/test_head.py
"""

import os
import random
import threading
import time
import traceback

import pytest

import ray
from ray._runtime import session
from ray.util import get_placement_group, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from tests.cluster.durable import durable_cluster
from tests.core.helpers import wait_until

KILLS = int(os.environ.get("SKATE_CHAOS_KILLS", "4"))
SEED = int(os.environ.get("SKATE_CHAOS_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 30)

pytestmark = [pytest.mark.skate, pytest.mark.slow]


@ray.remote(max_retries=-1)
def square(number):
    return number * number


@ray.remote
class Counter:
    def __init__(self):
        self.count = 0

    def increment(self):
        self.count += 1
        return self.count


class Load:
    """Threads that each repeat something and check it, until they are told to end."""

    def __init__(self):
        self.ended = False
        self.failures = []
        self.named = []
        self.serial = 0
        self.keys = {}
        self.groups = []
        self.grouped = 0
        self.rounds = {}
        self.threads = [
            threading.Thread(target=self._repeat, args=(work,), name=work.__name__)
            for work in (self.call, self.tasks, self.name_actors, self.put_keys, self.make_groups)
        ]
        self.counter = Counter.options(name="steady", lifetime="detached").remote()
        self.expected = 0
        self.slowest_s = 0.0

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *exc):
        self.ended = True
        for thread in self.threads:
            thread.join(60)
            assert not thread.is_alive(), f"{thread.name} hangs"

    def _repeat(self, work):
        try:
            while not self.ended:
                work()
                self.rounds[work.__name__] = self.rounds.get(work.__name__, 0) + 1
        except BaseException:
            self.failures.append(traceback.format_exc())

    def call(self):
        self.expected += 1
        started = time.monotonic()
        assert ray.get(self.counter.increment.remote(), timeout=30) == self.expected
        if self.expected > 1:
            self.slowest_s = max(self.slowest_s, time.monotonic() - started)

    def tasks(self):
        assert ray.get([square.remote(n) for n in range(20)], timeout=60) == [n * n for n in range(20)]

    def name_actors(self):
        self.serial += 1
        name = f"actor-{self.serial}"
        actor = Counter.options(name=name, lifetime="detached").remote()
        assert ray.get(actor.increment.remote(), timeout=60) == 1
        self.named.append(name)
        if len(self.named) % 8 == 0:  # some end again, so that no more and more processes run
            for old in self.named[-8:-1]:
                ray.kill(ray.get_actor(old))
            wait_until(lambda: not set(self.named[-8:-1]) & set(ray.util.list_named_actors()), what="their ends")
            del self.named[-8:-1]

    def make_groups(self):
        """A group comes, a task runs in each of its bundles, and the group before it goes."""
        self.grouped += 1
        name = f"group-{self.grouped}"
        group = placement_group([{"CPU": 0.25}, {"CPU": 0.25}], "STRICT_SPREAD", name=name, lifetime="detached")
        if self.grouped % 2:
            assert ray.get(group.ready(), timeout=60) == group
        else:
            assert group.wait(60)
        assert self.squares_in(group) == [0, 1]
        assert get_placement_group(name) == group
        self.groups.append(name)
        if len(self.groups) > 1:
            remove_placement_group(get_placement_group(self.groups.pop(0)))

    def squares_in(self, group):
        inside = [PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index) for index in (0, 1)]
        refs = [square.options(num_cpus=0.25, scheduling_strategy=inside[index]).remote(index) for index in (0, 1)]
        return ray.get(refs, timeout=60)

    def put_keys(self):
        key = f"key-{len(self.keys)}".encode()
        session.request("kv.put", key=key, value=key * 2, namespace="chaos")
        self.keys[key] = key * 2
        time.sleep(0.002)


@pytest.mark.timeout(60 + 8 * KILLS)
def test_nothing_acknowledged_is_lost_however_often_the_head_is_killed(cluster_keeper, belongings, tmp_path):
    print(f"SKATE_CHAOS_SEED={SEED} SKATE_CHAOS_KILLS={KILLS}")
    rng = random.Random(SEED)
    cluster_keeper.stop()
    with durable_cluster(tmp_path, belongings) as cluster:
        with Load() as load:
            slowest = 0.0
            for _ in range(KILLS):
                time.sleep(rng.uniform(0.05, 0.6))
                cluster.kill_head()
                killed = time.monotonic()
                time.sleep(rng.choice((0.0, 0.0, 0.2)))
                cluster.start_head()
                assert session.request("kv.get", key=b"none", namespace="chaos") is None
                slowest = max(slowest, time.monotonic() - killed)
                assert not load.failures, load.failures[0]
            wait_until(lambda: load.ended or len(load.rounds) == 5, what="each part of the workload")
        assert not load.failures, load.failures[0]
        print(f"rounds {load.rounds}, slowest return {slowest:.2f} s, slowest call {load.slowest_s:.2f} s")
        assert set(load.named) | {"steady"} == set(ray.util.list_named_actors())
        for name in load.named:
            assert ray.get(ray.get_actor(name).increment.remote(), timeout=30) == 2
        for key, value in load.keys.items():
            assert session.request("kv.get", key=key, namespace="chaos") == value
        for name in load.groups:
            group = get_placement_group(name)
            assert load.squares_in(group) == [0, 1]
            remove_placement_group(group)
        for name in ray.util.list_named_actors():
            ray.kill(ray.get_actor(name))
        wait_until(lambda: ray.available_resources().get("CPU") == 4, what="all CPUs to be free")
        assert not [name for name in ray.cluster_resources() if "_group_" in name]
