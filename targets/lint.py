"""Check that a provider has a kernel for every node of a package, without having the provider.

    python -m targets.lint PACKAGE --provider directml

Of a package of several graphs each is checked for the provider that runs it. For CUDA it is told as
well whether calls can be captured as a CUDA graph.

A node without a kernel would run on the CPU, with its tensors copied there and back, or fail. What
a provider has stands in kernels.json, with its source.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from graph_passes.infer_types import infer_types
from graph_passes.inline_operators import inline_operators
from targets.capture import find_hindrances
from targets.destination import MANIFEST
from targets.graphs import MODEL
from targets.target import CPU, CUDA

KERNELS = Path(__file__).with_name("kernels.json")
PROVIDERS = {
    "cpu": CPU,
    "cuda": CUDA,
    "directml": "DmlExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "qnn": "QNNExecutionProvider",
    "webgpu": "WebGpuExecutionProvider",
}
_NAMES = {"FLOAT": "float", "DOUBLE": "double"}  # others are the lower case of theirs


def lint(model: ir.Model, provider: str) -> list[str]:
    """What of a model a provider has no kernel for; empty when it has all.

    Nodes that compute from weights alone are left out: ONNX Runtime runs them while it loads.

    Args:
        model: as it stands in a package; operator bodies are inlined here.
        provider: full name of an execution provider that kernels.json describes; or the CPU, whose
            kernels the ONNX Runtime that is installed tells.

    Returns:
        One line a node, which begins with its name.
    """
    table = _table(provider)
    model = infer_types(inline_operators(model))
    problems = []
    for node in _computed_in_a_call(model.graph):
        name = node.name or node.outputs[0].name
        told = _fault(node, table, model.opset_imports)
        problems += [f"{name} ({node.op_type}): {fault}" for fault in told]
    return problems


def why_not_captured(model: ir.Model, *, native: bool) -> list[str]:
    """What keeps ONNX Runtime from capturing a model's calls as a CUDA graph; empty: nothing.

    Args:
        model: as it stands in a package.
        native: whether kernels run its operators, or their bodies are in their place.

    Returns:
        One line each, which begins with a node's name.
    """
    table = _table(CUDA)
    model = infer_types(model if native else inline_operators(model))
    nodes = _computed_in_a_call(model.graph)
    ours = {node for node in nodes if node.domain == "ai.sambay"}
    without = {n for n in nodes if n not in ours and _fault(n, table, model.opset_imports)}
    return find_hindrances(nodes, kernels=table["operators"], without=without)


def _computed_in_a_call(graph: ir.Graph) -> list[ir.Node]:
    """All nodes but those that compute from weights alone."""
    nodes, constant = [], set()
    for node in graph:
        sources = [value for value in node.inputs if value is not None]
        if node.op_type == "Constant" or (
            sources and all(v.is_initializer() or v.producer() in constant for v in sources)
        ):
            constant.add(node)
        else:
            nodes.append(node)
    return nodes


def count_nodes(model: ir.Model) -> int:
    """Nodes of a model once bodies are in the place of operators; those of loops count once."""
    return sum(1 for _ in inline_operators(model).graph.all_nodes())


def _table(provider: str) -> dict[str, Any]:
    if provider != CPU:
        return dict(json.loads(KERNELS.read_text(encoding="utf-8"))[provider])
    from onnxruntime.capi import onnxruntime_pybind11_state as ort

    operators: dict[str, Any] = {}
    types: dict[str, list[str]] = {}
    for kernel in ort.get_all_opkernel_def():
        if kernel.provider != CPU:
            continue
        name = f"{kernel.domain}.{kernel.op_name}" if kernel.domain else kernel.op_name
        operands = [1] if name == "Where" else [0]  # its first is a condition
        new = {"versions": [], "types": name, "operands": operands}
        described = operators.setdefault(name, new)
        first, last = kernel.version_range
        described["versions"].append(first if last > 1 << 30 else [first, last])
        found = {dtype for group in kernel.type_constraints.values() for dtype in group}
        plain = {dtype.removeprefix("tensor(").removesuffix(")") for dtype in found}
        if "float" in plain:  # ONNX Runtime puts Casts around what has no float16 of its own
            plain.add("float16")
        types[name] = sorted({*types.get(name, []), *plain})
    limits = {"rank": 8, "matmul_nbits": {"bits": [2, 4, 8], "scales_rank": 2}}
    return {"elsewhere": [], "types": types, "limits": limits, "operators": operators}


def _fault(node: ir.Node, table: Mapping[str, Any], opsets: Mapping[str, int]) -> list[str]:
    tensors = [value for value in (*node.inputs, *node.outputs) if value is not None]
    dtypes = [_dtype(value) for value in tensors]
    if table["elsewhere"] and set(dtypes) <= set(table["elsewhere"]):
        return []
    name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    kernel = table["operators"].get(name)
    if kernel is None:
        return ["no kernel for this operator"]
    faults = _version_fault(node, kernel, opsets)
    allowed = table["types"][kernel["types"]]  # none told: any
    checked = [node.inputs[i] for i in kernel.get("operands", [0]) if i < len(node.inputs)]
    checked += [node.outputs[0]] if kernel.get("result") else []
    for value in checked:
        if value is not None and allowed and _dtype(value) not in allowed:
            faults.append(f"{value.name} is {_dtype(value)}, kernels take {', '.join(allowed)}")
    if table["limits"].get("static"):
        names = [str(v.name) for v in tensors if v.shape is None or not v.shape.is_static()]
        faults += [f"sizes of {', '.join(names)} are not fixed"] if names else []
    ranks = [len(value.shape) for value in tensors if value.shape is not None]
    if max(ranks, default=0) > (most := table["limits"]["rank"]):
        faults.append(f"a tensor has {max(ranks)} dimensions, at most {most} are taken")
    if node.op_type == "MatMulNBits":
        faults += _matmul_faults(node, table["limits"]["matmul_nbits"])
    return faults


def _version_fault(
    node: ir.Node, kernel: Mapping[str, Any], opsets: Mapping[str, int]
) -> list[str]:
    """ONNX Runtime takes an open-ended kernel only for the version it was registered with."""
    if node.domain:
        return []
    schema = onnx.defs.get_schema(node.op_type, opsets[""], "")
    since = schema.since_version
    for version in kernel["versions"]:
        first, last = version if isinstance(version, list) else (version, version)
        if first <= since <= last:
            return []
    return [f"no kernel of version {since}, which opset {opsets['']} means: {kernel['versions']}"]


def _matmul_faults(node: ir.Node, limits: Mapping[str, Any]) -> list[str]:
    faults = []
    bits, block = node.attributes.get_int("bits", 4), node.attributes.get_int("block_size", 0)
    if bits not in limits["bits"]:
        faults.append(f"{bits} bits, kernels take {limits['bits']}")
    if block not in limits.get("block_size", [block]):
        faults.append(f"blocks of {block}, the fast kernels take {limits['block_size']}")
    if limits.get("symmetric") and len(node.inputs) > 3 and node.inputs[3] is not None:
        faults.append("zero points, the fast kernels take none")
    scales = node.inputs[2].shape if node.inputs[2] is not None else None
    if scales is not None and len(scales) != limits["scales_rank"]:
        faults.append(f"scales of {len(scales)} dimensions, not {limits['scales_rank']}")
    return faults


def _dtype(value: ir.Value) -> str:
    if value.dtype is None:
        return "of unknown type"
    return _NAMES.get(value.dtype.name, value.dtype.name.lower())


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what a package's provider has no kernels for; status 1 if there is any."""
    parser = argparse.ArgumentParser(prog="python -m targets.lint", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("package", type=Path, metavar="PACKAGE")
    parser.add_argument("--provider", choices=sorted(PROVIDERS), help="default: the package's own")
    options = parser.parse_args(arguments)
    try:
        return _lint(options.package, PROVIDERS.get(options.provider))
    except BrokenPipeError:  # the reader has left; what is still buffered goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _lint(package: Path, provider: str | None) -> int:
    status = 0
    for path in find_graphs(package, provider):
        try:
            model = ir.load(path)
        except Exception as error:
            told = f"{path} cannot be read as a model ({error}): give a package folder"
            print(f"targets.lint: error: {told}", file=sys.stderr)
            return 2
        checked = provider or model.metadata_props.get("sambay.provider", CPU)
        problems = lint(model, checked)
        for problem in problems:
            print(problem)
        verdict = f"{len(problems)} nodes have no kernel" if problems else "every node has a kernel"
        print(f"{path}: {verdict} of {checked}", flush=True)
        if checked == CUDA:
            _print_capture(path, model)
        status = 1 if problems else status
    return status


def _print_capture(path: Path, model: ir.Model) -> None:
    for native, operators in ((True, "native operators"), (False, "their bodies")):
        told = why_not_captured(model, native=native)
        for line in told:
            print(line)
        verdict = f"{len(told)} hindrances" if told else "calls can be captured as a CUDA graph"
        print(f"{path}: with {operators}, {verdict}")


def find_graphs(package: Path, provider: str | None = None) -> list[Path]:
    """The model files of a package: of several those for the provider, all where none is."""
    if not package.is_dir():
        return [package]
    try:
        graphs = json.loads((package / MANIFEST).read_text(encoding="utf-8"))["graphs"]
        made_for = {package / str(graph["file"]): graph["provider"] for graph in graphs}
    except (OSError, ValueError, KeyError, TypeError):
        return [package / MODEL]
    return [path for path, name in made_for.items() if name == provider] or list(made_for)


if __name__ == "__main__":
    sys.exit(main())
