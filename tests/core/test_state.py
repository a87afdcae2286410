"""`ray.util.state`: lists, single things, summaries, filters and limits, on one node."""

import os

import pytest

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from tests.core.helpers import Gate, wait_until

pytestmark = pytest.mark.skate  # on Ray these go through its dashboard, which these tests do without


@pytest.fixture
def state(cluster):
    from ray.util import state

    return state


@pytest.fixture
def gate(tmp_path):
    gate = Gate(tmp_path)
    yield gate
    gate.open()


@ray.remote
def wait_at(gate, *rest):
    gate.wait(50)
    return os.getpid()


@ray.remote(max_retries=0)
def fail(text):
    raise LookupError(text)


@ray.remote
class Counter:
    def __init__(self, broken=False):
        if broken:
            raise LookupError("no counter")

    def process(self):
        return os.getpid()

    def fail(self):
        raise LookupError("no count")

    def speak(self, text):
        print(text)


def one(rows):
    (row,) = rows
    return row


def task_named(state, name, wanted):
    """The task's row, once it is in the wanted state."""
    return wait_until(
        lambda: next((row for row in state.list_tasks(filters=[("name", "=", name)]) if row.state == wanted), None),
        what=f"{name} to be {wanted}",
    )


def test_a_task_is_listed_in_each_of_its_states(state, gate):
    blockers = [wait_at.options(name="blocker").remote(gate) for _ in range(4)]
    waits = wait_at.options(name="waits").remote(gate)
    depends = wait_at.options(name="depends").remote(gate, waits)
    running = task_named(state, "blocker", "RUNNING")
    assert (running.type, running.attempt_number, running.error_type) == ("NORMAL_TASK", 0, None)
    assert running.node_id == ray.get_runtime_context().get_node_id()
    assert running.start_time_ms >= running.creation_time_ms > 0
    assert running.job_id == ray.get_runtime_context().get_job_id()
    assert task_named(state, "waits", "PENDING_NODE_ASSIGNMENT").worker_pid is None
    assert task_named(state, "depends", "PENDING_ARGS_AVAIL").task_id == depends.task_id().hex()
    gate.open()
    pids = ray.get(blockers)
    ray.get(depends)
    found = state.list_tasks(filters=[("name", "=", "blocker")])
    assert {row.state for row in found} == {"FINISHED"}
    assert {row.task_id for row in found} == {reference.task_id().hex() for reference in blockers}
    assert sorted(row.worker_pid for row in found) == sorted(pids)
    assert all(row.end_time_ms >= row.start_time_ms for row in found)


def test_what_a_task_raised_is_in_its_row(state):
    with pytest.raises(LookupError):
        ray.get(fail.options(name="failing").remote("what is lost"))
    row = task_named(state, "failing", "FAILED")
    assert row.error_type == "TASK_EXECUTION_EXCEPTION"
    assert row.error_message.endswith("LookupError: what is lost")


def test_attempts_are_rows_of_their_own(state):
    @ray.remote(max_retries=2, name="dying")
    def die():
        os._exit(1)

    reference = die.remote()
    with pytest.raises(ray.exceptions.WorkerCrashedError):
        ray.get(reference)
    found = state.get_task(reference)
    assert [(row.attempt_number, row.state, row.error_type) for row in found] == [
        (attempt, "FAILED", "WORKER_DIED") for attempt in range(3)
    ]
    assert "max_retries=2" in found[-1].error_message


def test_retried_exceptions_are_attempts_too(state):
    reference = fail.options(max_retries=1, retry_exceptions=True, name="again").remote("x")
    with pytest.raises(LookupError):
        ray.get(reference)
    rows = wait_until(lambda: (got := state.get_task(reference)) and isinstance(got, list) and got)
    assert [(row.attempt_number, row.state) for row in rows] == [(0, "FAILED"), (1, "FAILED")]


def test_a_cancelled_task_says_so(state, gate):
    reference = wait_at.options(name="cancelled").remote(gate)
    task_named(state, "cancelled", "RUNNING")
    ray.cancel(reference)
    with pytest.raises(ray.exceptions.TaskCancelledError):
        ray.get(reference)
    assert task_named(state, "cancelled", "FAILED").error_type == "TASK_CANCELLED"


def test_calls_and_creations_of_actors_are_tasks(state):
    actor = Counter.remote()
    pid = ray.get(actor.process.remote())
    with pytest.raises(LookupError):
        ray.get(actor.fail.remote())
    rows = state.list_tasks(filters=[("actor_id", "=", actor._ray_actor_id.hex())])
    seen = {row.name: (row.type, row.state, row.worker_pid) for row in rows}
    assert seen == {
        "Counter.__init__": ("ACTOR_CREATION_TASK", "FINISHED", pid),
        "Counter.process": ("ACTOR_TASK", "FINISHED", pid),
        "Counter.fail": ("ACTOR_TASK", "FAILED", pid),
    }


def test_a_creation_that_failed_is_kept_with_its_exception(state):
    actor = Counter.remote(broken=True)
    with pytest.raises(ray.exceptions.ActorDiedError):
        ray.get(actor.process.remote())
    row = wait_until(
        lambda: next(
            (
                row
                for row in state.list_tasks(filters=[("actor_id", "=", actor._ray_actor_id.hex())])
                if row.type == "ACTOR_CREATION_TASK" and row.state == "FAILED"
            ),
            None,
        )
    )
    assert row.error_message.endswith("LookupError: no counter")


def test_a_generator_that_raises_has_failed(state):
    @ray.remote(num_returns="streaming", name="broken stream")
    def generate():
        yield 1
        raise LookupError("dry")

    stream = generate.remote()
    assert ray.get(next(stream)) == 1
    with pytest.raises(LookupError):
        ray.get(next(stream))
    assert task_named(state, "broken stream", "FAILED").error_message.endswith("LookupError: dry")


def test_tasks_of_which_no_history_is_wanted_leave_none(state):
    @ray.remote(enable_task_events=False)
    def quiet():
        return 1

    @ray.remote(enable_task_events=False)
    class Quiet:
        def call(self):
            return 1

        @ray.method(enable_task_events=True)
        def loud(self):
            return 1

    ray.get(quiet.remote())
    actor = Quiet.remote()
    ray.get([actor.call.remote(), actor.loud.remote()])
    names = {row.name for row in state.list_tasks(limit=10_000)}
    assert names & {"quiet", "Quiet.call", "Quiet.__init__", "Quiet.loud"} == {"Quiet.loud"}


def test_filters_compare_without_regard_to_case_and_can_be_negated(state, gate):
    reference = wait_at.options(name="Filtered").remote(gate)
    task_named(state, "filtered", "RUNNING")
    row = one(state.list_tasks(filters=[("name", "=", "FILTERED"), ("state", "!=", "FINISHED")]))
    assert row.task_id == reference.task_id().hex()
    assert one(state.list_tasks(filters=[("worker_pid", "=", str(row.worker_pid)), ("state", "=", "running")])) == row
    assert state.list_tasks(filters=[("name", "=", "filtered"), ("state", "!=", "RUNNING")]) == []


@pytest.mark.parametrize(
    ("filters", "text"),
    [
        ([("colour", "=", "red")], "cannot be filtered by 'colour'; possible columns: .*task_id"),
        ([("name", "<", "f")], "'=' or '!=', not '<'"),
        ([("name", "=")], "a filter is"),
    ],
)
def test_filters_that_make_no_sense_are_refused(state, filters, text):
    with pytest.raises(ValueError, match=text):
        state.list_tasks(filters=filters)


def test_a_list_is_no_longer_than_its_limit(state):
    ray.get([wait_free.remote() for _ in range(20)])
    assert len(state.list_tasks(limit=5)) == 5
    for limit in (0, 10_001):
        with pytest.raises(ValueError, match="limit is from 1 to 10000"):
            state.list_tasks(limit=limit)


@ray.remote
def wait_free():
    return None


def test_actors_are_listed_with_where_they_live_and_how_they_died(state):
    group = placement_group([{"CPU": 1}])
    there = PlacementGroupSchedulingStrategy(group)
    actor = Counter.options(name="listed", num_cpus=0.5, scheduling_strategy=there).remote()
    pid = ray.get(actor.process.remote())
    id = actor._ray_actor_id.hex()
    row = state.get_actor(id)
    assert (row.class_name, row.state, row.pid, row.name, row.is_detached) == ("Counter", "ALIVE", pid, "listed", False)
    assert row.node_id == ray.get_runtime_context().get_node_id()
    ray.get(actor.speak.remote("last words"))
    assert (row.required_resources, row.placement_group_id) == ({"CPU": 0.5}, group.id.hex())
    ray.kill(actor)
    row = wait_until(lambda: (row := state.get_actor(id)).state == "DEAD" and row, what="the actor's death")
    assert "ray.kill" in row.death_cause["message"]
    assert (row.pid, row.ray_namespace) == (pid, ray.get_runtime_context().namespace)
    assert "".join(state.get_log(actor_id=id)) == "last words\n"
    assert state.get_actor("00" * 16) is None
    remove_placement_group(group)


def test_workers_are_listed_while_they_live_and_after(state):
    actor = Counter.remote()
    pid = ray.get(actor.process.remote())
    row = one(state.list_workers(filters=[("pid", "=", pid)]))
    assert (row.is_alive, row.worker_type, row.exit_type) == (True, "WORKER", None)
    assert state.get_worker(row.worker_id).pid == pid
    os.kill(pid, 9)
    wait_until(lambda: not one(state.list_workers(filters=[("pid", "=", pid)])).is_alive, what="its end")
    row = one(state.list_workers(filters=[("pid", "=", pid)]))
    assert (row.is_alive, row.exit_type) == (False, "SYSTEM_ERROR")
    assert "SIGKILL" in row.exit_detail
    drivers = state.list_workers(filters=[("worker_type", "=", "DRIVER")])
    assert os.getpid() in [row.pid for row in drivers]


def test_objects_are_listed_with_what_refers_to_them(state, gate):
    small, large = ray.put(1), ray.put(bytes(300_000))
    nested = ray.put([small])
    task = wait_at.options(name="user").remote(gate, large)
    task_named(state, "user", "RUNNING")
    mine = {row.object_id: row for row in state.list_objects(limit=1000) if row.pid == os.getpid()}
    assert mine[small.hex()].reference_type == "LOCAL_REFERENCE"
    assert mine[large.hex()].reference_type == "USED_BY_PENDING_TASK"
    assert 300_000 <= mine[large.hex()].object_size < 301_000
    assert mine[task.hex()].task_status == "SUBMITTED_TO_WORKER"
    assert (mine[task.hex()].object_size, mine[task.hex()].type) == (-1, "DRIVER")
    borrower = [row for row in state.get_objects(large.hex()) if row.pid != os.getpid()]
    assert [row.type for row in borrower] == ["WORKER"]
    del small
    ray.get(nested)
    # Only the list refers to the number now; the value that `get` returned is gone again.
    types = {row.object_id: row.reference_type for row in state.list_objects(limit=1000) if row.pid == os.getpid()}
    assert "CAPTURED_IN_OBJECT" in types.values()
    gate.open()
    ray.get(task)


def test_handles_of_actors_are_told_from_objects(state):
    actor = Counter.remote()
    ray.get(actor.process.remote())
    types = [row.reference_type for row in state.list_objects(limit=1000) if row.pid == os.getpid()]
    assert "ACTOR_HANDLE" in types


def test_the_node_and_the_job_are_listed(state):
    node = one(state.list_nodes())
    assert node.is_head_node
    assert (node.state, node.resources_total["CPU"]) == ("ALIVE", 4.0)
    assert state.get_node(node.node_id).node_ip == node.node_ip
    job = one(state.list_jobs(filters=[("status", "=", "RUNNING")]))
    assert (job.job_id, job.driver_info["pid"]) == (ray.get_runtime_context().get_job_id(), str(os.getpid()))
    assert state.get_job(job.job_id).type == "DRIVER"
    assert "pytest" in job.entrypoint


def test_summaries_count_by_name_and_state(state, gate):
    ray.get([wait_free.options(name="summed").remote() for _ in range(7)])
    waiting = wait_at.options(name="summed").remote(gate)
    task_named(state, "summed", "RUNNING")
    tasks = state.summarize_tasks()["cluster"]
    assert tasks["summary"]["summed"] == {
        "func_or_class_name": "summed",
        "type": "NORMAL_TASK",
        "state_counts": {"FINISHED": 7, "RUNNING": 1},
    }
    assert tasks["total_tasks"] >= 8
    actor = Counter.remote()
    ray.get(actor.process.remote())
    assert state.summarize_actors()["cluster"]["summary"]["Counter"]["state_counts"]["ALIVE"] >= 1
    kept = ray.put(bytes(1 << 20))
    objects = state.summarize_objects()["cluster"]
    assert objects["total_size_mb"] >= 1.0
    assert objects["summary"]["disabled"]["ref_type_counts"]["LOCAL_REFERENCE"] >= 1
    del kept
    gate.open()
    ray.get(waiting)


def test_what_is_not_kept_says_so(state):
    for function in (state.list_runtime_envs, state.list_cluster_events):
        with pytest.raises(NotImplementedError, match="are not kept yet"):
            function()


def test_a_stopped_worker_is_named_instead_of_waited_for_without_end(state):
    from ray._node import looks
    from ray.util.state.exception import RayStateApiException

    actor = Counter.remote()
    pid = ray.get(actor.process.remote())
    os.kill(pid, 19)
    try:
        with pytest.raises(RayStateApiException, match=f"process {pid} on node"):
            state.list_tasks(timeout=1)
        found = state.list_tasks(timeout=1, raise_on_missing_output=False)
        assert found
    finally:
        os.kill(pid, 18)
    assert looks.MEMBER_S > 1  # so it was the caller's time that ended the wait
    wait_until(lambda: state.list_tasks(), what="an answer")


def test_there_must_be_a_cluster(state, monkeypatch):
    from ray.util.state.exception import ServerUnavailable

    with pytest.raises(ServerUnavailable, match="there is no cluster to ask"):
        state.list_nodes(address="127.0.0.1:1")
