"""Rows as text, filters, traces and options: what needs no cluster."""

import json

import click
import msgspec
import pytest

from ray._bundle_names import offered
from ray._runtime import rows, timeline
from ray._runtime.history import Attempt, Definition
from ray.scripts import memory_command, options, printing, state_commands
from ray.scripts import status as status_command
from ray.util.state import common

pytestmark = pytest.mark.skate

VALUES = {
    "text": "plain",
    "number": 1,
    "looks like a number": "1",
    "word": "null",
    "empty": "",
    "nothing": None,
    "flag": True,
    "nested": {"list": [1, {"a": "b: c", "d": []}], "none": {}},
    "lines": "a\nb\u00e4",
    "items": [["x"], "- y"],
}


def test_yaml_has_every_value_in_its_place():
    assert printing.as_yaml(VALUES) == (
        "---\n"
        "text: plain\n"
        "number: 1\n"
        '"looks like a number": "1"\n'
        'word: "null"\n'
        'empty: ""\n'
        "nothing: null\n"
        "flag: true\n"
        "nested:\n"
        "  list:\n"
        "    - 1\n"
        '    - a: "b: c"\n'
        "      d: []\n"
        '  "none": {}\n'
        'lines: "a\\nb\u00e4"\n'
        "items:\n"
        "  - - x\n"
        '  - "- y"\n'
        "..."
    )


@pytest.mark.parametrize("value", [VALUES, [], {}, [[]], "x", None, [{"a": [{"b": 1}]}]])
def test_yaml_and_json_say_the_same(value):
    yaml = pytest.importorskip("yaml")
    assert yaml.safe_load(printing.as_yaml(value)) == json.loads(printing.as_json(value)) == value


def test_a_table_has_aligned_columns_and_leaves_out_empty_ones():
    found = [
        {"name": "a", "size": 1.5, "note": None, "more": {}},
        {"name": "longer", "size": 22, "note": "", "more": {}},
    ]
    assert printing.as_table(found, ("name", "size", "note", "more")).splitlines() == [
        "NAME    SIZE",
        "a       1.5",
        "longer  22",
    ]
    assert printing.as_table([], ("name", "size")) == "NAME"


def test_long_cells_are_cut():
    (_, line) = printing.as_table([{"text": "x" * 500 + "\n"}], ("text",)).splitlines()
    assert line == "x" * (printing.CELL_CHARS_MAX - 3) + "..."


@pytest.mark.parametrize(
    ("row", "condition", "expected"),
    [
        ({"state": "RUNNING"}, ("state", "=", "running"), True),
        ({"state": "RUNNING"}, ("state", "!=", "running"), False),
        ({"pid": 5}, ("pid", "=", "5"), True),
        ({"pid": 5}, ("pid", "=", "five"), False),
        ({"pid": 5}, ("pid", "!=", 6), True),
        ({"alive": True}, ("alive", "=", "True"), True),
        ({"alive": True}, ("alive", "=", False), False),
        ({"alive": False}, ("alive", "=", "0"), True),
        ({"name": None}, ("name", "=", "none"), True),
        ({}, ("name", "!=", "x"), True),
    ],
)
def test_conditions(row, condition, expected):
    assert rows.matches(row, [condition]) is expected


def test_conditions_are_read_from_the_command_line():
    assert options.filters_of(("State=RUNNING", "name!=a=b")) == [("state", "=", "RUNNING"), ("name", "!=", "a=b")]
    with pytest.raises(click.BadParameter, match="has the form COLUMN=VALUE"):
        options.filters_of(("state",))


def test_a_listing_counts_what_it_does_not_show():
    listing = rows.Listing(2)
    for number in range(4):
        listing.add({"n": number}, [("n", "!=", 0)])
    assert ([row["n"] for row in listing.rows], listing.total, listing.is_cut) == ([1, 2], 4, True)
    assert "more than the limit of 2" in listing.warnings()[0]


def attempt(proc, start_ms, run_ms, *, name="f", task=0):
    of = Definition(0, b"", name, "")
    return Attempt(bytes(23) + bytes([task]), start_ms * 10**6, run_ms * 10**6, 0, 0, True, "", of, proc, proc, 1, 9)


class FakeLog:
    node = 9

    def __init__(self, attempts):
        self.found = attempts


class FakeAsker:
    """A cluster of one node, where a task that is said to run has ended meanwhile."""

    left_s = 1.0

    def nodes(self):
        return [{"node": 9, "Alive": True, "NodeManagerAddress": "10.0.0.9"}]

    def collect(self, what, limit):
        told = [
            [bytes(23) + bytes([task]), 0, "f", "", 0, "RUNNING", None, None, 0, 10**9, [0, 0, 0], 0, True]
            for task in (1, 2)
        ]
        return {"nodes": [[9, [[7, 3, 70, 1, 2, msgspec.msgpack.encode(told)]], []]], "silent": []}


def test_a_task_that_ends_while_somebody_looks_is_shown_once(monkeypatch):
    monkeypatch.setattr(rows.history, "attempts", lambda log, task: iter([attempt(7, 0, 10, task=1)]))
    found = {row["task_id"][-2:]: row["state"] for row in rows.tasks(FakeAsker(), [], 10).rows}
    assert found == {"01": "FINISHED", "02": "RUNNING"}
    assert len(rows.tasks(FakeAsker(), [], 10).rows) == 2
    counted = {row["state"]: row["count"] for row in rows.count_tasks(FakeAsker(), rows.Listing(10))}
    assert counted == {"FINISHED": 1, "RUNNING": 1}


@pytest.mark.parametrize("key", ["state", "name", "func_or_class_name", "type", "task_id"])
@pytest.mark.parametrize("value", ["FINISHED", "failed", "f", "g", "NORMAL_TASK", "other"])
@pytest.mark.parametrize("predicate", ["=", "!="])
def test_no_attempt_is_left_out_whose_row_would_match(key, predicate, value):
    one, filters = attempt(7, 0, 10), [(key, predicate, value)]
    is_match = rows.matches(rows.row_of(one, {}), filters)
    assert rows.may_match(one, filters) == (is_match or key == "task_id")


def test_slices_that_overlap_have_rows_of_their_own(monkeypatch):
    monkeypatch.setattr(timeline.history, "attempts", lambda log: iter(log.found))
    log = FakeLog([attempt(1, 0, 10), attempt(1, 5, 10), attempt(1, 10, 1), attempt(2, 0, 100)])
    events = timeline.of_logs([log])
    slices = [(event["tid"], event["ts"], event["dur"]) for event in events if event["ph"] == "X"]
    assert slices == [(0, 0.0, 10000.0), (1, 5000.0, 10000.0), (0, 10000.0, 1000.0), (2, 0.0, 100000.0)]
    assert sorted(event["tid"] for event in events if event["name"] == "thread_name") == [0, 1, 2]


def test_the_report_of_memory_groups_sorts_and_cuts():
    base = {"type": "DRIVER", "pid": 1, "task_status": "FINISHED", "call_site": "disabled", "is_stored": True}
    counts = {"local_references": 1, "task_references": 0, "contained_references": 2, "borrowers": 0}
    found = [
        {**base, **counts, "ip": "b", "object_id": "1", "object_size": 5, "reference_type": "X", "is_owner": True},
        {**base, **counts, "ip": "a", "object_id": "2", "object_size": 10, "reference_type": "X", "is_owner": True},
        {**base, **counts, "ip": "a", "object_id": "3", "object_size": 30, "reference_type": "Y", "is_owner": False},
    ]
    lines = memory_command.describe(found, "ip", "object_size", "B", 1, plain=True)
    assert lines == [
        "--- ip a: 2 entries, 10 B owned; 1 X, 1 Y",
        "",
        "a\t1\tDRIVER\t3\t30 B\tY\tlocal 1, contained 2\tFINISHED",
        "(1 more)",
        "",
        "--- ip b: 1 entries, 5 B owned; 1 X",
        "",
        "b\t1\tDRIVER\t1\t5 B\tX\tlocal 1, contained 2\tFINISHED",
        "",
    ]
    store = "object_store_memory"
    total, free = {store: 100 * 10_000}, {store: 60 * 10_000}
    assert memory_command.totals(found, total, free, units="B")[-1] == (
        "Shared memory: 40 B of 100 B lent to processes, 15 B of it in objects"
    )


def test_the_status_counts_what_groups_reserve_once():
    total, free = {"CPU": 40_000}, {"CPU": 10_000}
    total |= offered({"CPU": 20_000}, "0" * 36, 0)
    free |= {**offered({"CPU": 20_000}, "0" * 36, 0), "CPU_group_" + "0" * 36: 15_000}
    node = {"node": 1, "Alive": True, "IsHead": True, "IsClient": False, "Name": "n", "NodeManagerAddress": "::1"}
    node |= {"NodeManagerPort": 1, "Reason": "", "Resources": total, "Free": {}, "Labels": {}, "IsOutboundOnly": False}
    lines = status_command.describe("there:1", [node], total, free, [], verbose=False)
    assert [line.strip() for line in lines if "CPU" in line] == [
        "CPU  3 of 4 (2 reserved by placement groups, 0.5 of it used)"
    ]
    facts = status_command.facts("there:1", [node], total, free, [])
    assert (facts["total"], facts["used"]) == ({"CPU": 4}, {"CPU": 3})
    assert facts["reserved_by_placement_groups"] == {"CPU": {"total": 2, "used": 0.5}}
    assert (facts["nodes"][0]["total"], facts["nodes"][0]["used"]) == ({"CPU": 4}, {"CPU": 3})


def test_rows_are_shown_for_people_or_as_they_are():
    row = {"task_id": "t", "attempt_number": 0, "start_time_ms": 0}
    assert json.loads(state_commands.show([row], common.TaskState, form="json", detail=False))[0]["task_id"] == "t"
    node = {"node_id": "n", "resources_total": {"CPU": 2.0, "memory": 1024.0}}
    assert "CPU: 2, memory: 1.000 KiB" in state_commands.show([node], common.NodeState, form="table", detail=False)


def test_tasks_are_nested_below_those_that_submitted_them():
    def row(id, parent, name="f"):
        return {
            "task_id": id,
            "parent_task_id": parent,
            "func_or_class_name": name,
            "type": "NORMAL_TASK",
            "state": "FINISHED",
        }

    tasks = [row("1", "driver"), row("2", "1"), row("3", "2", "g"), row("4", "driver")]
    found = common.TaskSummaries.to_summary_by_lineage(tasks=tasks, actors=[])
    assert [entry.key for entry in found.summary] == ["1", "4"]
    assert found.summary[0].children[0].children[0].name == "g"
    assert found.total_tasks == 4


def test_options_know_when_they_contradict_themselves():
    assert common.ListApiOptions(filters=[("state", "=", "a"), ("state", "=", "b")]).has_conflicting_filters()
    assert not common.ListApiOptions(filters=[("state", "=", "a"), ("state", "!=", "b")]).has_conflicting_filters()


def test_a_row_is_also_a_mapping():
    row = common.dict_to_state({"node_id": "n", "unknown": 1}, common.StateResource.NODES)
    assert (row["node_id"], row.get("node_ip"), row.get("nothing", 7)) == ("n", None, 7)
    row["node_ip"] = "x"
    assert row.asdict()["node_ip"] == "x"
    assert common.remove_ansi_escape_codes("\x1b[31mred\x1b[0m") == "red"
