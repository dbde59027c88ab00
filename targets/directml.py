"""Any graphics processor with DirectX 12, on Windows.

The provider compiles a graph anew for every shape: a program should feed one row, calls of 1 and
of ``sambay.max_tokens`` tokens, and caches of a few fixed sizes, which it can tell the session by
``AddFreeDimensionOverrideByName`` ("tokens", "total", "window", "capacity").
"""

from __future__ import annotations

from functools import partial

from graph_passes.cleanup import cleanup
from graph_passes.compute_in_float16 import compute_in_float16
from graph_passes.fix_dimension import fix_dimension
from graph_passes.inline_operators import inline_operators
from graph_passes.lower_opset import lower_opset
from graph_passes.narrow_mod import narrow_mod
from graph_passes.pipeline import Pass
from graph_passes.replace_scan_loop import replace_scan_loop
from graph_passes.replace_scatter import replace_scatter
from graph_passes.store_caches_in_float16 import store_caches_in_float16
from graph_passes.unpack_embedding import unpack_embedding
from targets.target import Target
from targets.weights import INT4 as INT4_WEIGHTS
from targets.weights import UNQUANTIZED

_PROVIDER = "DmlExecutionProvider"

# No kernels: control flow, ScatterND of version 18, GatherBlockQuantized, Mod of 64 bits.
_BEGIN: tuple[Pass, ...] = (
    store_caches_in_float16,
    partial(replace_scan_loop, max_tokens=64),
    replace_scatter,
    cleanup,
)
_END: tuple[Pass, ...] = (
    compute_in_float16,
    inline_operators,
    narrow_mod,
    partial(fix_dimension, name="batch", size=1),
    partial(lower_opset, version=18),
)

# Captured graphs gave wrong logits with some drivers.
_OPTIONS = {"provider_options": [{"dml": {"enable_graph_capture": "0"}}]}

# ONNX Runtime GenAI gives window layers the full length there: 40 MB each at this one.
_MAX_CONTEXT = 8192

FP16 = Target(
    name="directml-fp16",
    summary="float16 weights and activations, float32 scan, softmax and norms",
    provider=_PROVIDER,
    cache="float16",
    passes=(*_BEGIN, *UNQUANTIZED, *_END),
    max_context=_MAX_CONTEXT,
    session_options=_OPTIONS,
)

INT4 = Target(
    name="directml-int4",
    summary="4-bit weights, 8-bit where it matters most, float16 activations",
    provider=_PROVIDER,
    cache="float16",
    passes=(*_BEGIN, *INT4_WEIGHTS, unpack_embedding, *_END),
    max_context=_MAX_CONTEXT,
    session_options=_OPTIONS,
)

TARGETS = (FP16, INT4)
