"""Which worker ends when memory is short, and what is said about it. Pure policy over what the memory watch knows.

Ray's documented policy, group by owner, with two changes. A worker must be *worth* ending: one that holds next to
nothing is spared, whatever else speaks against it, because its end would help nobody. And who is *alone*, without
another task of the same owner that is worth it, is not the first choice even if it may be repeated: nothing will end
whose memory it could have. If it holds most of the limit by itself, repeating would come to the same end, and its
failure is final; else something else uses most, and it is repeated at the expense of its `max_retries`.

In order: what can be repeated and is not alone, or is an actor with restarts left; then what can be repeated at all;
then those of the owner who has most of these; then the newest, which has least to lose; then the largest. Drivers are
never candidates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from ray._control.demands import ACTORS, Key
from ray._control.shown import show_bytes
from ray._protocol import RETRY_CHARGED, RETRY_FREE, RETRY_NEVER

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ray._node.events import MemoryUse, ProcessUse

WORTH_OF_LARGEST: Final = 0.1
"""A worker with less than this share of what the largest holds is spared."""

WORTH_OF_LIMIT: Final = 0.01
"""So is one with less than this share of the limit: then it is not the workers who use the memory."""

HOPELESS_SHARE: Final = 0.5
"""A task that is alone and holds this share of the limit is not repeated."""

SAME_AGE_S: Final = 1.0
"""Workers lent within such a time of each other are equally new: their order is chance."""

SHOWN: Final = 10
"""Processes in a table."""

LABEL_CHARS_MAX: Final = 60
"""Of a name in a table."""


class Tenant(msgspec.Struct, frozen=True):
    """A worker that is lent to somebody. `key` is its lease's, `owner` a process also if it is an actor."""

    proc: int
    pid: int
    key: Key
    owner: int
    job: int
    label: str
    since: float
    retriable: bool

    @property
    def is_actor(self) -> bool:
        return self.key[0] == ACTORS

    def __str__(self) -> str:
        kind = "actor" if self.is_actor else "task"
        return f"{kind} {self.label}" if self.label else f"an unnamed {kind}"


class Victim(msgspec.Struct, frozen=True):
    """Who ends. `retry` is what that means for a task, as in `WorkerDied`."""

    tenant: Tenant
    bytes: int
    retry: int


def choose(tenants: Sequence[Tenant], memory: Mapping[int, int], limit: int) -> Victim | None:
    """The worker whose end does least harm for the memory that it gives back.

    Args:
        tenants: Workers that are lent.
        memory: By pid, what its end would give back.
        limit: What there is to use.

    Returns:
        None if no worker is worth ending.
    """
    largest = max((memory.get(tenant.pid, 0) for tenant in tenants), default=0)
    worth = max(largest * WORTH_OF_LARGEST, limit * WORTH_OF_LIMIT, 1)
    candidates = [tenant for tenant in tenants if memory.get(tenant.pid, 0) >= worth]
    if not candidates:
        return None
    tasks = _count_by_owner([tenant for tenant in candidates if not tenant.is_actor])

    def is_alone(tenant: Tenant) -> bool:
        return not tenant.is_actor and tasks[tenant.owner] == 1

    def standing(tenant: Tenant) -> tuple[bool, bool]:
        return tenant.retriable and not is_alone(tenant), tenant.retriable

    best = max(standing(tenant) for tenant in candidates)
    group = [tenant for tenant in candidates if standing(tenant) == best]
    members = _count_by_owner(group)
    group = [tenant for tenant in group if members[tenant.owner] == max(members.values())]
    newest = max(tenant.since for tenant in group)
    group = [tenant for tenant in group if tenant.since >= newest - SAME_AGE_S]
    chosen = max(group, key=lambda tenant: (memory[tenant.pid], tenant.since, tenant.proc))
    held = memory[chosen.pid]
    if chosen.is_actor or (is_alone(chosen) and held < limit * HOPELESS_SHARE):
        retry = RETRY_CHARGED
    else:
        retry = RETRY_NEVER if is_alone(chosen) else RETRY_FREE
    return Victim(chosen, held, retry)


def _count_by_owner(tenants: Sequence[Tenant]) -> dict[int, int]:
    counts: dict[int, int] = {}
    for tenant in tenants:
        counts[tenant.owner] = counts.get(tenant.owner, 0) + 1
    return counts


# ------------------------------------------------------------------ words


def short_text(victim: Victim, use: MemoryUse, place: str) -> str:
    """One sentence, for logs and notices."""
    tenant = victim.tenant
    return (
        f"Memory was short on {place} ({describe(use)}): the worker (pid {tenant.pid}) of {tenant}, with "
        f"{show_bytes(victim.bytes)}, was ended; {_consequence(victim)}."
    )


def cause_text(
    victim: Victim, use: MemoryUse, threshold: float, place: str, tenants: Sequence[Tenant], all_: Sequence[ProcessUse]
) -> str:
    """What the owner's exception says, without its full stop: who used what, what the limit was, and what to do."""
    tenant = victim.tenant
    return (
        f"the worker process (pid {tenant.pid}), which ran {tenant} and held {show_bytes(victim.bytes)}, was ended by "
        f"its node because memory was short. On {place} {describe(use)} when it was chosen; workers are ended above "
        f"{threshold:.0%} of a limit, before the kernel ends whatever it likes. {_consequence(victim).capitalize()}.\n"
        f"{table(tenants, all_)}\n"
        "What helps: run fewer such tasks or actors at a time, with a larger num_cpus or with memory=... (bytes) in "
        "their options; use less in each, or split the work into smaller pieces; give the machine or the control group "
        "more memory. RAY_memory_usage_threshold moves the threshold, and RAY_memory_monitor_refresh_ms=0 switches "
        "this watch off, both in the environment of the program that starts the node"
    )


def describe(use: MemoryUse) -> str:
    """Like "31.2 GiB of 32.0 GiB were used, the limit of the machine"."""
    return f"{show_bytes(use.used)} of {show_bytes(use.limit)} were used, the limit of {use.name}"


def table(tenants: Sequence[Tenant], processes: Sequence[ProcessUse]) -> str:
    """The processes with most memory, largest first, and among them the object store, which has no process."""
    by_pid = {tenant.pid: str(tenant) for tenant in tenants}
    lines = ["What had most memory then:", "       pid       GiB  what"]
    for process in sorted(processes, key=lambda process: (-process.bytes, process.pid))[:SHOWN]:
        what = by_pid.get(process.pid, process.command)
        lines.append(f"{process.pid or '-':>10}{process.bytes / (1 << 30):>10.3f}  {_cut(what)}")
    return "\n".join(lines)


def _cut(text: str) -> str:
    return text if len(text) <= LABEL_CHARS_MAX else text[: LABEL_CHARS_MAX - 3] + "..."


def _consequence(victim: Victim) -> str:
    tenant = victim.tenant
    if tenant.is_actor:
        return "it is restarted, at the expense of its max_restarts" if tenant.retriable else "it has no restart left"
    if not tenant.retriable:
        return "it fails, because its max_retries is 0"
    if victim.retry == RETRY_NEVER:
        return "it fails, because it held most of that alone, so that another attempt would come to the same end"
    if victim.retry == RETRY_CHARGED:
        return "it is repeated at the expense of its max_retries, because no other task of its owner will make room"
    return "it is repeated when there is room, without a charge to its max_retries"
