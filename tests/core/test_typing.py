"""What a type checker makes of programs that use the public API."""

import subprocess
import sys
import textwrap

import pytest

pytestmark = [pytest.mark.skate, pytest.mark.slow]  # a type checker takes seconds to start


@pytest.fixture(scope="module")
def check(tmp_path_factory):
    pytest.importorskip("mypy")
    directory = tmp_path_factory.mktemp("typing")

    def run(program):
        path = directory / "program.py"
        path.write_text(textwrap.dedent(program))
        command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--cache-dir", str(directory), path]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=directory)
        return done.stdout + done.stderr

    return run


def test_a_correct_program_has_no_complaints(check):
    assert (
        check("""
        import ray

        @ray.remote
        def square(x: int) -> int:
            return x * x

        class Counter:
            def __init__(self, start: int = 0) -> None:
                self.value = start

            def increment(self) -> int:
                self.value += 1
                return self.value

        ray.init(num_cpus=1)
        reference: ray.ObjectRef[int] = square.remote(2)
        value: int = ray.get(reference)
        values: list[int] = ray.get([reference])
        chained: ray.ObjectRef[int] = square.remote(reference)
        # A type checker does not look at what decorates a class; called, it is seen.
        counter = ray.remote(Counter).remote(start=1)
        ready, pending = ray.wait([reference], num_returns=1, timeout=1.0)
        ray.kill(counter)
        ray.shutdown()
    """)
        == ""
    )


@pytest.mark.parametrize(
    "call", ['square.remote("text")', "square.remote()", "square.remote(1, 2)", "square.remote(y=1)"]
)
def test_a_wrong_call_is_found(check, call):
    complaint = check(f"""
        import ray

        @ray.remote
        def square(x: int) -> int:
            return x * x

        {call}
    """)
    assert "error" in complaint
    assert "program.py:8" in complaint


def test_the_type_of_a_result_is_known(check):
    complaint = check("""
        import ray

        @ray.remote
        def square(x: int) -> int:
            return x * x

        text: str = ray.get(square.remote(1))
    """)
    assert "program.py:8" in complaint


def test_what_is_put_keeps_its_type(check):
    complaint = check("""
        import ray

        number: int = ray.get(ray.put(1))
        text: str = ray.get(ray.put(1))
    """)
    assert "program.py:4" not in complaint
    assert "program.py:5" in complaint


ACTOR = """
    import asyncio
    from collections.abc import AsyncIterator, Iterator
    import ray
    from ray.actor import ActorHandle, ActorProxy

    class Counter:
        def __init__(self, start: int) -> None:
            self.value = start

        @ray.method
        def add(self, number: int, *, twice: bool = False) -> int:
            return self.value + number

        @ray.method(num_returns=1)
        def add_with_options(self, number: int) -> int:
            return self.add(number, twice=True)

        @ray.method
        async def later(self, number: int) -> str:
            return str(number)

        @ray.method
        def items(self) -> Iterator[bytes]:
            yield b""

        @ray.method
        async def async_items(self) -> AsyncIterator[float]:
            yield 1.0

        async def use(self) -> str:
            return await self.later(self.add(1))

    Actor = ray.remote(Counter)
    counter = ray.remote(num_cpus=1)(Counter).options(name="c").remote(1)
"""


def shown_types(check, *expressions):
    text = check(textwrap.dedent(ACTOR) + "".join(f"reveal_type({expression})\n" for expression in expressions))
    assert "error" not in text, text
    return [line.split('"')[1] for line in text.splitlines() if "Revealed type" in line]


def test_the_results_of_marked_methods_are_known(check):
    assert shown_types(
        check,
        "counter.add.remote(1)",
        "Actor.remote(1).add.remote(1, twice=True)",
        "counter.add_with_options.remote(1)",
        "counter.later.remote(1)",
        "counter.items.remote()",
        "counter.async_items.remote()",
        "counter.add.remote(ray.put(1))",
        "ray.get(counter.add.remote(1))",
        "Counter(1).add(1)",
    ) == [
        "ray._core.ObjectRef[int]",
        "ray._core.ObjectRef[int]",
        "ray._core.ObjectRef[int]",
        "ray._core.ObjectRef[str]",
        "ray._runtime.generators.ObjectRefGenerator[bytes]",
        "ray._runtime.generators.ObjectRefGenerator[float]",
        "ray._core.ObjectRef[int]",
        "int",
        "int",
    ]


@pytest.mark.parametrize(
    "call",
    [
        'counter.add.remote("text")',
        "counter.add.remote()",
        "counter.add.remote(1, thrice=True)",
        'counter.later.remote("text")',
        'counter.add_with_options.remote("text")',
        "counter.absent.remote()",
    ],
)
def test_a_wrong_call_of_a_marked_method_is_found(check, call):
    assert "error" in check(textwrap.dedent(ACTOR) + call + "\n")


def test_handles_have_a_name_for_annotations(check):
    assert (
        check(
            textwrap.dedent(ACTOR)
            + textwrap.dedent("""
                def use(proxy: ActorProxy[Counter]) -> ray.ObjectRef[int]:
                    return proxy.add.remote(1)

                use(Actor.remote(1))
                ray.kill(Actor.remote(1))
                found: ActorHandle[Counter] = ray.get_actor("c")
                found.add.remote(1)
            """)
        )
        == ""
    )
