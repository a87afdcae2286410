"""Requests about placement groups, as the control service answers them. Owns nothing: the groups are `GroupTable`'s."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from ray._control.group_records import REMOVED_ERROR, STRATEGIES, Group, Waiter

if TYPE_CHECKING:
    from collections.abc import Callable

    from ray._control.machine import Received
    from ray._control.service import ControlService

_BUNDLES = list[dict[str, int]]
_SELECTORS = list[dict[str, tuple[str, tuple[str, ...]]]]


class GroupRequests:
    """The operations on placement groups, for `ControlRequests`.

    Args:
        service: Whose groups they are.
        later: What an operation returns whose answer comes later.
        refuse: Makes the exception that refuses a request, of a name and a text.
    """

    def __init__(self, service: ControlService, later: object, refuse: Callable[[str, str], Exception]) -> None:
        self._service = service
        self._later = later
        self._refuse = refuse
        self.ops: dict[str, tuple[tuple[str, ...], Callable[..., Any]]] = {
            "group.create": (
                ("group", "name", "namespace", "bundles", "strategy", "detached", "selectors", "target", "actor"),
                self._create,
            ),
            "group.remove": (("group",), self._remove),
            "group.wait": (("group", "limit_s"), self._wait),
            "group.by_name": (("name", "namespace"), self._by_name),
            "group.get": (("group",), self._get),
            "group.list": (("group",), self._list),
        }

    def _create(
        self,
        event: Received,
        now: float,
        group: bytes,
        name: str,
        namespace: str,
        bundles: list[dict[str, int]],
        strategy: str,
        detached: Any,
        selectors: Any,
        target: int,
        actor: bytes,
    ) -> None:
        if strategy not in STRATEGIES:
            msg = f"{strategy!r} is no strategy of placement groups; there are {', '.join(STRATEGIES)}"
            raise ValueError(msg)
        new = Group(
            id=group,
            name=name,
            namespace=namespace,
            job=self._service.job_of(event.sender),
            actor=actor if self._is_detached(actor) else b"",
            detached=bool(detached),
            strategy=strategy,
            bundles=tuple(msgspec.convert(bundles, _BUNDLES)),
            selectors=tuple(msgspec.convert(selectors or [], _SELECTORS)),
            target=target,
            created_at=now,
        )
        self._service.groups.create(new, now)

    def _is_detached(self, actor: bytes) -> bool:
        record = self._service.actors.get(actor)
        return record is not None and record.detached

    def _remove(self, event: Received, now: float, group: bytes) -> None:
        self._service.groups.remove(group, now)

    def _wait(self, event: Received, now: float, group: bytes, limit_s: float | None) -> object:
        try:
            self._service.groups.wait(group, Waiter(event.sender, event.corr), limit_s, now)
        except ValueError as error:
            raise self._refuse(REMOVED_ERROR, str(error)) from None
        return self._later

    def _by_name(self, event: Received, now: float, name: str, namespace: str | None) -> dict[str, Any]:
        found = self._service.groups.by_name(name, namespace or "")
        if found is None:
            known = [x.name for x in self._service.groups.all() if x.state != "removed" and x.name][:10]
            there = f"There are: {', '.join(known)}" if known else "No placement group has a name"
            msg = (
                f"no placement group is named {name!r} in namespace {namespace!r}. {there}. It may have been removed, "
                "or be in another namespace"
            )
            raise ValueError(msg)
        return self._describe(found, now)

    def _get(self, event: Received, now: float, group: bytes) -> dict[str, Any]:
        found = self._service.groups.find(group)
        if found is None:
            msg = self._service.groups.gone(group) or f"placement group {group.hex()} is about to be created"
            raise ValueError(msg)
        return self._describe(found, now)

    def _list(self, event: Received, now: float, group: bytes | None) -> list[dict[str, Any]]:
        if group is None:
            return [self._describe(x, now) for x in self._service.groups.all()]
        found = self._service.groups.find(group)
        return [self._describe(found, now)] if found is not None else []

    def _describe(self, group: Group, now: float) -> dict[str, Any]:
        return {
            "group": group.id,
            "name": group.name,
            "namespace": group.namespace,
            "job": group.job,
            "detached": group.detached,
            "strategy": group.strategy,
            "state": _shown_state(group),
            "bundles": list(group.bundles),
            "nodes": [group.placed.get(index, 0) for index in range(len(group.bundles))],
            "attempts": group.attempt,
            "created_s": max(group.ready_at - group.created_at, 0.0),
            "placing_s": max(group.ready_at - group.began_at, 0.0) if group.began_at else 0.0,
            "infeasible": group.infeasible,
            "why": "" if group.state in ("created", "removed") else self._service.groups.why(group.id),
        }


def _shown_state(group: Group) -> str:
    """The state under Ray's names."""
    if group.lost and group.state in ("pending", "preparing", "returning"):
        return "RESCHEDULING"
    return {"created": "CREATED", "removed": "REMOVED"}.get(group.state, "PENDING")
