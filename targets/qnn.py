"""Qualcomm's NPUs (Hexagon), through QNN.

The compiler takes graphs of fixed size without control flow, and the processor computes in 16 bits.
So a package holds several graphs, cut where sizes begin to grow:

    prefill_embedding, decode_embedding   CPU   embedding, positions, masks
    prefill, decode                       NPU   layers 0..M, keys and values of layer M+1
    cross_decoder                         CPU   attention over the growing cache, all behind it

A prompt's work is in the NPU's graphs, 64 tokens a call: of the graphs behind the cut only the
last token of a call is seen. They read as many bytes a token as the NPU's, and one token at a time
is bound by reading on either processor, so a finer cut (two crossings for each of the cross layers)
would gain little. There the shared cache can grow as the text does.
"""

from __future__ import annotations

from functools import partial

from graph_passes.cleanup import cleanup
from graph_passes.compute_part_in_float16 import compute_part_in_float16
from graph_passes.fix_dimension import fix_dimension
from graph_passes.fold_shapes import fold_shapes
from graph_passes.gather_single_row import gather_single_row
from graph_passes.inline_operators import inline_operators
from graph_passes.keep_part import keep_part
from graph_passes.pack_window_caches import pack_window_caches
from graph_passes.pipeline import Pass
from graph_passes.replace_scan_loop import replace_scan_loop
from graph_passes.replace_scatter import replace_scatter
from graph_passes.set_accuracy_level import set_accuracy_level
from graph_passes.store_caches_in_float16 import store_caches_in_float16
from graph_passes.take_positions import take_positions
from graph_passes.use_native_matmul import use_native_matmul
from targets.target import CPU, Graph, Integers, Target
from targets.weights import INT4, INT8

PROVIDER = "QNNExecutionProvider"
PREFILL = 64  # tokens of a call

_OPTIONS = {"provider_options": [{"qnn": {"backend_type": "htp"}}]}

_BEGIN: tuple[Pass, ...] = (
    store_caches_in_float16,
    partial(replace_scatter, operators=("DifferentialAttention",)),
    cleanup,
)


def _whole(tokens: int) -> tuple[Pass, ...]:
    """What the graphs for calls of so many tokens are cut from."""
    return (
        # The processor's own Softplus is up to 8 % wrong; the polynomial is nearer than float16.
        partial(replace_scan_loop, max_tokens=tokens, softplus="polynomial", degree=5),
        partial(fix_dimension, name="batch", size=1),
        partial(fix_dimension, name="window", size="sliding_window"),
        partial(inline_operators, keep=("AppendKeyValue", "DifferentialCrossAttention")),
        partial(compute_part_in_float16, part="fixed"),
        pack_window_caches,
    )


def _for_calls_of(tokens: int, name: str) -> tuple[Graph, Graph]:
    sized: tuple[Pass, ...] = (
        *_whole(tokens),
        partial(fix_dimension, name="tokens", size=tokens),
        fold_shapes,
        gather_single_row,
    )
    return (
        Graph(
            name=f"{name}_embedding",
            provider=CPU,
            tokens=tokens,
            passes=(
                *sized,
                partial(keep_part, part="tokens"),
                # GenAI counts the tokens of a later prompt wrongly, and so its positions.
                *((partial(take_positions, tokens=tokens),) if tokens > 1 else ()),
            ),
        ),
        Graph(
            name=name,
            provider=PROVIDER,
            tokens=tokens,
            passes=(*sized, partial(keep_part, part="fixed")),
        ),
    )


_GRAPHS = (
    *_for_calls_of(PREFILL, "prefill"),
    *_for_calls_of(1, "decode"),
    Graph(
        name="cross_decoder",
        provider=CPU,
        passes=(
            *_whole(PREFILL),
            partial(keep_part, part="growing"),
            partial(set_accuracy_level, level=4),
            use_native_matmul,
        ),
    ),
)

# For --activations uint16. One scale for a whole tensor loses its small numbers where a few are
# large: those of the residual stream are 50 times the typical one, those of a gated scan 400 times.
_INTEGERS = Integers(
    part="fixed",
    operators=("MatMulNBits", "Add", "Mul", "Sigmoid"),
    islands=(
        "CausalConvWithState",
        "DifferentialAttention",  # with its softmax, pair norm and lambda
        "GatedMemoryUnit",
        "LayerNormalization",
        "MatMul",  # x_proj and dt_proj, whose weights are float
        "SelectiveScan",  # with its softplus
        "residual",
    ),
    wide=("GatedMemoryUnit",),
)

W4A16 = Target(
    name="qnn-npu-w4a16",
    summary="4-bit weights, 8-bit where it matters most, 16-bit float activations",
    provider=PROVIDER,
    cache="float16",
    passes=(*_BEGIN, *INT4),
    session_options=_OPTIONS,
    graphs=_GRAPHS,
    integers=_INTEGERS,
)

W8A16 = Target(
    name="qnn-npu-w8a16",
    summary="8-bit weights, 16-bit float activations",
    provider=PROVIDER,
    cache="float16",
    passes=(*_BEGIN, *INT8),
    session_options=_OPTIONS,
    graphs=_GRAPHS,
    integers=_INTEGERS,
)

TARGETS = (W4A16, W8A16)
