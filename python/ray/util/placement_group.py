"""Placement groups: resources of one or several nodes, set aside together for tasks and actors that belong together.

    group = placement_group([{"CPU": 1}, {"CPU": 1, "GPU": 1}], strategy="SPREAD")
    ray.get(group.ready())
    strategy = PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=1)
    ref = train.options(num_gpus=1, scheduling_strategy=strategy).remote()
    remove_placement_group(group)

A group has all of its bundles or none. When a node dies, its bundles are placed anew, and those of other nodes stay as
they are. A group ends with the driver of its job, or with the detached actor that created it, unless it is detached.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ray._runtime import session
from ray._runtime.ids import NodeID, PlacementGroupID
from ray._runtime.words import kind_of

if TYPE_CHECKING:
    from ray._core import ObjectRef

__all__ = [
    "BUNDLES_MAX",
    "NODE_ID_LABEL_KEY",
    "VALID_PLACEMENT_GROUP_STRATEGIES",
    "PlacementGroup",
    "check_placement_group_index",
    "get_current_placement_group",
    "get_placement_group",
    "placement_group",
    "placement_group_table",
    "remove_placement_group",
]

VALID_PLACEMENT_GROUP_STRATEGIES = {"PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"}

NODE_ID_LABEL_KEY = "ray.io/node-id"

BUNDLES_MAX = 1000
"""Bundles of one group; a group with more is refused, because placing it would hold up the cluster for seconds."""


class PlacementGroup:
    """A handle to a placement group. Can be passed to tasks and actors, compared and hashed.

    Attributes:
        id: The group's id.
        bundle_cache: Its bundles, once they are known here.
    """

    def __init__(self, id: PlacementGroupID, bundle_cache: list[dict[str, float]] | None = None) -> None:
        self.id = id
        self.bundle_cache = bundle_cache
        self._name = ""

    @staticmethod
    def empty() -> PlacementGroup:
        """What stands for no group."""
        return PlacementGroup(PlacementGroupID.nil())

    @property
    def is_empty(self) -> bool:
        """Whether this stands for no group."""
        return self.id.is_nil()

    def ready(self) -> ObjectRef[PlacementGroup]:
        """A reference to this handle that is ready when all bundles are set aside.

        Getting it raises `TaskPlacementGroupRemoved` if the group is removed before. Costs one message to the cluster;
        no task runs for it.
        """
        import msgspec

        core = session.ensure()
        if self.is_empty:
            return core.put(self)
        arguments = msgspec.msgpack.encode([self.id.binary()])
        return core.promise(self, "group.wait", arguments, f"{self} is created")

    def wait(self, timeout_seconds: float = 30) -> bool:
        """Waits until all bundles are set aside.

        Args:
            timeout_seconds: How long to wait at the most.

        Returns:
            Whether they are.

        Raises:
            TaskPlacementGroupRemoved: If there is no such group any more.
        """
        if not isinstance(timeout_seconds, int | float):
            message = f"timeout_seconds must be a number, not {kind_of(timeout_seconds)}"
            raise TypeError(message)
        if self.is_empty:
            return True
        from ray.exceptions import TaskPlacementGroupRemoved

        try:
            return bool(
                session.request("group.wait", timeout_s=None, group=self.id.binary(), limit_s=float(timeout_seconds))
            )
        except RuntimeError as error:
            raise TaskPlacementGroupRemoved(str(error)) from None

    @property
    def bundle_specs(self) -> list[dict[str, float]]:
        """The resources of each bundle."""
        if self.bundle_cache is None:
            self._learn()
        assert self.bundle_cache is not None, "just learned"
        return self.bundle_cache

    @property
    def bundle_count(self) -> int:
        """How many bundles there are."""
        return len(self.bundle_specs)

    def _learn(self) -> None:
        """Asks the cluster for what a handle that was made of an id alone does not know."""
        if self.is_empty:
            self.bundle_cache = []
            return
        found = session.request("group.get", group=self.id.binary())
        self.bundle_cache, self._name = _specs(found), found["name"]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PlacementGroup) and self.id == other.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        return f"PlacementGroup({self.id.hex()})"

    def __str__(self) -> str:
        return f"placement group {self._name or self.id.hex()}"


def placement_group(
    bundles: list[dict[str, float]],
    strategy: str | None = None,
    name: str = "",
    lifetime: str | None = None,
    _soft_target_node_id: str | None = None,
    bundle_label_selector: list[dict[str, str]] | None = None,
    topology_strategy: dict[str, str] | None = None,
) -> PlacementGroup:
    """Asks for a placement group, and returns a handle at once; resources are set aside when they are free.

    Args:
        bundles: The resources of each bundle, by name. All of a bundle is on one node.
        strategy: "PACK", the default, puts bundles on few nodes and "SPREAD" on many, as well as it can be had;
            "STRICT_PACK" on one node and "STRICT_SPREAD" each on a node of its own, or the group waits.
        name: A name under which `get_placement_group` finds it, in this program's namespace.
        lifetime: "detached" for a group that outlives its creator, until it is removed.
        _soft_target_node_id: The node, in hex, on which a STRICT_PACK group should be, if that has room.
        bundle_label_selector: For each bundle the labels that its node must have.
        topology_strategy: A strategy by label of nodes. Only that of "ray.io/node-id", which is `strategy` by another
            name, is available yet.

    Raises:
        TypeError, ValueError: If an argument is not valid; the message names it.
        NotImplementedError: If `topology_strategy` has other labels.
        RaySystemError: If the name is taken.
    """
    from ray._runtime import groups

    strategy = _strategy(strategy, topology_strategy)
    wire = _checked_bundles(bundles)
    if not isinstance(name, str):
        message = f"a placement group's name must be a string, not {kind_of(name)}"
        raise TypeError(message)
    if lifetime not in (None, "detached"):
        message = f"a placement group's lifetime must be None or 'detached', not {lifetime!r}"
        raise ValueError(message)
    target = 0
    if _soft_target_node_id:
        if strategy != "STRICT_PACK":
            message = f"_soft_target_node_id is for STRICT_PACK; this group has the strategy {strategy}"
            raise ValueError(message)
        target = NodeID.from_hex(_soft_target_node_id)._key()
    selectors = []
    if bundle_label_selector is not None:
        if len(bundle_label_selector) != len(bundles):
            message = (
                f"bundle_label_selector has {len(bundle_label_selector)} entries for {len(bundles)} bundles; "
                "it must have one for each, which may be empty"
            )
            raise ValueError(message)
        selectors = [
            groups.selector(labels, f"bundle_label_selector[{index}]")
            for index, labels in enumerate(bundle_label_selector)
        ]
    group = groups.create(
        wire,
        name,
        strategy=strategy,
        detached=lifetime == "detached",
        selectors=selectors,
        target=target,
    )
    made = PlacementGroup(group, [{key: float(amount) for key, amount in bundle.items()} for bundle in bundles])
    made._name = name
    return made


def _strategy(strategy: str | None, topology_strategy: dict[str, str] | None) -> str:
    if topology_strategy is not None:
        if strategy is not None:
            message = f"give strategy or topology_strategy, whose {NODE_ID_LABEL_KEY!r} means the same, but not both"
            raise ValueError(message)
        others = [label for label in topology_strategy if label != NODE_ID_LABEL_KEY]
        if others:
            message = (
                f"Skate places bundles by nodes only, not by {others[0]!r}, yet: leave it out of topology_strategy"
            )
            raise NotImplementedError(message)
        strategy = topology_strategy.get(NODE_ID_LABEL_KEY)
    if strategy is None:
        return "PACK"
    if strategy not in VALID_PLACEMENT_GROUP_STRATEGIES:
        known = ", ".join(sorted(VALID_PLACEMENT_GROUP_STRATEGIES))
        message = f"Invalid placement group strategy {strategy!r}; there are {known}"
        raise ValueError(message)
    return strategy


def _checked_bundles(bundles: Any) -> list[dict[str, int]]:
    from ray._runtime import groups

    if not isinstance(bundles, list):
        message = f"Placement group bundles must be a list of dictionaries, not {kind_of(bundles)}"
        raise ValueError(message)
    if not bundles:
        message = 'a placement group needs at least one bundle, for example [{"CPU": 1}]; the list is empty'
        raise ValueError(message)
    if len(bundles) > BUNDLES_MAX:
        message = f"a placement group has {BUNDLES_MAX} bundles at the most, not {len(bundles)}; make several groups"
        raise ValueError(message)
    wire = []
    for index, bundle in enumerate(bundles):
        if not isinstance(bundle, dict):
            message = f"bundle {index} must be a dictionary of resources, not {kind_of(bundle)}"
            raise ValueError(message)
        amounts = groups.to_wire(bundle, f"bundles[{index}]")
        if not amounts:
            message = f"bundle {index} is {bundle!r}: a bundle cannot be empty, or have only 0 of everything"
            raise ValueError(message)
        wire.append(amounts)
    return wire


def remove_placement_group(placement_group: PlacementGroup) -> None:
    """Gives a group up, at once or when it is created. Harmless if it is gone already.

    Tasks and actors that run in it are killed: actors die for good, tasks fail with `TaskPlacementGroupRemoved` when
    they would be tried again. Returns before all of that is done.

    Args:
        placement_group: The group.
    """
    import msgspec

    if not isinstance(placement_group, PlacementGroup):
        message = f"remove_placement_group() takes a PlacementGroup, not {kind_of(placement_group)}"
        raise TypeError(message)
    if not placement_group.is_empty:
        session.ensure().tell("group.remove", msgspec.msgpack.encode([placement_group.id.binary()]))


def get_placement_group(placement_group_name: str) -> PlacementGroup:
    """The group of this name, in this program's namespace.

    Raises:
        ValueError: If there is none.
    """
    if not placement_group_name:
        message = "get_placement_group() needs a name that is not empty"
        raise ValueError(message)
    session.ensure()
    session.load_job()
    try:
        found = session.request("group.by_name", name=placement_group_name, namespace=session.namespace)
    except ValueError as error:
        message = f"Failed to look up placement group with name: {placement_group_name}: {error}"
        raise ValueError(message) from None
    made = PlacementGroup(PlacementGroupID(found["group"]), _specs(found))
    made._name = found["name"]
    return made


def placement_group_table(placement_group: PlacementGroup | None = None) -> dict[Any, Any]:
    """What the cluster knows of a group, or of all.

    Args:
        placement_group: The group; None for all.

    Returns:
        For one group a dictionary with `placement_group_id`, `name`, `bundles` and `bundles_to_node_id` by index,
        `strategy`, `state` ("PENDING", "CREATED", "RESCHEDULING" or "REMOVED") and `stats`; empty if it is not known.
        For all, such dictionaries by id. Groups that were removed long ago are not known.
    """
    group = placement_group.id.binary() if placement_group is not None else None
    found = [_described(entry) for entry in session.request("group.list", group=group)]
    if placement_group is not None:
        return found[0] if found else {}
    return {entry["placement_group_id"]: entry for entry in found}


def _described(entry: dict[str, Any]) -> dict[str, Any]:
    from ray._runtime import groups

    nodes = [NodeID._from_key(node).hex() if node else "" for node in entry["nodes"]]
    return {
        "placement_group_id": entry["group"].hex(),
        "name": entry["name"],
        "bundles": dict(enumerate(_specs(entry))),
        "bundles_to_node_id": dict(enumerate(nodes)),
        "strategy": entry["strategy"],
        "state": entry["state"],
        "stats": groups.statistics_of(entry),
    }


def _specs(entry: dict[str, Any]) -> list[dict[str, float]]:
    from ray._runtime.options import from_fixed

    return [{name: from_fixed(units) for name, units in bundle.items()} for bundle in entry["bundles"]]


def get_current_placement_group() -> PlacementGroup | None:
    """The group that the calling task or actor is in; None if it is in none, and in a driver."""
    session.ensure()
    return None if session.current_group is None else session.current_group[0]


def check_placement_group_index(placement_group: PlacementGroup, bundle_index: int) -> None:
    """Raises ValueError if a group has no bundle of this index; -1 stands for any."""
    from ray._runtime import groups

    if not placement_group.is_empty:
        groups.check_index(placement_group, bundle_index)
    elif bundle_index != -1:
        message = f"without a placement group the bundle index must be -1, not {bundle_index}"
        raise ValueError(message)
