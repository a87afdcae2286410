"""What is known of tasks that have ended: on a running cluster, after it, and what a killed process takes along."""

import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import ray
from tests.core.helpers import run_driver, wait_until

pytestmark = pytest.mark.skate


@ray.remote
def double(number):
    return 2 * number


@ray.remote(max_retries=0)
def fail():
    raise LookupError("gone")


@pytest.fixture
def sessions():
    """A directory for sessions; short, because there are sockets in it."""
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory)


def test_history_is_there_after_the_cluster_is_gone(no_cluster, sessions, tmp_path):
    program = """
        import ray
        ray.init(num_cpus=2, log_to_driver=False)

        @ray.remote
        def double(number):
            return 2 * number

        @ray.remote(max_retries=0)
        def fail():
            raise LookupError("gone")

        assert ray.get([double.remote(i) for i in range(3000)]) == [2 * i for i in range(3000)]
        try:
            ray.get(fail.remote())
        except LookupError:
            pass
        ray.shutdown()
    """
    status, _, errors = run_driver(program, env={"RAY_EVENT_LOGS_KEPT": "3", "RAY_TMPDIR": str(sessions)})
    assert status == 0, errors
    assert sorted(path.name for path in sessions.iterdir()) == ["history"]
    listed = command("list_command", "tasks", "--from", sessions / "history", "--format", "json", "-f", "state=FAILED")
    (row,) = json.loads(listed)
    assert (row["name"], row["error_type"]) == ("fail", "TASK_EXECUTION_EXCEPTION")
    counted = json.loads(command("summary", "tasks", "--from", sessions / "history", "--format", "json"))
    states = {name: entry["state_counts"] for name, entry in counted["summary"].items()}
    assert states == {"double": {"FINISHED": 3000}, "fail": {"FAILED": 1}}
    trace = tmp_path / "trace.json"
    assert "3001 tasks" in command("timeline", "--from", sessions / "history", "-o", trace, module="timeline_command")
    slices = [event for event in json.loads(trace.read_text()) if event["ph"] == "X"]
    assert len({event["args"]["task_id"] for event in slices}) == 3001


def command(name, *arguments, module="state_commands"):
    """The output of a command, in a process of its own."""
    program = f"from ray.scripts.{module} import {name}; {name}()"
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=50
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def event_files():
    from ray._runtime import session

    return list(Path(session.temp_dir, session.session_name, "events").glob("*"))


def test_no_history_is_written_if_none_is_wanted(fresh_cluster, monkeypatch):
    monkeypatch.setenv("RAY_task_events", "0")
    fresh_cluster(num_cpus=2)
    from ray.util import state

    ray.get([double.remote(i) for i in range(2000)])
    with pytest.raises(LookupError):
        ray.get(fail.remote())
    assert state.list_tasks() == []
    assert event_files() == []


def test_records_leave_by_themselves_and_nothing_is_written_before(fresh_cluster):
    fresh_cluster(num_cpus=1)
    assert event_files() == []
    ray.get(double.remote(1))
    wait_until(event_files, what="a record on disk")


def test_a_failure_is_recorded_before_its_worker_is_killed(fresh_cluster):
    from ray.util import state

    fresh_cluster(num_cpus=4)

    @ray.remote(num_cpus=4, max_retries=0)
    def fail(kill):
        if kill:
            os._exit(1)
        raise LookupError(os.getpid())

    # Both on one worker, and the second as soon as the first has ended.
    failure, death = fail.remote(kill=False), fail.remote(kill=True)
    for reference in (failure, death):
        with pytest.raises(ray.exceptions.RayError):
            ray.get(reference)
    (row,) = state.list_tasks(filters=[("task_id", "=", failure.task_id().hex())])
    assert (row.state, row.error_type) == ("FAILED", "TASK_EXECUTION_EXCEPTION")


def test_a_worker_that_ends_in_order_leaves_no_record_behind(fresh_cluster):
    fresh_cluster(num_cpus=1)
    from ray.util import state

    @ray.remote(max_calls=1)
    def once():
        return os.getpid()

    pids = ray.get([once.remote() for _ in range(3)])
    found = wait_until(
        lambda: len(rows := state.list_tasks(filters=[("name", "=", "once")])) == 3 and rows, what="all records"
    )
    assert sorted(row.worker_pid for row in found) == sorted(pids)
    assert {row.state for row in found} == {"FINISHED"}


def test_many_tasks_are_all_there(fresh_cluster):
    fresh_cluster(num_cpus=2)
    from ray.util import state

    count = 20_000
    ray.get([double.remote(i) for i in range(count)])
    assert state.summarize_tasks()["cluster"]["summary"]["double"]["state_counts"] == {"FINISHED": count}
    newest = state.list_tasks(limit=10)
    assert len(newest) == 10


def test_the_timeline_has_a_row_for_each_worker_and_a_slice_for_each_task(fresh_cluster, tmp_path):
    fresh_cluster(num_cpus=2)

    @ray.remote
    class Server:
        def __init__(self):
            import asyncio

            self.waiting, self.all_are_there = 0, asyncio.Event()

        async def wait(self):
            self.waiting += 1
            if self.waiting == 3:
                self.all_are_there.set()
            await self.all_are_there.wait()

    server = Server.remote()
    ray.get([server.wait.remote() for _ in range(3)])
    references = [double.remote(i) for i in range(5)]
    ray.get(references)
    path = tmp_path / "trace.json"
    assert ray.timeline(str(path)) is None
    events = json.loads(path.read_text())
    slices = [event for event in events if event["ph"] == "X"]
    ids = {event["args"]["task_id"] for event in slices if event["name"] == "double"}
    assert ids == {reference.task_id().hex() for reference in references}
    rows = {(event["pid"], event["tid"]) for event in slices}
    named = {(event["pid"], event["tid"]) for event in events if event["name"] == "thread_name"}
    assert rows == named
    assert {event["pid"] for event in slices} == {event["pid"] for event in events if event["name"] == "process_name"}
    # Calls that ran at the same time are not nested in one row.
    for row in rows:
        spans = sorted((x["ts"], x["ts"] + x["dur"]) for x in slices if (x["pid"], x["tid"]) == row)
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
    calls = [event for event in slices if event["name"] == "Server.wait"]
    assert len({event["tid"] for event in calls}) == 3


def test_the_timeline_needs_a_cluster(no_cluster):
    with pytest.raises(ray.exceptions.RaySystemError):
        ray.timeline()
