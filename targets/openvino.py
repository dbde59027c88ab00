"""Processors, graphics processors and NPUs of Intel, through OpenVINO."""

from __future__ import annotations

from functools import partial

from graph_passes.cleanup import cleanup
from graph_passes.inline_operators import inline_operators
from graph_passes.replace_integer_clip import replace_integer_clip
from graph_passes.replace_scan_loop import replace_scan_loop
from graph_passes.unpack_embedding import unpack_embedding
from targets.target import Target
from targets.weights import INT4 as INT4_WEIGHTS

INT4 = Target(
    name="openvino-int4",
    summary="4-bit weights, 8-bit where it matters most, float32 activations",
    provider="OpenVINOExecutionProvider",
    passes=(
        partial(replace_scan_loop, max_tokens=64),  # it takes no Scan
        cleanup,
        *INT4_WEIGHTS,
        unpack_embedding,
        inline_operators,
        replace_integer_clip,
    ),
    session_options={"provider_options": [{"OpenVINO": {"device_type": "CPU"}}]},
)

TARGETS = (INT4,)
