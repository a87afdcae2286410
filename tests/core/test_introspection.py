"""What `inspect`, `help` and notebooks find on remote functions and actor classes."""

import inspect

import pytest

import ray


def plain(number: int, word: str = "a") -> int:
    """Describes itself."""
    return number + len(word)


def bare(number):
    return number


def test_remote_has_the_signature_name_and_text_of_its_function(cluster):
    remote = ray.remote(plain)
    assert inspect.signature(remote.remote) == inspect.signature(plain)
    assert remote.remote.__name__ == "plain"
    assert inspect.getdoc(remote.remote) == "Describes itself."
    assert ray.get(remote.remote(1, word="ab")) == 3


@pytest.mark.skate  # Ray gives these to `remote` only
def test_variants_and_the_remote_function_itself_have_them_too(cluster):
    remote = ray.remote(plain)
    for found in (remote, remote.options(num_cpus=0), remote.options(num_cpus=0).remote):
        assert inspect.signature(found) == inspect.signature(plain)
        assert (found.__name__, found.__doc__) == ("plain", "Describes itself.")


@pytest.mark.skate  # Ray shows the text of its own class
def test_what_has_no_text_shows_none(cluster):
    @ray.remote
    class Bare:
        pass

    assert ray.remote(bare).__doc__ is None
    assert ray.remote(bare).remote.__doc__ is None
    assert Bare.__doc__ is None


def test_a_remote_function_that_calls_itself_keeps_its_name_in_workers(cluster):
    @ray.remote
    def factorial(number):
        """Multiplies."""
        if number == 0:
            return 1, factorial.remote.__name__
        product, name = ray.get(factorial.remote(number - 1))
        return number * product, name

    assert ray.get(factorial.remote(4)) == (24, "factorial")
