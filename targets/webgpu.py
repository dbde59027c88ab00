"""A browser's graphics processor, and native programs through the same provider.

Arithmetic of integers (positions, masks, slots) has no kernels there and runs on the processor
beside it; everything of floats runs on the device.
"""

from __future__ import annotations

from functools import partial

from graph_passes.cleanup import cleanup
from graph_passes.compute_in_float16 import compute_in_float16
from graph_passes.inline_operators import inline_operators
from graph_passes.replace_scan_loop import replace_scan_loop
from graph_passes.store_caches_in_float16 import store_caches_in_float16
from graph_passes.unpack_embedding import unpack_embedding
from targets.target import Target
from targets.weights import INT4 as INT4_WEIGHTS

INT4 = Target(
    name="webgpu-int4",
    summary="4-bit weights, 8-bit where it matters most, float16 activations",
    provider="WebGpuExecutionProvider",
    cache="float16",
    passes=(
        store_caches_in_float16,
        # It has no Softplus, and no control flow.
        partial(replace_scan_loop, max_tokens=64, softplus="polynomial"),
        cleanup,
        *INT4_WEIGHTS,
        unpack_embedding,
        compute_in_float16,
        inline_operators,
    ),
    session_options={"provider_options": [{"webgpu": {"enableGraphCapture": "0"}}]},
)

TARGETS = (INT4,)
