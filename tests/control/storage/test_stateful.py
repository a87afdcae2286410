"""Heads that come and go on one cluster, compared with a dict: each storage in every order that hypothesis finds."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from ray._control import storage
from ray._control.storage import LeadershipLost, StorageWriter, Write

from .servers import contents

TABLES = st.sampled_from(["actors", "names", "a", "a_1"])
KEYS = st.one_of(st.sampled_from([b"", b"\0", b"k", b"k\0", b"\xff"]), st.binary(max_size=4))
VALUES = st.one_of(st.none(), st.binary(max_size=8))
BATCHES = st.lists(st.builds(Write, TABLES, KEYS, VALUES), max_size=6)
HEADS = st.sampled_from(["one", "two"])

EXAMPLES = {"sqlite": 25, "redis": 15, "etcd": 8, "postgres": 10}


class Heads(RuleBasedStateMachine):
    """Two heads, of which at most one leads; the model knows what was acknowledged, and who has the lease."""

    kind = None

    @initialize()
    def begin(self) -> None:
        self.url = self.kind.url()
        self.open = {name: storage.open(self.url) for name in ("one", "two")}
        self.model: dict[tuple[str, bytes], bytes] = {}
        self.leader: str | None = None
        self.epoch = 0

    def remember(self, batch: list[Write]) -> None:
        for table, key, value in batch:
            if value is None:
                self.model.pop((table, key), None)
            else:
                self.model[table, key] = value

    @rule(head=HEADS)
    def acquire(self, head: str) -> None:
        epoch = self.open[head].acquire(head, 3600)
        if self.leader in (None, head):
            assert epoch > self.epoch
            self.leader, self.epoch = head, epoch
        else:
            assert epoch is None

    @precondition(lambda self: self.leader)
    @rule(batch=BATCHES)
    def commit(self, batch: list[Write]) -> None:
        self.open[self.leader].commit(batch)
        self.remember(batch)

    @precondition(lambda self: self.leader)
    @rule(batches=st.lists(BATCHES, max_size=5))
    def write(self, batches: list[list[Write]]) -> None:
        writer = StorageWriter(self.open[self.leader])
        for batch in batches:
            writer.submit(batch)
            self.remember(batch)
        assert writer.close() == (len(batches), None)

    @precondition(lambda self: self.leader)
    @rule()
    def renew(self) -> None:
        self.open[self.leader].renew()

    @precondition(lambda self: self.leader)
    @rule()
    def release(self) -> None:
        self.open[self.leader].release()
        self.leader = None

    @rule(head=HEADS)
    def reopen(self, head: str) -> None:
        """The process of a head ends, which frees a lease in SQLite at once; and comes back under its name."""
        self.open[head].close()
        self.open[head] = storage.open(self.url)
        if self.leader == head:
            self.epoch = self.open[head].acquire(head, 3600)

    @precondition(lambda self: self.leader)
    @rule(batch=BATCHES.filter(bool))
    def replaced(self, batch: list[Write]) -> None:
        """A second life of the leader takes over; the first does not know."""
        former = self.open[self.leader]
        self.open[self.leader] = storage.open(self.url)
        self.epoch = self.open[self.leader].acquire(self.leader, 3600)
        for attempt in (lambda: former.commit(batch), former.renew):
            with pytest.raises(LeadershipLost):
                attempt()
        former.release()
        former.close()

    @invariant()
    def all_that_was_acknowledged_is_there_and_nothing_else(self) -> None:
        if hasattr(self, "open"):
            for head in self.open.values():
                assert contents(head) == self.model

    def teardown(self) -> None:
        for head in getattr(self, "open", {}).values():
            head.close()


@pytest.mark.slow  # many histories
def test_every_history_of_heads_agrees_with_a_dict(kind):
    machine = type("Heads", (Heads,), {"kind": kind})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=EXAMPLES[kind.name],
            stateful_step_count=12,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
