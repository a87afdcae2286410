"""`ray.init` and `ray.shutdown`: joining a cluster, or starting one of one node for this program alone.

Such a node is started by `ray._node.launch` and lives as long as this process, which holds the other end of a pipe.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping
from typing import Any

from ray._runtime import joining, nodes, session
from ray._runtime.labels import check_labels
from ray._runtime.resources import node_resources

__all__ = ["RayContext", "init", "shutdown"]

SHUTDOWN_TIMEOUT_S = 5.0
LOG_DRAIN_TIMEOUT_S = 1.0
ENTRYPOINT_CHARS_MAX = 1000  # of the command line, as lists of jobs show it; what is longer is cut

_IGNORED_EXTRAS = frozenset(
    ("_node_name", "_metrics_export_port", "_skip_env_hook", "_driver_object_store_memory", "_redis_username")
)
_ABSENT_EXTRAS = frozenset(
    (
        "_enable_object_reconstruction", "_plasma_directory", "_redis_password", "_temp_dir",
        "_tracing_startup_hook",
    )
)  # fmt: skip

_node: Any = None
_printer: Any = None
_atexit_registered = False


class RayContext(Mapping[str, Any]):
    """What `ray.init` returns: facts about the cluster, and a context manager that shuts it down.

    Attributes:
        address_info: Addresses, ids and directories by name; also reachable as `context["node_id"]`.
        dashboard_url: None: there is no dashboard yet.
        python_version: Of this interpreter.
        ray_version: Of this package.
        ray_commit: Empty.
    """

    def __init__(self, address_info: dict[str, Any], ray_version: str) -> None:
        self.address_info = address_info
        self.dashboard_url: str | None = None
        self.python_version = ".".join(map(str, sys.version_info[:3]))
        self.ray_version = ray_version
        self.ray_commit = ""

    def __getitem__(self, key: str) -> Any:
        return self.address_info[key]

    def __iter__(self) -> Any:
        return iter(self.address_info)

    def __len__(self) -> int:
        return len(self.address_info)

    def __enter__(self) -> RayContext:
        return self

    def __exit__(self, *exc: object) -> None:
        self.disconnect()

    def disconnect(self) -> None:
        """Shuts the cluster down, if it is still this one that the process is in."""
        if session.context is self:
            shutdown()

    def __repr__(self) -> str:
        info = self.address_info
        return (
            f"RayContext(node_id={info['node_id']!r}, session_dir={info['session_dir']!r}, "
            f"dashboard_url={self.dashboard_url!r}, python_version={self.python_version!r}, "
            f"ray_version={self.ray_version!r})"
        )

    def __str__(self) -> str:
        return repr(self)

    def _repr_html_(self) -> str:
        """A small table, for notebooks."""
        import html

        shown = {
            "Python": self.python_version,
            "Ray": self.ray_version,
            "Session": self.address_info["session_dir"],
            "Dashboard": self.dashboard_url or "none yet",
        }
        cell = '<td style="text-align: left">'
        rows = (f"<tr>{cell}<b>{name}</b></td>{cell}{html.escape(value)}</td></tr>" for name, value in shown.items())
        return f"<table>{''.join(rows)}</table>"


def init(
    address: str | None = None,
    *,
    num_cpus: int | None = None,
    num_gpus: int | None = None,
    resources: dict[str, float] | None = None,
    labels: dict[str, str] | None = None,
    object_store_memory: int | None = None,
    object_spilling_directory: str | None = None,
    local_mode: bool = False,
    ignore_reinit_error: bool = False,
    include_dashboard: bool | None = None,
    dashboard_host: str = "127.0.0.1",
    dashboard_port: int | None = None,
    job_config: Any = None,
    configure_logging: bool = True,
    logging_level: int | str = "info",
    logging_format: str | None = None,
    logging_config: Any = None,
    log_to_driver: bool | None = None,
    namespace: str | None = None,
    runtime_env: dict[str, Any] | None = None,
    enable_resource_isolation: bool = False,
    cgroup_path: str | None = None,
    system_reserved_cpu: float | None = None,
    system_reserved_memory: int | None = None,
    proxy_server_url: str | None = None,
    **kwargs: Any,
) -> RayContext:
    """Joins a cluster; without one, starts one of one node for this program.

    Called by itself when a program first uses the API without it. What it starts ends with this process, however that
    ends, or by `ray.shutdown()`. A cluster that was joined goes on without this program, but for its job.

    Args:
        address: "HOST:PORT" of a cluster's head, with or without "ray://" before it; "auto": the cluster of which a
            node runs on this machine; "local": a new one. None: the environment variable `RAY_ADDRESS` says which,
            else as "auto", else a new one.
        num_cpus: CPUs to schedule with; those that this process may run on by default.
        num_gpus: GPUs to schedule with; those of `CUDA_VISIBLE_DEVICES`, else of the machine by default.
        resources: Further resources, by name.
        labels: Labels of the new node, for label selectors.
        object_store_memory: Bytes of shared memory for values, no more than the machine has; 30 % of it by default.
        object_spilling_directory: A directory for values that leave a full store; a temporary one by default.
        local_mode: Not available.
        ignore_reinit_error: Return the running cluster's context instead of raising when there is one.
        include_dashboard: True only warns that there is no dashboard yet.
        dashboard_host: Where a dashboard would listen.
        dashboard_port: Where a dashboard would listen.
        job_config: A `ray.job_config.JobConfig`.
        configure_logging: Whether to set the level of the logger "ray".
        logging_level: That level.
        logging_format: Format for the logger "ray".
        logging_config: A `ray.LoggingConfig` for records of `logging`, here and in all workers.
        log_to_driver: Whether what workers print is printed here too; yes by default.
        namespace: Where named actors of this program live; a fresh, anonymous one by default.
        runtime_env: Environment of all workers; `env_vars` is what there is yet.
        enable_resource_isolation: Not available yet.
        cgroup_path: Not available yet.
        system_reserved_cpu: Not available yet.
        system_reserved_memory: Not available yet.
        proxy_server_url: Not available yet.
        kwargs: Arguments that begin with an underscore, as Ray has them; unknown ones are refused.

    Returns:
        Facts about the cluster; also a context manager that shuts it down.

    Raises:
        RuntimeError: If this process is in a cluster already, or an argument is unknown.
        ConnectionError: If the cluster cannot be found or joined; the text says why.
        NotImplementedError: If an argument asks for what does not exist yet.
        ValueError, TypeError: If an argument is out of range or of the wrong type.
    """
    unknown = sorted(set(kwargs) - _IGNORED_EXTRAS - _ABSENT_EXTRAS - {"_memory", "_node_ip_address", "_system_config"})
    if unknown:
        message = f"ray.init() has no argument {', '.join(map(repr, unknown))}"
        raise RuntimeError(message)
    _refuse_absent(
        {
            "local_mode": local_mode,
            "enable_resource_isolation": enable_resource_isolation,
            "cgroup_path": cgroup_path,
            "system_reserved_cpu": system_reserved_cpu,
            "system_reserved_memory": system_reserved_memory,
            "proxy_server_url": proxy_server_url,
            **{name: value for name, value in kwargs.items() if name in _ABSENT_EXTRAS},
        }
    )
    _check_logging_config(logging_config)
    with session.lock:
        if session.core is not None:
            if ignore_reinit_error:
                return _existing_context()
            message = (
                "This process is in a cluster already: ray.init() was called before, or an earlier call started one. "
                "Call ray.shutdown() first, or pass ignore_reinit_error=True."
            )
            raise RuntimeError(message)
        job = _job(job_config, namespace, runtime_env)
        where = joining.choose(address)
        if where == "local":
            memory = kwargs.get("_memory")
            amounts = node_resources(num_cpus, num_gpus, resources, object_store_memory, memory)
        else:
            _refuse_amounts(
                where,
                num_cpus=num_cpus,
                num_gpus=num_gpus,
                resources=resources,
                labels=labels,
                object_store_memory=object_store_memory,
                object_spilling_directory=object_spilling_directory,
                _system_config=kwargs.get("_system_config"),
                _memory=kwargs.get("_memory"),
            )
        if configure_logging:
            _configure_logging(logging_level, logging_format)
        if include_dashboard:
            _warn("ray.init(include_dashboard=True): Skate has no dashboard yet, and goes on without one.")
        if where == "local":
            kwargs["object_spilling_directory"] = object_spilling_directory
            place = _start(amounts, check_labels(labels, "ray.init()"), job, kwargs, logging_config)
        else:
            place = joining.enter(where)
            job["runtime_env"]["env_vars"] = {
                **_logging_variables(logging_config),
                **job["runtime_env"].get("env_vars", {}),
            }
        return _join(place, job, log_to_driver=log_to_driver is not False)


def _refuse_amounts(where: str, **arguments: Any) -> None:
    given = [name for name, value in arguments.items() if value is not None]
    if given:
        message = (
            f"ray.init() joins the running cluster at {where}, whose nodes have what they have: {', '.join(given)} "
            "can only be given for a new one (address='local')"
        )
        raise ValueError(message)


def _check_logging_config(config: Any) -> None:
    if config is not None and type(config).__name__ != "LoggingConfig":
        message = f"logging_config must be a ray.LoggingConfig, not {config!r}"
        raise TypeError(message)


def _refuse_absent(arguments: dict[str, Any]) -> None:
    for name, value in arguments.items():
        if value not in (None, False, {}):
            message = f"ray.init({name}={value!r}): Skate does not have this yet"
            raise NotImplementedError(message)


def _existing_context() -> RayContext:
    if session.context is None:  # a worker
        return RayContext(_worker_info(), _version())
    context: RayContext = session.context
    return context


def _worker_info() -> dict[str, Any]:
    from ray._runtime.ids import NodeID

    core = session.require()
    return {
        "node_ip_address": session.node_ip_address,
        "session_dir": os.path.join(session.temp_dir, session.session_name),
        "node_id": NodeID._from_key(core.node).hex(),
    }


def _version() -> str:
    from ray._version import __version__

    return __version__


def _job(job_config: Any, namespace: str | None, runtime_env: dict[str, Any] | None) -> dict[str, Any]:
    from ray._runtime import options
    from ray.job_config import JobConfig
    from ray.runtime_env import RuntimeEnv

    config = JobConfig() if job_config is None else job_config
    if not isinstance(config, JobConfig):
        message = f"job_config must be a ray.job_config.JobConfig, not {config!r}"
        raise TypeError(message)
    if namespace is not None and (not isinstance(namespace, str) or not namespace):
        message = f"namespace must be a string that is not empty, or None, not {namespace!r}"
        raise TypeError(message) if not isinstance(namespace, str) else ValueError(message)
    if namespace is not None:
        options.check_text("namespace", namespace)
    env = runtime_env if runtime_env is not None else config.runtime_env
    if env is not None and not isinstance(env, dict):
        message = f"runtime_env must be a dictionary or a RuntimeEnv, not {env!r}"
        raise TypeError(message)
    return {
        "namespace": namespace or config.ray_namespace or _anonymous(),
        "runtime_env": dict(env if isinstance(env, RuntimeEnv) else RuntimeEnv(**(env or {}))),
        "default_actor_lifetime": config.default_actor_lifetime,
        "metadata": dict(config.metadata),
    }


def _anonymous() -> str:
    import uuid

    return str(uuid.UUID(bytes=os.urandom(16), version=4))


# --- start and end -------------------------------------------------------------------------------------------------


def _warn(text: str) -> None:
    import logging

    logging.getLogger("ray").warning(text)


def _configure_logging(level: int | str, pattern: str | None) -> None:
    import logging

    logger = logging.getLogger("ray")
    logger.setLevel(level.upper() if isinstance(level, str) else level)
    if pattern is not None:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(pattern))
        logger.handlers[:] = [handler]


def _start(
    amounts: dict[str, int],
    labels: dict[str, str],
    job: dict[str, Any],
    extras: dict[str, Any],
    logging_config: Any,
) -> joining.Place:
    """Starts a cluster of one node for this program."""
    ip, token = extras.get("_node_ip_address") or "127.0.0.1", os.urandom(32)
    variables = {**_logging_variables(logging_config), **job["runtime_env"].get("env_vars", {})}
    node = nodes.start(
        token=token,
        amounts=amounts,
        ip=ip,
        labels=labels,
        env_vars=variables,
        spilling_directory=extras.get("object_spilling_directory"),
        system_config=extras.get("_system_config"),
    )
    return joining.Place(node.node, node.address, node.session_dir, token, "local", ip, node)


def _join(place: joining.Place, job: dict[str, Any], *, log_to_driver: bool) -> RayContext:
    global _node
    from ray import _core

    core: Any = None
    try:
        core = nodes.join(_core, place.socket, place.token, place.node)
        _node = place.process
        session.attach(core, session.SCRIPT_MODE)
        return _enter(core, place, job, log_to_driver=log_to_driver)
    except BaseException:  # Ctrl-C may come at any time
        shutdown()
        if core is not None:
            core.close()
        if place.process is not None:
            place.process.close(SHUTDOWN_TIMEOUT_S)
        raise


def _enter(core: Any, place: joining.Place, job: dict[str, Any], *, log_to_driver: bool) -> RayContext:
    """Makes the cluster, which this process has joined, known to its workers and to this process."""
    global _printer, _atexit_registered
    from ray._runtime.ids import NodeID

    temp_dir, session_name = os.path.split(place.session_dir)
    entrypoint = " ".join(sys.orig_argv)[:ENTRYPOINT_CHARS_MAX]
    facts = {**job, "log_to_driver": log_to_driver, "entrypoint": entrypoint}
    if place.head_address != "local":
        # The workers of a cluster were not started by this program, and run its tasks as if they had been.
        cwd = nodes.current_directory()
        facts.update(sys_path=[entry or cwd for entry in sys.path], cwd=cwd)
        session.worker_env = dict(job["runtime_env"])
    session.publish_job(facts, session_name=session_name, temp_dir=temp_dir, node_ip_address=place.ip)
    if not _atexit_registered:
        import atexit

        atexit.register(shutdown, _exiting_interpreter=True)
        _atexit_registered = True
    if log_to_driver:
        from ray._runtime import logs

        _printer = logs.Printer(core)
    context = RayContext(
        {
            "node_ip_address": place.ip,
            "address": place.head_address,
            "gcs_address": place.head_address,
            "session_dir": place.session_dir,
            "raylet_socket_name": place.socket,
            "object_store_address": place.socket,
            "webui_url": "",
            "node_id": NodeID._from_key(core.node).hex(),
        },
        _version(),
    )
    session.context = context
    return context


def describe_node_end() -> tuple[str, str]:
    """How the node that this process started has ended, and the end of its log; empty if it runs or is not its own."""
    node = _node
    if node is None:
        return "", ""
    how, log = node.describe_end()
    return how, log


def _logging_variables(config: Any) -> dict[str, str]:
    """Applies it here; returns what makes workers apply it."""
    if config is None:
        return {}
    import json

    from ray._runtime import logging_config

    logging_config.apply(config)
    return {logging_config.VARIABLE: json.dumps(config.to_dict())}


def shutdown(*, wait_for_processes: bool = False, _exiting_interpreter: bool = False) -> None:
    """Leaves the cluster; one that `ray.init` has started is ended, with everything in it.

    In a task or an actor this does nothing: the cluster is not theirs to end, and they go on as they are.

    Called by itself when the interpreter exits. Does nothing when this process is in no cluster. References and
    handles of the cluster cannot be used afterwards; remote functions and actor classes can.

    Args:
        wait_for_processes: Return only when the processes of the cluster have ended.
    """
    global _node, _printer
    with session.lock:
        if session.core is None or session.mode == session.WORKER_MODE:
            return
        session.closing, session.exiting = True, _exiting_interpreter
        node, printer = _node, _printer
        _node = _printer = None
        # The reply comes after every line that workers have printed. The node may be gone; it is ended below anyway.
        with contextlib.suppress(Exception):
            session.core.request("shutdown" if node is not None else "logs.flush", b"", LOG_DRAIN_TIMEOUT_S)
        core = session.detach()
    assert core is not None
    core.close()
    if printer is not None:
        printer.close()
    if node is not None:
        node.close(SHUTDOWN_TIMEOUT_S)
