"""`ray.init` and `ray.shutdown`: a cluster of one node for this program.

The node process is started by `ray._node.launch` and lives as long as this process: it holds the other end of a pipe.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping
from typing import Any

from ray._runtime import session

__all__ = ["RayContext", "init", "shutdown"]

HEAD_RESOURCE = "node:__internal_head__"  # programs demand a little of it to be on the head node
OBJECT_STORE_SHARE = 0.3  # of the memory that this process may use
OBJECT_STORE_BYTES_MIN = 64 * 1024 * 1024
SHUTDOWN_TIMEOUT_S = 5.0
LOG_DRAIN_TIMEOUT_S = 1.0

# Modules that the zygote imports once when the driver has them already: all known to be safe before a fork.
PRELOADS = ("numpy", "pandas", "pyarrow", "sklearn")

_IGNORED_EXTRAS = frozenset(
    ("_node_name", "_metrics_export_port", "_skip_env_hook", "_driver_object_store_memory", "_redis_username")
)
_ABSENT_EXTRAS = frozenset(
    (
        "_enable_object_reconstruction", "_plasma_directory", "_redis_password", "_system_config",
        "_temp_dir", "_tracing_startup_hook", "object_spilling_directory",
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
    """Starts a cluster of one node for this program, and joins it.

    Called by itself when a program first uses the API without it. The cluster ends with this process, however that
    ends, or by `ray.shutdown()`.

    Args:
        address: None or "local"; other clusters cannot be joined yet.
        num_cpus: CPUs to schedule with; those that this process may run on by default.
        num_gpus: GPUs to schedule with; those of `CUDA_VISIBLE_DEVICES`, else of the machine by default.
        resources: Further resources, by name.
        labels: Not available yet.
        object_store_memory: Bytes of shared memory for values, no more than the machine has; 30 % of it by default.
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
        NotImplementedError: If an argument asks for what does not exist yet.
        ValueError, TypeError: If an argument is out of range or of the wrong type.
    """
    unknown = sorted(set(kwargs) - _IGNORED_EXTRAS - _ABSENT_EXTRAS - {"_memory", "_node_ip_address"})
    if unknown:
        message = f"ray.init() has no argument {', '.join(map(repr, unknown))}"
        raise RuntimeError(message)
    _refuse_absent(
        {
            "labels": labels,
            "local_mode": local_mode,
            "enable_resource_isolation": enable_resource_isolation,
            "cgroup_path": cgroup_path,
            "system_reserved_cpu": system_reserved_cpu,
            "system_reserved_memory": system_reserved_memory,
            "proxy_server_url": proxy_server_url,
            **{name: value for name, value in kwargs.items() if name in _ABSENT_EXTRAS},
        }
    )
    _check_address(address)
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
        amounts = _resources(num_cpus, num_gpus, resources, object_store_memory, kwargs.get("_memory"))
        if configure_logging:
            _configure_logging(logging_level, logging_format)
        if include_dashboard:
            _warn("ray.init(include_dashboard=True): Skate has no dashboard yet, and goes on without one.")
        return _start(amounts, job, log_to_driver, kwargs, logging_config)


def _check_logging_config(config: Any) -> None:
    if config is not None and type(config).__name__ != "LoggingConfig":
        message = f"logging_config must be a ray.LoggingConfig, not {config!r}"
        raise TypeError(message)


def _refuse_absent(arguments: dict[str, Any]) -> None:
    for name, value in arguments.items():
        if value not in (None, False, {}):
            message = f"ray.init({name}={value!r}): Skate does not have this yet"
            raise NotImplementedError(message)


def _check_address(address: str | None) -> None:
    source = "ray.init(address=...)"
    if address is None:
        address = os.environ.get("RAY_ADDRESS") or None
        source = "the environment variable RAY_ADDRESS"
    if address is not None and not isinstance(address, str):
        message = f"address must be a string or None, not {address!r}"
        raise TypeError(message)
    if address not in (None, "", "local"):
        message = f"{source} asks for the cluster {address!r}, but Skate can only start local ones yet; use 'local'"
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
        "job_number": 1,
    }


def _anonymous() -> str:
    import uuid

    return str(uuid.UUID(bytes=os.urandom(16), version=4))


# --- resources -----------------------------------------------------------------------------------------------------


def _resources(
    num_cpus: int | None,
    num_gpus: int | None,
    resources: dict[str, float] | None,
    object_store_memory: int | None,
    memory: int | None,
) -> dict[str, int]:
    from ray._runtime import options

    options.check({"resources": resources}, {"resources": options.TASK["resources"]}, "ray.init()")
    store = object_store_memory
    if store is None:
        store = max(int(memory_bytes() * OBJECT_STORE_SHARE), OBJECT_STORE_BYTES_MIN)
    elif isinstance(store, bool) or not isinstance(store, int | float):
        message = f"object_store_memory must be a number of bytes, not {store!r}"
        raise TypeError(message)
    elif not store <= options.AMOUNT_MAX:
        message = (
            f"object_store_memory must be a number of bytes up to {options.AMOUNT_MAX}, not {options.shown(store)}"
        )
        raise ValueError(message)
    elif store < OBJECT_STORE_BYTES_MIN:
        message = f"object_store_memory must be at least {OBJECT_STORE_BYTES_MIN} bytes (64 MiB), not {store}"
        raise ValueError(message)
    elif store > memory_bytes():
        message = (
            f"object_store_memory is {store} bytes, but this machine, or the control group of this process, has "
            f"{memory_bytes()} bytes of memory, which tasks and actors need a part of; ask for less"
        )
        raise ValueError(message)
    if memory is not None:
        options.check({"_memory": memory}, {"_memory": options.TASK["memory"]}, "ray.init()")
    amounts: dict[str, float] = {
        "CPU": _count("num_cpus", num_cpus, available_cpus),
        "GPU": _count("num_gpus", num_gpus, available_gpus),
        "memory": max(memory_bytes() - int(store), 0) if memory is None else memory,
        "object_store_memory": int(store),
        **(resources or {}),
    }
    return {name: options.to_fixed(name, amount) for name, amount in amounts.items() if amount or name == "CPU"}


def _count(name: str, given: int | None, detect: Any) -> int:
    if given is None:
        return int(detect())
    from ray._runtime import options

    if isinstance(given, bool) or not isinstance(given, int | float):
        message = f"{name} must be a whole number, not {given!r}"
        raise TypeError(message)
    options.to_fixed(name, given)
    if given != int(given):
        message = f"{name} must be a whole number, not {given!r}"
        raise TypeError(message)
    return int(given)


def available_cpus() -> int:
    """CPUs that this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except (AttributeError, OSError):
        return os.cpu_count() or 1


def available_gpus() -> int:
    """GPUs that this process may use, without initialising any driver."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() and device.strip() != "-1"])
    try:
        return len(os.listdir("/proc/driver/nvidia/gpus"))
    except OSError:
        return 0


def gpu_ids(count: int) -> list[int]:
    """Which devices `count` GPUs are: the first visible ones. Positions, where those are not numbers but UUIDs."""
    visible = [device.strip() for device in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    numbers = [int(device) for device in visible if device.isdigit()]
    return numbers[:count] if len(numbers) >= count else list(range(count))


def memory_bytes() -> int:
    """Memory that this process may use: the machine's, or its control group's limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(path, encoding="ascii") as file:
                limit = int(file.read())
        except (OSError, ValueError):  # absent, or "max"
            continue
        return min(total, limit)
    return total


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
    job: dict[str, Any],
    log_to_driver: bool | None,
    extras: dict[str, Any],
    logging_config: Any = None,
) -> RayContext:
    global _node
    from ray import _core
    from ray._node import launch
    from ray._node.config import NodeConfig, read_memory_settings

    ip = extras.get("_node_ip_address") or "127.0.0.1"
    session_id, token, node_key = os.urandom(16), os.urandom(32), _core.random_id()
    cwd = _current_directory()
    for resource in (f"node:{ip}", HEAD_RESOURCE):
        amounts.setdefault(resource, 10_000)
    config = NodeConfig(
        session_dir="",  # made by the launcher
        session=session_id,
        token=token,
        node=node_key,
        resources=amounts,
        gpu_ids=gpu_ids(amounts.get("GPU", 0) // 10_000),
        object_store_memory=amounts["object_store_memory"] // 10_000,
        sys_path=[entry or cwd for entry in sys.path],
        cwd=cwd,
        preload=[module for module in PRELOADS if module in sys.modules],
        env_vars={**_logging_variables(logging_config), **job["runtime_env"].get("env_vars", {})},
        hostname=os.uname().nodename,
        address=ip,
        memory=read_memory_settings(os.environ),
    )
    oom_retries = session.task_oom_retries()
    node = launch.start_local_node(config)
    core: Any = None
    try:
        core = _core.Core(
            address=node.address,
            session=session_id,
            token=token,
            node=node_key,
            proc=_core.random_id(),
            role=_core.ROLE_DRIVER,
            hooks=session.hooks(),
            task_oom_retries=oom_retries,
        )
        _node = node
        session.attach(core, session.SCRIPT_MODE)
        return _enter(core, node, job, ip, log_to_driver=log_to_driver is not False)
    except BaseException:  # Ctrl-C may come at any time
        shutdown()
        if core is not None:
            core.close()
        node.close(SHUTDOWN_TIMEOUT_S)
        raise


def _enter(core: Any, node: Any, job: dict[str, Any], ip: str, *, log_to_driver: bool) -> RayContext:
    """Makes the cluster, which this process has joined, known to its workers and to this process."""
    global _printer, _atexit_registered
    from ray._runtime.ids import NodeID

    temp_dir, session_name = os.path.split(node.session_dir)
    session.publish_job(
        {
            **job,
            "session_name": session_name,
            "temp_dir": temp_dir,
            "node_ip_address": ip,
            "log_to_driver": log_to_driver,
        }
    )
    if not _atexit_registered:
        import atexit

        atexit.register(shutdown, _exiting_interpreter=True)
        _atexit_registered = True
    if log_to_driver:
        from ray._runtime import logs

        _printer = logs.Printer(core)
    context = RayContext(
        {
            "node_ip_address": ip,
            "address": "local",
            "gcs_address": "local",
            "session_dir": node.session_dir,
            "raylet_socket_name": node.address,
            "object_store_address": node.address,
            "webui_url": "",
            "node_id": NodeID._from_key(core.node).hex(),
        },
        _version(),
    )
    session.context = context
    return context


def _current_directory() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:
        message = (
            "The current directory of this program has been deleted, and workers are to run in it: change to one that "
            "exists (os.chdir) before ray.init()"
        )
        raise RuntimeError(message) from None


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
    """Leaves the cluster and, since it is a local one, ends it with everything in it.

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
            session.core.request("shutdown", b"", LOG_DRAIN_TIMEOUT_S)
        core = session.detach()
    assert core is not None
    core.close()
    if printer is not None:
        printer.close()
    if node is not None:
        node.close(SHUTDOWN_TIMEOUT_S)
