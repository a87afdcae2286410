"""Who has, or is getting, copies of the blocks that lie on this node: the tree of a broadcast.

Owns, for every block of which copies exist or are being made elsewhere, the nodes that hold them and from whom each
pulls. Does not know what the copies are for, nor whether the block itself still exists: a source that does not have
it says so to whoever asks.

A node that begins to pull is a source at once, because what has arrived is passed on. So a broadcast is first of all a
chain: each gives what it gets, once, and all have the block after little more than one transfer. A chain of
`DEPTH_MAX` is not made longer, since each of its nodes may be slow or die; then sources are used twice, the nearest to
the origin first, which halves the speed of each, and so on: the tree becomes wider only as it has to.

Invariants: a source's `load` is the number of unfinished holders that name it as theirs; a holder's source is nearer
to the origin than the holder, so there is no circle; an entry exists while somebody elsewhere holds or pulls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeAlias

import msgspec

if TYPE_CHECKING:
    from ray._node.peer_protocol import Copied, Dropped, Locate, Uncopied

DEPTH_MAX: Final = 8
"""Growing copies between a node and a whole one. More only where it could not be helped: after losses."""

SOURCES_MAX: Final = 4
"""Sources named to a puller. The first is meant for it, the others are for when that one fails."""

Block: TypeAlias = "tuple[bytes, int, int]"
"""Object, segment and offset."""


class Holder(msgspec.Struct):
    """A node with a copy of a block, whole or growing: from `source`, at `depth` steps from a whole one."""

    node: int
    segment: int
    offset: int
    whole: bool
    depth: int = 0
    source: int = 0
    load: int = 0


class Directory:
    """See the module's docstring.

    Args:
        node: This node, where the origins lie.
    """

    def __init__(self, node: int) -> None:
        self._node = node
        self._blocks: dict[Block, dict[int, Holder]] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def locate(self, node: int, message: Locate) -> list[tuple[int, int, int]]:
        """Where `node` should pull the block from, as (node, segment, offset); it counts as a source from now on."""
        block = (message.object, message.segment, message.offset)
        holders = self._blocks.get(block)
        if holders is None:
            holders = self._blocks[block] = {}
            holders[self._node] = Holder(self._node, message.segment, message.offset, whole=True)
        elif node in holders:
            self._remove(block, node)
        others = [holder for holder in holders.values() if holder.node != node]
        whole = sorted((holder for holder in others if holder.whole), key=lambda holder: holder.load)
        best = self._best(whole, [] if message.again else [holder for holder in others if not holder.whole])
        best.load += 1
        self._blocks[block] = holders
        holders[node] = Holder(node, message.into, 0, whole=False, depth=best.depth + 1, source=best.node)
        origin = holders[self._node]
        spare = [holder for holder in whole if holder is not best and holder is not origin][: SOURCES_MAX - 2]
        named = [best, *spare] if best is origin else [best, *spare, origin]
        return [(holder.node, holder.segment, holder.offset) for holder in named]

    def _best(self, whole: list[Holder], growing: list[Holder]) -> Holder:
        """The least busy source; of several, the nearest to a whole copy. The origin is always among them."""
        near = [holder for holder in growing if holder.depth < DEPTH_MAX]
        return min([*whole, *near], key=lambda holder: (holder.load, holder.depth))

    def copied(self, node: int, message: Copied) -> None:
        """The node has the whole block."""
        holder = self._blocks.get((message.object, message.segment, message.offset), {}).get(node)
        if holder is not None and not holder.whole:
            self._release_source((message.object, message.segment, message.offset), holder)
            holder.whole, holder.depth = True, 0

    def ended(self, node: int, message: Uncopied | Dropped, refused: list[int]) -> None:
        """The node has no copy, and will get none; `refused` are others that turned out to have none."""
        block = (message.object, message.segment, message.offset)
        for other in (node, *refused):
            if other != self._node:
                self._remove(block, other)

    def peer_left(self, node: int) -> None:
        """A node is gone, with all of its copies."""
        for block in [block for block, holders in self._blocks.items() if node in holders]:
            self._remove(block, node)

    def _remove(self, block: Block, node: int) -> None:
        holders = self._blocks.get(block, {})
        holder = holders.pop(node, None)
        if holder is None:
            return
        self._release_source(block, holder)
        for other in holders.values():
            if other.source == node:
                other.source = 0  # it goes on with another of those that it was told
        if list(holders) == [self._node]:
            del self._blocks[block]

    def _release_source(self, block: Block, holder: Holder) -> None:
        source = self._blocks[block].get(holder.source)
        if source is not None:
            source.load -= 1
        holder.source = 0

    def violation(self) -> str:
        """What is wrong with the state, if anything."""
        for block, holders in self._blocks.items():
            if self._node not in holders or len(holders) < 2:
                return f"block {block} is known for nobody"
            for holder in holders.values():
                pullers = sum(other.source == holder.node for other in holders.values())
                if pullers != holder.load:
                    return f"{holder} of block {block} has {pullers} pullers"
                source = holders.get(holder.source)
                if source is not None and not source.whole and source.depth >= holder.depth:
                    return f"{holder} of block {block} pulls from {source}"
        return ""
