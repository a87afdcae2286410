"""What happens when memory runs short: the right worker ends, the error says why, and the rest goes on.

Most tests give the node a limit of its own, which only its own processes count against, so that the machine is never
in danger. Those with a real control group are skipped where none can be made.
"""

import contextlib
import os
import textwrap
import uuid
from pathlib import Path

import pytest

import ray
from tests.core.helpers import Gate, Tally, run_driver, wait_until

pytestmark = [pytest.mark.skate, pytest.mark.slow]  # hundreds of megabytes are filled and given back

MIB = 1 << 20
LIMIT = 600 * MIB


@pytest.fixture
def tight_cluster(fresh_cluster, monkeypatch):
    """Starts a cluster whose node, workers and objects may use `LIMIT` together."""

    def start(**arguments):
        monkeypatch.setenv("RAY_memory_limit_bytes", str(LIMIT))
        fresh_cluster(**{"num_cpus": 4, "object_store_memory": 400 * MIB, **arguments})

    return start


@ray.remote
def hold(mebibytes, gate=None, tally=None):
    """Uses memory until the gate opens."""
    if tally is not None:
        tally.add(os.getpid())
    held = bytearray(mebibytes * MIB)
    if gate is not None:
        gate.wait()
    return len(held) // MIB


@ray.remote
class Holder:
    def __init__(self):
        self.held = None

    def hold(self, mebibytes):
        self.held = bytearray(mebibytes * MIB)
        Gate("/nowhere").wait()  # until it is ended

    def pid(self):
        return os.getpid()


def evictions():
    from ray._runtime import session

    return session.request("stats")["memory_evictions"]


def test_of_two_that_are_too_many_one_waits_until_the_other_is_through(tight_cluster, tmp_path):
    tight_cluster()
    gate, tally = Gate(tmp_path), Tally(tmp_path)
    refs = [hold.options(max_retries=1).remote(300, gate, tally) for _ in range(2)]
    # The lease of the one that was ended is not replaced; whoever asks is told what its task waits for.
    wait_until(lambda: any("memory was short" in str(ray.util.state.why(ref)) for ref in refs))
    assert evictions() >= 1
    assert ray.wait(refs, num_returns=2, timeout=0) == ([], refs)
    gate.open()
    assert ray.get(refs) == [300, 300]
    assert tally.count() >= 3, "one of them had another attempt"


def test_repetitions_for_want_of_memory_have_a_limit_of_their_own(tight_cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_task_oom_retries", "0")
    tight_cluster()
    gate = Gate(tmp_path)
    refs = [hold.remote(300, gate) for _ in range(2)]
    failed, _ = ray.wait(refs)
    with pytest.raises(ray.exceptions.OutOfMemoryError, match="RAY_task_oom_retries=0"):
        ray.get(failed)
    gate.open()
    assert ray.get([ref for ref in refs if ref not in failed]) == [300]


def test_many_that_are_too_many_all_come_to_an_end(tight_cluster):
    tight_cluster()
    assert ray.get([hold.options(max_retries=1).remote(200 + number) for number in range(8)]) == list(range(200, 208))


def test_a_task_that_is_too_large_by_itself_fails_and_says_who_used_what(tight_cluster):
    tight_cluster()
    with pytest.raises(ray.exceptions.OutOfMemoryError) as caught:
        ray.get(hold.remote(900, Gate("/nowhere")))
    text = str(caught.value)
    for part in ("task hold", "600.0 MiB", "RAY_memory_limit_bytes", os.uname().nodename, "the node", "num_cpus"):
        assert part in text
    top = text[text.index("What had most") :].splitlines()[2]
    assert top.endswith("task hold")
    assert 0.5 < float(top.split()[1]) < 1.0, "GiB"
    assert ray.get(hold.remote(10)) == 10, "the cluster goes on"


def test_tasks_that_may_not_be_repeated_fail_one_by_one_until_the_rest_fits(tight_cluster, tmp_path):
    tight_cluster()
    gate = Gate(tmp_path)
    refs = [hold.options(max_retries=0).remote(300, gate) for _ in range(2)]
    wait_until(lambda: evictions() == 1)
    gate.open()
    outcomes = []
    for ref in refs:
        try:
            outcomes.append(ray.get(ref))
        except ray.exceptions.OutOfMemoryError as error:
            outcomes.append("max_retries is 0" in str(error))
    assert sorted(outcomes) == [True, 300]


def test_an_actor_is_restarted_or_says_why_it_died(tight_cluster):
    tight_cluster()
    keeps = Holder.options(max_restarts=1).remote()
    before = ray.get(keeps.pid.remote())
    with pytest.raises(ray.exceptions.ActorUnavailableError):
        ray.get(keeps.hold.remote(900))
    assert wait_until(lambda: ray.get(keeps.pid.options(max_task_retries=-1).remote())) != before
    with pytest.raises(ray.exceptions.ActorDiedError, match=r"memory was short[\s\S]*Holder"):
        ray.get(keeps.hold.remote(900))


def test_shared_memory_counts(tight_cluster):
    numpy = pytest.importorskip("numpy")
    tight_cluster()
    stored = ray.put(numpy.ones(300 * MIB, dtype=numpy.uint8))
    with pytest.raises(ray.exceptions.OutOfMemoryError, match=r"0\.\d+  the object store"):
        ray.get(hold.options(max_retries=0).remote(280, Gate("/nowhere")))
    del stored


def test_a_setting_that_makes_no_sense_is_refused_at_the_start(no_cluster, monkeypatch):
    monkeypatch.setenv("RAY_memory_usage_threshold", "95")
    with pytest.raises(ValueError, match="RAY_memory_usage_threshold"):
        ray.init(num_cpus=1)
    monkeypatch.delenv("RAY_memory_usage_threshold")
    monkeypatch.setenv("RAY_task_oom_retries", "many")
    with pytest.raises(ValueError, match="RAY_task_oom_retries"):
        ray.init(num_cpus=1)


# -- Beside other nodes ---------------------------------------------------------------------------


@pytest.fixture
def two_nodes(no_cluster, monkeypatch):
    """A cluster of a head without CPUs, where the driver is, and a second node that may use `LIMIT`.

    A function that adds further such nodes.
    """
    from ray.cluster_utils import Cluster

    def add(**arguments):
        with monkeypatch.context() as patch:
            patch.setenv("RAY_memory_limit_bytes", str(LIMIT))
            cluster.add_node(object_store_memory=100 * MIB, **arguments)

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0}, shutdown_at_exit=False)
    try:
        add(num_cpus=4, node_name="second")
        cluster.connect()
        yield add
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_the_owner_of_a_task_on_another_node_hears_the_same(two_nodes):
    with pytest.raises(ray.exceptions.OutOfMemoryError, match="most of that alone") as caught:
        ray.get(hold.remote(900, Gate("/nowhere")))
    for part in ("task hold", "600.0 MiB", "RAY_memory_limit_bytes", "node second", "the node", "num_cpus"):
        assert part in str(caught.value)
    with pytest.raises(ray.exceptions.OutOfMemoryError, match="max_retries is 0"):
        ray.get(hold.options(max_retries=0).remote(900, Gate("/nowhere")))
    assert ray.get(hold.remote(10)) == 10, "the cluster goes on"


def test_a_task_that_was_ended_on_another_node_is_repeated_there_when_there_is_room(two_nodes, tmp_path):
    gate, tally = Gate(tmp_path), Tally(tmp_path)
    # With a single charged repetition: more would be needed if what the node did were charged.
    refs = [hold.options(max_retries=1).remote(300, gate, tally) for _ in range(2)]
    wait_until(lambda: any("memory was short on node second" in str(ray.util.state.why(ref)) for ref in refs))
    assert ray.wait(refs, num_returns=2, timeout=0) == ([], refs)
    gate.open()
    assert ray.get(refs) == [300, 300]
    assert tally.count() >= 3, "one of them had another attempt"


def test_a_task_that_one_node_has_no_memory_for_goes_to_another(two_nodes, tmp_path):
    gate, tally = Gate(tmp_path), Tally(tmp_path)
    refs = [hold.remote(300, gate, tally) for _ in range(2)]
    wait_until(lambda: any("memory was short on node second" in str(ray.util.state.why(ref)) for ref in refs))
    before = tally.count()
    two_nodes(num_cpus=1, node_name="third")
    wait_until(lambda: tally.count() > before)
    assert ray.wait(refs, num_returns=2, timeout=0) == ([], refs), "both run, the one beside the other"
    gate.open()
    assert ray.get(refs) == [300, 300]


def test_an_actor_on_another_node_is_restarted_or_says_why_it_died(two_nodes):
    keeps = Holder.options(max_restarts=1).remote()
    before = ray.get(keeps.pid.remote())
    with pytest.raises(ray.exceptions.ActorUnavailableError):
        ray.get(keeps.hold.remote(900))
    assert wait_until(lambda: ray.get(keeps.pid.options(max_task_retries=-1).remote())) != before
    with pytest.raises(ray.exceptions.ActorDiedError, match=r"memory was short[\s\S]*node second[\s\S]*Holder"):
        ray.get(keeps.hold.remote(900))


# -- With a real control group --------------------------------------------------------------------


def _own_group():
    """The directory of this process's group in the memory controller, of either version; None if there is none."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        for root in ("/sys/fs/cgroup/memory", "/sys/fs/cgroup") if controllers in ("", "memory") else ():
            group = Path(root + path)
            if (group / "memory.stat").exists():
                return group
    return None


@pytest.fixture
def control_group():
    """Makes a control group with a limit for all in it, and returns its directory."""
    made = []

    def make(limit):
        parent = _own_group()
        if parent is None:
            pytest.skip("no memory controller is mounted here")
        group = parent / f"skate-test-{uuid.uuid4().hex[:8]}"
        try:
            group.mkdir()
        except OSError as error:
            pytest.skip(f"no control group can be made here: {error}")
        made.append(group)
        try:
            for name in ("memory.limit_in_bytes", "memory.max"):
                if (group / name).exists():
                    (group / name).write_text(str(limit))
                    return group
        except OSError as error:
            pytest.skip(f"a control group cannot be given a limit here: {error}")
        pytest.skip("the memory controller is not delegated to groups below this one")

    yield make
    for group in made:
        wait_until(lambda group=group: _is_removed(group), what="the end of every process in the group")


def _is_removed(group):
    with contextlib.suppress(OSError):
        group.rmdir()
    return not group.exists()


PROGRAM = """
    import os, sys, time
    with open({group!r} + "/cgroup.procs", "w") as file:
        file.write(str(os.getpid()))
    import ray
    ray.init(num_cpus=2, object_store_memory=80 << 20, include_dashboard=False)

    @ray.remote(max_retries=0)
    def hold(mebibytes):
        held = bytearray(mebibytes << 20)
        time.sleep(60)

    try:
        ray.get(hold.remote({mebibytes}))
    except ray.exceptions.OutOfMemoryError as error:
        print(error)
"""


def run_in(group, mebibytes, env):
    program = textwrap.dedent(PROGRAM).format(group=str(group), mebibytes=mebibytes)
    status, output, errors = run_driver(program, env=env)
    assert status == 0, errors
    return output


def test_the_limit_of_a_control_group_is_kept_before_the_kernel_keeps_it(control_group):
    # What is used stays between the threshold and the limit, however late the node looks.
    group = control_group(400 * MIB)
    output = run_in(group, 270, {"RAY_memory_usage_threshold": "0.7"})
    assert "was ended by its node because memory was short" in output
    assert "of 400.0 MiB were used, the limit of the control group " in output
    assert group.name in output


def test_the_kernel_s_own_kill_is_recognised(control_group):
    group = control_group(250 * MIB)
    output = run_in(group, 400, {"RAY_memory_monitor_refresh_ms": "0"})
    assert "was killed by the kernel for want of memory" in output
    assert group.name in output
