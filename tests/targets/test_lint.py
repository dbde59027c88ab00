"""What targets.lint finds, and that it finds nothing in the packages of our own targets."""

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from export.checkpoint import open_checkpoint
from export.cli import REFERENCE
from export.trace import trace
from graph_passes.pipeline import run_passes
from targets import TARGETS, find_target
from targets.graphs import make_graphs
from targets.lint import KERNELS, PROVIDERS, lint, main, why_not_captured
from targets.package import write_package
from targets.target import CPU, Target

ROOT = Path(__file__).parents[2]
DML = "DmlExecutionProvider"
CUDA = "CUDAExecutionProvider"
QNN = "QNNExecutionProvider"
F, I64 = ir.DataType.FLOAT, ir.DataType.INT64


@pytest.fixture(scope="module")
def whole() -> ir.Model:
    return trace(open_checkpoint(REFERENCE))


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_the_provider_of_a_target_has_a_kernel_for_every_node(
    whole: ir.Model, target: Target
) -> None:
    graphs = make_graphs(run_passes(whole, target.passes), target)
    providers = [graph.provider for graph in target.graphs] or [target.provider]
    for model, provider in zip(graphs.values(), providers, strict=True):
        assert lint(model, provider) == []


def test_a_processor_package_is_none_for_directml(whole: ir.Model) -> None:
    told = lint(run_passes(whole, find_target("cpu-fp32").passes), DML)
    operators = {line.split("(")[1].split(")")[0] for line in told}
    assert {"Scan", "ScatterND", "Mod"} <= operators
    assert any("no kernel of version 18, which opset 20 means" in line for line in told)


def value(name: str, dtype: ir.DataType, *shape: int | str) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def model_of(node: ir.Node, opset: int = 18) -> ir.Model:
    node.name = "the_node"
    inputs = [v for v in node.inputs if v is not None and not v.is_initializer()]
    weights = [v for v in node.inputs if v is not None and v.const_value is not None]
    for output in node.outputs:
        output.type = ir.TensorType(I64 if node.op_type == "Mod" else F)
        output.shape = ir.Shape([1, 8]) if node.domain else None  # ONNX knows no others
    graph = ir.Graph(
        [v for v in inputs if v not in weights],
        node.outputs,
        nodes=[node],
        initializers=weights,
        opset_imports={"": opset, "com.microsoft": 1},
        name="g",
    )
    return ir.Model(graph, ir_version=10)


def matmul_nbits(bits: int = 4, block: int = 32, *, flat: bool = False, zeros: bool = False):
    blocks = 64 // block
    arrays = {"packed": np.zeros((8, blocks, block * bits // 8), np.uint8)}
    arrays["scales"] = np.zeros(8 * blocks if flat else (8, blocks), np.float32)
    if zeros:
        arrays["zeros"] = np.zeros((8, blocks // 2), np.uint8)
    weights = [
        ir.Value(name=n, const_value=ir.Tensor(a), shape=ir.Shape(a.shape))
        for n, a in arrays.items()
    ]
    settings = {"K": 64, "N": 8, "bits": bits, "block_size": block}
    inputs = [value("x", F, 1, 64), *weights]
    return ir.node("MatMulNBits", inputs, settings, domain="com.microsoft")


FAULTS: list[tuple[str, Callable[[], ir.Node], int, str]] = [
    (DML, lambda: ir.node("Einsum", [value("x", F, 2)], {"equation": "i->i"}), 18, "no kernel for"),
    (DML, lambda: ir.node("Mod", [value("x", I64, 2), value("y", I64, 2)]), 18, "x is int64"),
    (CUDA, lambda: ir.node("ReduceMax", [value("x", F, 2)]), 20, "version 20"),
    (CUDA, partial(matmul_nbits, block=64), 18, "blocks of 64"),
    (CUDA, partial(matmul_nbits, zeros=True), 18, "zero points"),
    (DML, partial(matmul_nbits, bits=2), 18, "2 bits"),
    (DML, partial(matmul_nbits, flat=True), 18, "scales of 1 dimensions, not 2"),
    (DML, lambda: ir.node("Exp", [value("x", F, *[1] * 9)]), 18, "9 dimensions, at most 8"),
    ("WebGpuExecutionProvider", lambda: ir.node("Softplus", [value("x", F, 2)]), 20, "no kernel"),
    (QNN, lambda: ir.node("Softplus", [value("x", F, 2)]), 20, "no kernel"),
    (QNN, lambda: ir.node("Exp", [value("x", F, "tokens")]), 20, "sizes of x"),
    (QNN, partial(matmul_nbits, block=16), 18, "blocks of 16"),
]


@pytest.mark.parametrize(("provider", "make", "opset", "fault"), FAULTS, ids=lambda v: str(v)[:24])
def test_a_fault_is_told_with_the_name_of_the_node(
    provider: str, make: Callable[[], ir.Node], opset: int, fault: str
) -> None:
    told = lint(model_of(make(), opset), provider)
    assert len(told) == 1
    assert told[0].startswith("the_node (")
    assert fault in told[0]


@pytest.mark.parametrize(
    ("provider", "node"),
    [
        (DML, lambda: ir.node("ReduceMax", [value("x", F, 2)])),
        (DML, matmul_nbits),
        (CUDA, matmul_nbits),
        ("WebGpuExecutionProvider", lambda: ir.node("Mod", [value("x", I64, 2)] * 2)),
        (CPU, lambda: ir.node("Einsum", [value("x", F, 2)], {"equation": "i->i"})),
    ],
)
def test_what_has_a_kernel_is_not_told(provider: str, node: Callable[[], ir.Node]) -> None:
    assert lint(model_of(node()), provider) == []


@pytest.mark.parametrize("native", [True, False], ids=["native", "bodies"])
@pytest.mark.parametrize("name", ["cuda-fp16", "cuda-int4"])
def test_calls_of_a_cuda_package_can_be_captured(whole: ir.Model, name: str, native: bool) -> None:
    *passes, last = find_target(name).passes
    model = run_passes(whole, passes)
    assert len(why_not_captured(model, native=native)) == (2 if native else 7)
    assert why_not_captured(last(model), native=native) == []


# As ONNX Runtime's CUDA provider has them, in sessions that are to capture.
HINDRANCES = [
    ("a = Abs (x) y = Mul (a, x)", None),
    ("s = Shape (x) t = Mul (s, s) y = Expand (x, t)", None),
    ("s = Shape (x) t = Mul (s, i) a = Abs (x) y = Expand (a, t)", None),
    ("s = Shape (x) f = Cast <to = 1> (s) a = Abs (x) y = Mul (a, f)", "f is copied to the device"),
    ("t = Mul (i, i) y = Expand (x, t)", "t is copied to the host"),
    ("f = Cast <to = 1> (i) a = Expand (x, i) y = Mul (a, f)", "takes i on the host, others do"),
    ("a = Abs (x) y = Det (a)", "a is copied to the host"),
    ("a = Det (x) c = Abs (x) y = Mul (a, c)", "a is copied to the device"),
    (
        "y = If (b) <then_branch = t () => (float[n,m] u) { u = Abs (x) },"
        " else_branch = e () => (float[n,m] v) { v = Exp (x) }>",
        "control flow",
    ),
]


@pytest.mark.parametrize(("nodes", "hindrance"), HINDRANCES)
def test_what_keeps_calls_from_being_captured_is_told(nodes: str, hindrance: str | None) -> None:
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 18]>'
        f"g (float[n,m] x, int64[2] i, bool b) => (float y) {{ {nodes} }}"
    )
    model.graph.outputs[0].shape = None
    told = "; ".join(why_not_captured(model, native=True))
    assert told == "" if hindrance is None else hindrance in told


def test_the_table_says_where_it_comes_from_and_has_every_type_it_names() -> None:
    tables = json.loads(KERNELS.read_text(encoding="utf-8"))
    assert {*tables, CPU} == set(PROVIDERS.values())
    assert {target.provider for target in TARGETS} <= set(PROVIDERS.values())
    for table in tables.values():
        assert table["source"]
        for kernel in table["operators"].values():
            assert table["types"][kernel["types"]]
            assert kernel["versions"]


def test_the_command_tells_faults_and_status(
    whole: ir.Model, tmp_path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = find_target("webgpu-int4")
    model = run_passes(whole, target.passes)
    package = write_package(model, tmp_path / "package", target=target, facts={})
    assert main([str(package)]) == 0
    assert "every node has a kernel of WebGpuExecutionProvider" in capsys.readouterr().out
    assert main([str(package), "--provider", "directml"]) == 1
    assert "nodes have no kernel of DmlExecutionProvider" in capsys.readouterr().out
    assert main([str(package), "--provider", "cuda"]) == 1
    assert "with their bodies, 19 hindrances" in capsys.readouterr().out
    assert main([str(tmp_path / "nothing")]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_a_reader_that_leaves_ends_the_command_quietly(tmp_path) -> None:
    nodes = "".join(f"y{n} = Det (x) " for n in range(9000))
    model = ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["" : 18]> g (float[2,2] x) => (float y0) {{ {nodes} }}'
    )
    ir.save(model, tmp_path / "model.onnx")
    command = [sys.executable, "-m", "targets.lint", str(tmp_path), "--provider", "qnn"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None  # noqa: PT018
        assert b"no kernel" in process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
