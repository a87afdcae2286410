"""`ray.LoggingConfig`: records of Python's `logging` with the ids of what wrote them, as text or JSON.

The driver applies it to its root logger; workers find it in an environment variable, and do the same when they start.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
from typing import Any

__all__ = ["LoggingConfig", "apply_inherited"]

VARIABLE = "RAY_WORKER_LOGGING_CONFIG"  # set by the driver for its workers
ENCODINGS = ("TEXT", "JSON")

# What every record has; whatever else a record carries was given as `extra` by the program.
_STANDARD = frozenset(logging.LogRecord("", 0, "", 0, "", (), None).__dict__) | {"message", "asctime", "taskName"}
_SHOWN = ("asctime", "levelname", "message", "filename", "lineno", "process")


@dataclasses.dataclass
class LoggingConfig:
    """How `logging` writes in the driver and its workers, for `ray.init(logging_config=...)`.

    Attributes:
        encoding: "TEXT" or "JSON", one record a line.
        log_level: Least level that is written.
        additional_log_standard_attrs: Attributes of `logging.LogRecord` to add to each line, such as "name".

    Raises:
        ValueError: If one of them is not valid.
    """

    encoding: str = "TEXT"
    log_level: str = "INFO"
    additional_log_standard_attrs: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        if self.encoding not in ENCODINGS:
            message = f"LoggingConfig(encoding=...) must be one of {list(ENCODINGS)}, not {self.encoding!r}"
            raise ValueError(message)
        if self.log_level not in logging.getLevelNamesMapping():
            message = f"LoggingConfig(log_level=...) must be a level's name, such as 'INFO', not {self.log_level!r}"
            raise ValueError(message)
        unknown = sorted(set(self.additional_log_standard_attrs) - _STANDARD)
        if unknown:
            message = (
                f"LoggingConfig(additional_log_standard_attrs=...): records have no {unknown}; "
                f"they have {sorted(_STANDARD)}"
            )
            raise ValueError(message)

    def to_dict(self) -> dict[str, object]:
        """The same as a dictionary."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> LoggingConfig:
        """The inverse of `to_dict`."""
        return cls(**d)


def apply(config: LoggingConfig) -> None:
    """Makes this process's root logger write so, on standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(config))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(config.log_level)


def apply_inherited() -> None:
    """In a worker, does what the driver asked for."""
    apply(LoggingConfig.from_dict(json.loads(os.environ[VARIABLE])))


class _Formatter(logging.Formatter):
    def __init__(self, config: LoggingConfig) -> None:
        super().__init__()
        self._json = config.encoding == "JSON"
        self._more = [name for name in config.additional_log_standard_attrs if name not in _SHOWN]

    def format(self, record: logging.LogRecord) -> str:
        """One line; a traceback follows as text, or is a field in JSON."""
        fields: dict[str, Any] = {"asctime": self.formatTime(record), "levelname": record.levelname}
        fields["message"] = record.getMessage()
        fields.update(filename=record.filename, lineno=record.lineno, process=record.process)
        extra = {name: record.__dict__.get(name) for name in self._more}
        extra.update({name: value for name, value in record.__dict__.items() if name not in _STANDARD})
        extra.update(_ids())
        trace = self.formatException(record.exc_info) if record.exc_info else record.exc_text
        if self._json:
            if trace:
                extra["exc_text"] = trace
            return json.dumps({**fields, **extra}, default=str)
        added = "".join(f" {name}={value}" for name, value in extra.items())
        head = f"{fields['asctime']}\t{record.levelname} {record.filename}:{record.lineno} -- "
        return f"{head}{fields['message']}{added}" + (f"\n{trace}" if trace else "")


def _ids() -> dict[str, str]:
    from ray._runtime import session
    from ray.runtime_context import get_runtime_context

    if session.core is None:
        return {}
    context = get_runtime_context()
    found: dict[str, str | None] = {
        "job_id": context.get_job_id(),
        "worker_id": context.get_worker_id(),
        "node_id": context.get_node_id(),
        "actor_id": context.get_actor_id(),
        "task_id": context.get_task_id(),
        "task_name": context.get_task_name(),
    }
    return {name: value for name, value in found.items() if value}
