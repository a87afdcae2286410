"""Whether a call fits a function, decided where `.remote()` is written.

Reads the code object directly: `inspect.signature` costs a hundred times more, and remote functions are made by the
thousand when a worker unpickles them.
"""

from __future__ import annotations

import sys
from types import FunctionType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Signature", "of_class", "of_function"]

_VARARGS = 0x04
_VARKEYWORDS = 0x08
UNLIMITED = sys.maxsize


class Signature:
    """Parameters of a callable, and a check whose errors read like Python's own.

    Invariant: a call with positional arguments only fits if and only if their number is within
    `minimum` and `maximum`.
    """

    __slots__ = ("_bound", "_keyword_only", "_keyword_only_needed", "_name", "_open", "_positional", "_positional_only",
                 "_required", "maximum", "minimum")  # fmt: skip

    def __init__(
        self,
        name: str,
        positional: tuple[str, ...],
        required: int,
        positional_only: int,
        keyword_only: frozenset[str],
        keyword_only_needed: tuple[str, ...],
        varargs: bool,
        varkeywords: bool,
        bound: int = 0,
    ) -> None:
        self._name = name
        self._positional = positional
        self._required = required
        self._positional_only = positional_only
        self._keyword_only = keyword_only
        self._keyword_only_needed = keyword_only_needed
        self._open = (varargs, varkeywords)
        self._bound = bound  # 1 for methods: Python counts `self` in its messages
        self.minimum = required
        self.maximum = UNLIMITED if varargs else len(positional)
        if keyword_only_needed:
            self.minimum, self.maximum = 0, -1

    def __reduce__(self) -> tuple[Any, ...]:
        return Signature, (
            self._name, self._positional, self._required, self._positional_only, self._keyword_only,
            self._keyword_only_needed, *self._open, self._bound,
        )  # fmt: skip

    @property
    def name(self) -> str:
        """The callable's name."""
        return self._name

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        """The arguments of a call that fits, each with its parameter's name; surplus ones are numbered."""
        names = self._positional
        for index, value in enumerate(args):
            yield names[index] if index < len(names) else f"*args[{index - len(names)}]", value
        yield from kwargs.items()

    def check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raises TypeError when a call with these arguments does not fit."""
        count = len(args)
        if not kwargs and self.minimum <= count <= self.maximum:
            return
        positional = self._positional
        varargs, varkeywords = self._open
        if count > len(positional) and not varargs:
            self._too_many(count)
        given = set(positional[:count])
        for name in kwargs:
            if name in given and name not in positional[: self._positional_only]:
                self._fail(f"got multiple values for argument {name!r}")
            if name in positional[self._positional_only :] or name in self._keyword_only:
                given.add(name)
            elif not varkeywords:
                if name in positional:
                    self._fail(f"got some positional-only arguments passed as keyword arguments: {name!r}")
                self._fail(f"got an unexpected keyword argument {name!r}")
        missing = [name for name in positional[: self._required] if name not in given]
        if missing:
            self._missing(missing, "positional")
        missing = [name for name in self._keyword_only_needed if name not in given]
        if missing:
            self._missing(missing, "keyword-only")

    def _too_many(self, count: int) -> None:
        most = len(self._positional) + self._bound
        least = self._required + self._bound
        takes = f"{most}" if least == most else f"from {least} to {most}"
        plural = "" if takes == "1" else "s"
        count += self._bound
        self._fail(f"takes {takes} positional argument{plural} but {count} {'was' if count == 1 else 'were'} given")

    def _missing(self, names: list[str], kind: str) -> None:
        quoted = [repr(name) for name in names]
        if len(quoted) == 1:
            listed = quoted[0]
        elif len(quoted) == 2:
            listed = " and ".join(quoted)
        else:
            listed = f"{', '.join(quoted[:-1])}, and {quoted[-1]}"
        plural = "" if len(quoted) == 1 else "s"
        self._fail(f"missing {len(quoted)} required {kind} argument{plural}: {listed}")

    def _fail(self, what: str) -> None:
        message = f"{self._name}() {what}"
        raise TypeError(message)


def of_function(function: Any, *, bound: int = 0) -> Signature:
    """The signature of a function; `bound` leading parameters (`self`) are taken by Python."""
    name: str = getattr(function, "__qualname__", None) or repr(function)
    if not isinstance(function, FunctionType):
        return _of_other(function, name, bound)
    code = function.__code__
    count = code.co_argcount
    names = code.co_varnames
    keyword_only = names[count : count + code.co_kwonlyargcount]
    keyword_defaults = function.__kwdefaults__ or {}
    varargs = bool(code.co_flags & _VARARGS)
    taken = min(bound, count)
    required = count - len(function.__defaults__ or ())
    return Signature(
        name,
        names[taken:count],
        max(required - taken, 0),
        max(code.co_posonlyargcount - taken, 0),
        frozenset(keyword_only),
        tuple(name for name in keyword_only if name not in keyword_defaults),
        varargs,
        bool(code.co_flags & _VARKEYWORDS),
        bound,
    )


def of_class(cls: type) -> Signature:
    """The signature of making an instance. Open where a metaclass, `__new__` or native code decides."""
    init = cls.__init__  # type: ignore[misc]
    plain: Any = object.__new__
    if type(cls).__call__ is type.__call__ and cls.__new__ is plain:
        if isinstance(init, FunctionType):
            return of_function(init, bound=1)
        if init is object.__init__:
            return Signature(cls.__qualname__, (), 0, 0, frozenset(), (), False, False)
    return _open(cls.__qualname__)


def _of_other(function: Any, name: str, bound: int) -> Signature:
    import inspect

    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return _open(name)
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][bound:]
    keyword_only = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    return Signature(
        name,
        tuple(p.name for p in positional),
        sum(p.default is p.empty for p in positional),
        sum(p.kind is p.POSITIONAL_ONLY for p in positional),
        frozenset(p.name for p in keyword_only),
        tuple(p.name for p in keyword_only if p.default is p.empty),
        any(p.kind is p.VAR_POSITIONAL for p in parameters),
        any(p.kind is p.VAR_KEYWORD for p in parameters),
        bound,
    )


def _open(name: str) -> Signature:
    return Signature(name, (), 0, 0, frozenset(), (), True, True)
