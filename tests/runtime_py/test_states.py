from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime_py.states import BLOCK, find_states, grown_capacity


def tensor(name, shape=("batch", 1), type="tensor(float)"):
    return SimpleNamespace(name=name, shape=shape, type=type)


@given(st.data())
def test_capacity_grows_enough_and_not_beyond_the_limit(data):
    most = data.draw(st.integers(1, 300_000))
    capacity = data.draw(st.integers(0, most))
    needed = data.draw(st.integers(min(capacity + 1, most), most))
    grown = grown_capacity(capacity, needed, most)
    assert grown >= needed
    assert grown % BLOCK == 0
    assert grown < most + BLOCK


def test_token_by_token_each_slot_is_copied_a_few_times_only():
    capacity, copied = 0, 0
    while capacity < 262_144:
        copied += capacity
        capacity = grown_capacity(capacity, capacity + 1, 262_144)
    assert copied <= 5 * 262_144


@pytest.mark.parametrize("type", ["tensor(float)", "tensor(float16)", "tensor(int8)"])
def test_states_have_the_dtype_and_the_sizes_the_model_declares(type):
    shape = ("batch", 2, "capacity", 3)
    inputs = [tensor("input_ids"), tensor("past_key_values.7.key", shape, type)]
    (state,) = find_states(inputs, [tensor("present.7.key")])
    fresh = state.zeros({"batch": 4, "capacity": 256})
    assert fresh.shape == (4, 2, 256, 3)
    assert (
        fresh.dtype
        == {
            "tensor(float)": np.float32,
            "tensor(float16)": np.float16,
            "tensor(int8)": np.int8,
        }[type]
    )
    assert state.grows


def test_a_copy_holds_the_used_slots_and_zeros():
    inputs = [tensor("past_key_values.0.key", ("batch", "capacity"))]
    (state,) = find_states(inputs, [tensor("present.0.key")])
    copy = state.copy(np.ones((1, 4), np.float32), {"batch": 1, "capacity": 6}, used=3)
    assert copy.tolist() == [[1, 1, 1, 0, 0, 0]]


def test_a_state_of_an_unknown_dtype_is_refused():
    with pytest.raises(ValueError, match=r"tensor\(double\)"):
        find_states(
            [tensor("past_key_values.0.key", type="tensor(double)")], [tensor("present.0.key")]
        )
