"""Graphics processors of NVIDIA.

The operators stay nodes of our domain with their bodies, so that native kernels can take them; the
bodies are such that ONNX Runtime runs all of them on the device, at one fixed shape a step, as
capturing a CUDA graph needs.
"""

from __future__ import annotations

from functools import partial

from graph_passes.cleanup import cleanup
from graph_passes.compute_in_float16 import compute_in_float16
from graph_passes.lower_opset import lower_opset
from graph_passes.pipeline import Pass
from graph_passes.replace_scan_loop import replace_scan_loop
from graph_passes.send_sizes_to_device import send_sizes_to_device
from graph_passes.store_caches_in_float16 import store_caches_in_float16
from targets.target import CUDA, Target
from targets.weights import INT4 as INT4_WEIGHTS
from targets.weights import UNQUANTIZED

_BEGIN: tuple[Pass, ...] = (
    store_caches_in_float16,
    partial(replace_scan_loop, max_tokens=128),
    cleanup,
)

# 18: the provider's kernels of ReduceMax, ReduceMin and Pad are of that version.
_END: tuple[Pass, ...] = (
    compute_in_float16,
    partial(lower_opset, version=18),
    send_sizes_to_device,
)

_OPTIONS = {
    # The graph can be captured; "0" until a GPU has confirmed the tokens.
    "provider_options": [{"cuda": {"enable_cuda_graph": "0"}}],
    # The fast kernels for symmetric 4- and 8-bit blocks are off unless asked for.
    "ep.cuda.fpa_intb_gemm": "1",
}

FP16 = Target(
    name="cuda-fp16",
    summary="float16 weights and activations, float32 scan: next to no loss",
    provider=CUDA,
    cache="float16",
    passes=(*_BEGIN, *UNQUANTIZED, *_END),
    session_options=_OPTIONS,
)

INT4 = Target(
    name="cuda-int4",
    summary="4-bit weights, 8-bit where it matters most, float16 activations",
    provider=CUDA,
    cache="float16",
    passes=(*_BEGIN, *INT4_WEIGHTS, *_END),
    session_options=_OPTIONS,
)

TARGETS = (FP16, INT4)
