"""How weights are stored, whatever runs them: parts that recipes share."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from graph_passes.fold_weight_casts import fold_weight_casts
from graph_passes.fold_weight_transposes import fold_weight_transposes
from graph_passes.pipeline import Pass
from graph_passes.quantize_embedding import quantize_embedding
from graph_passes.quantize_matmul import quantize_matmul
from graph_passes.read_tied_head_in_place import read_tied_head_in_place
from graph_passes.recipe import Rule, Storage

# What steers the scan: small (1 % of the weights), and an error in a step size lasts.
SCAN_INPUTS = ("*.x_proj.*", "*.dt_proj.*")

# The two layers whose results every later layer reads: the memory, the shared keys and values.
SHARED_RESULTS = ("*.layers.{memory_layer}.attn.*", "*.layers.{shared_layer}.attn.*")


def rules(patterns: Iterable[str], storage: Storage) -> tuple[Rule, ...]:
    """The same storage for several patterns."""
    return tuple((pattern, storage) for pattern in patterns)


UNQUANTIZED: tuple[Pass, ...] = (
    fold_weight_casts,
    read_tied_head_in_place,
    fold_weight_transposes,
)


def _in_blocks(bits: int, kept: tuple[Rule, ...] = ()) -> tuple[Pass, ...]:
    """Products in the activations' own type: what a GPU or an NPU computes fastest.

    Symmetric blocks of 32 with scales [rows, blocks] are the form that every provider's kernels
    take.
    """
    return (
        partial(quantize_embedding, bits=8, block_size=32, accuracy_level=0),
        partial(
            quantize_matmul,
            bits=bits,
            block_size=32,
            accuracy_level=0,
            rules=rules(SCAN_INPUTS, None) + kept,
        ),
        fold_weight_casts,
        fold_weight_transposes,
    )


INT4 = _in_blocks(4, rules(SHARED_RESULTS, 8))
INT8 = _in_blocks(8)
