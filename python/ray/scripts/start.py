"""`ray start`: what can be asked for. What is made of it is in `starting`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import click

if TYPE_CHECKING:
    from collections.abc import Callable

ONE_PORT: Final = "a node has one TCP port for everything, which --port sets"
TOKEN: Final = "the cluster's token takes the place of passwords (--token-file)"
NO_DASHBOARD: Final = "there is no dashboard yet"


class Obsolete(NamedTuple):
    """An option that scripts for Ray pass and that changes nothing here; without a reason nobody misses it."""

    name: str
    reason: str
    kind: Any = str
    is_flag: bool = False


OBSOLETE: Final = (
    Obsolete("--redis-password", TOKEN),
    Obsolete("--redis-username", TOKEN),
    Obsolete("--redis-shard-ports", ONE_PORT),
    Obsolete("--object-manager-port", ONE_PORT, int),
    Obsolete("--node-manager-port", ONE_PORT, int),
    Obsolete("--min-worker-port", ONE_PORT, int),
    Obsolete("--max-worker-port", ONE_PORT, int),
    Obsolete("--worker-port-list", ONE_PORT),
    Obsolete("--ray-client-server-port", ONE_PORT, int),
    Obsolete("--runtime-env-agent-port", ONE_PORT, int),
    Obsolete("--dashboard-host", NO_DASHBOARD),
    Obsolete("--dashboard-port", NO_DASHBOARD, int),
    Obsolete("--include-dashboard", NO_DASHBOARD, bool),
    Obsolete("--dashboard-agent-listen-port", NO_DASHBOARD, int),
    Obsolete("--dashboard-agent-grpc-port", NO_DASHBOARD, int),
    Obsolete("--metrics-export-port", "there are no metrics to export yet", int),
    Obsolete("--plasma-directory", "values lie in anonymous shared memory, in no directory"),
    Obsolete("--no-monitor", "", is_flag=True),  # no autoscaler runs
    Obsolete("--disable-usage-stats", "", is_flag=True),  # nothing is reported to anybody
    Obsolete("--log-style", ""),  # what is printed is plain text
    Obsolete("--log-color", ""),
)


def accepts_obsolete(command: Callable[..., None]) -> Callable[..., None]:
    """Lets a command take the obsolete options, and warns of those that were given."""

    def warned(**given: Any) -> None:
        by_reason: dict[str, list[str]] = {}
        for option in OBSOLETE:
            value = given.pop(option.name.removeprefix("--").replace("-", "_"))
            if value not in (None, False) and option.reason:
                by_reason.setdefault(option.reason, []).append(option.name)
        for reason, names in by_reason.items():
            click.echo(f"Warning: {', '.join(names)} had no effect: {reason}.", err=True)
        command(**given)

    warned.__doc__ = command.__doc__
    wrapped: Callable[..., None] = warned
    for option in reversed(OBSOLETE):
        if option.is_flag:
            wrapped = click.option(option.name, is_flag=True, default=None, hidden=True)(wrapped)
        else:
            wrapped = click.option(option.name, type=option.kind, hidden=True)(wrapped)
    return wrapped


@click.command(name="start", short_help="Start a head, or a node that joins one.")
@click.option("--head", is_flag=True, help="Start a new cluster, whose head this node is.")
@click.option(
    "--address",
    metavar="HOST:PORT",
    help="Join the cluster whose head is there, or where its standbys are, with commas; 'auto': one that runs here.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    help="The TCP port of this node, for everything; 0: a free one.  [default: 6379 for a head, else 0]",
)
@click.option(
    "--node-ip-address",
    metavar="IP",
    help="Where others reach this node; by default the address by which this machine reaches the head, or others.",
)
@click.option(
    "--outbound-only",
    is_flag=True,
    help="Listen for nobody: for a machine that others cannot connect to. They reach it through the head.",
)
@click.option("--num-cpus", type=int, help="CPUs to schedule with; those that this command may run on by default.")
@click.option("--num-gpus", type=int, help="GPUs to schedule with; the visible ones by default.")
@click.option("--resources", metavar="JSON", help="""Further resources, such as '{"special": 2}'.""")
@click.option("--memory", type=int, help="Bytes of memory to schedule with; what the object store leaves by default.")
@click.option("--object-store-memory", type=int, help="Bytes of shared memory for values; 30 % of memory by default.")
@click.option("--labels", metavar="K=V,...", help="Labels of the node.")
@click.option("--labels-file", metavar="FILE", help="The same, as a mapping in a file of JSON or YAML.")
@click.option("--node-name", help="A name for people; the host's by default.")
@click.option("--temp-dir", metavar="DIR", help="Where the node's logs and its socket lie.")
@click.option("--object-spilling-directory", metavar="DIR", help="For values that leave a full object store.")
@click.option("--token", metavar="HEX", help="The cluster's token. Process lists show it; --token-file does not.")
@click.option("--token-file", metavar="FILE", help="A file with the cluster's token.")
@click.option("--tls", is_flag=True, help="Encrypt what nodes say to each other; without it a joiner does as the head.")
@click.option(
    "--state",
    metavar="URL",
    envvar="RAY_STATE",
    help="Where a head keeps what must outlive it: sqlite:///PATH, redis://HOST:PORT, etcd://HOST:PORT or "
    "postgresql://HOST/DB. Started again with the same, it goes on where it was; by default it keeps nothing.",
)
@click.option(
    "--standby", is_flag=True, help="With --state: wait while another head leads, and take over when it does not."
)
@click.option("--block", is_flag=True, help="Stay in the foreground; the node ends with this command.")
@accepts_obsolete
def start(**asked: Any) -> None:
    """Starts a node on this machine: the head of a new cluster, or one that joins.

    Who connects to a cluster has to prove its token. It is looked for in --token, --token-file, RAY_AUTH_TOKEN, the
    file that RAY_AUTH_TOKEN_PATH names, and ~/.ray/auth_token; without any, a head makes one for its cluster, and
    says where it is. Further nodes on the head's machine find it by themselves.

    With --tls (or RAY_USE_TLS=1) a head makes a cluster whose nodes use TLS 1.3 between them. Certificates follow from
    the token, so there is nothing else to hand out. A joiner with --tls joins no other cluster.

    With --outbound-only (or RAY_OUTBOUND_ONLY=1) a node that joins needs no port that is let through to it: behind a
    firewall or an address translation it takes part in everything, and the head passes on to it who wants it.
    """
    from ray.scripts import starting

    raise SystemExit(starting.run(starting.Asked(**asked)))
