"""Values in the object store, and references to them."""

import gc
import pickle

import numpy as np
import pytest

import ray
from tests.core.helpers import Gate


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        -(2**80),
        3.5,
        float("inf"),
        2 + 3j,
        "",
        "ünïcode \N{SNOWMAN}",
        b"bytes",
        pytest.param(bytearray(b"more"), marks=pytest.mark.skate),  # bytes on Ray
        (1, (2, ("three",))),
        [],
        [None, 1, "a", [2.0]],
        {"a": 1, 2: [3], (4, 5): {6}},
        {1, 2, 3},
        frozenset({"x"}),
        range(5),
        slice(1, 2),
        Ellipsis,
        int,
    ],
    ids=repr,
)
def test_what_is_put_is_what_is_got(cluster, value):
    result = ray.get(ray.put(value))
    assert result == value
    assert type(result) is type(value)


def test_get_of_a_list_keeps_order_and_repetitions(cluster):
    one, two = ray.put(1), ray.put(2)
    assert ray.get([two, one, two]) == [2, 1, 2]


def test_get_of_an_empty_list(cluster):
    assert ray.get([]) == []


def test_get_gives_every_caller_a_value_of_its_own(cluster):
    reference = ray.put([1, 2])
    ray.get(reference).append(3)
    assert ray.get(reference) == [1, 2]


def test_an_object_does_not_change_with_what_was_put(cluster):
    array = np.zeros(1_000_000)
    reference = ray.put(array)
    array[:] = 1
    assert not ray.get(reference).any()


@pytest.mark.parametrize("dtype", ["int8", "float32", "int64", "complex128", "bool", "datetime64[s]", "U5"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (400, 500)])
def test_arrays_of_any_type_and_shape(cluster, dtype, shape):
    array = np.zeros(shape, dtype=dtype)
    result = ray.get(ray.put(array))
    assert (result.dtype, result.shape) == (array.dtype, shape)
    assert np.array_equal(result, array)


@pytest.mark.parametrize("order", ["C", "F"])
def test_the_memory_order_of_an_array_is_kept(cluster, order):
    array = np.asarray(np.arange(200_000).reshape(400, 500), order=order)
    result = ray.get(ray.put(array))
    assert result.flags[f"{order}_CONTIGUOUS"]
    assert np.array_equal(result, array)


def test_a_strided_view_of_an_array(cluster):
    array = np.arange(1_000_000)[::3]
    assert np.array_equal(ray.get(ray.put(array)), array)


def test_structured_and_object_arrays(cluster):
    structured = np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")])
    assert np.array_equal(ray.get(ray.put(structured)), structured)
    objects = np.array([None, "x", [1]], dtype=object)
    assert ray.get(ray.put(objects)).tolist() == [None, "x", [1]]


def test_a_large_array_comes_back_read_only(cluster):
    result = ray.get(ray.put(np.zeros(1_000_000)))
    assert not result.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        result[0] = 1


def test_two_gets_of_a_large_array_share_memory(cluster):
    reference = ray.put(np.zeros(1_000_000))
    first, second = ray.get(reference), ray.get(reference)
    assert first.__array_interface__["data"] == second.__array_interface__["data"]


def test_arrays_inside_other_values_share_memory(cluster):
    reference = ray.put({"weights": [np.zeros(500_000), np.ones(500_000)]})
    first, second = ray.get(reference), ray.get(reference)
    assert np.shares_memory(first["weights"][1], second["weights"][1])


def test_a_view_keeps_the_memory_after_the_reference_has_gone(cluster):
    view = ray.get(ray.put(np.full(1_000_000, 7)))[10:20]
    gc.collect()
    for number in range(20):  # would reuse the memory if it were free
        ray.put(np.full(1_000_000, number))
    assert view.tolist() == [7] * 10


def test_a_task_reads_an_array_in_place(cluster):
    @ray.remote
    def look(array):
        return array.flags.writeable, int(array.sum())

    assert ray.get(look.remote(ray.put(np.ones(1_000_000, dtype=np.int64)))) == (False, 1_000_000)


def test_arrow_tables_share_memory(cluster):
    pa = pytest.importorskip("pyarrow")
    table = pa.table({"x": np.arange(500_000), "y": np.random.default_rng(0).random(500_000)})
    reference = ray.put(table)
    first, second = ray.get(reference), ray.get(reference)
    assert first.equals(table)
    address = [t.column("x").chunk(0).buffers()[1].address for t in (first, second)]
    assert address[0] == address[1]


def test_an_object_of_a_hundred_megabytes(cluster):
    array = np.arange(12_500_000)
    result = ray.get(ray.put(array))
    assert (result[0], result[-1], len(result)) == (0, 12_499_999, 12_500_000)


def test_many_readers_of_one_object(cluster):
    @ray.remote
    def total(array):
        return int(array.sum())

    reference = ray.put(np.ones(500_000, dtype=np.int64))
    assert ray.get([total.remote(reference) for _ in range(20)]) == [500_000] * 20


def test_an_object_made_by_a_task_can_be_read_by_another(cluster):
    @ray.remote
    def make():
        return np.full(1_000_000, 3)

    @ray.remote
    def total(array):
        return int(array.sum())

    assert ray.get(total.remote(make.remote())) == 3_000_000


def test_references_inside_objects(cluster):
    inner = ray.put("inner")
    outer = ray.get(ray.put({"list": [inner]}))
    assert ray.get(outer["list"][0]) == "inner"
    assert outer["list"][0] == inner


def test_a_reference_equals_itself_wherever_it_has_been(cluster):
    @ray.remote
    def echo(items):
        return items

    reference = ray.put(1)
    (back,) = ray.get(echo.remote([reference]))
    assert back == reference
    assert hash(back) == hash(reference)
    assert {reference: "found"}[back] == "found"


def test_different_objects_have_different_references(cluster):
    assert len({ray.put(0) for _ in range(100)}) == 100


def test_a_reference_shows_its_id(cluster):
    reference = ray.put(1)
    assert reference.hex() in repr(reference)
    assert "ObjectRef" in repr(reference)
    assert bytes.fromhex(reference.hex()) == reference.binary()


def test_a_reference_is_not_its_value(cluster):
    assert ray.put(1) != 1
    assert ray.put(1) != ray.put(1)


def test_put_refuses_a_reference(cluster):
    with pytest.raises(TypeError, match="ObjectRef"):
        ray.put(ray.put(1))


@pytest.mark.parametrize("wrong", [1, "text", None, {"a": 1}, [1, 2]], ids=repr)
def test_get_refuses_what_is_not_a_reference(cluster, wrong):
    with pytest.raises((ValueError, TypeError), match="ObjectRef"):
        ray.get(wrong)


def test_get_refuses_a_remote_function(cluster):
    @ray.remote
    def f():
        pass

    with pytest.raises((ValueError, TypeError)):
        ray.get(f)


def test_get_ends_after_its_timeout(cluster, tmp_path):
    gate = Gate(tmp_path)

    @ray.remote
    def late():
        gate.wait()
        return "late"

    reference = late.remote()
    with pytest.raises(ray.exceptions.GetTimeoutError):
        ray.get(reference, timeout=0.05)
    with pytest.raises(TimeoutError):
        ray.get([ray.put(1), reference], timeout=0.05)
    gate.open()
    assert ray.get(reference, timeout=20) == "late"


def test_a_timeout_of_zero_gets_what_is_there(cluster):
    assert ray.get(ray.put(5), timeout=0) == 5


def test_a_timeout_of_zero_does_not_wait(cluster, tmp_path):
    gate = Gate(tmp_path)

    @ray.remote
    def late():
        gate.wait()

    reference = late.remote()
    with pytest.raises(ray.exceptions.GetTimeoutError):
        ray.get(reference, timeout=0)
    gate.open()
    ray.get(reference)


def test_a_reference_cannot_be_pickled_outside_of_the_engine(cluster):
    # Ray allows it and then never frees the object; both ways the value must stay readable.
    reference = ray.put(8)
    try:
        copied = pickle.loads(pickle.dumps(reference))
    except Exception:
        return
    assert ray.get(copied) == 8


def test_a_loop_of_puts_larger_than_the_store_reuses_its_memory(fresh_cluster):
    fresh_cluster(num_cpus=1, object_store_memory=100_000_000)
    for number in range(40):
        assert ray.get(ray.put(np.full(1_250_000, number)))[5] == number


@pytest.mark.skate
def test_small_values_fill_nearly_the_whole_store(fresh_cluster):
    fresh_cluster(num_cpus=1, object_store_memory=100 << 20)
    value = bytes(200 << 10)
    references = [ray.put(value) for _ in range(450)]
    assert len(ray.get(references[-1])) == len(value)
