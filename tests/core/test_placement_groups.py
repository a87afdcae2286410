"""Placement groups through the public interface, on one node."""

import os
import pickle
import signal
import time

import pytest

import ray
from ray.exceptions import (
    ActorDiedError,
    GetTimeoutError,
    RaySystemError,
    TaskPlacementGroupRemoved,
    WorkerCrashedError,
)
from ray.util.placement_group import (
    PlacementGroup,
    get_current_placement_group,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from tests.core.helpers import Gate, Tally, run_driver, wait_until


@ray.remote
def current():
    return get_current_placement_group()


@ray.remote
def children(depth):
    """The groups of the caller and of tasks that it submits, down to a depth."""
    mine = get_current_placement_group()
    return [mine] if not depth else [mine, *ray.get(children.options(num_cpus=0).remote(depth - 1))]


def child_of_caller():
    """The group of a task that the caller submits, and the caller's process. All tasks of a worker share this."""
    return ray.get(current.options(num_cpus=0).remote()), os.getpid()


@ray.remote
class Member:
    def __init__(self, resist=False):
        if resist:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def group(self):
        return get_current_placement_group()

    def child(self):
        return ray.get(current.options(num_cpus=0).remote())

    def pid(self):
        return os.getpid()


@pytest.fixture
def group(cluster):
    """A group with two bundles of one CPU, removed after the test."""
    made = placement_group([{"CPU": 1}, {"CPU": 1, "special": 1}])
    assert made.wait(10)
    yield made
    remove_placement_group(made)
    wait_until(lambda: ray.available_resources().get("CPU") == 4, what="the group's resources to come back")


def strategy(group, **options):
    return PlacementGroupSchedulingStrategy(placement_group=group, **options)


# --- creation --------------------------------------------------------------------------------------------------------


def test_ready_is_a_reference_to_the_group(group):
    assert ray.get(group.ready()) == group
    ready, rest = ray.wait([group.ready()], timeout=5)
    assert (len(ready), rest) == (1, [])


def test_a_group_holds_its_resources_until_it_is_removed(cluster):
    made = placement_group([{"CPU": 3}])
    ray.get(made.ready())
    assert ray.available_resources()["CPU"] == 1
    remove_placement_group(made)
    wait_until(lambda: ray.available_resources()["CPU"] == 4, what="the CPUs to come back")


def test_a_group_that_does_not_fit_waits(cluster):
    first, second = placement_group([{"CPU": 3}]), placement_group([{"CPU": 2}])
    ready = second.ready()
    assert not second.wait(0.05)
    with pytest.raises(GetTimeoutError):
        ray.get(ready, timeout=0.05)
    remove_placement_group(first)
    assert ray.get(ready, timeout=10) == second
    remove_placement_group(second)


def test_a_group_gets_the_cpus_of_leases_that_nobody_uses(cluster):
    @ray.remote
    def nothing():
        return None

    ray.get([nothing.remote() for _ in range(20)])  # the driver keeps its leases for a moment
    made = placement_group([{"CPU": 1}] * 4)
    assert made.wait(10)
    remove_placement_group(made)


def test_ready_works_in_other_processes_and_as_an_argument(group):
    @ray.remote(num_cpus=0)
    def wait_for(made):
        return ray.get(made.ready(), timeout=10) == made and made.bundle_count == 2

    @ray.remote(num_cpus=0)
    def take(value):
        return value

    assert ray.get(wait_for.remote(group))
    assert ray.get(take.remote(group.ready())) == group


def test_bundles_and_table(group):
    assert group.bundle_specs == [{"CPU": 1.0}, {"CPU": 1.0, "special": 1.0}]
    row = placement_group_table(group)
    assert row["placement_group_id"] == group.id.hex()
    assert row["bundles"] == {0: {"CPU": 1.0}, 1: {"CPU": 1.0, "special": 1.0}}
    assert row["state"] == "CREATED"
    assert row["strategy"] == "PACK"
    assert set(row["bundles_to_node_id"].values()) == {ray.get_runtime_context().get_node_id()}
    assert row["stats"]["scheduling_state"] == "FINISHED"
    assert placement_group_table()[group.id.hex()] == row


def test_handles_are_pickled_compared_and_found_by_id(group):
    copy = pickle.loads(pickle.dumps(group))
    assert copy == group
    assert hash(copy) == hash(group)
    assert PlacementGroup(group.id).bundle_specs == group.bundle_specs
    assert PlacementGroup.empty().is_empty
    assert not group.is_empty


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"bundles": []}, "ist"),
        ({"bundles": [{}]}, "empty"),
        ({"bundles": [{"CPU": 0}]}, "only 0"),
        ({"bundles": "CPU"}, "list"),
        ({"bundles": [{"CPU": 1}], "strategy": "LOOSE"}, "Invalid placement group strategy"),
        ({"bundles": [{"CPU": 1}], "lifetime": "long"}, "lifetime"),
        ({"bundles": [{"CPU": 1}], "bundle_label_selector": []}, "bundle_label_selector"),
        ({"bundles": [{"CPU": 1}], "_soft_target_node_id": "00" * 28}, "STRICT_PACK"),
    ],
)
def test_bad_arguments_are_refused_at_the_call(cluster, arguments, text):
    with pytest.raises(ValueError, match=text):
        placement_group(**arguments)


@pytest.mark.skate
@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"bundles": [{"CPU": -1}]}, ValueError, "negative"),
        ({"bundles": [{"CPU": "1"}]}, TypeError, "not a number"),
        ({"bundles": [{1: 1}]}, TypeError, "resource names are strings"),
        ({"bundles": [{"GPU": 1.5}]}, ValueError, "whole numbers"),
        ({"bundles": [{"CPU": 1}] * 1001}, ValueError, "1000 bundles at the most"),
        ({"bundles": [{"CPU": 1}], "bundle_label_selector": [{"a": "in(b"}]}, ValueError, "none of 'a'"),
        ({"bundles": [{"CPU": 1}], "topology_strategy": {"rack": "PACK"}}, NotImplementedError, "rack"),
    ],
)
def test_bad_amounts_and_labels_are_refused_at_the_call(cluster, arguments, error, text):
    with pytest.raises(error, match=text):
        placement_group(**arguments)


# --- running in a group ----------------------------------------------------------------------------------------------


def test_tasks_run_in_the_group_that_their_strategy_names(group):
    assert ray.get(current.options(scheduling_strategy=strategy(group)).remote()) == group
    assert ray.get(current.options(placement_group=group).remote()) == group
    assert ray.get(current.options(placement_group=group, placement_group_bundle_index=1).remote()) == group
    assert ray.get(current.remote()) is None
    assert get_current_placement_group() is None


def test_options_at_the_decorator_name_the_group(group):
    @ray.remote(num_cpus=1, scheduling_strategy=strategy(group, placement_group_bundle_index=0))
    def decorated():
        context = ray.get_runtime_context()
        return context.get_placement_group_id(), context.get_assigned_resources()

    assert ray.get(decorated.remote()) == (group.id.hex(), {"CPU": 1.0})


def test_actors_run_in_the_group_too(group):
    in_group = Member.options(scheduling_strategy=strategy(group, placement_group_bundle_index=1)).remote()
    old_form = Member.options(placement_group=group, num_cpus=1).remote()
    assert ray.get([in_group.group.remote(), old_form.group.remote()]) == [group, group]


def test_a_bundle_holds_no_more_than_it_has(group, tmp_path):
    gate, tally = Gate(tmp_path), Tally(tmp_path)

    @ray.remote
    def occupy():
        tally.add()
        gate.wait()

    one = strategy(group, placement_group_bundle_index=0)
    refs = [occupy.options(scheduling_strategy=one).remote() for _ in range(3)]
    wait_until(lambda: tally.count() == 1)
    assert len(ray.wait(refs, num_returns=1, timeout=0.2)[0]) == 0
    assert tally.count() == 1, "one CPU is room for one task"
    outside = current.remote()
    assert ray.get(outside) is None, "what is outside of the group goes on"
    gate.open()
    ray.get(refs)


def test_a_task_that_waits_for_its_children_lends_them_its_cpu(group):
    @ray.remote
    def parent():
        inside = strategy(group, placement_group_bundle_index=0)
        return ray.get(current.options(scheduling_strategy=inside).remote())

    inside = strategy(group, placement_group_bundle_index=0)
    assert ray.get(parent.options(scheduling_strategy=inside).remote(), timeout=20) == group


def test_tasks_submitted_before_the_group_is_there_wait_for_it(cluster):
    first, second = placement_group([{"CPU": 4}]), placement_group([{"CPU": 4}])
    ref = current.options(scheduling_strategy=strategy(second)).remote()
    actor = Member.options(scheduling_strategy=strategy(second)).remote()
    assert ray.wait([ref], timeout=0.1) == ([], [ref])
    remove_placement_group(first)
    assert ray.get([ref, actor.group.remote()], timeout=20) == [second, second]
    remove_placement_group(second)


def test_children_are_captured_only_where_that_is_asked_for(group):
    plain = children.options(scheduling_strategy=strategy(group))
    capturing = children.options(scheduling_strategy=strategy(group, placement_group_capture_child_tasks=True))
    assert ray.get(plain.remote(2)) == [group, None, None]
    assert ray.get(capturing.remote(2)) == [group, group, group]
    assert ray.get(plain.remote(2)) == [group, None, None], "workers that served both keep them apart"


def test_a_worker_that_has_served_one_that_captures_keeps_nothing_of_it(group):
    @ray.remote
    def caller():
        from tests.core import test_placement_groups as shared

        return shared.child_of_caller()

    def is_kept_apart():
        found = []
        for captures in (False, True, False):
            inside = strategy(group, placement_group_bundle_index=0, placement_group_capture_child_tasks=captures)
            child, pid = ray.get(caller.options(scheduling_strategy=inside).remote())
            assert child == (group if captures else None)
            found.append(pid)
        return len(set(found)) == 1

    wait_until(is_kept_apart, what="one worker to serve all")


def test_actors_capture_children_and_children_can_leave(group):
    capturing = strategy(group, placement_group_capture_child_tasks=True)
    assert ray.get(Member.options(scheduling_strategy=capturing).remote().child.remote()) == group
    assert ray.get(Member.options(scheduling_strategy=strategy(group)).remote().child.remote()) is None

    @ray.remote
    def leaves():
        outside = [
            current.options(num_cpus=0, placement_group=None),
            current.options(num_cpus=0, scheduling_strategy=PlacementGroupSchedulingStrategy(None)),
            current.options(num_cpus=0, scheduling_strategy="DEFAULT"),
        ]
        captured = ray.get_runtime_context().should_capture_child_tasks_in_placement_group
        return captured, ray.get([each.remote() for each in outside])

    assert ray.get(leaves.options(scheduling_strategy=capturing).remote()) == (True, [None, None, None])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"placement_group_bundle_index": 2}, "bundle"),
        ({"num_cpus": 2}, "fit into any bundle"),
        ({"num_gpus": 1}, "fit into any bundle"),
        ({"scheduling_strategy": "SPREAD"}, "scheduling_strategy"),
    ],
)
def test_what_cannot_run_in_a_group_is_refused_at_the_call(group, options, text):
    with pytest.raises(ValueError, match=text):
        current.options(placement_group=group, **options).remote()
    with pytest.raises(ValueError, match=text):
        Member.options(placement_group=group, **options).remote()


@pytest.mark.skate
def test_refusals_say_what_is_needed_and_what_there_is(group):
    with pytest.raises(ValueError, match=r"it needs GPU: 1, the largest bundle has none"):
        current.options(placement_group=group, num_gpus=1).remote()
    with pytest.raises(ValueError, match=r"bundle 0 of placement group .*: it needs special: 1, it has none"):
        current.options(placement_group=group, resources={"special": 1}, placement_group_bundle_index=0).remote()
    with pytest.raises(ValueError, match=r"no bundle 7: it has 2, with indexes from 0 to 1"):
        current.options(placement_group=group, placement_group_bundle_index=7).remote()
    with pytest.raises(ValueError, match="there is no placement group"):
        current.options(placement_group_bundle_index=1).remote()
    with pytest.raises(TypeError, match="must be a PlacementGroup"):
        current.options(placement_group="group")


@pytest.mark.skate
def test_why_speaks_of_the_group(cluster):
    from ray.util.state import why

    first = placement_group([{"CPU": 4}], name="first")
    later = placement_group([{"CPU": 2}], name="later")
    ref = current.options(scheduling_strategy=strategy(later)).remote()
    wait_until(lambda: "placement group later is not created yet" in why(ref), what="the reason")
    assert "_group_" not in why(ref)
    assert "until placement group later is created" in why(later.ready())
    for each in (later, first):
        remove_placement_group(each)
    with pytest.raises(TaskPlacementGroupRemoved, match="placement group later was removed"):
        ray.get(ref, timeout=10)


# --- ends ------------------------------------------------------------------------------------------------------------


def test_removal_kills_what_runs_and_fails_what_waits(cluster, tmp_path):
    tally = Tally(tmp_path)
    made = placement_group([{"CPU": 1}])

    @ray.remote(max_retries=0)
    def stay():
        tally.add()
        time.sleep(50)

    inside = stay.options(scheduling_strategy=strategy(made))
    running = inside.remote()
    wait_until(lambda: tally.count() == 1)
    waiting = inside.remote()
    remove_placement_group(made)
    with pytest.raises(WorkerCrashedError):
        ray.get(running, timeout=20)
    for ref in (waiting, inside.remote()):
        with pytest.raises((TaskPlacementGroupRemoved, WorkerCrashedError)):
            ray.get(ref, timeout=20)
    assert placement_group_table(made)["state"] == "REMOVED"
    wait_until(lambda: ray.available_resources()["CPU"] == 4)


def test_a_task_that_may_be_retried_fails_with_its_group(cluster, tmp_path):
    tally = Tally(tmp_path)
    made = placement_group([{"CPU": 1}])

    @ray.remote(max_retries=5)
    def stay():
        tally.add()
        time.sleep(50)

    ref = stay.options(scheduling_strategy=strategy(made)).remote()
    wait_until(lambda: tally.count() == 1)
    remove_placement_group(made)
    with pytest.raises(TaskPlacementGroupRemoved):
        ray.get(ref, timeout=20)
    assert tally.count() == 1


def test_actors_die_with_their_group_and_are_not_restarted(cluster):
    made = placement_group([{"CPU": 1}])
    actor = Member.options(max_restarts=-1, max_task_retries=-1, scheduling_strategy=strategy(made)).remote()
    ray.get(actor.pid.remote())
    remove_placement_group(made)

    def is_dead():
        try:
            ray.get(actor.pid.remote(), timeout=10)
        except ActorDiedError:
            return True
        return False

    wait_until(is_dead, what="the actor to die")


def test_removing_twice_and_waiting_for_what_is_removed(cluster):
    made = placement_group([{"CPU": 100}])
    ready = made.ready()
    remove_placement_group(made)
    remove_placement_group(made)
    with pytest.raises(TaskPlacementGroupRemoved):
        ray.get(ready, timeout=10)
    with pytest.raises(Exception, match=r"removed|exist"):
        made.wait(5)


def test_names_find_groups(cluster):
    made = placement_group([{"CPU": 1}], name="named")
    assert get_placement_group("named") == made
    with pytest.raises(RaySystemError, match="named"):
        placement_group([{"CPU": 1}], name="named")
    remove_placement_group(made)
    with pytest.raises(ValueError, match="Failed to look up placement group with name: named"):
        get_placement_group("named")
    with pytest.raises(ValueError, match=r"non-empty|not empty"):
        get_placement_group("")


def test_a_group_ends_with_the_driver_that_created_it(fresh_cluster):
    status, _, errors = run_driver("""
        import ray
        ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR")
        made = ray.util.placement_group([{"CPU": 2}])
        ray.get(made.ready())

        @ray.remote
        class Stays:
            def ping(self):
                return 1

        actor = Stays.options(placement_group=made).remote()
        assert ray.get(actor.ping.remote()) == 1
        """)
    assert (status, errors) == (0, "")


def test_the_function_has_the_modules_name_and_is_not_hidden_by_it(cluster):
    import ray.util.placement_group as module

    assert callable(ray.util.placement_group)
    assert ray.util.placement_group is placement_group
    assert module is not None


@pytest.mark.skate
def test_many_groups_become_ready_without_a_task_or_a_thread(cluster):
    import threading

    threads = threading.active_count()
    made = [placement_group([{"CPU": 0.01}]) for _ in range(100)]
    assert ray.get([each.ready() for each in made], timeout=20) == made
    assert threading.active_count() == threads
    for each in made:
        remove_placement_group(each)
    wait_until(lambda: ray.available_resources()["CPU"] == 4)
    assert not [name for name in ray.cluster_resources() if "_group_" in name]
