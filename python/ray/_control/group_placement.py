"""On which nodes the bundles of a placement group go. Pure functions of what nodes have free.

The strict strategies are met exactly or not at all: for STRICT_SPREAD a matching of bundles and nodes is searched for.
PACK takes few nodes by giving each in turn as many bundles as it has room for, SPREAD gives each bundle to the node
that has fewest; both place the largest bundles first, and may miss a way to place a group that needs every last unit
of several nodes (bin packing is NP-hard).

GPUs are whole devices: `demand_of` says how many a set of bundles needs when fractions share devices among themselves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeAlias

import msgspec

from ray._control.group_records import SPREAD, STRICT_PACK, STRICT_SPREAD
from ray._control.shown import show, show_demand
from ray._control.strategy import matches
from ray._protocol import UNIT

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from ray._control.node_records import Node

Selector: TypeAlias = "Mapping[str, tuple[str, tuple[str, ...]]]"

GPU: Final = "GPU"
NODE_ID_LABEL: Final = "ray.io/node-id"


class Place(msgspec.Struct):
    """A node as this module sees it."""

    key: int
    room: dict[str, int]
    labels: dict[str, str]
    used: float

    def suits(self, selector: Selector) -> bool:
        """Whether the labels are right."""
        return all(matches(self.labels.get(name), *test) for name, test in selector.items())


class Filling:
    """A node while bundles are being laid on it."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self._left = dict(place.room)
        self._gpus: list[int] = []

    def takes(self, bundle: dict[str, int], selector: Selector) -> bool:
        """Whether there is room for one more bundle here, and the labels are right."""
        if not self.place.suits(selector):
            return False
        if any(units > self._left.get(name, 0) for name, units in bundle.items() if name != GPU):
            return False
        gpus = bundle.get(GPU, 0)
        return not gpus or gpu_demand([*self._gpus, gpus]) <= self.place.room.get(GPU, 0)

    def add(self, bundle: dict[str, int]) -> None:
        """Lay it here."""
        for name, units in bundle.items():
            self._left[name] = self._left.get(name, 0) - units
        if bundle.get(GPU, 0):
            self._gpus.append(bundle[GPU])


class Wish(msgspec.Struct):
    """What is to be placed: bundles and what is asked of their nodes, by index; `taken` are those placed already."""

    strategy: str
    bundles: dict[int, dict[str, int]]
    selectors: tuple[Selector, ...]
    taken: dict[int, int]
    target: int = 0

    def selector(self, index: int) -> Selector:
        return self.selectors[index] if self.selectors else {}


def place_of(node: Node, room: dict[str, int]) -> Place:
    """A node with that much to give away."""
    id_hex = node.key.to_bytes(8, "big").hex().ljust(56, "0")
    return Place(node.key, room, {NODE_ID_LABEL: id_hex, **node.labels}, node.utilization())


def choose(places: list[Place], wish: Wish) -> dict[int, int] | None:
    """A node for each bundle; None if there is none."""
    order = sorted(wish.bundles, key=lambda index: (-sum(wish.bundles[index].values()), index))
    if wish.strategy == STRICT_PACK:
        return _on_one(places, wish)
    if wish.strategy == STRICT_SPREAD:
        return _on_different(places, wish, order)
    if wish.strategy == SPREAD:
        return _spread(places, wish, order)
    return _on_one(places, wish) or _packed(places, wish, order)


def choose_gathering(free: list[Place], whole: list[Place], wish: Wish) -> dict[int, int] | None:
    """The plan by what nodes have at all (`whole`), with those first that have most of it free."""
    room = {place.key: place.room for place in free}
    for place in whole:
        needs = demand_of(wish.bundles.values())
        has = [room.get(place.key, {}).get(name, 0) / max(units, 1) for name, units in needs.items()]
        place.used = 1.0 - min([*has, 1.0])
    return choose(whole, wish)


def demand_of(bundles: Collection[dict[str, int]]) -> dict[str, int]:
    """What bundles need together."""
    total: dict[str, int] = {}
    for bundle in bundles:
        for name, units in bundle.items():
            if units > 0:
                total[name] = total.get(name, 0) + units
    if total.get(GPU, 0) > UNIT:
        total[GPU] = gpu_demand([bundle.get(GPU, 0) for bundle in bundles])
    return total


def gpu_demand(gpus: list[int]) -> int:
    """What has to be free of GPUs for bundles with so many each.

    Fractions are packed onto as few devices as best fit decreasing finds. If all fit one device, which others may use
    a part of, their sum is asked for; else whole devices are.
    """
    together = sum(gpus)
    if together <= UNIT:
        return together
    return UNIT * (sum(units // UNIT for units in gpus) + len(pack_fractions([units % UNIT for units in gpus])))


def pack_fractions(fractions: list[int]) -> list[list[int]]:
    """Which fractions of a device go together: for each device the positions of those that share it."""
    devices: list[list[int]] = []
    left: list[int] = []
    for at in sorted(range(len(fractions)), key=lambda at: (-fractions[at], at)):
        if not fractions[at]:
            continue
        fitting = [(room, device) for device, room in enumerate(left) if room >= fractions[at]]
        if fitting:
            device = min(fitting)[1]
        else:
            device = len(devices)
            devices.append([])
            left.append(UNIT)
        devices[device].append(at)
        left[device] -= fractions[at]
    return devices


# --- strategies ----------------------------------------------------------------------------------------------------


def _on_one(places: list[Place], wish: Wish) -> dict[int, int] | None:
    """All bundles on one node: that of those which are placed, else the wished one, else the fullest with room."""
    homes = set(wish.taken.values())
    if len(homes) > 1:
        return None
    able = [
        place
        for place in places
        if (not homes or place.key in homes)
        and all(units <= place.room.get(name, 0) for name, units in demand_of(wish.bundles.values()).items())
        and all(place.suits(wish.selector(index)) for index in wish.bundles)
    ]
    if not able:
        return None
    best = min(able, key=lambda place: (place.key != wish.target, -place.used))
    return dict.fromkeys(wish.bundles, best.key)


def _packed(places: list[Place], wish: Wish, order: list[int]) -> dict[int, int] | None:
    """As few nodes as can be had by giving each in turn all it has room for; those in use by the group come first."""
    chosen: dict[int, int] = {}
    rest = list(order)
    left = list(places)
    homes = set(wish.taken.values())
    while rest:
        fills = [(place, _fill(place, wish, rest)) for place in left]
        fills = [(place, fill) for place, fill in fills if fill]
        if not fills:
            return None
        place, fill = max(fills, key=lambda entry: (entry[0].key in homes, len(entry[1]), entry[0].used))
        chosen.update(dict.fromkeys(fill, place.key))
        rest = [index for index in rest if index not in chosen]
        left.remove(place)
    return chosen


def _fill(place: Place, wish: Wish, order: list[int]) -> list[int]:
    """Bundles that fit together on a node, largest first."""
    taken: list[int] = []
    filling = Filling(place)
    for index in order:
        if filling.takes(wish.bundles[index], wish.selector(index)):
            filling.add(wish.bundles[index])
            taken.append(index)
    return taken


def _spread(places: list[Place], wish: Wish, order: list[int]) -> dict[int, int] | None:
    chosen: dict[int, int] = {}
    fillings = [Filling(place) for place in places]
    counts = {place.key: sum(node == place.key for node in wish.taken.values()) for place in places}
    for index in order:
        able = [filling for filling in fillings if filling.takes(wish.bundles[index], wish.selector(index))]
        if not able:
            return None
        best = min(able, key=lambda filling: (counts[filling.place.key], filling.place.used))
        chosen[index] = best.place.key
        best.add(wish.bundles[index])
        counts[best.place.key] += 1
    return chosen


def _on_different(places: list[Place], wish: Wish, order: list[int]) -> dict[int, int] | None:
    """A matching by augmenting paths (Kuhn, The Hungarian method for the assignment problem, 1955, section 2)."""
    free = [place for place in places if place.key not in wish.taken.values()]
    if len(order) > len(free):
        return None
    free.sort(key=lambda place: place.used)
    able = {
        index: [place.key for place in free if Filling(place).takes(wish.bundles[index], wish.selector(index))]
        for index in order
    }
    owner: dict[int, int] = {}

    def find(index: int, seen: set[int]) -> bool:
        for node in able[index]:
            if node in seen:
                continue
            seen.add(node)
            if node not in owner or find(owner[node], seen):
                owner[node] = index
                return True
        return False

    for index in order:
        if not find(index, set()):
            return None
    return {index: node for node, index in owner.items()}


# --- words ---------------------------------------------------------------------------------------------------------


def describe_impossible(places: list[Place], wish: Wish) -> str:
    """Why no node has the room, as a sentence without its full stop; `places` have all that their nodes have."""
    many = "1 node" if len(places) == 1 else f"{len(places)} nodes"
    for index, bundle in wish.bundles.items():
        labelled = [place for place in places if place.suits(wish.selector(index))]
        if not labelled:
            return f"bundle {index} asks for labels that none of {many} has"
        if not any(Filling(place).takes(bundle, {}) for place in labelled):
            name, most = _scarcest(labelled, bundle)
            has = f"the most that one node has is {name}: {show(name, most)}" if most else f"no node has any {name}"
            return f"bundle {index} needs {show_demand(bundle)}; {has}"
    together = f"its {len(wish.bundles)} bundles need {show_demand(demand_of(wish.bundles.values()))} together"
    match wish.strategy:
        case "STRICT_PACK":
            if wish.taken:
                return f"{together}, on the node that has its other bundles, as STRICT_PACK asks"
            return f"{together}, which no single node has, as STRICT_PACK asks"
        case "STRICT_SPREAD":
            count = len(wish.bundles) + len(wish.taken)
            return f"its {count} bundles need as many different nodes, as STRICT_SPREAD asks; there is {many}"
        case _:
            return f"{together}, which {many} cannot hold"


def _scarcest(places: list[Place], bundle: dict[str, int]) -> tuple[str, int]:
    """A resource that no place has enough of, and the most that one has."""
    most = {name: max(place.room.get(name, 0) for place in places) for name in bundle}
    lacking = [name for name, units in bundle.items() if units > most[name]]
    name = lacking[0] if lacking else next(iter(bundle))
    return name, most[name]
