"""`ray/_core.pyi` mirrors the extension module: names, methods, parameters, and which of these are optional."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import ray
from ray import _core

STUB = ast.parse((Path(ray.__file__).parent / "_core.pyi").read_text())
CLASSES = {node.name: node for node in STUB.body if isinstance(node, ast.ClassDef)}
FUNCTIONS = {node.name: node for node in STUB.body if isinstance(node, ast.FunctionDef)}
CONSTANTS = {
    node.target.id for node in STUB.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
}

CHECKED_MAGIC = {"__await__"}
"""Others are there because the language needs them, and typed by `object`."""

METHODS = [
    (class_name, node.name)
    for class_name, definition in CLASSES.items()
    for node in definition.body
    if isinstance(node, ast.FunctionDef)
]


def public_names(owner: object) -> set[str]:
    names = vars(owner)
    return {name for name in names if not name.startswith("__") or name in CHECKED_MAGIC}


def decorators(node: ast.FunctionDef) -> set[str]:
    return {ast.unparse(decorator) for decorator in node.decorator_list}


def parameters_in_stub(node: ast.FunctionDef, *, bound: bool) -> list[tuple[str, bool, bool]]:
    """(name, whether by keyword only, whether optional) of each parameter."""
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    optional = [False] * (len(positional) - len(arguments.defaults)) + [True] * len(arguments.defaults)
    found = [(argument.arg, False, has) for argument, has in zip(positional, optional, strict=True)]
    found = found[1:] if bound else found
    return found + [
        (argument.arg, True, default is not None)
        for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]


def parameters_in_module(function: object, *, bound: bool) -> list[tuple[str, bool, bool]]:
    parameters = list(inspect.signature(function).parameters.values())
    return [
        (parameter.name, parameter.kind is parameter.KEYWORD_ONLY, parameter.default is not parameter.empty)
        for parameter in (parameters[1:] if bound else parameters)
    ]


def method(class_name: str, name: str) -> ast.FunctionDef:
    return next(node for node in CLASSES[class_name].body if isinstance(node, ast.FunctionDef) and node.name == name)


def test_the_module_has_the_names_of_the_stub():
    assert public_names(_core) == {*CLASSES, *FUNCTIONS, *CONSTANTS}


@pytest.mark.parametrize("class_name", CLASSES)
def test_a_class_has_the_members_of_its_stub(class_name):
    in_stub = set()
    for node in CLASSES[class_name].body:
        if isinstance(node, ast.FunctionDef) and node.name != "__init__":
            in_stub.add(node.name)
        elif isinstance(node, ast.AnnAssign):
            in_stub.add(node.target.id)
    assert public_names(getattr(_core, class_name)) == in_stub


@pytest.mark.parametrize(("class_name", "name"), [pair for pair in METHODS if pair[1] not in CHECKED_MAGIC])
def test_a_method_has_the_parameters_of_its_stub(class_name, name):
    stub = method(class_name, name)
    owner = getattr(_core, class_name)
    if name == "__init__":
        assert parameters_in_module(owner, bound=False) == parameters_in_stub(stub, bound=True)
    elif "property" in decorators(stub):
        assert inspect.isdatadescriptor(vars(owner)[name])
    elif "staticmethod" in decorators(stub):
        assert parameters_in_module(getattr(owner, name), bound=False) == parameters_in_stub(stub, bound=False)
    elif "classmethod" in decorators(stub):
        assert parameters_in_module(getattr(owner, name), bound=False) == parameters_in_stub(stub, bound=True)
    else:
        assert parameters_in_module(getattr(owner, name), bound=True) == parameters_in_stub(stub, bound=True)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_has_the_parameters_of_its_stub(name):
    assert parameters_in_module(getattr(_core, name), bound=False) == parameters_in_stub(FUNCTIONS[name], bound=False)


EXCEPTIONS = {name for name in CLASSES if issubclass(getattr(_core, name, object), BaseException)}
"""These are made like the builtin exceptions that they derive from."""


@pytest.mark.parametrize(
    "class_name",
    [name for name in CLASSES if name not in EXCEPTIONS and not any(pair == (name, "__init__") for pair in METHODS)],
)
def test_a_class_without_constructor_in_the_stub_cannot_be_made(class_name):
    with pytest.raises(TypeError):
        getattr(_core, class_name)()


@pytest.mark.parametrize("name", sorted(CONSTANTS))
def test_constants_are_small_numbers(name):
    assert 0 < getattr(_core, name) < 256
