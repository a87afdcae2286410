"""Programs of the kind that Ray's documentation teaches with, and the results it promises.

Written anew after the pages "Getting started", "Key concepts", "Monte Carlo estimation of pi",
"Patterns: tree of tasks", "Parameter server" and "Actors" of Ray's documentation.
"""

import collections
import math
import random

import numpy as np
import pytest

import ray


def test_square(cluster):
    @ray.remote
    def square(x):
        return x * x

    assert ray.get([square.remote(i) for i in range(4)]) == [0, 1, 4, 9]


def test_counter(cluster):
    @ray.remote
    class Counter:
        def __init__(self):
            self.i = 0

        def get(self):
            return self.i

        def incr(self, value):
            self.i += value

    counter = Counter.remote()
    for _ in range(10):
        counter.incr.remote(1)
    assert ray.get(counter.get.remote()) == 10


def test_objects_are_shared_between_tasks(cluster):
    @ray.remote
    def sum_matrix(matrix):
        return np.sum(matrix)

    assert ray.get(sum_matrix.remote(np.ones((100, 100)))) == 10_000.0
    matrix = ray.put(np.ones((1000, 1000)))
    assert ray.get(sum_matrix.remote(matrix)) == 1_000_000.0


def test_pi_with_tasks_and_an_actor_for_progress(cluster):
    @ray.remote
    class ProgressActor:
        def __init__(self, total):
            self.total = total
            self.done = {}

        def report(self, task, done):
            self.done[task] = done

        def progress(self):
            return sum(self.done.values()) / self.total

    @ray.remote
    def sample(count, task, progress_actor):
        generator = random.Random(task)
        inside = 0
        for i in range(count):
            inside += math.hypot(generator.uniform(-1, 1), generator.uniform(-1, 1)) <= 1
            if (i + 1) % 5_000 == 0:
                progress_actor.report.remote(task, i + 1)
        ray.get(progress_actor.report.remote(task, count))
        return inside

    tasks, samples = 8, 10_000
    progress_actor = ProgressActor.remote(tasks * samples)
    results = [sample.remote(samples, task, progress_actor) for task in range(tasks)]
    while (progress := ray.get(progress_actor.progress.remote())) < 1:
        assert 0 <= progress <= 1
        ray.wait(results, num_returns=tasks, timeout=0.02)
    pi = 4 * sum(ray.get(results)) / (tasks * samples)
    assert abs(pi - math.pi) < 0.05


def test_tree_reduction(cluster):
    @ray.remote
    def add(x, y):
        return x + y

    values = [ray.put(i) for i in range(64)]
    while len(values) > 1:
        values = [*values[2:], add.remote(values[0], values[1])]
    assert ray.get(values[0]) == 2016


def test_sorting_with_a_tree_of_tasks(cluster):
    def merge(left, right):
        return np.sort(np.concatenate([left, right]), kind="stable")

    @ray.remote
    def merge_sort(numbers, depth):
        if depth == 0:
            return np.sort(numbers)
        middle = len(numbers) // 2
        halves = [merge_sort.remote(part, depth - 1) for part in (numbers[:middle], numbers[middle:])]
        return merge(*ray.get(halves))

    numbers = np.random.default_rng(0).integers(0, 10**9, 200_000)
    assert np.array_equal(ray.get(merge_sort.remote(numbers, 2)), np.sort(numbers))


def linear_problem(seed):
    generator = np.random.default_rng(seed)
    inputs = generator.normal(size=(200, 10))
    return inputs, inputs @ np.arange(10)


@ray.remote
class ParameterServer:
    def __init__(self, learning_rate):
        self.weights = np.zeros(10)
        self.learning_rate = learning_rate

    def apply(self, *gradients):
        self.weights = self.weights - self.learning_rate * np.mean(gradients, axis=0)
        return self.weights

    def get_weights(self):
        return self.weights


@ray.remote
class DataWorker:
    def __init__(self, inputs, outputs):
        self.inputs, self.outputs = inputs, outputs

    def gradient(self, weights):
        error = self.inputs @ weights - self.outputs
        return self.inputs.T @ error / len(error)


def test_synchronous_parameter_server(cluster):
    server = ParameterServer.remote(0.5)
    workers = [DataWorker.remote(*linear_problem(seed)) for seed in range(3)]
    weights = server.get_weights.remote()
    for _ in range(40):
        weights = server.apply.remote(*[worker.gradient.remote(weights) for worker in workers])
    assert np.allclose(ray.get(weights), np.arange(10), atol=0.01)


def test_asynchronous_parameter_server(cluster):
    server = ParameterServer.remote(0.2)
    workers = [DataWorker.remote(*linear_problem(seed)) for seed in range(3)]
    weights = server.get_weights.remote()
    gradients = {worker.gradient.remote(weights): worker for worker in workers}
    # How soon it converges depends on which workers are fast.
    for step in range(5000):
        (ready,), _ = ray.wait(list(gradients))
        worker = gradients.pop(ready)
        gradients[worker.gradient.remote(server.apply.remote(ready))] = worker
        if step % 50 == 0 and np.allclose(ray.get(server.get_weights.remote()), np.arange(10), atol=0.05):
            return
    pytest.fail("it did not converge")


def test_a_queue_sharded_over_actors(cluster):
    @ray.remote
    class Shard:
        def __init__(self):
            self.items = collections.deque()

        def push(self, item):
            self.items.append(item)

        def pop(self):
            return self.items.popleft() if self.items else None

    @ray.remote
    def produce(shards, producer, count):
        ray.get([shards[i % len(shards)].push.remote((producer, i)) for i in range(count)])

    @ray.remote
    def drain(shard):
        items = []
        while (item := ray.get(shard.pop.remote())) is not None:
            items.append(item)
        return items

    shards = [Shard.remote() for _ in range(3)]
    ray.get([produce.remote(shards, producer, 30) for producer in range(3)])
    drained = ray.get([drain.remote(shard) for shard in shards])
    everything = [item for items in drained for item in items]
    assert sorted(everything) == [(producer, i) for producer in range(3) for i in range(30)]
    for items in drained:  # of one producer, each shard has kept the order
        for producer in range(3):
            mine = [i for p, i in items if p == producer]
            assert mine == sorted(mine)


def test_processing_results_in_the_order_they_come(cluster):
    @ray.remote
    def work(i):
        return i * i

    pending = [work.remote(i) for i in range(20)]
    total = 0
    while pending:
        (done,), pending = ray.wait(pending)
        total += ray.get(done)
    assert total == sum(i * i for i in range(20))


def test_limiting_the_number_of_tasks_in_flight(cluster):
    @ray.remote
    def work(i):
        return i

    in_flight, results = [], []
    for i in range(50):
        if len(in_flight) == 10:
            (done,), in_flight = ray.wait(in_flight)
            results.append(ray.get(done))
        in_flight.append(work.remote(i))
    results.extend(ray.get(in_flight))
    assert sorted(results) == list(range(50))


def test_fibonacci_by_recursion(cluster):
    @ray.remote
    def fibonacci(n):
        return n if n < 2 else sum(ray.get([fibonacci.remote(n - 1), fibonacci.remote(n - 2)]))

    assert ray.get(fibonacci.remote(5)) == 5


def test_supervisor_and_workers(cluster):
    @ray.remote
    class Worker:
        def work(self, x):
            return x + 1

    @ray.remote
    class Supervisor:
        def __init__(self):
            self.workers = [Worker.remote() for _ in range(2)]

        def run(self):
            return ray.get([worker.work.remote(i) for i, worker in enumerate(self.workers)])

    assert ray.get(Supervisor.remote().run.remote()) == [1, 2]
