"""Looking at a cluster of several nodes, from a driver and from the command line."""

import json
import os
import re
import subprocess
import sys

import pytest

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from tests.core.helpers import Gate, run_driver, wait_until

pytestmark = [pytest.mark.skate, pytest.mark.slow]  # nodes of a cluster are processes that take a moment to start


@ray.remote
def wait_at(gate, text=""):
    if text:
        print(text)
    gate.wait(50)
    return os.getpid()


@ray.remote
class Counter:
    def speak(self, text):
        print(text)
        return os.getpid()

    def count(self, lines):
        for number in range(lines):
            print(number, "x" * 100)
        return os.getpid()


def at(remote, node, **options):
    return remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False), **options)


def command(*arguments):
    """(status, output, errors) of a sub-command of `ray`, in a process that is in no cluster."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-m", "ray", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
        env=environment,
    )
    return done.returncode, done.stdout, done.stderr


def output_of(*arguments):
    status, output, errors = command(*arguments)
    assert status == 0, errors
    return output


@pytest.fixture
def gate(tmp_path):
    gate = Gate(tmp_path)
    yield gate
    gate.open()


def test_everything_is_listed_wherever_it_is(start_cluster, gate):
    from ray.util import state

    cluster, (one, two) = start_cluster({"num_cpus": 1}, {"num_cpus": 1})
    references = {node.node_id: at(wait_at, node, name="spread").remote(gate) for node in cluster.list_all_nodes()}

    def running():
        rows = state.list_tasks(filters=[("name", "=", "spread"), ("state", "=", "RUNNING")])
        return rows if len(rows) == 3 else None

    rows = wait_until(running, what="three tasks to run")
    assert {row.node_id: row.task_id for row in rows} == {
        node: reference.task_id().hex() for node, reference in references.items()
    }
    workers = {row.pid: row.node_id for row in state.list_workers(filters=[("is_alive", "=", True)])}
    assert all(workers[row.worker_pid] == row.node_id for row in rows)
    assert len(state.list_nodes()) == 3
    gate.open()
    pids = {node: ray.get(reference) for node, reference in references.items()}
    ended = state.list_tasks(filters=[("name", "=", "spread"), ("state", "=", "FINISHED")])
    assert {row.node_id: row.worker_pid for row in ended} == pids
    # What a node has written goes with it, and the list says nothing of it; the node itself is remembered.
    cluster.remove_node(two)
    cluster.wait_for_nodes()
    ended = state.list_tasks(filters=[("name", "=", "spread"), ("state", "=", "FINISHED")])
    assert {row.node_id for row in ended} == set(references) - {two.node_id}
    lost = state.get_node(two.node_id)
    assert lost.state == "DEAD"
    assert lost.state_message
    assert state.get_node(one.node_id).state == "ALIVE"


def test_a_node_that_does_not_answer_is_named(start_cluster, gate):
    from ray.util import state
    from ray.util.state.exception import RayStateApiException

    _, (node,) = start_cluster({"num_cpus": 1})
    reference = at(wait_at, node, name="there").remote(gate)
    wait_until(lambda: state.list_tasks(filters=[("name", "=", "there"), ("state", "=", "RUNNING")]), what="the task")
    os.kill(node.pid, 19)
    try:
        with pytest.raises(RayStateApiException, match=f"node {node.node_id[:16]}"):
            state.list_workers(timeout=1)
        assert state.list_workers(timeout=1, raise_on_missing_output=False)
    finally:
        os.kill(node.pid, 18)
    gate.open()
    assert ray.get(reference, timeout=20)


def test_the_command_line_looks_from_outside(start_cluster, gate, tmp_path):
    cluster, (node,) = start_cluster({"num_cpus": 1})
    where = ("--address", cluster.address)
    reference = at(wait_at, node, name="seen").remote(gate, "hello from there")
    actor = at(Counter, node).remote()
    pid = ray.get(actor.speak.remote("the actor speaks"))
    wait_until(
        lambda: "RUNNING" in output_of("list", "tasks", "-f", "name=seen", *where),
        what="the task to run",
    )
    (row,) = json.loads(output_of("list", "actors", "--format", "json", "-f", "state=ALIVE", *where))
    assert (row["class_name"], row["pid"], row["node_id"]) == ("Counter", pid, node.node_id)
    assert f"pid: {pid}" in output_of("get", "actors", row["actor_id"], *where)
    assert "Counter.speak" in output_of("summary", "tasks", *where)
    assert "all nodes:" in output_of("memory", *where)
    stacks = output_of("stack", *where)
    assert re.search(r"^--- process \d+ on node .*, runs seen$", stacks, re.MULTILINE)
    assert "in wait_at" in stacks
    text = output_of("why", reference.hex(), *where)
    assert "seen was given to worker" in text
    assert f"its owner is the driver, process {os.getpid()}" in text
    assert "is alive in process" in output_of("why", row["actor_id"], *where)
    files = output_of("logs", *where)
    assert node.node_id[:16] in files
    assert f"-{pid}.out" in files
    assert output_of("logs", "actor", "--id", row["actor_id"], *where) == "the actor speaks\n"
    assert "hello from there\n" in output_of("logs", "task", "--id", reference.task_id().hex(), *where)
    trace = tmp_path / "trace.json"
    output_of("timeline", "-o", trace, *where)
    assert "Counter.speak" in trace.read_text()
    status, _, errors = command("why", "abc", *where)
    assert (status, errors.count("\n")) == (1, 1)
    assert "is no id" in errors
    gate.open()
    ray.get(reference)
    for id in (reference.task_id().hex(), reference.hex()):
        assert "attempt 0 of seen has ended in process" in output_of("why", id, *where)


def test_placement_groups_are_listed_and_say_why_they_wait(start_cluster):
    from ray.util import state
    from ray.util.placement_group import placement_group, remove_placement_group

    cluster, (node,) = start_cluster({"num_cpus": 1, "resources": {"there": 1}})
    where = ("--address", cluster.address)
    group = placement_group([{"there": 1}], name="mine")
    ray.get(group.ready())
    waiting = placement_group([{"there": 1}, {"CPU": 1}])
    row = state.get_placement_group(group.id.hex())
    assert (row.name, row.state, row.creator_job_id) == ("mine", "CREATED", ray.get_runtime_context().get_job_id())
    assert [(bundle["node_id"], bundle["unit_resources"]) for bundle in row.bundles] == [(node.node_id, {"there": 1})]
    (row,) = json.loads(output_of("list", "placement-groups", "-f", "state=PENDING", "--format", "json", *where))
    assert row["placement_group_id"] == waiting.id.hex()
    assert f"CREATED, on node {node.node_id[:16]}" in output_of("why", group.id.hex(), *where)
    assert "PENDING: " in output_of("why", waiting.id.hex(), *where)
    assert "(1 reserved by placement groups, 0 of it used)" in output_of("status", *where)
    remove_placement_group(group)
    wait_until(lambda: state.get_placement_group(waiting.id.hex()).state == "CREATED", what="the other group")
    assert state.get_placement_group(group.id.hex()).state == "REMOVED"
    remove_placement_group(waiting)


def test_every_command_speaks_json_and_yaml(start_cluster, gate):
    cluster, (node,) = start_cluster({"num_cpus": 1})
    where = ("--address", cluster.address, "--format", "json")

    def rows(resource):
        return json.loads(output_of("list", resource, *where))

    reference = at(wait_at, node, name="seen").remote(gate)
    pid = wait_until(
        lambda: next((row["worker_pid"] for row in rows("tasks") if row["state"] == "RUNNING"), None),
        what="the task to run",
    )
    status = json.loads(output_of("status", *where))
    (there,) = [row for row in status["nodes"] if row["role"] != "head"]
    assert (there["node_id"], there["used"]["CPU"], there["total"]["CPU"]) == (node.node_id, 1, 1)
    assert status["pending"] == []
    memory = json.loads(output_of("memory", *where))
    assert reference.hex() in [row["object_id"] for row in memory["objects"]]
    assert memory["shared_memory"]["total"] > 0
    stacks = json.loads(output_of("stack", "--pid", pid, *where))
    assert [(row["node_id"], row["runs"]) for row in stacks] == [(node.node_id, ["seen"])]
    assert f"-{pid}.out" in "".join(json.loads(output_of("logs", *where))[node.node_id])
    assert "seen was given to worker" in json.loads(output_of("why", reference.hex(), *where))[0]["why"]
    (worker,) = [row["worker_id"] for row in rows("workers") if row["pid"] == pid]
    (chain,) = json.loads(output_of("why", worker, *where))
    assert chain["why"].endswith("is alive, lent for seen")
    (chain,) = json.loads(output_of("why", node.node_id, *where))
    assert "a node at" in chain["why"]
    assert output_of("why", worker, *where[:2], "--format", "yaml").startswith('---\n- what: "worker ')
    gate.open()
    ray.get(reference)


def test_a_log_that_is_followed_shows_what_is_written_next(start_cluster):
    from ray.util import state

    _, (node,) = start_cluster({"num_cpus": 1})
    actor = at(Counter, node).remote()
    ray.get(actor.speak.remote("first"))
    log = state.get_log(actor_id=actor._actor_id.hex(), follow=True, _interval=0.01)
    assert next(log) == "first\n"
    ray.get(actor.speak.remote("second"))
    assert next(log) == "second\n"
    log.close()


def test_the_end_of_a_long_log_is_found(start_cluster):
    from ray.util import state

    _, (node,) = start_cluster({"num_cpus": 1})
    actor = at(Counter, node).remote()
    pid = ray.get(actor.count.remote(8000))
    lines = "\n".join(f"{number} {'x' * 100}" for number in range(8000))
    tail = "".join(state.get_log(actor_id=actor._actor_id.hex(), tail=3))
    assert [line.split()[0] for line in tail.splitlines()] == ["7997", "7998", "7999"]
    whole = "".join(state.get_log(node_id=node.node_id, pid=pid))
    assert whole == lines + "\n"
    assert "".join(state.get_log(node_id=node.node_id, pid=pid, tail=0)) == ""
    with pytest.raises(ValueError, match="there is no log file worker-"):
        list(state.get_log(pid=1))


def test_lines_of_workers_on_other_nodes_reach_the_driver(start_cluster):
    cluster, (one, two) = start_cluster({"num_cpus": 1}, {"num_cpus": 1})
    program = f"""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        ray.init({cluster.address!r})

        @ray.remote
        def speak(text):
            print(text)

        @ray.remote
        class Speaker:
            def speak(self, text):
                print(text)

        for node in {[one.node_id, two.node_id]!r}:
            there = NodeAffinitySchedulingStrategy(node, soft=False)
            ray.get(speak.options(scheduling_strategy=there).remote("a task on " + node))
            speaker = Speaker.options(scheduling_strategy=there).remote()
            ray.get(speaker.speak.remote("an actor on " + node))
        import time, sys
        # Lines of other nodes come when they come: the program goes on until its reader has seen them.
        sys.stdin.readline()
    """
    from tests.core.helpers import plain, start_driver

    with start_driver(program) as driver:
        wanted = {f"({name} pid=N) {what} on {node.node_id}" for node in (one, two)
                  for name, what in (("speak", "a task"), ("Speaker", "an actor"))}  # fmt: skip
        seen = set()
        while not wanted <= seen:
            line = driver.stdout.readline()
            assert line, driver.stderr.read()
            seen.add(re.sub(r"pid=\d+", "pid=N", plain(line).strip()))
        driver.stdin.write("\n")
        driver.stdin.flush()
        assert driver.wait(20) == 0


def test_a_tool_leaves_no_job_and_changes_nothing(start_cluster):
    from ray.util import state

    cluster, _ = start_cluster({"num_cpus": 1})
    jobs = state.list_jobs()
    status, _, errors = run_driver(
        f"from ray.util import state; assert len(state.list_nodes(address={cluster.address!r})) == 2"
    )
    assert status == 0, errors
    assert [job.job_id for job in state.list_jobs()] == [job.job_id for job in jobs]
    # A second connection of a driver leaves its own as it is.
    assert len(state.list_nodes(address=cluster.address)) == 2
    assert ray.get(ray.put(1)) == 1
