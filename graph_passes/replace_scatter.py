"""Write caches without ScatterND, for providers that have no kernel of it."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from graph_passes.pipeline import graph_pass

_DOMAIN = '<domain: "ai.sambay", opset_import: ["" : 20, "ai.sambay" : 1]>'

# What stands in each slot after the call: token `source` of the call, or what stood there.
_PLACE = f"""
{_DOMAIN}
PlaceTokens (past, new, source) => (present)
{{
    zero = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    two = Constant <value_ints = [2]> ()
    copy = Constant <value_ints = [0, 0]> ()
    rest = Constant <value_ints = [-1]> ()
    around = Constant <value_ints = [1, 3]> ()
    heads = Shape <start = 1, end = 2> (past)
    tokens = Shape <start = 1, end = 2> (new)
    begun = GreaterOrEqual (source, zero)
    within = Less (source, tokens)
    fresh = And (begun, within)
    newest = Sub (tokens, one)
    at_least = Max (source, zero)
    token = Min (at_least, newest)
    index = Unsqueeze (token, two)
    rows = GatherND <batch_dims = 1> (new, index)
    split = Concat <axis = 0> (copy, heads, rest)
    apart = Reshape (rows, split)
    by_head = Transpose <perm = [0, 2, 1, 3]> (apart)
    moved = CastLike (by_head, past)
    written = Unsqueeze (fresh, around)
    present = Where (written, moved, past)
}}
"""

_APPEND = f"""
{_DOMAIN}
AppendKeyValue (past_key, past_value, k, v, past_lengths) => (present_key, present_value)
{{
    zero = Constant <value_int = 0> ()
    step = Constant <value_int = 1> ()
    one = Constant <value_ints = [1]> ()
    size = Shape <start = 2, end = 3> (past_key)
    capacity = Squeeze (size)
    slots = Range (zero, capacity, step)
    past = Unsqueeze (past_lengths, one)
    source = Sub (slots, past)
    present_key = ai.sambay.PlaceTokens (past_key, k, source)
    present_value = ai.sambay.PlaceTokens (past_value, v, source)
}}
"""

# After DifferentialAttention's own nodes. Past is read out of what the attention read, so that
# nothing is written where present and past are one buffer before the attention has read it.
_RING = f"""
{_DOMAIN}
MoveRing (keys, values, past_key, k, v, past_lengths, lengths) => (present_key, present_value)
{{
    zero = Constant <value_int = 0> ()
    step = Constant <value_int = 1> ()
    one = Constant <value_ints = [1]> ()
    first = Constant <value_ints = [0]> ()
    two = Constant <value_ints = [2]> ()
    size = Shape <start = 2, end = 3> (past_key)
    capacity = Squeeze (size)
    slots = Range (zero, capacity, step)
    past = Unsqueeze (past_lengths, one)
    count = Unsqueeze (lengths, one)
    now = Add (past, count)
    newest = Sub (now, step)
    behind = Sub (newest, slots)
    age = Mod (behind, capacity)
    position = Sub (newest, age)
    source = Sub (position, past)
    ring_key = Slice (keys, first, size, two)
    ring_value = Slice (values, first, size, two)
    present_key = ai.sambay.PlaceTokens (ring_key, k, source)
    present_value = ai.sambay.PlaceTokens (ring_value, v, source)
}}
"""


@graph_pass
def replace_scatter(
    model: ir.Model, *, operators: tuple[str, ...] = ("AppendKeyValue", "DifferentialAttention")
) -> None:
    """Give the operators that write caches bodies that choose every slot with Where.

    A step then reads and writes the whole capacity, as ScatterND does on a device that cannot
    write in place. List it before inline_operators.

    Args:
        operators: those that get one.

    Raises:
        ValueError: the body of DifferentialAttention is none this pass knows.
    """
    append, window = (
        ("ai.sambay", name, "") for name in ("AppendKeyValue", "DifferentialAttention")
    )
    found = {key for key in (append, window) if key in model.functions and key[1] in operators}
    for text in (_PLACE, _RING) if found else ():
        function = ir.serde.deserialize_function(onnx.parser.parse_function(text))
        model.functions[function.identifier()] = function
    if append in found:
        proto = onnx.parser.parse_function(_APPEND)
        model.functions[append] = ir.serde.deserialize_function(proto)
    if window in found:
        _replace_ring(model.functions[window])


def _replace_ring(function: ir.Function) -> None:
    names = {value.name: value for value in function.inputs}
    scatters = [node for node in function if node.op_type == "ScatterND"]
    gathers = [node.inputs[2].producer() for node in scatters if node.inputs[2] is not None]
    if len(scatters) != 2 or any(node is None or node.op_type != "GatherND" for node in gathers):
        raise ValueError("replace_scatter: the body of DifferentialAttention is not as expected")
    joined = [node.inputs[0] for node in gathers if node is not None]
    rest = [names[name] for name in ("past_key", "k", "v", "past_lengths", "lengths")]
    move = ir.node("MoveRing", [*joined, *rest], domain="ai.sambay", num_outputs=2)
    function.append(move)
    for scatter, new in zip(scatters, move.outputs, strict=True):
        old = scatter.outputs[0]
        new.name, old.name = old.name, None
        function.outputs[function.outputs.index(old)] = new
    for node in scatters:
        function.remove(node, safe=True)
