"""The first five minutes: tasks, actors, objects, resources.

Run it with `python examples/quickstart.py`. Every value printed is also checked, and the exit
status says whether all were right.
"""

import os

import ray


@ray.remote
def square(x):
    return x * x


@ray.remote
def total(*numbers):
    return sum(numbers)


@ray.remote
class Counter:
    """An actor is a process that keeps state between calls."""

    def __init__(self, start=0):
        self.value = start

    def increment(self, by=1):
        self.value += by
        return self.value


@ray.remote
def where_am_i():
    return os.getpid()


def tasks():
    # `.remote` returns at once with a reference; `ray.get` waits for the value.
    references = [square.remote(x) for x in range(4)]
    squares = ray.get(references)
    print("four tasks:        ", squares)

    # References can be arguments: the task starts when they are ready.
    sum_of_squares = ray.get(total.remote(*references))
    print("a task of tasks:   ", sum_of_squares)
    return squares == [0, 1, 4, 9] and sum_of_squares == 14


def actors():
    counter = Counter.remote(start=10)
    values = ray.get([counter.increment.remote() for _ in range(3)])
    print("a counting actor:  ", values)
    return values == [11, 12, 13]


def objects():
    # An object is stored once, however many tasks read it.
    numbers = ray.put(list(range(1000)))
    lengths = ray.get([length.remote(numbers) for _ in range(3)])
    print("one shared object: ", lengths)
    return ray.get(numbers)[-1] == 999 and lengths == [1000, 1000, 1000]


@ray.remote
def length(items):
    return len(items)


def resources():
    # A task starts when what it demands is free: here, half a core and a part of "disk".
    reference = where_am_i.options(num_cpus=0.5, resources={"disk": 1}).remote()
    worker = ray.get(reference)
    print("with demands:      ", f"process {worker}; the cluster has {ray.cluster_resources()['disk']:g} disks")
    return worker != os.getpid()


def main():
    ray.init(resources={"disk": 2})
    correct = all([tasks(), actors(), objects(), resources()])
    ray.shutdown()
    print("all as expected" if correct else "something above is wrong")
    return 0 if correct else 1


if __name__ == "__main__":
    raise SystemExit(main())
