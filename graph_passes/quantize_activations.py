"""Compute linear layers and sums in integers of 16 or 8 bits: the QDQ form that NPUs compile."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import onnx_ir as ir

from graph_passes.infer_types import fill_in_types
from graph_passes.keep_part import PARTS, find_parts
from graph_passes.pipeline import graph_pass
from graph_passes.weight_path import add_initializer

Ranges = Mapping[str, tuple[float, float]]

RESIDUAL = "residual"  # an Add of two activations; "Add" is that of one and a weight

# Can be computed in integers, with the inputs that are activations. Everything else is a float
# island: norms, softmax, exponentials, and the operators of ours, which hold scans and attention.
OPERATORS: Mapping[str, tuple[int, ...]] = {
    "MatMul": (0, 1),
    "MatMulNBits": (0,),
    "Add": (0, 1),
    RESIDUAL: (0, 1),
    "Sub": (0, 1),
    "Mul": (0, 1),
    "Sigmoid": (0,),
}
# These compute nothing: what comes out has the scale of what went in, or is the same number.
MOVERS = frozenset({"Slice", "Split", "Reshape", "Transpose", "Squeeze", "Unsqueeze"})
PAIR = ("QuantizeLinear", "DequantizeLinear")
_COPIES = MOVERS | {"Cast", "Concat", "Expand", "Gather", "GatherElements", "GatherND"}

DTYPES = (ir.DataType.UINT16, ir.DataType.INT16, ir.DataType.UINT8, ir.DataType.INT8)

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
_TINY = float(np.finfo(np.float32).tiny)


@graph_pass
def quantize_activations(
    model: ir.Model,
    *,
    ranges: Ranges,
    dtype: ir.DataType = ir.DataType.UINT16,
    operators: Iterable[str] = tuple(OPERATORS),
    islands: Iterable[str] | None = None,
    wide: Iterable[str] = (),
    part: str | None = None,
) -> None:
    """Put QuantizeLinear and DequantizeLinear behind what integer operators read and write.

    One pair stands behind every such value. What an integer operator writes is read behind the pair
    by everyone, under the name it had; what an island writes, other islands read as it is.

    A MatMul by a weight in float stays an island: run ``quantize_matmul_channels`` or
    ``quantize_matmul`` before. List this pass before ``inline_operators``, so that the insides of
    our operators stay islands. ``compute_part_in_float16`` may follow: it leaves the pairs and what
    stands between them alone.

    Pairs of 16 bits are of the domain com.microsoft below opset 21, where ONNX has none.

    Args:
        ranges: least and largest of every value that ``find_quantized`` names, as
            ``export.quantize.activation_ranges`` collects them. Zero is always representable.
            Constants have their own.
        dtype: one of DTYPES.
        operators: those of OPERATORS that are computed in integers.
        islands: operators that may compute in floats: so no recipe gets one unseen. None: any.
        wide: islands whose results have too wide a range: what reads them is an island, too.
        part: one of ``keep_part.PARTS``, whose nodes alone are looked at; None looks at all.

    Raises:
        ValueError: another dtype, operator or part, an island that is not named, a value without a
            range, or one whose range is empty or not finite.
    """
    if dtype not in DTYPES:
        raise ValueError(f"quantize_activations: dtype is {dtype}, expected one of {DTYPES}")
    found = _Quantized(model, operators, wide, part)
    if islands is not None:
        found.check_islands(frozenset(islands))
    pairs = _Pairs(model, dtype)
    # Before names change: what is written in integers passes its name on.
    parameters = {
        source: pairs.parameters(source, _range_of(source, ranges))
        for source in dict.fromkeys(found.values.values())
    }
    for value, source in found.values.items():
        pairs.insert(value, *parameters[source], found)
    if pairs.domain:
        model.opset_imports[pairs.domain] = 1


def find_quantized(
    model: ir.Model,
    *,
    operators: Iterable[str] = tuple(OPERATORS),
    wide: Iterable[str] = (),
    part: str | None = None,
) -> list[str]:
    """Names of the activations whose ranges the pass needs.

    Weights need not be quantized yet: a MatMul by any weight counts.

    Raises:
        ValueError: an operator or a part that there is not.
    """
    found = _Quantized(model.clone(), operators, wide, part, any_weight=True)
    sources = dict.fromkeys(found.values.values())
    return [source.name or "" for source in sources if _constant(source) is None]


def is_integer(node: ir.Node) -> bool:
    """Whether a node is one of a pair, or stands between pairs and is computed in integers."""
    if node.op_type in PAIR:
        return True
    if node.op_type not in OPERATORS and node.op_type not in MOVERS:
        return False
    operands = [node.inputs[index] for index in OPERATORS.get(node.op_type, (0,))]
    readers = [use.node.op_type for output in node.outputs for use in output.uses()]
    return (
        all(_is_dequantized(value) for value in operands)
        and bool(readers)
        and set(readers) == {"QuantizeLinear"}
    )


class _Quantized:
    """Values that get a pair, each with the value whose range it has."""

    def __init__(
        self,
        model: ir.Model,
        operators: Iterable[str],
        wide: Iterable[str],
        part: str | None,
        *,
        any_weight: bool = False,
    ) -> None:
        chosen = set(operators)
        if unknown := sorted(chosen - OPERATORS.keys()):
            raise ValueError(
                f"quantize_activations: operators are {unknown}, expected some of {list(OPERATORS)}"
            )
        if part not in (None, *PARTS):
            raise ValueError(
                f"quantize_activations: part is {part!r}, expected one of {', '.join(PARTS)}"
            )
        fill_in_types(model)
        places = {} if part is None else find_parts(model)
        self.values: dict[ir.Value, ir.Value] = {}
        self.nodes: set[ir.Node] = set()  # computed in integers
        self._islands: dict[str, ir.Node] = {}  # by kind, one of each
        moving = set(model.graph.inputs)  # what follows from inputs, not from weights alone
        self._moving, self._any_weight = moving, any_weight
        self._wide = frozenset(wide)
        for node in model.graph:
            if any(value in moving for value in node.inputs):
                moving.update(node.outputs)
            if places.get(node) != part or self._reads_wide(node):
                continue
            if self._kind(node) in chosen and node.domain != "ai.sambay":
                self._take(node)
            elif node.op_type in MOVERS and node.inputs[0] in self.values:
                self.nodes.add(node)
                source = self.values[node.inputs[0]]
                self.values.update(dict.fromkeys(node.outputs, source))
            if node not in self.nodes and self._computes(node):
                self._islands.setdefault(self._kind(node), node)

    def check_islands(self, named: frozenset[str]) -> None:
        for kind, node in self._islands.items():
            if kind not in named:
                raise ValueError(
                    f"quantize_activations: {node.outputs[0].name!r} ({kind}) would be computed in "
                    f"floats, expected of {', '.join(sorted(named))} only: name it an island, or "
                    "one of the operators that are computed in integers"
                )

    def _kind(self, node: ir.Node) -> str:
        residual = node.op_type == "Add" and all(value in self._moving for value in node.inputs)
        return RESIDUAL if residual else node.op_type

    def _reads_wide(self, node: ir.Node) -> bool:
        producers = (value.producer() for value in node.inputs if value is not None)
        return any(each is not None and each.op_type in self._wide for each in producers)

    def _computes(self, node: ir.Node) -> bool:
        output = node.outputs[0]
        return output in self._moving and output.dtype in _FLOATS and node.op_type not in _COPIES

    def _take(self, node: ir.Node) -> None:
        operands = [node.inputs[index] for index in OPERATORS[node.op_type]]
        activations: list[ir.Value | None] = [value for value in operands if value in self._moving]
        if node.op_type == "MatMul":
            others = [value for value in operands if value not in self._moving]
            if not all(self._any_weight or _is_dequantized(value) for value in others):
                return
            operands = activations
        known = all(v in self._moving or _constant(v) is not None for v in operands)
        floats = all(v is not None and v.dtype in _FLOATS for v in (*operands, node.outputs[0]))
        if not (activations and known and floats):
            return
        self.nodes.add(node)
        for value in (*operands, node.outputs[0]):
            if value is not None:
                self.values.setdefault(value, value)


class _Pairs:
    """Inserts pairs; those of one range share scale and zero."""

    def __init__(self, model: ir.Model, dtype: ir.DataType) -> None:
        self._graph, self._dtype = model.graph, dtype
        sixteen = dtype.bitwidth == 16 and model.opset_imports.get("", 0) < 21
        self.domain = "com.microsoft" if sixteen else ""

    def insert(
        self,
        value: ir.Value,
        scale: ir.Value,
        zero: ir.Value,
        found: _Quantized,
    ) -> None:
        graph, producer = self._graph, value.producer()
        readers = [
            use for use in value.uses() if producer in found.nodes or use.node in found.nodes
        ]
        quantize = ir.node("QuantizeLinear", [value, scale, zero], domain=self.domain)
        parts = [quantize.outputs[0], scale, zero]
        restore = ir.node("DequantizeLinear", parts, domain=self.domain)
        stored, restored = quantize.outputs[0], restore.outputs[0]
        stored.name, restored.name = f"{value.name}.quantized", f"{value.name}.dequantized"
        stored.shape = restored.shape = value.shape
        stored.type, restored.type = ir.TensorType(self._dtype), value.type
        if producer is None:
            graph.insert_before(graph[0], [quantize, restore])
        else:
            graph.insert_after(producer, [quantize, restore])
        for use in readers:
            use.node.replace_input_with(use.idx, restored)
        if producer in found.nodes:
            value.name, restored.name = f"{value.name}.exact", value.name
            if value.is_graph_output():
                graph.outputs[graph.outputs.index(value)] = restored

    def parameters(
        self, source: ir.Value, limits: tuple[float, float]
    ) -> tuple[ir.Value, ir.Value]:
        scale, zero = _scale_and_zero(limits, self._dtype)
        kind = np.float16 if source.dtype == ir.DataType.FLOAT16 else np.float32
        name = source.name
        return (
            add_initializer(self._graph, ir.Tensor(np.array(scale, kind), name=f"{name}.scale")),
            add_initializer(
                self._graph, ir.Tensor(np.array(zero, self._dtype.numpy()), name=f"{name}.zero")
            ),
        )


def _scale_and_zero(limits: tuple[float, float], dtype: ir.DataType) -> tuple[float, int]:
    """Of the least range that holds both limits and zero."""
    low, high = min(limits[0], 0.0), max(limits[1], 0.0)
    bounds = np.iinfo(dtype.numpy())
    scale = max((high - low) / (int(bounds.max) - int(bounds.min)), _TINY)
    return scale, int(np.clip(round(int(bounds.min) - low / scale), bounds.min, bounds.max))


def _range_of(source: ir.Value, ranges: Ranges) -> tuple[float, float]:
    constant = _constant(source)
    if constant is not None:
        numbers = constant.numpy().astype(np.float32)
        return float(numbers.min()), float(numbers.max())
    name = source.name or ""
    if name not in ranges:
        raise ValueError(
            f"quantize_activations: the range of {name!r} is not known: collect the ranges on the "
            "same traced graph, with the same operators"
        )
    low, high = ranges[name]
    if not (np.isfinite(low) and np.isfinite(high) and low <= high):
        raise ValueError(
            f"quantize_activations: the range of {name!r} is {low} to {high}, expected two numbers "
            "in ascending order"
        )
    return low, high


def _constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The small tensor of a bias or a number, perhaps behind a Cast."""
    for producer in _behind_casts(value):
        return producer.const_value
    return None


def _behind_casts(value: ir.Value | None) -> Iterator[ir.Value]:
    while value is not None and (node := value.producer()) is not None:
        if node.op_type == "Constant":
            break
        if node.op_type != "Cast":
            return
        value = node.inputs[0]
    if value is not None and value.const_value is not None and len(value.const_value.shape) < 2:
        yield value


def _is_dequantized(value: ir.Value | None) -> bool:
    node = None if value is None else value.producer()
    return node is not None and node.op_type == "DequantizeLinear"
