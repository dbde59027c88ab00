"""From a checkpoint to its ONNX graph: traced without weights, weights bound by name afterwards.

A weight is never in memory here: parameters are fake while tracing, and then initializers that
point into the safetensors files.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

import onnx_ir as ir
import onnx_ir.passes.common
import onnxscript.optimizer
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from export.checkpoint import Checkpoint
from export.model import SambaY, States
from export.ops import OPS
from export.ops.custom_op import DOMAIN
from export.states import all_states
from export.weights import fake_weights

OPSET = 20  # the newest that DirectML runs
_SOURCE = "sambay.source"  # on a weight until it is bound: tensor of the checkpoint, first row, end


class TraceError(RuntimeError):
    """The traced graph is not what the contract says: a defect here or a changed exporter."""


class _Traced(nn.Module):
    """The call as the graph makes it: positional tensors in, a flat tuple out."""

    def __init__(self, model: SambaY, all_logits: bool) -> None:
        super().__init__()
        self.sambay, self.all_logits = model, all_logits

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, states: States
    ) -> tuple[Tensor, ...]:
        logits, present, hidden = self.sambay(
            input_ids, attention_mask, states, all_logits=self.all_logits
        )
        return (logits, *(tensor for pair in present for tensor in pair), *hidden)


def trace(checkpoint: Checkpoint, *, all_logits: bool = False) -> ir.Model:
    """Trace a checkpoint's model, see docs/architecture.md for the graph.

    Args:
        all_logits: every layer sees every token; logits of all tokens and each layer's output.

    Raises:
        TraceError: the exporter made something else than the contract.
    """
    config = checkpoint.config
    states = all_states(config)
    mode = FakeTensorMode()
    model = _Traced(fake_weights(checkpoint, mode), all_logits)
    tokens, total, window, capacity = (
        5,
        11,
        config.sliding_window + 3,
        17,
    )  # any sizes, all different
    with mode:
        ids = torch.zeros(2, tokens, dtype=torch.int64)
        mask = torch.ones(2, total, dtype=torch.int64)
        pairs = model.sambay.initial_states(2, capacity=capacity, window=window)
    axes = {name: torch.export.Dim(name) for name in ("batch", "window", "capacity")}
    flat = [{n: axes[axis] for n, axis in enumerate(s.shape) if axis in axes} for s in states]
    hidden = [f"hidden_states.{i}" for i in range(config.num_hidden_layers)] if all_logits else []
    with _quiet_exporter(), torch.no_grad():
        program = torch.onnx.export(
            model,
            (ids, mask, pairs),
            dynamo=True,
            optimize=False,  # it needs real weights and loses their names
            opset_version=OPSET,
            verbose=False,
            input_names=["input_ids", "attention_mask", *(state.past for state in states)],
            output_names=["logits", *(state.present for state in states), *hidden],
            dynamic_shapes={
                "input_ids": {0: axes["batch"], 1: torch.export.Dim("tokens")},
                "attention_mask": {0: axes["batch"], 1: torch.export.Dim("total")},
                "states": list(zip(flat[0::2], flat[1::2], strict=True)),
            },
            custom_translation_table={op.torch_op: op.node_factory() for op in OPS},
        )
    if program is None:
        raise TraceError("torch.onnx.export returned no program")
    traced = program.model
    _rename_weights(traced)
    _fold_constants(traced)
    _split_rows(traced)
    ir.passes.common.RemoveUnusedNodesPass()(traced)
    _bind_weights(traced, checkpoint)
    _attach_bodies(traced)
    traced.graph.name = "sambay"
    traced.producer_name = "phi4export"
    traced.metadata_props.update(
        {
            "sambay.version": "1",
            "sambay.config": config.to_json(),
            "sambay.logits": "all" if all_logits else "last",
        }
    )
    return traced


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keep the exporter's notes about other packages and axis names off the screen."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _fold_constants(model: ir.Model) -> None:
    """Fold the exporter's chains of constants; nodes that read a weight are left alone."""
    weights = {value for value in model.graph.initializers.values() if _SOURCE in value.meta}
    onnxscript.optimizer.fold_constants(
        model,
        # None: the folder's own limits decide
        should_fold=lambda node: False if weights.intersection(node.inputs) else None,
    )


def _rename_weights(model: ir.Model) -> None:
    """Give parameters the checkpoint's names, without the wrapper's; note which rows they are."""
    for name, value in list(model.graph.initializers.items()):
        value.name = name.removeprefix("sambay.")
        value.meta[_SOURCE] = (value.name, 0, _sizes(value)[0])


def _split_rows(model: ir.Model) -> None:
    """Turn ``Slice(weight)`` along the rows into a weight of its own: the same bytes, no node.

    Layer M+1 projects queries for fewer tokens than keys and values, from one stored matrix.
    """
    initializers = model.graph.initializers
    for node in list(model.graph):
        weight = node.inputs[0] if node.op_type == "Slice" else None
        if weight is None or not weight.is_initializer():
            continue
        start, stop, axis, *step = (_constant(value) for value in node.inputs[1:])
        if axis != 0 or step not in ([], [1]):
            raise TraceError(f"{node.name} slices {weight.name!r} along axis {axis}, expected rows")
        rows, *others = _sizes(weight)
        stop = min(stop, rows)
        name = f"{weight.name}.rows_{start}_{stop}"
        if name not in initializers:
            shape = ir.Shape([stop - start, *others])
            part = ir.Value(name=name, shape=shape, type=weight.type)
            part.const_value = weight.const_value  # until the weights are bound
            part.meta[_SOURCE] = (weight.name, start, stop)
            initializers[name] = part
        node.outputs[0].replace_all_uses_with(initializers[name])
        model.graph.remove(node, safe=True)


def _constant(value: ir.Value | None) -> int:
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    if tensor is None or tensor.size != 1:
        raise TraceError(f"a Slice of a weight has bounds that are not constant: {value}")
    return int(tensor.numpy().item())


def _sizes(value: ir.Value) -> list[int]:
    if value.shape is None:
        raise TraceError(f"{value.name!r} was traced without a shape")
    return [int(size) for size in value.shape.numpy()]


def _bind_weights(model: ir.Model, checkpoint: Checkpoint) -> None:
    """Point every weight at its bytes in the checkpoint."""
    used = set()
    for name_in_graph, value in model.graph.initializers.items():
        if _SOURCE not in value.meta:
            continue  # a constant of the graph
        name, start, stop = value.meta.pop(_SOURCE)
        if name not in checkpoint.tensors:
            raise TraceError(f"initializer {value.name!r} is no tensor of the checkpoint")
        tensor = checkpoint.tensors[name].rows(start, stop).to_ir()
        tensor.name = name_in_graph
        if tensor.dtype != value.dtype or list(tensor.shape) != _sizes(value):
            raise TraceError(f"{value.name!r}: traced as {value}, stored as {tensor}")
        value.const_value = tensor
        used.add(name)
    if unused := set(checkpoint.tensors) - used:
        raise TraceError(f"the graph does not use {sorted(unused)[:5]}")


def _attach_bodies(model: ir.Model) -> None:
    """Put the body of every operator beside the graph: a pass may exchange one for another."""
    for op in OPS:
        for function in op.functions():
            model.functions[function.identifier()] = function
    model.opset_imports[DOMAIN.domain] = DOMAIN.version
