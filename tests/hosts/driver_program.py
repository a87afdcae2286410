"""A driver that does what it is told: each line of its input is a JSON text of Python code, answered by a JSON line.

An expression is answered by ``{"value": ...}``, a statement by ``{"value": null}``, an exception by its class and text.
The code sees `ray`, what `tests.hosts.remote` has, and what earlier lines have set.
"""

import ast
import json
import os
import sys

import ray
from tests.hosts import remote


def main() -> None:
    # Standard output is for answers alone.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    scope = {**vars(remote), "ray": ray}
    for line in sys.stdin:
        try:
            answer = {"value": perform(json.loads(line), scope)}
        except BaseException as error:
            answer = {"error": type(error).__name__, "text": str(error)}
        print(json.dumps(answer), file=answers, flush=True)
    ray.shutdown()


def perform(code: str, scope: dict[str, object]) -> object:
    tree = ast.parse(code)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "<test>", "exec"), scope)
    if last is None:
        return None
    return eval(compile(ast.Expression(last.value), "<test>", "eval"), scope)


if __name__ == "__main__":
    main()
