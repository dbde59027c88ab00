"""Any processor that ONNX Runtime runs on."""

from __future__ import annotations

from functools import partial

from graph_passes.cleanup import cleanup
from graph_passes.fold_weight_casts import fold_weight_casts
from graph_passes.fold_weight_transposes import fold_weight_transposes
from graph_passes.quantize_embedding import quantize_embedding
from graph_passes.quantize_matmul import quantize_matmul
from graph_passes.read_tied_head_in_place import read_tied_head_in_place
from graph_passes.store_caches_in_float16 import store_caches_in_float16
from graph_passes.use_native_matmul import use_native_matmul
from targets.target import CPU, Target
from targets.weights import SCAN_INPUTS, SHARED_RESULTS

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

INT8 = Target(
    name="cpu-int8",
    summary="8-bit weights: half the size of float16, next to no loss",
    provider=CPU,
    cache="float16",
    passes=(
        store_caches_in_float16,
        cleanup,
        partial(quantize_embedding, bits=8, block_size=32),
        partial(quantize_matmul, bits=8, block_size=32, rules=SCAN_INPUTS),
        fold_weight_casts,
        fold_weight_transposes,
        use_native_matmul,
    ),
)

INT4 = Target(
    name="cpu-int4",
    summary="4-bit weights, 8-bit where it matters most: the smallest and fastest",
    provider=CPU,
    cache="float16",
    passes=(
        store_caches_in_float16,
        cleanup,
        partial(quantize_embedding, bits=8, block_size=32),
        partial(quantize_matmul, bits=4, block_size=32, rules=SCAN_INPUTS + SHARED_RESULTS),
        fold_weight_casts,
        fold_weight_transposes,
        use_native_matmul,
    ),
)

TARGETS = (FP32, INT8, INT4)
