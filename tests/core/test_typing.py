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
