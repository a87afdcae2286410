"""A call that Python would refuse is refused at `.remote()`, in Python's words."""

from __future__ import annotations

from typing import Any

import pytest

from ray._runtime import signature


def no_arguments() -> None: ...
def one(x: Any) -> None: ...
def defaulted(x: Any, y: Any = 1) -> None: ...
def positional_only(x: Any, y: Any = 2, /, z: Any = 3) -> None: ...
def keyword_only(x: Any, *, k: Any, o: Any = 1) -> None: ...
def everything(x: Any, *args: Any, k: Any = 1, **kwargs: Any) -> None: ...
def three(a: Any, b: Any, c: Any) -> None: ...
def positional_only_and_keywords(x: Any, /, **kwargs: Any) -> None: ...


FUNCTIONS = [
    no_arguments,
    one,
    defaulted,
    positional_only,
    keyword_only,
    everything,
    three,
    positional_only_and_keywords,
]
CALLS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    (args, kwargs)
    for args in [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)]
    for kwargs in [{}, {"x": 1}, {"y": 1}, {"z": 1}, {"k": 1}, {"q": 1}, {"k": 1, "o": 2}, {"b": 1, "c": 2}]
]


def outcome(call: Any) -> str | None:
    try:
        call()
    except TypeError as error:
        return str(error)
    return None


@pytest.mark.parametrize("function", FUNCTIONS)
def test_verdicts_and_most_words_are_pythons_own(function: Any) -> None:
    described = signature.of_function(function)
    for args, kwargs in CALLS:
        own = outcome(lambda args=args, kwargs=kwargs: described.check(args, kwargs))
        python = outcome(lambda args=args, kwargs=kwargs: function(*args, **kwargs))
        assert (own is None) == (python is None), (function, args, kwargs, own, python)
        if own is not None and python is not None and len(kwargs) == 0:
            assert own == python


@pytest.mark.parametrize("function", FUNCTIONS)
def test_limits_agree_with_the_check(function: Any) -> None:
    described = signature.of_function(function)
    for count in range(6):
        if described.minimum <= count <= described.maximum:
            assert outcome(lambda count=count: function(*range(count))) is None


def test_methods_count_self_like_python() -> None:
    class A:
        def m(self, x: Any) -> None: ...

    described = signature.of_function(A.m, bound=1)
    args: Any = (1, 2)
    with pytest.raises(TypeError) as info:
        A().m(*args)
    assert outcome(lambda: described.check(args, {})) == str(info.value)


def test_classes() -> None:
    class Plain: ...

    class WithInit:
        def __init__(self, x: int) -> None: ...

    class Odd:
        def __new__(cls, *_args: Any) -> Odd:
            return object.__new__(cls)

    assert outcome(lambda: signature.of_class(Plain).check((1,), {}))
    assert outcome(lambda: signature.of_class(WithInit).check((), {}))
    assert outcome(lambda: signature.of_class(WithInit).check((), {"x": 1})) is None
    assert outcome(lambda: signature.of_class(Odd).check((1, 2), {})) is None
    assert outcome(lambda: signature.of_class(dict).check((1, 2), {"a": 1})) is None


def test_builtins() -> None:
    assert outcome(lambda: signature.of_function(len).check((), {}))
    assert outcome(lambda: signature.of_function(max).check((1, 2, 3), {})) is None
