import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray._control.shown import show, show_demand
from ray._node import config
from ray._node.resources import Ledger
from ray._protocol import UNIT
from tests.node.simulated import cpu, gpu


def test_fractions_of_a_gpu_share_one_device_while_whole_ones_stay_whole():
    ledger = Ledger(gpu(2), (4, 7))
    first, second = ledger.take(gpu(0.5)), ledger.take(gpu(0.3))
    assert first.gpu_ids == second.gpu_ids
    whole = ledger.take(gpu(1))
    assert whole.gpu_ids != first.gpu_ids
    assert ledger.lacking(gpu(0.3)) == ["GPU"]
    ledger.give(second)
    assert ledger.take(gpu(0.5)).gpu_ids == first.gpu_ids


def test_a_whole_gpu_is_not_put_together_from_parts():
    ledger = Ledger(gpu(2), (0, 1))
    parts = [ledger.take(gpu(0.6)), ledger.take(gpu(0.6))]
    assert [part.gpu_ids for part in parts] == [[0], [1]]
    ledger.give(parts[0])
    parts[0] = ledger.take(gpu(0.2))
    assert ledger.free["GPU"] > UNIT
    assert ledger.lacking(gpu(1)) == [] or parts[0].gpu_ids == [0]


def test_more_than_one_gpu_must_be_a_whole_number():
    assert "only whole numbers" in str(Ledger(gpu(4), (0, 1, 2, 3)).infeasible(gpu(1.5)))


def test_what_does_not_exist_is_said_to_be_missing():
    assert Ledger(cpu(2)).infeasible(gpu(1)) == "needs GPU: 1; this node has 0"
    assert Ledger(cpu(2)).infeasible({"CPU": 2 * UNIT}) is None


def test_lent_cpus_can_be_taken_twice_and_free_becomes_negative():
    ledger = Ledger(cpu(1))
    waiting = ledger.take(cpu(1))
    assert ledger.lend_cpu(waiting)
    assert not ledger.lend_cpu(waiting)
    other = ledger.take(cpu(1))
    ledger.retake_cpu(waiting)
    assert ledger.free == {"CPU": -UNIT}
    assert ledger.available() == {"CPU": 0}
    ledger.give(waiting)
    ledger.give(other)
    assert ledger.free == ledger.total


def test_giving_back_while_lent_does_not_count_twice():
    ledger = Ledger(cpu(1))
    waiting = ledger.take(cpu(1))
    ledger.lend_cpu(waiting)
    ledger.give(waiting)
    assert ledger.free == ledger.total


def test_device_ids_must_agree_with_the_number_of_devices():
    with pytest.raises(ValueError, match="whole devices"):
        Ledger(gpu(2), (0,))


@given(
    st.lists(
        st.one_of(
            st.sampled_from([1000, 2500, 3333, 5000, 7000, 10000, 20000]),
            st.integers(0, 30).map(lambda index: -index - 1),
        )
    )
)
def test_devices_and_amounts_always_add_up(steps: list[int]):
    ledger = Ledger({"GPU": 3 * UNIT, "CPU": 4 * UNIT}, (5, 6, 9))
    taken = []
    for step in steps:
        if step >= 0:
            demand = {"GPU": step, "CPU": step // 4}
            if not ledger.lacking(demand):
                allocation = ledger.take(demand)
                assert sum(units for _, units in allocation.shares) == step
                assert len(allocation.shares) == max(1, step // UNIT)
                taken.append(allocation)
        elif -step - 1 < len(taken):
            ledger.give(taken.pop(-step - 1))
        for device, share in ledger.devices.items():
            used = sum(units for x in taken for held, units in x.shares if held == device)
            assert 0 <= share == UNIT - used
        for name, total in ledger.total.items():
            assert ledger.free[name] == total - sum(x.amounts.get(name, 0) for x in taken)


def test_amounts_are_shown_as_people_write_them():
    assert show("CPU", 5000) == "0.5"
    assert show("CPU", 30000) == "3"
    assert show("memory", (3 << 30) * UNIT) == "3.0 GiB"
    assert show_demand({"CPU": UNIT, "GPU": 2500}) == "CPU: 1, GPU: 0.25"
    assert show_demand({}) == "nothing"


def test_the_configuration_counts_in_the_units_of_the_wire():
    assert config._UNIT == UNIT
