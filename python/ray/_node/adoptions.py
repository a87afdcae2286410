"""Who still owns blocks in segments whose lessee has died.

Owns, for each such segment, which members have still to say what they own in it, and what the others have claimed.
Does not own the segments, nor decides what becomes of one that nobody needs.

Members of other nodes are asked by the control service, and it says whom it has asked before they answer. What can have
been lost on the way is asked again: when this node or theirs has come back from a broken link. So a segment is needed
by members that live and own a block in it, or have not answered yet, and by nobody else.

Invariants: an adoption exists as long as somebody needs its segment; who is not of this node was asked by the control
service.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from ray._control.messages import SegmentOrphaned

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence


class Adoption(msgspec.Struct):
    """Who owns what in a segment whose lessee has died."""

    lessee: int
    awaited: dict[int, None]
    """Cores that have not said yet what they own."""
    claims: dict[int, dict[int, None]] = {}
    """Offsets of blocks that are alive, by owner."""
    asking: bool = False
    """The control service has not said yet whom it has asked."""
    elsewhere: dict[int, None] = {}
    """Members of other nodes that were asked and live."""

    @property
    def is_needed(self) -> bool:
        return bool(self.awaited or self.claims or self.asking)

    def forget(self, proc: int) -> None:
        """A member has ended."""
        self.awaited.pop(proc, None)
        self.claims.pop(proc, None)
        self.elsewhere.pop(proc, None)


class Adoptions:
    """See the module's docstring. Methods after which a segment may not be needed any more say which: `unneeded`."""

    def __init__(self) -> None:
        self._by_segment: dict[int, Adoption] = {}
        self._is_alone = True
        """There are no other nodes."""

    def __len__(self) -> int:
        return len(self._by_segment)

    def __iter__(self) -> Iterator[int]:
        return iter(self._by_segment)

    def __contains__(self, segment: int) -> bool:
        return segment in self._by_segment

    def begin(self, segment: int, lessee: int, cores: Iterable[int]) -> list[SegmentOrphaned]:
        """The lessee has died: these cores of this node are asked by the caller, the others by what is returned."""
        self._by_segment[segment] = Adoption(lessee, dict.fromkeys(cores))
        return self.ask([segment])

    def ask(self, segments: Iterable[int]) -> list[SegmentOrphaned]:
        """For the control service, to ask members of other nodes, or to ask them again."""
        if self._is_alone:
            return []
        asked = []
        for segment in segments:
            adoption = self._by_segment[segment]
            adoption.asking = True
            asked.append(SegmentOrphaned(segment, adoption.lessee))
        return asked

    def asked(self, segment: int, procs: Sequence[int]) -> None:
        """The control service has asked these: all members that other nodes have."""
        adoption = self._by_segment.get(segment)
        if adoption is None:
            return
        adoption.asking = False
        now = dict.fromkeys(procs)
        for proc in [proc for proc in adoption.elsewhere if proc not in now]:
            adoption.forget(proc)
        adoption.elsewhere = now
        adoption.awaited |= now

    def concerning(self, procs: Sequence[int]) -> list[int]:
        """Segments about which one of these members of other nodes was asked."""
        return [
            segment
            for segment, adoption in self._by_segment.items()
            if any(proc in adoption.elsewhere for proc in procs)
        ]

    def set_alone(self, *, alone: bool) -> None:
        """The first other node has joined, or the last has gone, and with it whoever was asked there."""
        self._is_alone = alone
        if alone:
            for adoption in self._by_segment.values():
                adoption.asking = False
                for proc in list(adoption.elsewhere):
                    adoption.forget(proc)

    def claim(self, segment: int, proc: int, offsets: Iterable[int]) -> None:
        """A member says what it owns; a repeated answer replaces the one before."""
        adoption = self._by_segment.get(segment)
        if adoption is None or proc not in adoption.awaited:
            return  # nobody asked, or it is answered already
        del adoption.awaited[proc]
        adoption.claims.pop(proc, None)
        if claimed := dict.fromkeys(offsets):
            adoption.claims[proc] = claimed

    def free(self, segment: int, proc: int, offsets: Iterable[int]) -> None:
        """Blocks that a member has claimed are not needed any more."""
        adoption = self._by_segment.get(segment)
        claims = adoption.claims.get(proc) if adoption is not None else None
        if adoption is None or claims is None:
            return
        for offset in offsets:
            claims.pop(offset, None)
        if not claims:
            del adoption.claims[proc]

    def forget_member(self, proc: int) -> None:
        """A member of this node or another has ended."""
        for adoption in self._by_segment.values():
            adoption.forget(proc)

    def unneeded(self, segment: int | None = None) -> list[int]:
        """Segments, of this one or all, that nobody needs any more; they are forgotten here."""
        looked_at = self._by_segment if segment is None else [x for x in (segment,) if x in self._by_segment]
        ended = [x for x in looked_at if not self._by_segment[x].is_needed]
        for segment in ended:
            del self._by_segment[segment]
        return ended

    def lose_all(self) -> list[int]:
        """For tests of what readers do then: all segments, which are forgotten here."""
        lost = list(self._by_segment)
        self._by_segment.clear()
        return lost

    def violation(self, processes: Iterable[int]) -> str:
        """What is wrong with the state, if anything; `processes` are the members of this node."""
        here = dict.fromkeys(processes)
        for segment, adoption in self._by_segment.items():
            if not adoption.is_needed:
                return f"segment {segment} is kept for nobody"
            for proc in (*adoption.awaited, *adoption.claims):
                if proc not in here and proc not in adoption.elsewhere:
                    return f"segment {segment} is kept for the dead"
        return ""
