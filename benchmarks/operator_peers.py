"""The scan and the convolution against ONNX Runtime's own operators, at the published shape.

    python -m benchmarks.operator_peers [--tokens 1,512] [--blocks 3] [--threads 2] [--json FILE]

`LinearAttention` computes a Mamba-1 scan exactly with a head for every channel: keys B and queries
C are repeated for all of them, values have one element. Each peer takes the very inputs of our
operator and its results are compared before anything is timed; `node alone` is given what the
nodes around it would have computed, for nothing. In every block each of them has a session, is
timed and dropped: idle sessions disturb each other by spinning.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe_machine
from benchmarks.operators import (
    CHANNELS,
    STATES,
    TYPES,
    Call,
    calls,
    make_model,
    measure,
    open_session,
)

BOUND = 1e-4  # of the largest value: both sum in float32, in another order
STANDARD, MICROSOFT = "", "com.microsoft"
GATED = {"kv_num_heads": CHANNELS, "update_rule": "gated", "scale": 1.0}
X, DT, DT_BIAS, A, B, C, D, STATE = (f"in{i}" for i in range(8))

Form = tuple[Call, bytes]  # what is bound, and the model that takes it


@dataclass(frozen=True)
class Peer:
    """Another way to compute what one of our operators computes.

    Attributes:
        form: from our call to the peer's.
    """

    operator: str
    name: str
    form: Callable[[Call], Form]


def _model(nodes: Sequence[onnx.NodeProto], call: Call, constants: dict[str, Any]) -> bytes:
    value = helper.make_tensor_value_info
    inputs = [value(f"in{i}", TYPES[a.dtype], a.shape) for i, a in enumerate(call.inputs)]
    outputs = [value(f"out{i}", TYPES[np.dtype(np.float32)], None) for i in range(2)]
    kept = [numpy_helper.from_array(np.array(each), name) for name, each in constants.items()]
    graph = helper.make_graph(list(nodes), "peer", inputs, outputs, kept)
    imports = [helper.make_opsetid(STANDARD, 27), helper.make_opsetid(MICROSOFT, 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=13)
    return bytes(model.SerializeToString())


def _node(kind: str, inputs: str, outputs: str, **settings: Any) -> onnx.NodeProto:
    return helper.make_node(kind, inputs.split(), outputs.split(), **settings)


def _apart(call: Call) -> Call:
    """The same call with its new state in memory of its own."""
    y, state = call.outputs
    shape = call.inputs[state].shape if isinstance(state, int) else state[0]
    return replace(call, outputs=(y, (shape, np.float32)))


def linear_attention(domain: str, repeated: bool, call: Call) -> Form:
    """SelectiveScan by LinearAttention.

    Args:
        domain: whose operator.
        repeated: B and C once for every channel, as the operator of opset 27 must have them; the
            other one can share them.
        call: of SelectiveScan.
    """
    wide = [1, call.tokens, CHANNELS * STATES]
    constants = {"wide": wide, "last": [-1]} | ({"every": [1, 1, CHANNELS]} if repeated else {})
    key, query = ("key", "query") if repeated else (B, C)
    tiles = [_node("Tile", f"{B} every", "key"), _node("Tile", f"{C} every", "query")]
    heads = CHANNELS if repeated else 1
    settings = {**GATED, "q_num_heads": heads, "domain": domain}
    nodes = [
        _node("Add", f"{DT} {DT_BIAS}", "biased"),
        _node("Softplus", "biased", "step"),
        _node("Unsqueeze", "step last", "column"),
        _node("Mul", f"column {A}", "powers"),  # [1, tokens, channels, states]
        _node("Reshape", "powers wide", "decay"),
        _node("Mul", f"step {X}", "value"),
        *(tiles if repeated else []),
        _node("Unsqueeze", f"{STATE} last", "past"),
        _node("LinearAttention", f"{query} {key} value past decay", "read present", **settings),
        _node("Mul", f"{X} {D}", "skip"),
        _node("Add", "read skip", "out0"),
        _node("Squeeze", "present last", "out1"),
    ]
    return _apart(call), _model(nodes, call, constants)


def linear_attention_alone(call: Call) -> Form:
    """The node of opset 27, given its inputs as it wants them: no softplus, product or skip."""
    x, dt, dt_bias, a, b, c, _, state, _ = call.inputs
    step = np.logaddexp(dt + dt_bias, np.float32(0))
    wide = (1, call.tokens, CHANNELS * STATES)
    inputs = (
        np.tile(c, (1, 1, CHANNELS)),
        np.tile(b, (1, 1, CHANNELS)),
        step * x,
        state[..., None],
        (step[..., None] * a).reshape(wide),
    )
    outputs = ((x.shape, np.float32), (inputs[3].shape, np.float32))
    alone = replace(call, inputs=inputs, outputs=outputs)
    names = " ".join(f"in{i}" for i in range(5))
    settings = {**GATED, "q_num_heads": CHANNELS}
    return alone, _model([_node("LinearAttention", names, "out0 out1", **settings)], alone, {})


def standard_convolution(call: Call) -> Form:
    """Of opset 27: channels before tokens, so it stands between two transpositions."""
    swap = {"perm": [0, 2, 1]}
    nodes = [
        _node("Transpose", "in0", "x", **swap),
        _node("CausalConvWithState", "x in1 in2 in3", "y out1", activation="silu"),
        _node("Transpose", "y", "out0", **swap),
    ]
    return _apart(call), _model(nodes, call, {})


def channels_last_convolution(call: Call) -> Form:
    """Of com.microsoft: as our own, but for the state, which is small and is turned around."""
    swap = {"perm": [0, 2, 1]}
    settings = {"activation": "silu", "channels_last": 1, "domain": MICROSOFT}
    nodes = [
        _node("Transpose", "in3", "past", **swap),
        _node("CausalConvWithState", "in0 in1 in2 past", "out0 present", **settings),
        _node("Transpose", "present", "out1", **swap),
    ]
    return _apart(call), _model(nodes, call, {})


PEERS = (
    Peer("SelectiveScan", "LinearAttention", partial(linear_attention, STANDARD, True)),
    Peer("SelectiveScan", "LinearAttention, node alone", linear_attention_alone),
    Peer(
        "SelectiveScan",
        "com.microsoft.LinearAttention, shared keys",
        partial(linear_attention, MICROSOFT, False),
    ),
    Peer("CausalConvWithState", "CausalConvWithState", standard_convolution),
    Peer(
        "CausalConvWithState",
        "com.microsoft.CausalConvWithState, channels last",
        channels_last_convolution,
    ),
)


def largest_difference(call: Call, peer: Peer, threads: int) -> float:
    """Of the peer's results from ours, relative to the largest of each tensor.

    Raises:
        ArithmeticError: it is more than the bound, so the two compute different things.
    """
    theirs, model = peer.form(call)
    ours = _run(call, make_model(call), threads)
    found = _run(theirs, model, threads)
    if theirs.inputs is not call.inputs:  # the node alone has no skip
        ours[0] = ours[0] - call.inputs[6] * call.inputs[0]
    worst = 0.0
    for wanted, got in zip(ours, found, strict=True):
        difference = np.abs(got.reshape(wanted.shape) - wanted).max() / np.abs(wanted).max()
        worst = max(worst, float(difference))
    if not worst <= BOUND:
        raise ArithmeticError(
            f"{peer.name} differs from {call.name} by {worst:.2g} of the largest value; "
            f"expected at most {BOUND}"
        )
    return worst


def _run(call: Call, model: bytes, threads: int) -> list[np.ndarray]:
    feeds = {f"in{i}": array for i, array in enumerate(call.inputs)}
    return list(open_session(model, threads).run(None, feeds))


def compare(call: Call, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each peer of an operator."""
    peers = [peer for peer in PEERS if peer.operator == call.name]
    differences = {peer.name: largest_difference(call, peer, options.threads) for peer in peers}
    forms = {"": (call, make_model(call))} | {peer.name: peer.form(call) for peer in peers}
    taken: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(options.blocks):
        for name, (form, model) in forms.items():
            taken[name] += measure(form, options.threads, options.seconds, model)
    figures = {
        name: {"min_ms": round(min(each) * 1e3, 4), "median_ms": round(_median(each) * 1e3, 4)}
        for name, each in taken.items()
    }
    return [
        {
            "operator": call.name,
            "tokens": call.tokens,
            "peer": peer.name,
            "ours": figures[""],
            "theirs": figures[peer.name],
            "times_faster_min": round(min(taken[peer.name]) / min(taken[""]), 2),
            "times_faster_median": round(_median(taken[peer.name]) / _median(taken[""]), 2),
            "largest_difference": float(f"{differences[peer.name]:.2g}"),
        }
        for peer in peers
    ]


def _show(machine: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    console = Console(stderr=True)
    console.print(machine)
    for (name, tokens), group in groupby(rows, key=lambda row: (row["operator"], row["tokens"])):
        peers = list(group)
        table = Table("", "min ms", "median ms", "x: min", "median", "difference")
        table.title = f"{name}, {tokens} tokens"
        ours = peers[0]["ours"]
        table.add_row(name, str(ours["min_ms"]), str(ours["median_ms"]))
        for row in peers:
            values = [row["peer"], *row["theirs"].values(), row["times_faster_min"]]
            table.add_row(
                *map(str, [*values, row["times_faster_median"], row["largest_difference"]])
            )
        console.print(table)


def _median(seconds: list[float]) -> float:
    return float(np.median(seconds))


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.operator_peers", description=__doc__
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--tokens", default="1,512")
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each in one block")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    machine = describe_machine(options.threads)
    rows = []
    wanted = {peer.operator for peer in PEERS}
    lengths = [int(part) for part in options.tokens.split(",")]
    for call in (each for each in calls(lengths) if each.name in wanted):
        rows += compare(call, options)
    _show(machine, rows)
    if options.json:
        result = {"machine": machine, "blocks": options.blocks, "peers": rows}
        options.json.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
