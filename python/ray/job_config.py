"""What a driver decides for its whole job."""

from __future__ import annotations

from typing import Any

from ray.runtime_env import RuntimeEnv

__all__ = ["JobConfig"]


class JobConfig:
    """Settings of a job, for `ray.init(job_config=...)`.

    Attributes:
        runtime_env: Environment of the job's workers.
        metadata: Free text by key, for people and tools.
        ray_namespace: Where the job's named actors live.
        default_actor_lifetime: "detached" or "non_detached", for actors that do not say.
    """

    def __init__(
        self,
        jvm_options: list[str] | None = None,
        code_search_path: list[str] | None = None,
        runtime_env: dict[str, Any] | None = None,
        _client_job: bool = False,
        metadata: dict[str, str] | None = None,
        ray_namespace: str | None = None,
        default_actor_lifetime: str = "non_detached",
        _disable_job_level_lineage_reconstruction: bool = False,
        _py_driver_sys_path: list[str] | None = None,
    ) -> None:
        for name, value in (("jvm_options", jvm_options), ("code_search_path", code_search_path)):
            if value:
                message = f"JobConfig({name}=...): Skate runs Python only"
                raise NotImplementedError(message)
        self.metadata = dict(metadata or {})
        self.ray_namespace = ray_namespace
        self.runtime_env: dict[str, Any] = {}
        self.set_runtime_env(runtime_env)
        self.default_actor_lifetime = "non_detached"
        self.set_default_actor_lifetime(default_actor_lifetime)

    def set_metadata(self, key: str, value: str) -> None:
        """Adds one piece of metadata."""
        self.metadata[key] = value

    def set_runtime_env(self, runtime_env: dict[str, Any] | None, validate: bool = False) -> None:
        """Sets the environment; it is checked always."""
        self.runtime_env = dict(RuntimeEnv(**runtime_env)) if runtime_env else {}

    def set_ray_namespace(self, ray_namespace: str) -> None:
        """Sets the namespace of named actors."""
        self.ray_namespace = ray_namespace

    def set_default_actor_lifetime(self, default_actor_lifetime: str) -> None:
        """Sets the lifetime of actors that do not say: "detached" or "non_detached"."""
        if default_actor_lifetime not in ("detached", "non_detached"):
            message = f"default_actor_lifetime must be 'detached' or 'non_detached', not {default_actor_lifetime!r}"
            raise ValueError(message)
        self.default_actor_lifetime = default_actor_lifetime

    @classmethod
    def from_json(cls, job_config_json: dict[str, Any]) -> JobConfig:
        """The job configuration that a decoded JSON object describes."""
        known = ("runtime_env", "metadata", "ray_namespace", "default_actor_lifetime")
        return cls(**{name: job_config_json[name] for name in known if name in job_config_json})
