"""Arguments of every operator, of any size and cache type."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from export.ops import (
    append_key_value,
    append_quantized_key_value,
    causal_conv_with_state,
    differential_attention,
    differential_cross_attention,
    gated_memory_unit,
    quantized_differential_attention,
    quantized_differential_cross_attention,
    selective_scan,
)
from export.ops.custom_op import CustomOp, Sample
from export.ops.quantized_cells import quantize_heads


@dataclass(frozen=True)
class Sizes:
    """Sizes that mean something to some of the operators.

    Attributes:
        width: channels, or the size of a head.
        taps, states: of the convolution and the scan.
        pairs, group: pairs of key heads, and query heads that read one.
        slots: capacity of a cache.
        depth: tokens before this call, as far as there is room.
        all_seen: every query sees every slot.
    """

    batch: int = 2
    tokens: int = 5
    width: int = 10
    taps: int = 4
    states: int = 16
    pairs: int = 2
    group: int = 2
    slots: int = 40
    depth: int = 7
    all_seen: bool = False

    @property
    def kv_heads(self) -> int:
        return 2 * self.pairs

    @property
    def attributes(self) -> dict[str, int | float]:
        heads = self.kv_heads * self.group
        return {
            "num_heads": heads,
            "num_kv_heads": self.kv_heads,
            "lambda_init": 0.35,
            "window": self.slots + self.tokens if self.all_seen else max(1, self.slots - 3),
        }


@dataclass(frozen=True)
class Case:
    """An operator with one type of cache.

    Attributes:
        cell: dtype of the caches; None where the operator has none.
        shared: inputs whose memory the runtime gives to an output as well.
    """

    op: CustomOp
    make: Callable[[Sizes, torch.dtype], tuple[torch.Tensor, ...]]
    cell: torch.dtype | None
    shared: dict[int, int]
    attributes: tuple[str, ...] = ()

    def sample(self, sizes: Sizes, seed: int = 0) -> Sample:
        torch.manual_seed(seed)
        tensors = self.make(sizes, self.cell or torch.float32)
        return Sample(tensors, {name: sizes.attributes[name] for name in self.attributes})

    def __str__(self) -> str:
        return self.op.name + (f"-{str(self.cell).removeprefix('torch.')}" if self.cell else "")


def _lengths(sizes: Sizes) -> torch.Tensor:
    """Real tokens of each row: all in the first, fewer in others, none in some."""
    lengths = torch.randint(0, sizes.tokens + 1, (sizes.batch,))
    lengths[:1] = sizes.tokens
    return lengths


def _cache(sizes: Sizes, cell: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Key and value, then their scales where there are any."""
    shape = sizes.batch, sizes.kv_heads, sizes.slots, sizes.width
    key, value = torch.randn(shape), torch.randn(shape)
    if cell != torch.int8:
        return key.to(cell), value.to(cell)
    (key, key_scale), (value, value_scale) = quantize_heads(key), quantize_heads(value)
    return key, value, key_scale, value_scale


def _heads(sizes: Sizes, count: int) -> torch.Tensor:
    return torch.randn(sizes.batch, sizes.tokens, count * sizes.width)


def _mixing(sizes: Sizes) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([0.4]), torch.randn(2 * sizes.width)


def _convolution(sizes: Sizes, _: torch.dtype) -> tuple[torch.Tensor, ...]:
    return (
        torch.randn(sizes.batch, sizes.tokens, sizes.width),
        torch.randn(sizes.width, 1, sizes.taps),
        torch.randn(sizes.width),
        torch.randn(sizes.batch, sizes.width, sizes.taps - 1),
        _lengths(sizes),
    )


def _scan(sizes: Sizes, _: torch.dtype) -> tuple[torch.Tensor, ...]:
    return (
        torch.randn(sizes.batch, sizes.tokens, sizes.width),
        torch.randn(sizes.batch, sizes.tokens, sizes.width),
        torch.randn(sizes.width),
        -torch.rand(sizes.width, sizes.states) * 8,
        torch.randn(sizes.batch, sizes.tokens, sizes.states),
        torch.randn(sizes.batch, sizes.tokens, sizes.states),
        torch.randn(sizes.width),
        torch.randn(sizes.batch, sizes.width, sizes.states),
        _lengths(sizes),
    )


def _gate(sizes: Sizes, _: torch.dtype) -> tuple[torch.Tensor, ...]:
    shape = sizes.batch, sizes.tokens, sizes.width
    return torch.randn(shape), torch.randn(shape)


def _window(sizes: Sizes, cell: torch.dtype) -> tuple[torch.Tensor, ...]:
    return (
        _heads(sizes, sizes.kv_heads * sizes.group),
        _heads(sizes, sizes.kv_heads),
        _heads(sizes, sizes.kv_heads),
        *_cache(sizes, cell),
        *_mixing(sizes),
        torch.randint(sizes.slots if sizes.all_seen else 0, sizes.depth + 1, (sizes.batch,)),
        _lengths(sizes),
    )


def _cross(sizes: Sizes, cell: torch.dtype) -> tuple[torch.Tensor, ...]:
    return (
        _heads(sizes, sizes.kv_heads * sizes.group),
        *_cache(sizes, cell),
        *_mixing(sizes),
        torch.randint(
            sizes.slots - 1 if sizes.all_seen else 0, sizes.slots, (sizes.batch, sizes.tokens)
        ),
    )


def _append(sizes: Sizes, cell: torch.dtype) -> tuple[torch.Tensor, ...]:
    room = sizes.slots - sizes.tokens
    assert room >= 0, "an append needs slots for its tokens"
    return (
        *_cache(sizes, cell),
        _heads(sizes, sizes.kv_heads),
        _heads(sizes, sizes.kv_heads),
        torch.randint(0, min(room, sizes.depth) + 1, (sizes.batch,)),
    )


_HEADS = ("num_heads", "num_kv_heads", "lambda_init")
_FLOATS = (torch.float32, torch.float16)
_PLAIN = (
    (differential_attention.OP, _window, {3: 1, 4: 2}, (*_HEADS, "window")),
    (differential_cross_attention.OP, _cross, {}, _HEADS),
    (append_key_value.OP, _append, {0: 0, 1: 1}, ()),
)
_QUANTIZED = (
    (
        quantized_differential_attention.OP,
        _window,
        {3: 1, 4: 2, 5: 3, 6: 4},
        (*_HEADS, "window"),
    ),
    (quantized_differential_cross_attention.OP, _cross, {}, _HEADS),
    (append_quantized_key_value.OP, _append, {0: 0, 1: 1, 2: 2, 3: 3}, ()),
)
CASES = (
    Case(causal_conv_with_state.OP, _convolution, None, {3: 1}),
    Case(selective_scan.OP, _scan, None, {7: 1}),
    Case(gated_memory_unit.OP, _gate, None, {}),
    *(Case(op, make, cell, *rest) for cell in _FLOATS for op, make, *rest in _PLAIN),
    *(Case(op, make, torch.int8, *rest) for op, make, *rest in _QUANTIZED),
)

# What a package for CUDA has in float32 among float16 activations, by name of the operator.
_WIDE = {
    "SelectiveScan": (2, 3, 6, 7),
    "DifferentialAttention": (5, 6),
    "DifferentialCrossAttention": (3, 4),
    "QuantizedDifferentialAttention": (7, 8),
    "QuantizedDifferentialCrossAttention": (5, 6),
}


def as_activations(case: Case, sample: Sample, activation: torch.dtype) -> Sample:
    """The sample as a package has it with these activations; caches stay as they are."""
    caches = case.shared if case.cell else ()
    first = next((i for i, t in enumerate(sample.tensors) if i in caches), 0)
    scales = range(first, first + len(caches))
    wide = {*_WIDE.get(case.op.name, ()), *scales}
    if case.cell and not caches:  # a cross layer reads its cache only
        wide |= set(range(1, _WIDE[case.op.name][0]))
    return Sample(
        tuple(
            tensor.to(activation) if tensor.is_floating_point() and i not in wide else tensor
            for i, tensor in enumerate(sample.tensors)
        ),
        sample.attributes,
    )
