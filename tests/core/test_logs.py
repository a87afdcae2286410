"""What workers print is seen by the driver's user."""

import json
import re
import textwrap

import pytest

from tests.core.helpers import run_driver


def program(body):
    """Return a driver that runs `body` and ends when all output has arrived.

    Skate's `shutdown` sees to that. Ray has no way to wait for output, so time has to pass.
    """
    return (
        textwrap.dedent("""
        import os, sys, time
        import ray

        def wait_on_ray(seconds):
            time.sleep(0 if "skate" in ray.__version__ else seconds)

        @ray.remote
        def speak(text, stream="stdout"):
            print(text, file=getattr(sys, stream), flush=True)
            return os.getpid()

        @ray.remote
        class Speaker:
            def speak(self, text):
                print(text)
    """)
        + textwrap.dedent(body)
        + "\nwait_on_ray(1.0)\nray.shutdown()\n"
    )


def test_output_of_a_task_has_its_name_and_process(no_cluster):
    status, output, errors = run_driver(
        program("""
        ray.init()
        pid = ray.get(speak.remote("hello from a task"))
        print(f"worker {pid}")
    """)
    )
    assert status == 0, errors
    pid = re.search(r"worker (\d+)", output)[1]
    assert re.search(rf"\(speak pid={pid}\) hello from a task", output + errors)


def test_output_of_an_actor_has_its_class_and_process(no_cluster):
    _, output, errors = run_driver(
        program("""
        ray.init()
        ray.get(Speaker.remote().speak.remote("hello from an actor"))
    """)
    )
    assert re.search(r"\(Speaker pid=\d+\) hello from an actor", output + errors)


def test_errors_of_a_task_arrive_too(no_cluster):
    _, output, errors = run_driver(
        program("""
        ray.init()
        ray.get(speak.remote("to standard error", "stderr"))
    """)
    )
    assert re.search(r"\(speak pid=\d+\) to standard error", output + errors)


def test_several_lines_each_get_a_prefix(no_cluster):
    _, output, errors = run_driver(
        program("""
        ray.init()
        ray.get(speak.remote("first line\\nsecond line"))
    """)
    )
    assert re.search(r"\(speak pid=\d+\) first line", output + errors)
    assert re.search(r"\(speak pid=\d+\) second line", output + errors)


def test_output_can_be_silenced(no_cluster):
    status, output, errors = run_driver(
        program("""
        ray.init(log_to_driver=False)
        ray.get(speak.remote("not to be seen"))
    """)
    )
    assert status == 0, errors
    assert "not to be seen" not in output + errors


def test_identical_lines_of_many_processes_are_folded(no_cluster):
    _, output, errors = run_driver(
        program("""
        ray.init(num_cpus=4)
        speakers = [Speaker.remote() for _ in range(4)]
        ray.get([speaker.speak.remote("the same") for speaker in speakers])
        wait_on_ray(5.5)  # it reports folded lines after five seconds, with the next line
        ray.get(speakers[0].speak.remote("another"))
    """)
    )
    everything = output + errors
    assert everything.count("the same") == 2
    assert re.search(r"the same.*repeated 3x", everything)


def test_output_of_the_driver_itself_has_no_prefix(no_cluster):
    _, output, _ = run_driver(
        program("""
        ray.init()
        print("plain")
    """)
    )
    assert "plain" in output.splitlines()


def test_unusual_characters_pass(no_cluster):
    _, output, errors = run_driver(
        program("""
        ray.init()
        ray.get(speak.remote("tab\\tsnowman \\N{SNOWMAN}"))
    """),
        env={"PYTHONIOENCODING": "utf-8"},
    )
    assert "tab\tsnowman \N{SNOWMAN}" in output + errors


def test_the_last_words_of_a_worker_that_dies_arrive(no_cluster):
    _, output, errors = run_driver(
        program("""
        @ray.remote(max_retries=0)
        def die():
            print("last words", flush=True)
            os._exit(1)

        ray.init()
        try:
            ray.get(die.remote())
        except ray.exceptions.WorkerCrashedError:
            pass
    """)
    )
    assert "last words" in output + errors


@pytest.mark.skate
def test_output_printed_just_before_the_end_of_the_driver_is_not_lost(no_cluster):
    _, output, errors = run_driver("""
        import ray
        ray.get(ray.remote(lambda: print("in time")).remote())
    """)
    assert "in time" in output + errors


def output_of(body):
    """Return what a driver that runs `body` shows, on both streams."""
    status, output, errors = run_driver(program("ray.init()\n" + textwrap.dedent(body)))
    assert status == 0, errors
    return output + errors


def test_a_progress_bar_is_shown_as_a_terminal_would(no_cluster):
    output = output_of("""
        @ray.remote
        def bar():
            for percent in (10, 50, 100):
                sys.stderr.write(f"\\r{percent}%|###|")
            print("after", file=sys.stderr)

        ray.get(bar.remote())
    """)
    assert "100%|###|after" in output
    assert "10%|" not in output.replace("100%|", "")
    assert "\r" not in output


def test_a_line_without_its_end_is_not_lost(no_cluster):
    output = output_of("""
        @ray.remote
        def ask():
            print("no end", end="", flush=True)

        ray.get(ask.remote())
    """)
    assert re.search(r"\(ask pid=\d+\) no end\n", output)


def test_an_actor_may_say_what_stands_before_its_output(no_cluster):
    output = output_of("""
        @ray.remote
        class Actor:
            def __init__(self, number):
                self.number = number

            def __repr__(self):
                return f"Actor({self.number})"

            def speak(self):
                print("hello")

        ray.get(Actor.remote(7).speak.remote())
    """)
    assert re.search(r"\(Actor\(7\) pid=\d+\) hello", output)


@pytest.mark.skate  # the original shows records without a prefix
def test_records_of_logging_carry_ids_in_driver_and_workers(no_cluster):
    status, _, errors = run_driver("""
        import json, logging
        import ray

        ray.init(num_cpus=1, logging_config=ray.LoggingConfig(encoding="JSON", log_level="INFO"))

        @ray.remote
        def task():
            logging.getLogger("mine").info("in the task", extra={"size": 3})

        logging.info("in the driver")
        logging.debug("not shown")
        ray.get(task.remote())
    """)
    assert status == 0, errors
    records = [json.loads(line[line.index("{") :]) for line in errors.splitlines() if "{" in line]
    driver, task = records
    assert (driver["message"], driver["levelname"]) == ("in the driver", "INFO")
    assert (task["message"], task["size"], task["task_name"]) == ("in the task", 3, "task")
    assert task["job_id"] == driver["job_id"]
    assert task["worker_id"] != driver["worker_id"]


def test_tasks_that_share_a_worker_each_print_under_their_own_name(no_cluster):
    _, output, errors = run_driver(
        program("""
        @ray.remote
        def whisper(text):
            print("whispered", text)
            return os.getpid()

        ray.init(num_cpus=1)
        pids = {
            ray.get(f.options(name=name).remote(text))
            for number in range(3)
            for f, name, text in [(speak, "speak", f"a{number}"), (whisper, f"part-{number}", f"b{number}")]
        }
        print(f"workers {len(pids)}")
    """)
    )
    assert "workers 1" in output
    for number in range(3):
        assert re.search(rf"\(speak pid=\d+\) a{number}\n", output + errors)
        assert re.search(rf"\(part-{number} pid=\d+\) whispered b{number}\n", output + errors)
    assert "\x1b]" not in output + errors


def test_an_actor_on_a_worker_that_ran_tasks_prints_under_its_own_name(no_cluster):
    _, output, errors = run_driver(
        program("""
        ray.init(num_cpus=1)
        ray.get(speak.remote("first a task"))
        ray.get(Speaker.remote().speak.remote("then an actor"))
    """)
    )
    assert re.search(r"\(speak pid=\d+\) first a task", output + errors)
    assert re.search(r"\(Speaker pid=\d+\) then an actor", output + errors)


FAILURES = """
    import asyncio
    ray.init(num_cpus=2)

    @ray.remote
    def fail(text):
        raise ValueError(text)

    @ray.remote
    def pass_on(value):
        return value

    def expect(wait):
        try:
            wait()
        except ValueError:
            pass
        else:
            raise AssertionError

    async def wait_for(awaitable):
        return await awaitable
"""


def test_the_failure_of_a_task_whose_result_nobody_wants_is_told(no_cluster):
    status, _, errors = run_driver(
        program(
            FAILURES
            + """
    fail.remote("forgotten at once")
    reference = fail.remote("only waited for")
    ray.wait([reference])
    del reference
    """
        )
    )
    assert status == 0, errors
    assert "ValueError: forgotten at once" in errors
    assert "ValueError: only waited for" in errors
    assert errors.count("Unhandled error") == 2


def test_a_failure_that_somebody_has_seen_is_not_told_again(no_cluster):
    status, _, errors = run_driver(
        program(
            FAILURES
            + """
    expect(lambda: ray.get(fail.remote("got")))
    expect(lambda: ray.get([fail.remote("got first"), fail.remote("got second")]))
    expect(lambda: ray.get(pass_on.remote(fail.remote("passed on"))))
    expect(lambda: fail.remote("future").future().result())
    expect(lambda: asyncio.run(wait_for(fail.remote("awaited"))))
    """
        )
    )
    assert status == 0, errors
    assert "Unhandled" not in errors


def test_unhandled_errors_can_be_silenced(no_cluster):
    env = {"RAY_IGNORE_UNHANDLED_ERRORS": "1"}
    _, _, errors = run_driver(program(FAILURES + '\n    fail.remote("x"); ray.wait([fail.remote("y")])'), env=env)
    assert "Unhandled" not in errors
