"""Independent programs on one machine do not notice each other."""

import json
import re

import ray
from tests.core.helpers import run_driver, start_driver

PROGRAM = """
    import json, sys
    import ray

    ray.init(num_cpus=1, address="local")

    @ray.remote
    class Counter:
        def __init__(self):
            self.value = 0

        def increment(self):
            self.value += 1
            return self.value

    counter = Counter.options(name="counter").remote()
    values = ray.get([counter.increment.remote() for _ in range(20)])
    print("ready", flush=True)
    sys.stdin.readline()
    node = ray.nodes()[0]["NodeID"]
    values += ray.get([ray.get_actor("counter").increment.remote() for _ in range(20)])
    print(json.dumps([node, len(ray.nodes()), values]), flush=True)
"""


def wait_for_ready(process):
    for line in process.stdout:
        if line.strip() == "ready":
            return
    raise AssertionError(process.stderr.read())


def test_two_programs_run_side_by_side(no_cluster):
    with start_driver(PROGRAM) as first, start_driver(PROGRAM) as second:
        for process in (first, second):
            wait_for_ready(process)
        results = []
        for process in (first, second):
            output, errors = process.communicate("go\n", timeout=40)
            assert process.returncode == 0, errors
            results.append(json.loads(output.splitlines()[-1]))
    assert results[0][0] != results[1][0]
    for _, nodes, values in results:
        assert nodes == 1
        assert values == list(range(1, 41))


def test_the_end_of_one_program_does_not_touch_the_other(no_cluster):
    with start_driver(PROGRAM) as survivor:
        wait_for_ready(survivor)
        with start_driver(PROGRAM) as killed:
            wait_for_ready(killed)
            killed.kill()
            killed.wait()
        output, errors = survivor.communicate("go\n", timeout=40)
        assert survivor.returncode == 0, errors
        assert json.loads(output.splitlines()[-1])[2] == list(range(1, 41))


def test_a_program_can_run_while_this_process_has_a_cluster(fresh_cluster):
    fresh_cluster(num_cpus=1)
    reference = ray.put("mine")
    status, output, errors = run_driver("""
        import ray
        ray.init(num_cpus=1, address="local")
        print(len(ray.nodes()), ray.get(ray.put("other")))
    """)
    assert status == 0, errors
    assert re.search(r"^1 other$", output, re.MULTILINE)
    assert ray.get(reference) == "mine"


def test_a_task_that_starts_a_program_of_its_own(fresh_cluster):
    fresh_cluster(num_cpus=1)

    @ray.remote
    def start():
        return run_driver("""
            import ray
            ray.init(num_cpus=1, address="local")
            print(ray.get(ray.remote(lambda: "inner").remote()))
        """)

    status, output, errors = ray.get(start.remote())
    assert status == 0, errors
    assert output.splitlines()[-1] == "inner"
