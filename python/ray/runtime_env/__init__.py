"""Runtime environments: what a worker finds around it. Environment variables are what there is yet."""

from __future__ import annotations

from typing import Any, ClassVar

__all__ = ["RuntimeEnv", "RuntimeEnvConfig"]

_MISSING = object()


class RuntimeEnvConfig(dict[str, Any]):
    """How an environment is set up.

    Attributes:
        known_fields: The keys that exist.
    """

    known_fields: ClassVar[set[str]] = {"setup_timeout_seconds", "eager_install", "log_files"}

    def __init__(
        self, setup_timeout_seconds: int = 600, eager_install: bool = True, log_files: list[str] | None = None
    ) -> None:
        super().__init__()
        if isinstance(setup_timeout_seconds, bool) or not isinstance(setup_timeout_seconds, int):
            message = f"setup_timeout_seconds must be a whole number, not {setup_timeout_seconds!r}"
            raise TypeError(message)
        if setup_timeout_seconds <= 0 and setup_timeout_seconds != -1:
            message = f"setup_timeout_seconds must be positive, or -1 for no limit, not {setup_timeout_seconds}"
            raise ValueError(message)
        if not isinstance(eager_install, bool):
            message = f"eager_install must be True or False, not {eager_install!r}"
            raise TypeError(message)
        self.update(setup_timeout_seconds=setup_timeout_seconds, eager_install=eager_install)
        if log_files is not None:
            self["log_files"] = list(log_files)

    @classmethod
    def default_config(cls) -> RuntimeEnvConfig:
        """The configuration that counts when none is given."""
        return cls()

    @staticmethod
    def parse_and_validate_runtime_env_config(config: dict[str, Any]) -> RuntimeEnvConfig:
        """A configuration from a plain dictionary."""
        if isinstance(config, RuntimeEnvConfig):
            return config
        unknown = sorted(set(config) - RuntimeEnvConfig.known_fields)
        if unknown:
            message = f"runtime_env's config has no key {unknown}; it has {sorted(RuntimeEnvConfig.known_fields)}"
            raise ValueError(message)
        return RuntimeEnvConfig(**config)

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary with the same content."""
        return dict(self)


class RuntimeEnv(dict[str, Any]):
    """The environment of a job's, a task's or an actor's workers: a dictionary that checks itself.

    A worker serves one environment for its whole life. The environment of a task or actor is laid over the job's.

    Args:
        env_vars: Environment variables, strings to strings.
        config: How it is set up; see `RuntimeEnvConfig`.

    Raises:
        NotImplementedError: For keys that Ray has and Skate does not have yet.
        ValueError: For keys that do not exist.
    """

    known_fields: ClassVar[set[str]] = {
        "py_modules", "py_executable", "java_jars", "working_dir", "conda", "pip", "uv", "container", "excludes",
        "env_vars", "_ray_release", "_ray_commit", "_inject_current_ray", "config", "worker_process_setup_hook",
        "_nsight", "_rocprof_sys", "image_uri",
    }  # fmt: skip
    extensions_fields: ClassVar[set[str]] = {"_ray_release", "_ray_commit", "_inject_current_ray"}

    _available: ClassVar[frozenset[str]] = frozenset(("env_vars", "config"))

    def __init__(
        self,
        *,
        env_vars: dict[str, str] | None = None,
        config: dict[str, Any] | None = None,
        _validate: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        for name, value in {"env_vars": env_vars, "config": config, **kwargs}.items():
            if value is not None:
                self[name] = value

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, self._checked(key, value))

    def _checked(self, key: str, value: Any) -> Any:
        if key == "env_vars":
            return _checked_variables(value)
        if key == "config":
            return RuntimeEnvConfig.parse_and_validate_runtime_env_config(value)
        if key in self.known_fields or key in ("nsight", "rocprof_sys"):
            message = (
                f"runtime_env[{key!r}]: Skate does not have this yet; there is 'env_vars'. "
                "Install what is needed in the environment that the program itself runs in."
            )
            raise NotImplementedError(message)
        message = f"runtime_env has no key {key!r}; it has {sorted(f for f in self.known_fields if f[0] != '_')}"
        raise ValueError(message)

    def set(self, name: str, value: Any) -> None:
        """Sets a field; None removes it."""
        if value is None:
            self.pop(name, None)
        else:
            self[name] = value

    def get(self, name: str, default: Any = None, data_class: Any = None) -> Any:
        """A field's value; an instance of `data_class` made from it when that is given."""
        value = super().get(name, _MISSING)
        if value is _MISSING:
            return default
        return data_class(**value) if data_class is not None and isinstance(value, dict) else value

    def env_vars(self) -> dict[str, str]:
        """The environment variables; empty when there are none."""
        return dict(super().get("env_vars", {}))

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary with the same content."""
        return {key: dict(value) if isinstance(value, dict) else value for key, value in self.items()}

    # --- fields that Ray has and that cannot be set here yet: as Ray answers where they are not set ----------------

    def has_conda(self) -> bool:
        """Whether there is a conda."""
        return False

    def has_pip(self) -> bool:
        """Whether there is a pip."""
        return False

    def has_uv(self) -> bool:
        """Whether there is a uv."""
        return False

    def has_working_dir(self) -> bool:
        """Whether there is a working_dir."""
        return False

    def has_py_container(self) -> bool:
        """Whether there is a py_container."""
        return False

    def conda_config(self) -> str | None:
        """Not set."""
        return None

    def conda_env_name(self) -> str | None:
        """Not set."""
        return None

    def conda_uri(self) -> str | None:
        """Not set."""
        return None

    def pip_config(self) -> dict[str, Any]:
        """Not set."""
        return {}

    def pip_uri(self) -> str | None:
        """Not set."""
        return None

    def uv_config(self) -> dict[str, Any]:
        """Not set."""
        return {}

    def uv_uri(self) -> str | None:
        """Not set."""
        return None

    def virtualenv_name(self) -> str | None:
        """Not set."""
        return None

    def working_dir(self) -> str:
        """Not set."""
        return ""

    def working_dir_uri(self) -> str | None:
        """Not set."""
        return None

    def py_modules(self) -> list[str]:
        """Not set."""
        return []

    def py_modules_uris(self) -> list[str]:
        """Not set."""
        return []

    def py_executable(self) -> str | None:
        """Not set."""
        return None

    def py_container_image(self) -> str | None:
        """Not set."""
        return None

    def py_container_worker_path(self) -> str | None:
        """Not set."""
        return None

    def py_container_run_options(self) -> list[str] | None:
        """Not set."""
        return None

    def image_uri(self) -> str | None:
        """Not set."""
        return None

    def java_jars(self) -> list[str]:
        """Not set."""
        return []

    def nsight(self) -> dict[str, str] | str | None:
        """Not set."""
        return None

    def rocprof_sys(self) -> dict[str, Any] | str | None:
        """Not set."""
        return None

    def plugin_uris(self) -> list[str]:
        """Not set."""
        return []

    def plugins(self) -> list[tuple[str, Any]]:
        """Not set."""
        return []

    def get_extension(self, key: str) -> str | None:
        """An extension's value.

        Raises:
            ValueError: If there is no such extension.
        """
        if key not in self.extensions_fields:
            message = f"runtime_env has no extension {key!r}; it has {sorted(self.extensions_fields)}"
            raise ValueError(message)
        value: str | None = self.get(key)
        return value

    def serialize(self) -> str:
        """The environment as JSON, the same for equal environments."""
        import json

        return json.dumps(self.to_dict(), sort_keys=True)

    @classmethod
    def deserialize(cls, serialized_runtime_env: str) -> RuntimeEnv:
        """The inverse of `serialize`."""
        import json

        return cls(**json.loads(serialized_runtime_env))

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.to_dict(),)


def _rebuild(fields: dict[str, Any]) -> RuntimeEnv:
    return RuntimeEnv(**fields)


def _checked_variables(value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        message = f"runtime_env['env_vars'] must be a dictionary of strings to strings, not {value!r}"
        raise TypeError(message)
    for name, content in value.items():
        if not isinstance(name, str) or not isinstance(content, str):
            message = f"runtime_env['env_vars'] must hold strings only, but has {name!r}: {content!r}"
            raise TypeError(message)
        if not name or "=" in name or "\0" in name or "\0" in content:
            message = f"runtime_env['env_vars'] has {name!r}, which cannot be the name of an environment variable"
            raise ValueError(message)
    return dict(value)
