"""Classify 10,000 images with a model that is loaded once per core.

The classic batch job: an actor per core loads the model, batches fan out, results come back in
order. The same is done with tasks, which get the model from the object store. The images are
scikit-learn's handwritten digits; accuracy is computed on digits that the model was not trained
on, repeated until there are 10,000 of them.

The exit status is not zero if the two ways disagree, or differ from a serial run.
"""

import pickle
import sys
import time

import ray

try:
    import numpy as np
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from sklearn.svm import SVC
except ImportError as missing:
    raise SystemExit(f"This example needs scikit-learn ({missing}): pip install scikit-learn") from None

ITEM_COUNT = 10_000
BATCH_SIZE = 100


def train():
    """Return a pickled classifier, and the images and labels held out from its training."""
    digits = load_digits()
    train_images, test_images, train_labels, test_labels = train_test_split(
        digits.data, digits.target, test_size=0.5, random_state=0, stratify=digits.target
    )
    model = SVC(gamma=0.001).fit(train_images, train_labels)
    return pickle.dumps(model), test_images, test_labels


def repeat_to(count, images, labels):
    index = np.arange(count) % len(images)
    return images[index], labels[index]


@ray.remote(num_cpus=1)
class Classifier:
    """Holds the model for as long as there are batches."""

    def __init__(self, pickled_model):
        self.model = pickle.loads(pickled_model)

    def predict(self, images):
        return self.model.predict(images)


@ray.remote
def predict(model, images):
    return model.predict(images)


def classify_with_actors(pickled_model, batches, actor_count):
    actors = [Classifier.remote(pickled_model) for _ in range(actor_count)]
    ray.get([actor.__ray_ready__.remote() for actor in actors])
    started = time.perf_counter()
    # Results are asked for in the order of the batches, whoever computes them.
    predictions = ray.get([actors[i % actor_count].predict.remote(batch) for i, batch in enumerate(batches)])
    return np.concatenate(predictions), time.perf_counter() - started


def classify_with_tasks(pickled_model, batches, worker_count):
    model = ray.put(pickle.loads(pickled_model))
    # The workers import scikit-learn before the clock starts, as the actors have done.
    ray.get([predict.remote(model, batch) for batch in batches[: 4 * worker_count]])
    started = time.perf_counter()
    predictions = ray.get([predict.remote(model, batch) for batch in batches])
    return np.concatenate(predictions), time.perf_counter() - started


def classify_serially(pickled_model, batches):
    model = pickle.loads(pickled_model)
    started = time.perf_counter()
    predictions = [model.predict(batch) for batch in batches]
    return np.concatenate(predictions), time.perf_counter() - started


def main():
    pickled_model, test_images, test_labels = train()
    images, labels = repeat_to(ITEM_COUNT, test_images, test_labels)
    batches = [images[i : i + BATCH_SIZE] for i in range(0, ITEM_COUNT, BATCH_SIZE)]
    print(f"{ITEM_COUNT:,} images in {len(batches)} batches; the model was trained on other images")

    ray.init()
    cores = max(1, int(ray.cluster_resources()["CPU"]))
    runs = {f"actors, {cores}": classify_with_actors(pickled_model, batches, cores)}
    runs["tasks"] = classify_with_tasks(pickled_model, batches, cores)
    ray.shutdown()
    runs["serial"] = classify_serially(pickled_model, batches)

    for name, (predictions, seconds) in runs.items():
        accuracy = np.mean(predictions == labels)
        print(f"{name:<12} {ITEM_COUNT / seconds:10,.0f} images/s   accuracy {accuracy:.2%}")

    expected = runs["serial"][0]
    if not all(np.array_equal(predictions, expected) for predictions, _ in runs.values()):
        print("THE PREDICTIONS DIFFER", file=sys.stderr)
        return 1
    print("all predictions are equal and in order")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
