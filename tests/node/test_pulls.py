"""Copies between nodes: several whole nodes in one process, whose messages travel through the codec.

The bulk client is played by the tests: `Cluster.finish` checks that the source it is to pull from really has the block
before it says that the bytes are there.
"""

from __future__ import annotations

import itertools

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from ray import _protocol as p
from ray._node import directory, events, peer_protocol, pulls, segments
from ray._node.manager import CoreJoined
from ray._node.peer_protocol import Copied, Dropped, Locate, Uncopied
from tests.node.simulated import World

MIB = 1 << 20
SIZE = 8 * MIB


class Cluster:
    """Nodes 1001, 1002 ... that know each other, and what lies in their segments."""

    def __init__(self, count: int, *, store: int = 64 * MIB) -> None:
        self.worlds: dict[int, World] = {}
        self.contents: dict[tuple[int, int], bytes] = {}
        """Object by node and segment; a copy's once it is whole."""
        self._corr = itertools.count(1)
        for number in range(count):
            self.worlds[1001 + number] = World(store=store, node=1001 + number, first_proc=100 * (number + 1))
        for node in self.worlds:
            self.introduce(node)

    def introduce(self, node: int) -> None:
        for other, world in self.worlds.items():
            if other != node:
                world.feed(CoreJoined(node, p.ROLE_NODE, 0))
                world.feed(events.PeerJoined(node, f"10.0.0.{node - 1000}:1"))

    def __getitem__(self, node: int) -> World:
        return self.worlds[node]

    def put(self, node: int, name: bytes, size: int = SIZE) -> p.Pull:
        """A driver on a node makes an object; returns what a reader elsewhere asks for."""
        world = self.worlds[node]
        driver, corr = world.driver(), next(self._corr)
        world.send(driver, p.SegmentRequest(size), corr)
        granted = world.replies[driver].pop(corr)
        assert isinstance(granted, p.SegmentGranted)
        self.contents[node, granted.segment] = name
        return p.Pull(name, node, granted.segment, 0, size)

    def ask(self, node: int, member: int, pull: p.Pull) -> int:
        corr = 0 if pull.prefetch else next(self._corr)
        self.worlds[node].send(member, pull, corr)
        self.settle()
        return corr

    def settle(self) -> None:
        """Messages between nodes arrive, those of each pair in order."""
        while any(world.to_peers for world in self.worlds.values()):
            for node, world in self.worlds.items():
                sent, world.to_peers = world.to_peers, []
                for effect in sent:
                    if effect.node in self.worlds:
                        kind = peer_protocol.PEER_KINDS[type(effect.message)]
                        message = peer_protocol.decode(kind, peer_protocol.encode(effect.message))
                        self.worlds[effect.node].feed(events.FromPeer(node, message))

    def running(self, node: int) -> list[events.StartPull]:
        return list(self.worlds[node].pulls.values())

    def finish(self, node: int, pull: events.StartPull | None = None) -> events.StartPull:
        """A pull comes to its end, from the first source that has the block."""
        world = self.worlds[node]
        pull = pull or self.running(node)[0]
        name = self.name_of(pull)
        failures = []
        for source, _, segment, _ in pull.sources:
            if source not in self.worlds:
                failures.append((source, False, "Connection refused"))
            elif self.contents.get((source, segment)) != name:
                failures.append((source, True, "it refused"))
            else:
                self.contents[node, pull.segment] = name
                del world.pulls[pull.ticket]
                world.feed(events.PullDone(pull.ticket, "", tuple(failures), pull.len))
                break
        else:
            self.fail(node, pull, tuple(failures))
        self.settle()
        return pull

    def fail(self, node: int, pull: events.StartPull, failures: tuple[tuple[int, bool, str], ...] = ()) -> None:
        del self.worlds[node].pulls[pull.ticket]
        self.worlds[node].feed(events.PullDone(pull.ticket, "no source delivered it", failures))
        self.settle()

    def name_of(self, pull: events.StartPull) -> bytes:
        """The object that a pull is for, of which the bulk client knows nothing."""
        world = next(world for world in self.worlds.values() if world.pulls.get(pull.ticket) is pull)
        return world.node.pulls._tickets[pull.ticket].key[0]

    def reply(self, node: int, member: int, corr: int) -> p.Message | None:
        return self.worlds[node].replies.get(member, {}).pop(corr, None)

    def leave(self, node: int) -> None:
        del self.worlds[node]
        for world in self.worlds.values():
            world.feed(events.PeerLeft(node))
        self.settle()


@pytest.fixture
def pair() -> Cluster:
    return Cluster(2)


def test_the_wire_between_nodes_is_as_agreed():
    table = """
    144 Locate object segment offset into again
    145 Located object segment offset sources
    146 Copied object segment offset
    147 Uncopied object segment offset refused
    148 Dropped object segment offset
    149 SpillFreed owner spill
    """
    lines = [
        f"{kind} {' '.join([m.__name__, *m.__struct_fields__])}" for kind, m in peer_protocol.PEER_MESSAGES.items()
    ]
    assert lines == [line.strip() for line in table.strip().splitlines()]
    assert all(144 <= kind < 160 for kind in peer_protocol.PEER_MESSAGES)
    with pytest.raises(msgspec.ValidationError):
        peer_protocol.decode(144, msgspec.msgpack.encode(["text", 1, 2, 3]))


def test_a_reader_gets_a_copy_in_a_segment_of_its_own_node(pair):
    pull = pair.put(1001, b"a")
    reader = pair[1002].driver()
    corr = pair.ask(1002, reader, pull)
    (started,) = pair.running(1002)
    assert started.sources == ((1001, "10.0.0.1:1", pull.segment, 0),)
    assert pair.reply(1002, reader, corr) is None
    pair.finish(1002)
    assert pair.reply(1002, reader, corr) == p.Pulled(started.segment, SIZE, 0)
    second = pair.ask(1002, reader, pull)
    assert pair.reply(1002, reader, second) == p.Pulled(started.segment, SIZE, 0), "from the copy, at once"
    assert pair.running(1002) == []


def test_concurrent_readers_share_one_pull(pair):
    pull = pair.put(1001, b"a")
    readers = [pair[1002].driver() for _ in range(3)]
    corrs = [pair.ask(1002, reader, pull) for reader in readers]
    assert len(pair.running(1002)) == 1
    pair.finish(1002)
    assert all(
        isinstance(pair.reply(1002, reader, corr), p.Pulled) for reader, corr in zip(readers, corrs, strict=True)
    )


def test_a_copy_that_is_held_is_kept_and_an_idle_one_makes_room(pair):
    pull = pair.put(1001, b"a", 40 * MIB)
    world, reader = pair[1002], pair[1002].driver()
    pair.ask(1002, reader, pull)
    pair.finish(1002)
    other = world.driver()
    world.send(other, p.SegmentRequest(30 * MIB), 1)
    assert pair.reply(1002, other, 1) is None, "the copy is held"
    world.send(reader, p.PullReleased(b"a"))
    pair.settle()
    assert isinstance(pair.reply(1002, other, 1), p.SegmentGranted)
    assert world.node.pulls.statistics()["copies"] == 0
    assert len(pair[1001].node.pulls.directory) == 0, "its origin knows that it is gone"


def test_idle_copies_are_evicted_oldest_first_and_may_be_held_again(pair):
    named = {name: pair.put(1001, name, 20 * MIB) for name in (b"a", b"b", b"c")}
    world, reader = pair[1002], pair[1002].driver()
    for name, pull in named.items():
        pair.ask(1002, reader, pull)
        pair.finish(1002)
        world.send(reader, p.PullReleased(name))
    corr = pair.ask(1002, reader, named[b"a"])
    assert isinstance(pair.reply(1002, reader, corr), p.Pulled)
    world.send(world.driver(), p.SegmentRequest(20 * MIB), 1)
    kept = {copy.key[0] for copy in world.node.pulls._by_segment.values()}
    assert kept == {b"a", b"c"}


def test_an_evicted_copy_s_memory_serves_the_next_one(pair):
    first, second = (pair.put(1001, name, 30 * MIB) for name in (b"a", b"b"))
    world, reader = pair[1002], pair[1002].driver()
    world.send(reader, p.SegmentRequest(30 * MIB), 1)
    pair.ask(1002, reader, first)
    pair.finish(1002)
    world.send(reader, p.PullReleased(b"a"))
    files = len(world.segments)
    pair.ask(1002, reader, second)
    assert len(world.segments) == files
    pair.finish(1002)


def test_a_dead_member_holds_and_wants_nothing(pair):
    pulls_wanted = [pair.put(1001, name) for name in (b"a", b"b")]
    world, reader = pair[1002], pair[1002].driver()
    pair.ask(1002, reader, pulls_wanted[0])
    pair.finish(1002)
    pair.ask(1002, reader, pulls_wanted[1])
    (started,) = pair.running(1002)
    world.leave(reader)
    assert world.cancelled == [started.ticket]
    pair.fail(1002, started)
    assert world.node.segments.statistics()["store_bytes_idle"] == SIZE
    assert world.node.pulls.statistics()["pull_bytes_in_flight"] == 0
    assert list(world.segments) == [1], "the destination was dropped, and not before nothing was written to it"


def test_a_cancelled_pull_that_is_wanted_again_begins_anew(pair):
    pull = pair.put(1001, b"a")
    world, reader = pair[1002], pair[1002].driver()
    pair.ask(1002, reader, pull)
    world.send(reader, p.PullReleased(b"a"))
    corr = pair.ask(1002, reader, pull)
    pair.fail(1002, pair.running(1002)[0])
    pair.finish(1002)
    assert isinstance(pair.reply(1002, reader, corr), p.Pulled)


def test_a_cancelled_pull_that_had_come_to_its_end_is_a_cache(pair):
    pull = pair.put(1001, b"a")
    world, reader = pair[1002], pair[1002].driver()
    pair.ask(1002, reader, pull)
    world.send(reader, p.PullReleased(b"a"))
    pair.finish(1002)
    assert world.node.segments.statistics()["store_bytes_idle"] == SIZE


def test_gets_outrank_prefetches_and_each_wait_in_order(pair):
    pulls_wanted = [pair.put(1001, bytes([n]), MIB) for n in range(pulls.PULLS_MAX + 6)]
    reader = pair[1002].driver()
    for pull in pulls_wanted[: pulls.PULLS_MAX]:
        pair.ask(1002, reader, pull)
    waiting = pulls_wanted[pulls.PULLS_MAX :]
    for pull in waiting[:3]:
        pair.ask(1002, reader, msgspec.structs.replace(pull, prefetch=True))
    for pull in waiting[3:]:
        pair.ask(1002, reader, pull)
    pair.ask(1002, reader, waiting[2])
    assert len(pair.running(1002)) == pulls.PULLS_MAX
    begun = []
    for _ in waiting:
        before = set(pair[1002].pulls)
        pair.finish(1002)
        (new,) = set(pair[1002].pulls) - before
        begun.append(pair.name_of(pair[1002].pulls[new]))
    assert begun == [waiting[n].object for n in (3, 4, 5, 2, 0, 1)]


def test_bytes_in_flight_are_bounded_and_a_larger_block_goes_alone():
    pair = Cluster(2, store=4 << 30)
    small, large, behind = (
        pair.put(1001, name, size) for name, size in ((b"s", MIB), (b"l", pulls.IN_FLIGHT_BYTES_MAX + 1), (b"b", MIB))
    )
    reader = pair[1002].driver()
    for pull in (small, large, behind):
        pair.ask(1002, reader, pull)
    order = []
    while pair.running(1002):
        (started,) = pair.running(1002)
        order.append(pair.name_of(started))
        pair.finish(1002)
    assert order == [b"s", b"l", b"b"], "nothing overtakes it"


def test_a_prefetched_copy_is_there_when_it_is_needed(pair):
    pull = pair.put(1001, b"a")
    world, reader = pair[1002], pair[1002].driver()
    pair.ask(1002, reader, msgspec.structs.replace(pull, prefetch=True))
    pair.finish(1002)
    assert world.replies == {}
    assert world.node.segments.statistics()["store_bytes_idle"] == SIZE
    corr = pair.ask(1002, reader, pull)
    assert isinstance(pair.reply(1002, reader, corr), p.Pulled)
    assert world.node.segments.statistics()["store_bytes_idle"] == 0


def test_a_full_store_is_no_loss_of_the_value(pair):
    pull = pair.put(1001, b"a", 40 * MIB)
    world, holder = pair[1002], pair[1002].driver()
    world.send(holder, p.SegmentRequest(40 * MIB), 1)
    reader = world.driver()
    corr = pair.ask(1002, reader, pull)
    world.advance(11)
    denied = pair.reply(1002, reader, corr)
    assert isinstance(denied, p.SegmentDenied)
    assert denied.kept
    assert "could not be copied" in denied.message
    assert "40.0 MiB were asked for" in denied.message


def test_memory_that_the_system_refuses_is_no_loss_either(pair):
    pull = pair.put(1001, b"a")
    pair[1002].refuse_memory = True
    reader = pair[1002].driver()
    corr = pair.ask(1002, reader, pull)
    denied = pair.reply(1002, reader, corr)
    assert isinstance(denied, p.SegmentDenied)
    assert denied.kept
    assert len(pair[1001].node.pulls.directory) == 0


def test_a_block_that_its_origin_does_not_have_is_lost(pair):
    pull = pair.put(1001, b"a")
    del pair.contents[1001, pull.segment]
    reader = pair[1002].driver()
    corr = pair.ask(1002, reader, pull)
    pair.finish(1002)
    denied = pair.reply(1002, reader, corr)
    assert isinstance(denied, p.SegmentDenied)
    assert not denied.kept
    assert pair[1002].segments == {}


def test_a_pull_is_tried_again_a_few_times_and_then_the_value_counts_as_lost(pair):
    pull = pair.put(1001, b"a")
    reader = pair[1002].driver()
    corr = pair.ask(1002, reader, pull)
    for _ in range(1 + len(pulls.PAUSES_S)):
        assert pair.reply(1002, reader, corr) is None
        pair.fail(1002, pair.running(1002)[0], ((1001, False, "Connection refused"),))
        pair[1002].advance(max(pulls.PAUSES_S))
        pair.settle()
    denied = pair.reply(1002, reader, corr)
    assert isinstance(denied, p.SegmentDenied)
    assert not denied.kept
    assert pair[1002].node.next_deadline() is None


@pytest.mark.parametrize("state", ["unknown", "room", "locating", "pulling", "pausing"])
def test_values_of_a_node_that_left_are_lost_whatever_their_copies_wait_for(state):
    pair = Cluster(2)
    pull = pair.put(1001, b"a")
    world, reader = pair[1002], pair[1002].driver()
    if state == "unknown":
        pull = msgspec.structs.replace(pull, node=4242)
    if state == "room":
        world.send(world.driver(), p.SegmentRequest(60 * MIB), 1)
    corr = 77
    world.send(reader, pull, corr)
    if state in ("pulling", "pausing"):
        pair.settle()
    if state == "pausing":
        pair.fail(1002, pair.running(1002)[0])
        world.now += 0.0
    (copy,) = world.node.pulls._copies.values()
    assert copy.state == state
    world.to_peers.clear()
    world.feed(events.PeerLeft(pull.node))
    if state == "pulling":
        pair.fail(1002, pair.running(1002)[0])
    denied = pair.reply(1002, reader, corr)
    assert isinstance(denied, p.SegmentDenied)
    assert "has left the cluster" in denied.message
    assert not denied.kept
    assert world.node.pulls._copies == {}
    late = pair.ask(1002, reader, pull)
    assert isinstance(pair.reply(1002, reader, late), p.SegmentDenied), "at once"


def test_a_copy_outlives_the_node_that_it_came_from(pair):
    pull = pair.put(1001, b"a")
    reader = pair[1002].driver()
    pair.ask(1002, reader, pull)
    pair.finish(1002)
    pair.leave(1001)
    corr = pair.ask(1002, pair[1002].driver(), pull)
    assert corr
    assert any(isinstance(x, p.Pulled) for replies in pair[1002].replies.values() for x in replies.values())


def test_a_node_that_was_not_heard_of_is_waited_for():
    cluster = Cluster(1)
    reader = cluster[1001].driver()
    pull = p.Pull(b"a", 1002, 1, 0, SIZE)
    first = cluster.ask(1001, reader, pull)
    cluster.worlds[1002] = World(node=1002, first_proc=500)
    cluster.put(1002, b"a")
    cluster.introduce(1001)
    cluster.introduce(1002)
    cluster.settle()
    cluster.finish(1001)
    assert isinstance(cluster.reply(1001, reader, first), p.Pulled)
    second = cluster.ask(1001, reader, msgspec.structs.replace(pull, node=1003))
    cluster[1001].advance(pulls.UNKNOWN_NODE_S)
    denied = cluster.reply(1001, reader, second)
    assert isinstance(denied, p.SegmentDenied)
    assert "nobody has told this node" in denied.message


def test_an_object_that_was_made_again_is_another_copy(pair):
    old = pair.put(1001, b"a")
    reader = pair[1002].driver()
    pair.ask(1002, reader, old)
    pair.finish(1002)
    new = pair.put(1001, b"a")
    corr = pair.ask(1002, reader, new)
    assert pair.reply(1002, reader, corr) is None
    pair.finish(1002)
    assert isinstance(pair.reply(1002, reader, corr), p.Pulled)
    pair[1002].send(reader, p.PullReleased(b"a"))
    assert pair[1002].node.segments.statistics()["store_bytes_idle"] == 2 * SIZE


def test_what_lies_here_is_not_copied(pair):
    pull = pair.put(1001, b"a")
    reader = pair[1001].driver()
    denied = pair.reply(1001, reader, pair.ask(1001, reader, pull))
    assert isinstance(denied, p.SegmentDenied)
    assert denied.kept


# -- The tree ---------------------------------------------------------------------------------------


def broadcast_time(count: int) -> float:
    """Transfers until `count` nodes that ask at once have a block. Each sends no faster than one in that time,
    and no faster than it gets it itself.
    """
    tree = directory.Directory(1)
    source = {node: tree.locate(node, Locate(b"a", 5, 0, node))[0][0] for node in range(2, count + 2)}
    have = dict.fromkeys(source, 0.0)
    step, time = 0.01, 0.0
    while any(amount < 1 for amount in have.values()):
        time += step
        pulling = [source[node] for node in have if have[node] < 1]
        gets = {node: step / pulling.count(source[node]) for node in have if have[node] < 1}
        for node in sorted(gets):
            have[node] = min(have[node] + gets[node], have.get(source[node], 1.0), 1.0)
    return time


def test_eight_readers_are_served_in_little_more_than_one_transfer_and_hundreds_in_three():
    assert broadcast_time(1) < 1.1
    assert broadcast_time(8) < 1.2
    assert broadcast_time(60) < 2.3
    assert broadcast_time(400) < 3.3


def located(tree: directory.Directory, node: int, *, again: bool = False) -> list[int]:
    return [source for source, _, _ in tree.locate(node, Locate(b"a", 5, 0, node, again))]


def test_whole_copies_come_before_growing_ones_and_the_origin_is_always_named():
    tree = directory.Directory(1)
    assert located(tree, 2) == [1]
    assert located(tree, 3) == [2, 1], "the origin is busy"
    assert located(tree, 4) == [3, 1]
    tree.copied(2, Copied(b"a", 5, 0))
    assert located(tree, 5) == [1, 2], "it has nothing to do any more"
    tree.copied(5, Copied(b"a", 5, 0))
    tree.copied(3, Copied(b"a", 5, 0))
    assert located(tree, 6)[0] == 1
    assert located(tree, 7)[0] in (2, 5)
    assert tree.violation() == ""


def test_a_chain_has_an_end():
    tree = directory.Directory(1)
    nodes = range(2, 2 + 3 * directory.DEPTH_MAX)
    sources = {node: located(tree, node)[0] for node in nodes}
    for node in nodes:
        depth, at = 0, node
        while at != 1:
            depth, at = depth + 1, sources[at]
        assert depth <= directory.DEPTH_MAX
    assert max(list(sources.values()).count(node) for node in (1, *nodes)) == 2
    assert tree.violation() == ""


def test_after_a_failure_only_whole_copies_are_named():
    tree = directory.Directory(1)
    for node in range(2, 6):
        located(tree, node)
    assert located(tree, 3, again=True) == [1], "5 has nothing to do, and waits for 3"
    tree.copied(2, Copied(b"a", 5, 0))
    assert set(located(tree, 4, again=True)) == {1, 2}
    assert tree.violation() == ""


def test_the_directory_forgets_whom_nobody_copies_from_any_more():
    tree = directory.Directory(1)
    for node in range(2, 8):
        located(tree, node)
    tree.ended(2, Uncopied(b"a", 5, 0), [3])
    tree.ended(4, Dropped(b"a", 5, 0), [])
    tree.ended(4, Dropped(b"a", 5, 0), [])
    tree.peer_left(5)
    assert tree.violation() == ""
    tree.copied(9, Copied(b"a", 5, 0))
    tree.copied(6, Copied(b"z", 5, 0))
    for node in (6, 7):
        tree.ended(node, Uncopied(b"a", 5, 0), [1])
    assert len(tree) == 0


# -- Any order --------------------------------------------------------------------------------------


class Copying(RuleBasedStateMachine):
    """Readers on three nodes ask, let go and die while pulls end well or badly and one node leaves; in the end whoever
    asked was answered, and nothing is held that nobody holds."""

    def __init__(self) -> None:
        super().__init__()
        self.cluster = Cluster(4, store=40 * MIB)
        self.wanted = [self.cluster.put(1001 + n % 2, bytes([n]), size) for n, size in enumerate((MIB, SIZE, 30 * MIB))]
        self.readers = {node: [self.cluster[node].driver() for _ in range(2)] for node in self.cluster.worlds}
        self.open: dict[tuple[int, int, int], bytes] = {}

    nodes = st.sampled_from([1001, 1002, 1003, 1004])

    def reader(self, node: int, which: int) -> int | None:
        readers = self.readers.get(node, [])
        return readers[which % len(readers)] if readers else None

    @rule(node=nodes, which=st.integers(0, 1), what=st.integers(0, 2), prefetch=st.booleans())
    def ask(self, node: int, which: int, what: int, prefetch: bool) -> None:
        reader, pull = self.reader(node, which), self.wanted[what]
        if reader is not None and pull.node != node:
            corr = self.cluster.ask(node, reader, msgspec.structs.replace(pull, prefetch=prefetch))
            if corr:
                self.open[node, reader, corr] = pull.object
        self.collect()

    @rule(node=nodes, which=st.integers(0, 1), what=st.integers(0, 2))
    def let_go(self, node: int, which: int, what: int) -> None:
        reader, name = self.reader(node, which), bytes([what])
        if reader is not None:
            self.cluster[node].send(reader, p.PullReleased(name))
            self.cluster.settle()
            for key in [key for key, object in self.open.items() if key[:2] == (node, reader) and object == name]:
                del self.open[key]

    @rule(node=nodes)
    def die(self, node: int) -> None:
        if len(self.readers.get(node, [])) == 2:
            reader = self.readers[node].pop()
            self.cluster[node].leave(reader)
            self.cluster.settle()
            for key in [key for key in self.open if key[:2] == (node, reader)]:
                del self.open[key]

    @rule(node=nodes, which=st.integers(0, 9), well=st.booleans())
    def end_pull(self, node: int, which: int, well: bool) -> None:
        running = self.cluster.running(node) if node in self.cluster.worlds else []
        if running:
            pull = running[which % len(running)]
            if well:
                self.cluster.finish(node, pull)
            else:
                self.cluster.fail(node, pull, ((pull.sources[0][0], False, "broke"),) if pull.sources else ())
        self.collect()

    @rule(node=nodes, seconds=st.sampled_from([0.1, 1.0, 11.0]))
    def wait(self, node: int, seconds: float) -> None:
        if node in self.cluster.worlds:
            self.cluster[node].advance(seconds)
            self.cluster.settle()
        self.collect()

    @rule()
    def node_leaves(self) -> None:
        if 1002 in self.cluster.worlds:
            self.cluster.leave(1002)
            self.readers.pop(1002)
            for key in [key for key in self.open if key[0] == 1002]:
                del self.open[key]

    def collect(self) -> None:
        for node, reader, corr in list(self.open):
            answer = self.cluster.reply(node, reader, corr)
            if answer is None:
                continue
            name = self.open.pop((node, reader, corr))
            if isinstance(answer, p.Pulled):
                assert self.cluster.contents[node, answer.segment] == name
            else:
                assert isinstance(answer, p.SegmentDenied)

    def teardown(self) -> None:
        for _ in range(200):
            for node, world in self.cluster.worlds.items():
                for pull in self.cluster.running(node):
                    self.cluster.finish(node, pull)
                world.advance(11.0)
                self.cluster.settle()
            self.collect()
            if not self.open and not any(world.pulls for world in self.cluster.worlds.values()):
                break
        assert self.open == {}
        for node, readers in self.readers.items():
            for reader in readers:
                self.cluster[node].leave(reader)
        self.cluster.settle()
        for world in self.cluster.worlds.values():
            counts = {**world.node.pulls.statistics(), **world.node.segments.statistics()}
            assert counts["copy_bytes"] == counts["store_bytes_idle"]
            assert counts["pull_bytes_in_flight"] == counts["pulls_waiting"] == 0


TestCopying = Copying.TestCase
TestCopying.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_what_was_asked_on_a_link_that_broke_is_asked_again():
    world = World(node=1001)
    reader = world.driver()
    world.feed(CoreJoined(1002, p.ROLE_NODE, 0))
    world.feed(events.PeerJoined(1002, "10.0.0.2:1"))
    world.send(reader, p.Pull(b"a", 1002, 1, 0, SIZE), 1)
    assert [type(effect.message) for effect in world.to_peers] == [Locate]
    world.feed(events.LinkLost(1002))
    world.advance(0)
    asked = [effect.message for effect in world.to_peers]
    assert [type(message) for message in asked] == [Locate, Locate]
    assert asked[-1].again
    for _ in pulls.PAUSES_S:
        world.feed(events.LinkLost(1002))
        world.advance(2)
    denied = world.replies[reader].pop(1)
    assert isinstance(denied, p.SegmentDenied)
    assert "connection to it was lost" in denied.message


def test_who_pulled_over_a_link_that_broke_is_no_source_any_more(pair):
    pull = pair.put(1001, b"a")
    pair.ask(1002, pair[1002].driver(), pull)
    assert len(pair[1001].node.pulls.directory) == 1
    pair[1001].feed(events.LinkLost(1002))
    assert len(pair[1001].node.pulls.directory) == 0


def test_a_copy_that_nobody_holds_is_kept_for_a_while_and_then_dropped(pair):
    pull, reader = pair.put(1001, b"a"), pair[1002].driver()
    corr = pair.ask(1002, reader, pull)
    pair.finish(1002)
    assert isinstance(pair.reply(1002, reader, corr), p.Pulled)
    pair[1002].send(reader, p.PullReleased(b"a"))
    pair[1002].advance(segments.IDLE_S / 2)
    pair.ask(1002, reader, pull)
    pair[1002].advance(segments.IDLE_S * 2)
    assert pair[1002].node.pulls.statistics()["copies"] == 1, "somebody holds it again"
    pair[1002].send(reader, p.PullReleased(b"a"))
    pair[1002].advance(segments.IDLE_S)
    pair.settle()
    assert pair[1002].node.pulls.statistics()["copies"] == 0
    assert len(pair[1001].node.pulls.directory) == 0, "its origin was told"
