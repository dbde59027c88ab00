import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from runtime_py import InputError, Sampling
from runtime_py.sampling import choose, nucleus

# Few values, so that ties are common.
weights = hnp.arrays(np.float32, st.integers(1, 40), elements=st.sampled_from([0, 0.125, 0.5, 1]))
logits = hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(-90, 90, width=32))
top_ps = st.sampled_from([1e-9, 0.125, 0.5, 0.95, 1.0])


@settings(max_examples=60)
@given(weights.filter(np.any), top_ps)
def test_the_nucleus_is_the_shortest_head_of_the_sorted_weights(weights, top_p):
    order = np.argsort(-weights, kind="stable")
    sums = np.cumsum(weights[order], dtype=np.float64)
    count = int(np.searchsorted(sums, top_p * sums[-1])) + 1
    assert nucleus(weights, top_p).tolist() == sorted(order[:count].tolist())


@settings(max_examples=60)
@given(logits, top_ps, st.integers(0, 5), st.sampled_from([1e-40, 0.6, 1e30]))
def test_only_tokens_of_the_nucleus_are_chosen(logits, top_p, seed, temperature):
    sampling = Sampling(temperature, top_p, seed)
    token = choose(logits, sampling, sampling.random())
    with np.errstate(over="ignore"):
        scaled = (logits - logits.max()) / np.float32(max(temperature, 1e-30))
    assert token in nucleus(np.exp(scaled), top_p)


@given(hnp.arrays(np.float32, st.integers(1, 9), elements=st.integers(-2, 2)))
def test_greedy_takes_the_lowest_of_the_most_likely(logits):
    greedy = Sampling(0)
    token = choose(logits, greedy, greedy.random())
    assert token == min(np.flatnonzero(logits == logits.max()))


def test_tokens_come_as_often_as_they_are_likely():
    wanted = np.array([0.5, 0.3, 0.2])
    sampling = Sampling(temperature=1, top_p=1, seed=3)
    random = sampling.random()
    logits = np.log(wanted).astype(np.float32)
    counts = np.bincount([choose(logits, sampling, random) for _ in range(4000)])
    np.testing.assert_allclose(counts / 4000, wanted, atol=0.03)


def test_a_token_ruled_out_is_never_chosen():
    logits = np.array([-np.inf, 0, -np.inf], np.float32)
    sampling = Sampling(temperature=5, top_p=1, seed=0)
    random = sampling.random()
    assert {choose(logits, sampling, random) for _ in range(50)} == {1}


def test_choosing_leaves_the_logits_as_they_are():
    logits = np.arange(5, dtype=np.float32)
    choose(logits, Sampling(), Sampling().random())
    assert logits.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_broken_logits_are_named(broken):
    with pytest.raises(ArithmeticError, match="logit 1"):
        choose(np.array([0, broken], np.float32), Sampling(), Sampling().random())


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_p": 1.5},
        {"top_p": float("nan")},
        {"seed": -1},
    ],
    ids=str,
)
def test_a_setting_without_meaning_is_refused_when_it_is_made(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        Sampling(**wrong)
