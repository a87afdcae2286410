"""Who gets what is free, and whom to ask for leases back. Pure policy over the lease table's state.

Sharing out goes round the owners, one lease each, and within an owner round its classes, so neither a
great number of tasks nor of classes gives anyone more than a turn. What does not fit is stepped over:
a demand for a GPU does not hold up those for CPUs. Stepping over alone would starve a large demand
behind an endless stream of small ones, so a demand that was passed over `PATIENCE` times *holds* the
resources that it names: what becomes free is kept for it. A hold that has not led to a grant after
`HOLD_S` is given up and its patience doubled, because what it waits for may be in the hands of tasks
that never end; so the cost of holding stays bounded too.

Leases are asked back when a demand does not fit, from those who hold more of what is lacking than the
one who waits. With equal shares nothing moves; where there is one thing for two owners it changes
hands, but a lease whose owner has more work of the kind serves at least `QUANTUM_S` first, so that
handing over stays cheap against working.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ray._control.demands import Key
    from ray._node.lease_records import Lease, Want
    from ray._node.resources import Ledger

PATIENCE: Final = 16
"""Grants of a lacking resource to others after which a demand holds its resources."""

PATIENCE_MAX: Final = 4096
"""Doubling ends here."""

HOLD_S: Final = 5.0
"""How long a hold may keep resources idle."""

QUANTUM_S: Final = 0.02
"""A lease in demand by its own owner is not asked back earlier: some two hundred short tasks."""

WAITERS_SERVED: Final = 16
"""Demands per pass for which leases are asked back; bounds the pass. Others follow as these are met."""


def share_out(
    turns: dict[int, dict[Key, Want]],
    ledger: Ledger,
    start: Callable[[Want], None],
) -> list[Want]:
    """Start leases in fair order while they fit; return the feasible demands that lack something.

    Owners and classes that got something move to the end of their queues in `turns`.
    """
    holding = _serve_patient(turns, ledger, start)
    held_names = {name for want in holding for name in want.demand}
    blocked: list[tuple[Want, list[str]]] = []
    granted: dict[str, int] = {}
    round_ = {owner: list(wants.values()) for owner, wants in turns.items()}
    while round_:
        for owner in list(round_):
            queue = round_[owner]
            want = _next_fitting(queue, ledger, held_names, blocked)
            if want is None:
                del round_[owner]
                continue
            start(want)
            for name in want.demand:
                granted[name] = granted.get(name, 0) + 1
            _to_the_end(turns, want)
            queue.append(queue.pop(0))
    for want, lacking in blocked:
        want.passed_over += max(granted.get(name, 0) for name in lacking)
    return [want for want, _ in blocked]


def give_up_hold(want: Want) -> None:
    """Start counting anew, with more patience, if the demand holds resources."""
    if want.passed_over >= want.patience:
        want.passed_over = 0
        want.patience = min(want.patience * 2, PATIENCE_MAX)


def choose_reclaims(
    blocked: list[Want],
    leases: list[Lease],
    wants: dict[Key, Want],
    ledger: Ledger,
    now: float,
) -> tuple[list[Lease], float | None]:
    """Leases to ask back for those who wait, and when to look again because a lease is too young.

    Works on a projection: what is free, with what was asked back already counted as if it had come, unless its owner
    has said that it is in use.
    """
    projected = dict(ledger.free)
    keepers: list[Lease] = []
    for lease in leases:
        if lease.reclaimed and not lease.kept:
            for name in lease.allocation.amounts:
                projected[name] += lease.allocation.holds(name)
        else:
            keepers.append(lease)
    victims: list[Lease] = []
    again_at: float | None = None
    for want in blocked[:WAITERS_SERVED]:
        gets = 0
        while gets < want.unmet:
            lacking = [name for name, units in want.demand.items() if projected.get(name, 0) < units]
            if not lacking and gets == 0 and not _gpu_comes(leases, victims):
                # There may be enough in sum, and yet no device is whole.
                lacking = [name for name in ledger.lacking(want.demand) if name == "GPU"]
            if lacking:
                victim, young_until = _victim(want, lacking, gets, keepers, wants, now)
                if victim is None:
                    if young_until is not None:
                        again_at = young_until if again_at is None else min(again_at, young_until)
                    break
                keepers.remove(victim)
                victims.append(victim)
                for name in victim.allocation.amounts:
                    projected[name] += victim.allocation.holds(name)
            else:
                gets += 1
                for name, units in want.demand.items():
                    projected[name] -= units
    return victims, again_at


def needless_reclaims(blocked: list[Want], leases: list[Lease], ledger: Ledger) -> list[Lease]:
    """Leases in use that were asked back and may stay: nobody waits for what they hold, or shares are equal by now.

    When nothing comes back at once, more leases are asked for than are needed, because nobody knows which will be
    idle first.
    """
    kept = [lease for lease in leases if lease.kept]
    staying = [lease for lease in leases if lease.kept or not lease.reclaimed]
    needed: set[int] = set()
    for want in blocked[:WAITERS_SERVED]:
        lacking = ledger.lacking(want.demand)
        counts = _Counts(_useful(staying, lacking), want)
        needed.update(lease.id for lease in _useful(kept, lacking) if counts.is_due(lease))
    return [lease for lease in kept if lease.id not in needed]


def overlooked(turns: dict[int, dict[Key, Want]], ledger: Ledger) -> list[Want]:
    """Demands that fit now and wait without being held up; there should be none after sharing out."""
    wants = [want for turn in turns.values() for want in turn.values() if want.may_start]
    held = {name for want in wants if want.passed_over >= want.patience for name in want.demand}
    return [
        want
        for want in wants
        if not ledger.infeasible(want.place)
        and not ledger.infeasible(want.demand)
        and not ledger.lacking(want.demand)
        and not held.intersection(want.demand)
    ]


def _serve_patient(turns: dict[int, dict[Key, Want]], ledger: Ledger, start: Callable[[Want], None]) -> list[Want]:
    """Start what has waited too long, most passed over first; return what still lacks something and holds."""
    waiting = [
        want
        for turn in turns.values()
        for want in turn.values()
        if want.passed_over >= want.patience and want.may_start
    ]
    holding: list[Want] = []
    held: set[str] = set()
    for want in sorted(waiting, key=lambda want: -want.passed_over):  # a stable sort: ties keep their turn
        if held.isdisjoint(want.demand) and not ledger.lacking(want.demand):
            start(want)
            want.passed_over = 0
            _to_the_end(turns, want)
        else:
            holding.append(want)
            held.update(want.demand)
    return holding


def _next_fitting(
    queue: list[Want], ledger: Ledger, held_names: set[str], blocked: list[tuple[Want, list[str]]]
) -> Want | None:
    """The owner's first demand that can start; those before it leave the queue for this pass.

    Within a pass resources only become fewer, so what does not fit once need not be looked at again.
    """
    while queue:
        want = queue[0]
        if not want.may_start or ledger.infeasible(want.place) or ledger.infeasible(want.demand):
            queue.pop(0)
            continue
        lacking = ledger.lacking(want.demand)
        if not lacking and held_names.isdisjoint(want.demand):
            return want
        if lacking:
            blocked.append((want, lacking))
        queue.pop(0)
    return None


def _to_the_end(turns: dict[int, dict[Key, Want]], want: Want) -> None:
    turn = turns.pop(want.owner)
    turns[want.owner] = turn
    del turn[want.key]
    turn[want.key] = want


def _victim(
    want: Want,
    lacking: list[str],
    gets: int,
    keepers: list[Lease],
    wants: dict[Key, Want],
    now: float,
) -> tuple[Lease | None, float | None]:
    """The newest lease of whoever holds most of what `want` lacks, if that is more than its own share.

    Otherwise None, and the time when a lease that is too young now may be taken.
    """
    useful = _useful(keepers, lacking)
    # What is about to come back counts for nobody; what is starting counts, though it cannot be asked back yet.
    counts = _Counts(useful, want, gets)
    young_until: float | None = None
    candidates: list[tuple[int, int, Lease]] = []
    for lease in useful:
        if not lease.held or lease.reclaimed or not counts.is_due(lease):
            continue
        own = wants.get(lease.key)
        if own is not None and own.count > 0 and now < lease.since + QUANTUM_S:
            until = lease.since + QUANTUM_S
            young_until = until if young_until is None else min(young_until, until)
            continue
        candidates.append((counts.held_beside(lease), lease.id, lease))
    if not candidates:
        return None, young_until
    return max(candidates, key=lambda candidate: candidate[:2])[2], None


def _gpu_comes(leases: list[Lease], victims: list[Lease]) -> bool:
    """Whether a device's share was asked back and has not come yet."""
    return any(x.allocation.shares and ((x.reclaimed and not x.kept) or x in victims) for x in leases)


class _Counts:
    """Who holds how many of the leases that are of use to `want`, to which `gets` more are on their way."""

    def __init__(self, useful: list[Lease], want: Want, gets: int = 0) -> None:
        self._by_owner = _count(lease.owner for lease in useful)
        self._by_class = _count(lease.key for lease in useful)
        self._want = want
        self._gets = gets

    def held_beside(self, lease: Lease) -> int:
        """Leases of its class where the one who waits is its owner too, else of its owner."""
        if lease.owner == self._want.owner:
            return self._by_class.get(lease.key, 0)
        return self._by_owner.get(lease.owner, 0)

    def is_due(self, lease: Lease) -> bool:
        """Whether its holder has so much more than the one who waits that it should change hands."""
        want = self._want
        if lease.key == want.key:
            return False
        same = lease.owner == want.owner
        ours = (self._by_class.get(want.key, 0) if same else self._by_owner.get(want.owner, 0)) + self._gets
        return self.held_beside(lease) >= ours + 2 or ours == 0


def _useful(leases: list[Lease], lacking: list[str]) -> list[Lease]:
    return [lease for lease in leases if any(lease.allocation.holds(name) > 0 for name in lacking)]


def _count(keys: Iterable[object]) -> dict[object, int]:
    counts: dict[object, int] = {}
    for key in keys:
        counts[key] = counts.get(key, 0) + 1
    return counts
