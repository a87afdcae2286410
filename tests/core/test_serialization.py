"""What can travel between processes, and what is said about what cannot."""

import collections
import copyreg
import dataclasses
import datetime
import enum
import functools
import gc
import threading
import uuid

import cloudpickle
import numpy as np
import pytest

import ray


@ray.remote
def identity(value):
    return value


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Point:
    x: float
    label: str = "p"


Pair = collections.namedtuple("Pair", "first second")


@pytest.mark.parametrize(
    "value",
    [
        Colour.RED,
        Point(1.5),
        Pair(1, [2]),
        datetime.datetime(2020, 1, 2, tzinfo=datetime.UTC),
        datetime.timedelta(seconds=3),
        uuid.UUID(int=7),
        collections.OrderedDict(a=1),
        collections.Counter("abca"),
        collections.deque([1, 2], maxlen=5),
        ValueError("as a value").args,
        np.float32(1.5),
        np.dtype("i4"),
        float,
        len,
    ],
    ids=repr,
)
def test_values_of_many_types_travel(cluster, value):
    result = ray.get(identity.remote(value))
    assert result == value
    assert type(result) is type(value)


def test_instances_of_local_classes_travel(cluster):
    class Local:
        def __init__(self, x):
            self.x = x

        def double(self):
            return 2 * self.x

    assert ray.get(identity.remote(Local(4))).double() == 8
    assert isinstance(ray.get(identity.remote(Local(1))), Local)


def test_functions_lambdas_and_partials_travel(cluster):
    base = 10

    def add(x):
        return base + x

    assert ray.get(identity.remote(add))(1) == 11
    assert ray.get(identity.remote(lambda x: x + base))(2) == 12
    assert ray.get(identity.remote(functools.partial(add, 3)))() == 13


def test_a_value_that_contains_itself(cluster):
    value = [1]
    value.append(value)
    result = ray.get(identity.remote(value))
    assert result[1] is result


def test_shared_parts_stay_shared(cluster):
    part = [1]
    first, second = ray.get(identity.remote((part, part)))
    assert first is second


def test_a_deep_but_reasonable_nesting(cluster):
    value = 0
    for _ in range(100):
        value = [value]
    assert ray.get(identity.remote(value)) == value


def test_too_deep_a_nesting_is_an_error_at_the_call(cluster):
    value = 0
    for _ in range(100_000):
        value = [value]
    with pytest.raises(Exception, match=r"(?i)recursion|deep"):
        ray.put(value)
    with pytest.raises(Exception, match=r"(?i)recursion|deep"):
        identity.remote(value)
    while isinstance(value, list):  # its plain destruction would be as deep
        value = value.pop()


def test_classes_of_main_travel(no_cluster):
    from tests.core.helpers import run_driver

    status, output, errors = run_driver("""
        import ray

        class Vector:
            def __init__(self, *items):
                self.items = items
            def __add__(self, other):
                return Vector(*[a + b for a, b in zip(self.items, other.items)])

        @ray.remote
        def add(a, b):
            assert isinstance(a, Vector)
            return a + b

        result = ray.get(add.remote(Vector(1, 2), Vector(3, 4)))
        print(type(result) is Vector, result.items)
    """)
    assert status == 0, errors
    assert output.splitlines()[-1] == "True (4, 6)"


def test_custom_reducers_are_used(cluster):
    class Connection:
        def __init__(self, address):
            self.address = address
            self.lock = threading.Lock()

        def __reduce__(self):
            return Connection, (self.address,)

    assert ray.get(identity.remote(Connection("here"))).address == "here"


def test_getstate_and_setstate_are_used(cluster):
    class Cached:
        def __init__(self):
            self.kept, self.dropped = 1, threading.Lock()

        def __getstate__(self):
            return {"kept": self.kept}

        def __setstate__(self, state):
            self.kept, self.dropped = state["kept"], "made anew"

    result = ray.get(identity.remote(Cached()))
    assert (result.kept, result.dropped) == (1, "made anew")


def test_a_registered_serializer_is_used_until_it_is_deregistered(cluster):
    class Locked:
        def __init__(self, x):
            self.x, self.lock = x, threading.Lock()

    @ray.remote
    def read(locked):
        return locked.x

    ray.util.register_serializer(Locked, serializer=lambda value: value.x, deserializer=Locked)
    try:
        assert ray.get(ray.put(Locked(3))).x == 3
        assert ray.get(read.remote(Locked(4))) == 4
    finally:
        ray.util.deregister_serializer(Locked)
    with pytest.raises(TypeError):
        ray.put(Locked(5))


def test_an_argument_that_cannot_travel_is_an_error_at_the_call(cluster):
    with pytest.raises(TypeError, match=r"(?i)lock"):
        identity.remote(threading.Lock())


def test_the_error_names_the_part_that_cannot_travel(cluster):
    with pytest.raises(TypeError, match=r"(?i)lock"):
        identity.remote({"good": 1, "bad": [threading.Lock()]})
    with pytest.raises(TypeError, match=r"(?i)lock"):
        ray.put(threading.Lock())


def test_a_closure_that_cannot_travel_is_an_error_at_the_call(cluster):
    secret_lock = threading.Lock()

    @ray.remote
    def use():
        return secret_lock

    with pytest.raises(TypeError, match="secret_lock"):
        use.remote()


def test_an_actor_class_that_cannot_travel_is_an_error_at_the_call(cluster):
    secret_lock = threading.Lock()

    @ray.remote
    class User:
        def use(self):
            return secret_lock

    with pytest.raises(TypeError, match="secret_lock"):
        User.remote()


def test_a_result_that_cannot_travel_is_an_error_for_the_caller(cluster):
    @ray.remote
    def make():
        return threading.Lock()

    with pytest.raises(TypeError, match=r"(?i)lock"):
        ray.get(make.remote())


def test_a_value_that_cannot_be_restored_is_an_error_for_the_reader(cluster):
    class Poison:
        def __reduce__(self):
            return explode, ()

    def explode():
        raise ValueError("cannot be restored")

    reference = ray.put(Poison())
    with pytest.raises(Exception, match="cannot be restored"):
        ray.get(reference)
    with pytest.raises(Exception, match="cannot be restored"):
        ray.get(identity.remote(reference))


def test_a_worker_survives_a_value_that_cannot_be_restored(cluster):
    class Poison:
        def __reduce__(self):
            return eval, ("1/0",)

    with pytest.raises(Exception, match="division by zero"):
        ray.get(identity.remote(Poison()))
    assert ray.get(identity.remote(1)) == 1


def test_inspect_serializability_finds_the_culprit(cluster, capsys):
    lock = threading.Lock()

    def function():
        return lock

    serializable, failures = ray.util.inspect_serializability(function, name="function")
    assert not serializable
    assert ["lock" in failure.path[-1] for failure in failures] == [True]
    assert "lock" in capsys.readouterr().out


def test_inspect_serializability_is_content_with_what_travels(cluster):
    assert ray.util.inspect_serializability([1, 2], name="numbers") == (True, set())


def test_arrays_inside_custom_objects_keep_their_values(cluster):
    class Model:
        def __init__(self):
            self.weights = {"w": np.arange(300_000), "b": np.ones(3)}

    result = ray.get(identity.remote(Model()))
    assert result.weights["w"][-1] == 299_999
    assert result.weights["b"].tolist() == [1, 1, 1]


def test_small_arrays_can_be_changed_after_a_copy(cluster):
    result = ray.get(identity.remote(np.zeros(3))).copy()
    result[0] = 1
    assert result.tolist() == [1, 0, 0]


def test_bytes_with_every_value(cluster):
    data = bytes(range(256)) * 1000
    assert ray.get(identity.remote(data)) == data


def test_strings_with_any_character(cluster):
    text = "".join(map(chr, range(0xD7FF))) + "\U0001f600"
    assert ray.get(identity.remote(text)) == text


def test_a_memory_mapped_array(cluster, tmp_path):
    path = tmp_path / "array.npy"
    np.save(path, np.arange(1000))
    assert ray.get(identity.remote(np.load(path, mmap_mode="r")))[999] == 999


def test_small_arrays_are_read_only_views_too(cluster):
    @ray.remote
    def same(value):
        assert not value.flags.writeable
        assert not value.flags.owndata
        return value

    for array in (np.arange(3), np.arange(5000)):
        for back in (ray.get(ray.put(array)), ray.get(same.remote(array)), ray.get(same.remote(ray.put(array)))):
            assert not back.flags.writeable
            assert not back.flags.owndata
            assert (back == array).all()


def test_an_argument_that_cannot_travel_is_named_with_the_part_at_fault(cluster):
    @ray.remote
    def take(first, *rest, option=None):
        pass

    @ray.remote
    class Taker:
        def __init__(self, first):
            pass

        def take(self, first):
            pass

    lock = threading.Lock()
    for call, name in [
        (lambda: take.remote({"a": [1, lock]}), r"argument 'first' of .*take\(\).*first\['a'\]\[1\]"),
        (lambda: take.remote(1, 2, lock), r"argument '\*args\[1\]' of"),
        (lambda: take.remote(1, option=lock), "argument 'option' of"),
        (lambda: Taker.remote(lock), r"argument 'first' of .*__init__\(\)"),
        (lambda: Taker.remote(1).take.remote(lock), r"argument 'first' of .*Taker.take\(\)"),
        (lambda: take.remote(ray.put(1), lock), r"argument '\*args\[0\]' of"),
    ]:
        with pytest.raises(TypeError, match=name):
            call()


def test_a_reference_in_a_closure_is_kept_by_the_function(cluster):
    def make():
        large, small = ray.put(np.ones(200_000)), ray.put("small")

        @ray.remote
        def use():
            return ray.get(large).sum(), ray.get(small)

        @ray.remote
        class User:
            def use(self):
                return ray.get(large).sum(), ray.get(small)

        return use, User

    use, User = make()
    gc.collect()
    assert ray.get([use.remote() for _ in range(8)]) == [(200_000, "small")] * 8
    assert ray.get(User.remote().use.remote()) == (200_000, "small")


def test_a_reference_stays_although_the_box_of_the_closure_was_emptied(cluster):
    box = [ray.put(np.ones(200_000))]

    @ray.remote
    def use():
        return ray.get(box[0]).sum()

    assert ray.get(use.remote()) == 200_000
    box.clear()
    gc.collect()
    assert ray.get([use.remote() for _ in range(8)]) == [200_000] * 8


@dataclasses.dataclass
class Envelope:
    content: object
    by_key: dict


def test_references_and_handles_travel_inside_of_anything(cluster):
    @ray.remote
    class Holder:
        def method(self):
            return 5

    @ray.remote
    def same(value):
        return value

    holder = Holder.remote()
    sent = Envelope((ray.put(1), holder), {ray.put(2): [ray.put(3)]})
    back = ray.get(same.remote(sent))
    reference, handle = back.content
    ((key, (value,)),) = back.by_key.items()
    assert ray.get([reference, key, value, handle.method.remote()]) == [1, 2, 3, 5]
    assert handle == holder


def test_references_and_handles_survive_plain_pickles(cluster):
    @ray.remote
    class Holder:
        def method(self):
            return 5

    holder, reference = Holder.remote(), ray.put(7)
    handle, again = cloudpickle.loads(cloudpickle.dumps((holder, reference)))
    assert again == reference
    assert ray.get([handle.method.remote(), again]) == [5, 7]


class Registered:
    def __init__(self, value):
        self.value = value


def test_the_last_reducer_that_copyreg_was_given_counts(cluster):
    try:
        for number in (1, 2):
            copyreg.pickle(Registered, lambda _, number=number: (Registered, (number,)))
            assert ray.get(ray.put(Registered(0))).value == number
    finally:
        del copyreg.dispatch_table[Registered]
    assert ray.get(ray.put(Registered(7))).value == 7


def test_cloudpickle_is_found_under_ray(cluster):
    import ray.cloudpickle

    assert ray.cloudpickle.loads(ray.cloudpickle.dumps(lambda x: x + 1))(1) == 2
    assert issubclass(ray.cloudpickle.CloudPickler, cloudpickle.Pickler)
    assert ray.cloudpickle.register_pickle_by_value is cloudpickle.register_pickle_by_value
