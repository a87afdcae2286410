"""Train a linear model with a parameter server: workers compute gradients of their part of the data, all at once.

An actor holds the weights; worker actors take them, compute a gradient on a batch of their own data, and send it back.
First in lock step (every worker's gradient counts in each step), then without waiting for the slowest: a gradient is
applied when it comes.

The exit status is not zero if a model has not learned the weights that made the data.
"""

import sys
import time

import ray

try:
    import numpy as np
except ImportError as missing:
    raise SystemExit(f"This example needs numpy ({missing}): pip install numpy") from None

FEATURES = 50
ROWS_PER_WORKER = 4_000
BATCH = 200
WORKERS = 4
STEPS = 150
RATE = 0.1
TOLERANCE = 0.02


def true_weights():
    return np.random.default_rng(0).normal(size=FEATURES)


@ray.remote
class ParameterServer:
    """Holds the weights."""

    def __init__(self):
        self.weights = np.zeros(FEATURES)

    def apply(self, *gradients):
        """Go one step down the mean of the gradients; returns the new weights."""
        self.weights = self.weights - RATE * np.mean(gradients, axis=0)
        return self.weights

    def get(self):
        return self.weights


@ray.remote
class Worker:
    """Holds a part of the data, made here, so that it never travels."""

    def __init__(self, seed):
        self.random = np.random.default_rng(seed)
        self.inputs = self.random.normal(size=(ROWS_PER_WORKER, FEATURES))
        self.outputs = self.inputs @ true_weights() + self.random.normal(scale=0.01, size=ROWS_PER_WORKER)

    def gradient(self, weights):
        rows = self.random.integers(ROWS_PER_WORKER, size=BATCH)
        inputs, outputs = self.inputs[rows], self.outputs[rows]
        return 2 * inputs.T @ (inputs @ weights - outputs) / BATCH


def train_together(workers):
    server = ParameterServer.remote()
    weights = server.get.remote()
    for _ in range(STEPS):
        # References are passed on before there are values: the loop never waits.
        weights = server.apply.remote(*[worker.gradient.remote(weights) for worker in workers])
    return ray.get(weights)


def train_apart(workers):
    server = ParameterServer.remote()
    weights = server.get.remote()
    running = {worker.gradient.remote(weights): worker for worker in workers}
    for _ in range(STEPS * len(workers)):
        (done,), _ = ray.wait(list(running))
        worker = running.pop(done)
        running[worker.gradient.remote(server.apply.remote(done))] = worker
    return ray.get(server.get.remote())


def main():
    ray.init()
    workers = [Worker.remote(seed) for seed in range(1, WORKERS + 1)]
    fine = True
    for name, train in (("together", train_together), ("apart", train_apart)):
        started = time.perf_counter()
        error = float(np.abs(train(workers) - true_weights()).max())
        took = time.perf_counter() - started
        print(f"Trained {name} in {took:.2f} s, {STEPS * WORKERS / took:.0f} gradients a second; error {error:.4f}.")
        fine = fine and error < TOLERANCE
    ray.shutdown()
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
