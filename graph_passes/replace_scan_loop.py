"""Give SelectiveScan a body without control flow, for providers that cannot run ONNX Scan."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from graph_passes.pipeline import graph_pass

MAX_TOKENS = "sambay.max_tokens"  # metadata: most tokens of one call

_HEAD = """
<domain: "ai.sambay", opset_import: ["" : 20]>
SelectiveScan (x, dt, dt_bias, A, B, C, D, past_state, lengths) => (y, present_state)
{{
    zero = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    two = Constant <value_ints = [2]> ()
    three = Constant <value_ints = [3]> ()
    trailing = Constant <value_ints = [1, 2]> ()
    last = Constant <value_ints = [-1]> ()
    end = Constant <value_ints = [9223372036854775807]> ()
    none = Constant <value = float {{0}}> ()
    full = Constant <value = float {{1}}> ()
    tokens = Shape <start = 1, end = 2> (x)
    every = Constant <value_ints = [{every}]> ()
    offsets = Slice (every, zero, tokens)
    count = Unsqueeze (lengths, one)
    real = Less (offsets, count)
    real_wide = Cast <to = 1> (real)
    mask = Unsqueeze (real_wide, two)
    x_wide = Cast <to = 1> (x)
    dt_wide = Cast <to = 1> (dt)
    bias = Cast <to = 1> (dt_bias)
    raw = Add (dt_wide, bias)
    {softplus}
    delta = Mul (positive, mask)
    drive = Mul (delta, x_wide)
    rate = Cast <to = 1> (A)
    B_wide = Cast <to = 1> (B)
    C_wide = Cast <to = 1> (C)
    D_wide = Cast <to = 1> (D)
    past_wide = Cast <to = 1> (past_state)
    delta_column = Unsqueeze (delta, three)
    exponent = Mul (delta_column, rate)
    decay_0 = Exp (exponent)
    drive_column = Unsqueeze (drive, three)
    B_row = Unsqueeze (B_wide, two)
    state_0 = Mul (drive_column, B_row)
"""

_SOFTPLUS = {
    "operator": "positive = Softplus (raw)",
    # relu(x) + log1p(u), u = exp(-|x|); {log1p} is a polynomial on [0, 1]
    "polynomial": """floor = Relu (raw)
    size = Abs (raw)
    below = Neg (size)
    u = Exp (below)
    {log1p}
    positive = Add (floor, log1p)""",
}

# Combines each token's step with that of `shift` tokens before: afterwards both reach twice as far.
_STEP = """
    shift_{k} = Constant <value_int = {shift}> ()
    moved_{k} = Sub (offsets, shift_{k})
    source_{k} = Max (moved_{k}, zero)
    inside_{k} = GreaterOrEqual (offsets, shift_{k})
    there_{k} = Unsqueeze (inside_{k}, trailing)
    state_source_{k} = Gather <axis = 1> (state_{k}, source_{k})
    state_before_{k} = Where (there_{k}, state_source_{k}, none)
    carried_{k} = Mul (decay_{k}, state_before_{k})
    state_{next} = Add (state_{k}, carried_{k})
    decay_source_{k} = Gather <axis = 1> (decay_{k}, source_{k})
    decay_before_{k} = Where (there_{k}, decay_source_{k}, full)
    decay_{next} = Mul (decay_{k}, decay_before_{k})
"""

_TAIL = """
    past_row = Unsqueeze (past_wide, one)
    past_part = Mul (decay_{k}, past_row)
    states = Add (state_{k}, past_part)
    C_column = Unsqueeze (C_wide, three)
    read = MatMul (states, C_column)
    scanned = Squeeze (read, three)
    skip = Mul (D_wide, x_wide)
    y_wide = Add (scanned, skip)
    y = CastLike (y_wide, x)
    newest = Slice (states, last, end, one)
    present_state = Squeeze (newest, one)
}}
"""


@graph_pass
def replace_scan_loop(
    model: ir.Model, *, max_tokens: int, softplus: str = "operator", degree: int = 9
) -> None:
    """Put a body without Scan in the place of SelectiveScan's own; the operator stays.

    A step of the recurrence h_t = a_t h_{t-1} + b_t is the pair (a_t, b_t). Two neighbours combine
    to (a_t a_s, b_t + a_t b_s), which is associative, so log2(max_tokens) rounds of combining each
    token with the one 1, 2, 4, ... before give all of them. Every decay is at most 1: nothing
    overflows. It costs about 5 log2(max_tokens) operators on [batch, tokens, inner, states].

    Metadata ``sambay.max_tokens`` tells the runtime; a longer call fails in ONNX Runtime, at the
    mask, rather than being cut.

    Args:
        max_tokens: most tokens of one call, a power of 2; 1 is a body of a single step.
        softplus: "operator"; or "polynomial", for providers that have none or a bad one.
        degree: of that polynomial; 9 is 2e-8 off, 5 is 9e-6 off, enough for float16.

    Raises:
        ValueError: max_tokens is no power of 2, or softplus is neither.
    """
    if softplus not in _SOFTPLUS:
        raise ValueError(f"replace_scan_loop: softplus is {softplus!r}, not {list(_SOFTPLUS)}")
    if max_tokens < 1 or max_tokens & (max_tokens - 1):
        raise ValueError(f"replace_scan_loop: max_tokens is {max_tokens}, expected 1, 2, 4, ...")
    found = ("ai.sambay", "SelectiveScan", "")
    if found in model.functions:
        body = _body(max_tokens, softplus, degree)
        model.functions[found] = ir.serde.deserialize_function(body)
    model.metadata_props[MAX_TOKENS] = str(max_tokens)


def _body(max_tokens: int, softplus: str, degree: int) -> onnx.FunctionProto:
    rounds = max_tokens.bit_length() - 1
    text = _HEAD.format(
        every=", ".join(map(str, range(max_tokens))),
        softplus=_SOFTPLUS[softplus].format(log1p=_log1p(degree)),
    )
    for k in range(rounds):
        text += _STEP.format(k=k, next=k + 1, shift=1 << k)
    # The last round's decays are needed for the past, so no round is left out.
    return onnx.parser.parse_function(text + _TAIL.format(k=rounds))


def _log1p(degree: int) -> str:
    """Nodes that compute log1p of u in [0, 1] by Horner's rule."""
    nodes = np.cos(np.pi * (np.arange(64) + 0.5) / 64) / 2 + 0.5
    fit = np.polynomial.Polynomial.fit(nodes, np.log1p(nodes) / nodes, degree).convert()
    *lower, value = fit.coef
    lines = [f"p_{degree} = Constant <value = float {{{value:.9g}}}> ()"]
    for power in range(degree - 1, -1, -1):
        lines += [
            f"c_{power} = Constant <value = float {{{lower[power]:.9g}}}> ()",
            f"m_{power} = Mul (p_{power + 1}, u)",
            f"p_{power} = Add (m_{power}, c_{power})",
        ]
    return "\n    ".join([*lines, "log1p = Mul (p_0, u)"])
