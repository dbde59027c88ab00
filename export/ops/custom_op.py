"""What an operator of domain ``ai.sambay`` consists of, and how it enters a traced graph.

The exporter writes a bare node, so that a native kernel can take it; the body travels as a function
in the same file, so that any other runtime can run it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import onnx
import onnx_ir as ir
import onnxscript
import torch

DOMAIN = onnxscript.values.Opset("ai.sambay", 1)

_SCHEMA = onnx.defs.OpSchema
_TENSOR_TYPES = [
    f"tensor({name})" for name in ("float", "float16", "bfloat16", "double", "int64", "int8")
]


@dataclass(frozen=True)
class Sample:
    """Arguments to try an operator with: the tensors, then the attributes by name."""

    tensors: tuple[torch.Tensor, ...]
    attributes: dict[str, int | float]


@dataclass(frozen=True)
class CustomOp:
    """One operator: torch reference, ONNX body, and what the tests feed it.

    Attributes:
        torch_op: the registered torch operator; calling it runs the reference. Its attributes are
            keyword-only, so that they reach the node by name.
        body: ONNX function with the same inputs, attributes and outputs.
        sample: makes arguments from a seeded generator.
        parts: functions that the body calls; they travel with it.
    """

    torch_op: torch._ops.OpOverload
    body: onnxscript.OnnxFunction
    sample: Callable[[], Sample]
    parts: tuple[onnxscript.OnnxFunction, ...] = ()

    @property
    def name(self) -> str:
        """Operator name in domain ``ai.sambay``."""
        return self.body.name

    def node_factory(self) -> onnxscript.values.Op:
        """What ``torch.onnx.export`` puts in place of the torch operator: a node without a body."""
        schema = _SCHEMA(
            self.name,
            DOMAIN.domain,
            DOMAIN.version,
            inputs=[
                _SCHEMA.FormalParameter(parameter.name, f"T{i}")
                for i, parameter in enumerate(self._parameters(ir.schemas.Parameter))
            ],
            outputs=[
                _SCHEMA.FormalParameter(output.name, f"U{i}")
                for i, output in enumerate(self.body.function_ir.outputs)
            ],
            type_constraints=[
                (letter, _TENSOR_TYPES, "")
                for letter in itertools.chain(
                    (f"T{i}" for i, _ in enumerate(self._parameters(ir.schemas.Parameter))),
                    (f"U{i}" for i, _ in enumerate(self.body.function_ir.outputs)),
                )
            ],
            attributes=[
                _SCHEMA.Attribute(
                    attribute.name, getattr(_SCHEMA.AttrType, attribute.type.name), required=True
                )
                for attribute in self._parameters(ir.schemas.AttributeParameter)
            ],
        )
        return onnxscript.values.Op(DOMAIN, self.name, schema)

    def functions(self) -> Iterable[ir.Function]:
        """Fresh copies of the body and its parts, for one model."""
        for function in (self.body, *self.parts):
            yield ir.serde.deserialize_function(function.to_function_proto())

    def _parameters(self, kind: type) -> list[Any]:
        signature = self.body.op_signature
        assert signature is not None  # onnxscript derives it for every script
        return [p for p in signature.params if isinstance(p, kind)]


def make_trainable(
    torch_op: torch.library.CustomOpDef, reference: Callable[..., Any]
) -> torch.library.CustomOpDef:
    """Give an operator gradients by running its reference again under autograd.

    Costs one more forward pass of the operator and saves only its inputs.
    """

    def setup_context(
        ctx: Any, inputs: tuple, output: Any, keyword_only_inputs: dict | None = None
    ) -> None:
        del output
        ctx.save_for_backward(*inputs)
        ctx.attributes = keyword_only_inputs or {}

    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs = [
            tensor.detach().requires_grad_(needed)
            for tensor, needed in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=True)
        ]
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        with torch.enable_grad():
            outputs = reference(*inputs, **ctx.attributes)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        found = iter(torch.autograd.grad(outputs, wanted, gradients, allow_unused=True))
        return tuple(next(found) if tensor.requires_grad else None for tensor in inputs)

    torch_op.register_autograd(backward, setup_context=setup_context)
    return torch_op
