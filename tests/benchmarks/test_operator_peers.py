"""What the native operators are timed against computes the same."""

from dataclasses import replace

import pytest

from benchmarks.operator_peers import PEERS, Peer, largest_difference, linear_attention
from benchmarks.operators import calls
from runtime_py.native import library_path

pytestmark = pytest.mark.skipif(library_path() is None, reason="needs the native operators")
CALLS = {call.name: call for call in calls([3])}


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_a_peer_computes_what_our_operator_computes(peer: Peer) -> None:
    assert 0 < largest_difference(CALLS[peer.operator], peer, threads=1) < 1e-5


def test_a_peer_that_computes_something_else_is_not_timed() -> None:
    call = CALLS["SelectiveScan"]
    other = replace(call, inputs=tuple(-each for each in call.inputs[:-1]) + call.inputs[-1:])
    stranger = Peer(call.name, "negated", lambda _: linear_attention("", True, other))
    with pytest.raises(ArithmeticError, match="negated differs from SelectiveScan"):
        largest_difference(call, stranger, threads=1)
