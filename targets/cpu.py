"""Any processor that ONNX Runtime runs on."""

from __future__ import annotations

from functools import partial
from typing import Any

from graph_passes.cleanup import cleanup
from graph_passes.fold_weight_casts import fold_weight_casts
from graph_passes.fold_weight_transposes import fold_weight_transposes
from graph_passes.pipeline import Pass
from graph_passes.quantize_embedding import quantize_embedding
from graph_passes.quantize_matmul import quantize_matmul
from graph_passes.read_tied_head_in_place import read_tied_head_in_place
from graph_passes.recipe import Rule, WeightFormat
from graph_passes.store_caches_in_float16 import store_caches_in_float16
from graph_passes.use_native_matmul import use_native_matmul
from targets.target import CPU, Target
from targets.weights import SCAN_INPUTS, SHARED_RESULTS, rules

FP32 = Target(
    name="cpu-fp32",
    summary="float32 throughout: the reference",
    provider=CPU,
    passes=(
        cleanup,
        fold_weight_casts,
        read_tied_head_in_place,
        fold_weight_transposes,
    ),
)

# 8 bits are so fine that a scale serves 128 weights; 4 bits want one for 32. Step sizes of the scan
# are computed in full precision, and their 160 inputs fill no blocks of 128.
_INT8: dict[str, Any] = {"bits": 8, "block_size": 128, "scale_type": "float16"}
_INT4: dict[str, Any] = {"bits": 4, "block_size": 32, "scale_type": "float16"}
_SCAN = rules(SCAN_INPUTS, WeightFormat(bits=8, block_size=32, scale_type="float16"))


def _quantized(settings: dict[str, Any], kept: tuple[Rule, ...]) -> tuple[Pass, ...]:
    return (
        store_caches_in_float16,
        cleanup,
        partial(quantize_embedding, **_INT8),
        partial(quantize_matmul, **settings, rules=_SCAN + kept, exact=SCAN_INPUTS),
        use_native_matmul,
        fold_weight_casts,
        fold_weight_transposes,
    )


INT8 = Target(
    name="cpu-int8",
    summary="8-bit weights: half the size of float16, next to no loss",
    provider=CPU,
    cache="float16",
    passes=_quantized(_INT8, ()),
)

INT4 = Target(
    name="cpu-int4",
    summary="4-bit weights, 8-bit where it matters most: the smallest and fastest",
    provider=CPU,
    cache="float16",
    passes=_quantized(_INT4, rules(SHARED_RESULTS, WeightFormat(**_INT8))),
)

TARGETS = (FP32, INT8, INT4)
