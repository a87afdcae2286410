"""Skate: an engine for distributed Python that speaks Ray's public API.

    import ray

    @ray.remote
    def square(x):
        return x * x

    ray.get([square.remote(i) for i in range(4)])  # [0, 1, 4, 9]

Importing loads neither asyncio, numpy, nor any library; sub-packages load at their first use.
"""

from __future__ import annotations

import os as _os
from typing import TYPE_CHECKING, Any

from ray._version import __version__


def _refuse_the_original() -> None:
    """Both packages are called `ray`; files of one would shadow those of the other."""
    here = _os.path.dirname(_os.path.abspath(__file__))
    original = None
    for directory, prefix in ((here, "_raylet."), (_os.path.dirname(here), "ray-")):
        for name in _os.listdir(directory):
            if name.startswith(prefix) and (directory == here or name.endswith(".dist-info")):
                original = _os.path.join(directory, name)
    if original is not None:
        message = (
            f"Skate cannot run beside the original Ray, whose package has the same name and was found at {original}. "
            "Install Skate in an environment of its own, or uninstall both there and install one again "
            "(pip uninstall ray skate)."
        )
        raise ImportError(message)


_refuse_the_original()

from ray import actor, exceptions  # noqa: E402 (after the check)
from ray._core import ObjectRef  # noqa: E402
from ray._runtime.cluster import available_resources, cluster_resources, nodes  # noqa: E402
from ray._runtime.decorator import remote  # noqa: E402
from ray._runtime.generators import DynamicObjectRefGenerator, ObjectRefGenerator  # noqa: E402
from ray._runtime.ids import (  # noqa: E402
    ActorClassID,
    ActorID,
    FunctionID,
    JobID,
    NodeID,
    PlacementGroupID,
    TaskID,
    UniqueID,
    WorkerID,
)
from ray._runtime.session import SCRIPT_MODE, WORKER_MODE  # noqa: E402
from ray._runtime.values import cancel, get, put, wait  # noqa: E402
from ray.actor import get_actor, kill, method  # noqa: E402
from ray.runtime_context import get_gpu_ids, get_runtime_context  # noqa: E402

if TYPE_CHECKING:
    from ray import util
    from ray._runtime.language import Language
    from ray._runtime.local import init, shutdown
    from ray._runtime.logging_config import LoggingConfig
    from ray._runtime.trace_file import timeline
    from ray.client_builder import ClientBuilder, client

ObjectID = ObjectRef

__all__ = [
    "SCRIPT_MODE",
    "WORKER_MODE",
    "ActorClassID",
    "ActorID",
    "ClientBuilder",
    "DynamicObjectRefGenerator",
    "FunctionID",
    "JobID",
    "Language",
    "LoggingConfig",
    "NodeID",
    "ObjectID",
    "ObjectRef",
    "ObjectRefGenerator",
    "PlacementGroupID",
    "TaskID",
    "UniqueID",
    "WorkerID",
    "__version__",
    "actor",
    "available_resources",
    "cancel",
    "client",
    "cluster_resources",
    "exceptions",
    "get",
    "get_actor",
    "get_gpu_ids",
    "get_runtime_context",
    "init",
    "is_initialized",
    "kill",
    "method",
    "nodes",
    "put",
    "remote",
    "shutdown",
    "timeline",
    "util",
    "wait",
]

# Names are shown where users find them.
for _name in __all__:
    _value = globals().get(_name)
    if getattr(_value, "__module__", "").startswith("ray._runtime"):
        _value.__module__ = "ray"
del _name, _value

_LAZY = {
    "ClientBuilder": "ray.client_builder",
    "Language": "ray._runtime.language",
    "LoggingConfig": "ray._runtime.logging_config",
    "client": "ray.client_builder",
    "init": "ray._runtime.local",
    "shutdown": "ray._runtime.local",
    "timeline": "ray._runtime.trace_file",
}
_SUBMODULES = frozenset(
    (
        "client_builder",
        "cloudpickle",
        "job_config",
        "remote_function",
        "runtime_context",
        "runtime_env",
        "types",
        "util",
    )
)


def is_initialized() -> bool:
    """Whether this process is in a cluster."""
    from ray._runtime import session

    return session.core is not None


def __getattr__(name: str) -> Any:
    import importlib

    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name]), name)
        value.__module__ = "ray"
        globals()[name] = value
        return value
    if name in _SUBMODULES:
        return importlib.import_module(f"ray.{name}")
    message = f"module 'ray' has no attribute {name!r}; what Skate does not have yet is absent"
    raise AttributeError(message)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})
