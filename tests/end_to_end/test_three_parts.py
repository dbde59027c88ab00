"""A graph cut where its sizes begin to grow: all on the CPU, and the fixed part on an emulator."""

import os
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from export import reference
from export.checkpoint import open_checkpoint
from export.trace import trace
from graph_passes.cleanup import cleanup
from graph_passes.fix_dimension import fix_dimension
from graph_passes.fold_shapes import fold_shapes
from graph_passes.gather_single_row import gather_single_row
from graph_passes.inline_operators import inline_operators
from graph_passes.keep_part import PARTS, keep_part
from graph_passes.pipeline import run_passes
from graph_passes.replace_scan_loop import replace_scan_loop
from graph_passes.replace_scatter import replace_scatter
from graph_passes.unpack_embedding import unpack_embedding
from runtime_py import Session
from targets.weights import INT4
from tests.end_to_end.three_parts import ThreeParts

PYTHON = os.environ.get("QNN_PYTHON")
PREFILL, WINDOW = 64, 32

# Of logits whose standard deviation is 2.3 to 4.2. The HTP computes residual stream and scan in
# float16 too: 0.18 was seen, where targets that keep those in float32 stay within 0.15.
CLOSE = 0.3


def write_parts(model: ir.Model, folder: Path, most: int) -> None:
    """Write the parts of a model as traced, for calls of `most` tokens and of 1."""
    loop_free = (partial(replace_scan_loop, max_tokens=most, softplus="polynomial"),)
    model = run_passes(model, (*loop_free, replace_scatter, cleanup))
    for tokens in (most, 1):
        sizes = {"batch": 1, "window": WINDOW, "tokens": tokens}
        fixed = [partial(fix_dimension, name=name, size=size) for name, size in sizes.items()]
        whole = run_passes(model, (*fixed, inline_operators, fold_shapes, gather_single_row))
        for part in PARTS:
            ir.save(keep_part(whole, part=part), folder / f"{part}{tokens}.onnx")


def test_the_three_parts_are_the_whole_and_only_one_has_sizes_that_grow(
    export: Callable[..., Path], tmp_path: Path
) -> None:
    package = export(None, "cpu-fp32")
    model = ir.load(package / "model.onnx")
    ir.external_data.load_to_model(model)
    write_parts(model, tmp_path, most=8)
    for tokens in (8, 1):
        fixed = ir.load(tmp_path / f"fixed{tokens}.onnx").graph
        values = [*fixed.inputs, *(output for node in fixed for output in node.outputs)]
        assert all(v.shape is not None and v.shape.is_static() for v in values)
        assert not {"GatherND", "Scan", "Shape", "Einsum"} & {node.op_type for node in fixed}
    whole, parts = Session(package).start(), ThreeParts(tmp_path, most=8)
    random = np.random.default_rng(3)
    for count in (8, 5, 1, 1, 8, 8, 8, 1, 2):  # past the window
        ids = random.integers(0, 256, count).tolist()
        np.testing.assert_allclose(parts.step(ids), whole.step(ids)[0], atol=2e-4, rtol=0)


@pytest.mark.qnn
@pytest.mark.skipif(PYTHON is None, reason="set QNN_PYTHON as CONTRIBUTING.md says")
def test_the_fixed_part_on_the_htp_emulator_alone_gives_the_tokens_of_float32(
    tmp_path: Path,
) -> None:
    traced = trace(open_checkpoint(Path(next(iter(reference.__path__)))))
    quantized = run_passes(traced, (cleanup, *INT4, unpack_embedding))
    write_parts(quantized, tmp_path, PREFILL)
    script = Path(__file__).with_name("three_parts.py")
    subprocess.run([str(PYTHON), str(script), str(tmp_path), str(PREFILL)], check=True)
    wanted, got = np.moveaxis(np.load(tmp_path / "logits.npy"), 1, 0)
    np.testing.assert_allclose(got, wanted, atol=CLOSE, rtol=0)
    best = np.sort(wanted, axis=1)
    clear = best[:, -1] - best[:, -2] > CLOSE  # a nearer tie may fall either way
    assert clear.sum() >= 6
    assert (got.argmax(1) == wanted.argmax(1))[clear].all()


def test_what_the_passes_cannot_do_is_named() -> None:
    text = """<ir_version: 10, opset_import: ["" : 20]>
    g (float[{rows},5,3] x, int64[{rows},4,1] index) => (float[{rows},4,3] y)
    {{ y = GatherND <batch_dims = 1> (x, index) }}"""
    one = gather_single_row(ir.from_onnx_text(text.format(rows=1)))
    assert [node.op_type for node in one.graph] == ["Reshape", "Gather"]
    with pytest.raises(ValueError, match="one row"):
        gather_single_row(ir.from_onnx_text(text.format(rows=2)))
    with pytest.raises(ValueError, match="'heads'"):
        keep_part(one, part="heads")
