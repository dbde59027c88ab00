"""The quantized product is right to the rounding of its inputs, on every instruction set."""

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graph_passes.use_native_matmul import use_native_matmul
from tests.kernels.single_node import open_session

ISAS = ("portable", "neon", "neon_dot", "avx2", "avx2_vnni", "avx512", "avx512_vnni")
BLOCK, EXACT_TOKENS = 32, 8
FINE, COARSE = 128 * 127 + 63, 127  # steps on either side of zero that an input is rounded to
GRAPH = """
<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
product (float{x} x, uint8[{n},{blocks},{bytes}] B, {scale}[{n},{blocks}] scales) => (float{y} y)
{{
    wide = Cast <to=1> (scales)
    y = com.microsoft.MatMulNBits <K={k}, N={n}, bits={bits}, block_size={size},
                                   accuracy_level={level}> (x, B, wide)
}}
"""
FORMS = [(32, "float"), (32, "float16"), (64, "float16"), (128, "float"), (256, "float16")]
by_isa = pytest.mark.parametrize("isa", ISAS)
by_bits = pytest.mark.parametrize("bits", [4, 8])


def product(
    k: int,
    n: int,
    bits: int,
    *,
    level: int = 4,
    size: int = BLOCK,
    scale: str = "float",
    rank: int = 2,
) -> ir.Model:
    """One product, with its weight as an input."""
    dims = ["a", "b", "c"][: rank - 1]
    text = GRAPH.format(
        x=f"[{','.join([*dims, str(k)])}]",
        y=f"[{','.join([*dims, str(n)])}]",
        k=k, n=n, bits=bits, level=level, size=size, scale=scale, blocks=-(-k // size),
        bytes=size * bits // 8,
    )  # fmt: skip
    return use_native_matmul(ir.from_onnx_text(text))


def serialized(model: ir.Model) -> bytes:
    return ir.to_proto(model).SerializeToString()


@dataclass(frozen=True)
class Weight:
    """As the operator has it: bytes [n, blocks, size * bits / 8], scales [n, blocks]."""

    packed: np.ndarray
    scale: np.ndarray
    bits: int
    columns: int

    def values(self) -> np.ndarray:
        """float64 [n, columns]."""
        stored = self.packed
        if self.bits == 4:
            stored = np.stack([stored & 0xF, stored >> 4], axis=-1).reshape(*stored.shape[:2], -1)
        scale = self.scale.astype(np.float64)[:, :, None]
        values = (stored - float(1 << (self.bits - 1))) * scale
        return values.reshape(len(values), -1)[:, : self.columns]


def random_weight(
    k: int, n: int, bits: int, seed: int = 0, *, size: int = BLOCK, scale: str = "float"
) -> Weight:
    """Every stored value that there is, the lowest too, and scales of both signs."""
    rng, blocks = np.random.default_rng(seed), -(-k // size)
    return Weight(
        packed=rng.integers(0, 256, (n, blocks, size * bits // 8), np.uint8),
        scale=(rng.uniform(-1, 1, (n, blocks)) / 2**bits).astype(
            {"float": np.float32, "float16": np.float16}[scale]
        ),
        bits=bits,
        columns=k,
    )


def run(session: ort.InferenceSession, x: np.ndarray, weight: Weight) -> np.ndarray:
    return session.run(None, {"x": x, "B": weight.packed, "scales": weight.scale})[0]


def error_bound(x: np.ndarray, weight: Weight, steps: int) -> np.ndarray:
    """Most that rounding a block's inputs to half a step, and float32 sums, can change."""
    size = np.abs(weight.values())
    missing = -x.shape[-1] % BLOCK
    in_blocks = np.pad(np.abs(x).astype(np.float64), ((0, 0), (0, missing))).reshape(
        len(x), -1, BLOCK
    )
    per_block = np.pad(size, ((0, 0), (0, missing))).reshape(len(size), -1, BLOCK).sum(axis=-1)
    rounding = in_blocks.max(axis=-1) / (2 * steps) @ per_block.T
    return 1.001 * rounding + 3e-6 * (np.abs(x) @ size.T) + 1e-30


def check(y: np.ndarray, x: np.ndarray, weight: Weight, steps: int) -> None:
    exact = x.astype(np.float64) @ weight.values().T
    assert (np.abs(y - exact) <= error_bound(x, weight, steps)).all()


@by_isa
@by_bits
@pytest.mark.parametrize(
    ("k", "n"), [(32, 1), (64, 33), (96, 7), (160, 67), (512, 64), (544, 40), (100, 17), (1056, 5)]
)
def test_the_error_is_at_most_the_rounding_of_the_inputs(
    isa: str, bits: int, k: int, n: int
) -> None:
    weight = random_weight(k, n, bits, seed=k)
    sessions = {
        level: open_session(serialized(product(k, n, bits, level=level)), isa=isa)
        for level in (1, 4)
    }
    for tokens, (level, session) in itertools.product(
        (1, 2, 3, 4, 7, 8, 9, 30, 64), sessions.items()
    ):
        x = np.random.default_rng(tokens).standard_normal((tokens, k), np.float32)
        fine = tokens <= EXACT_TOKENS or level != 4
        check(run(session, x, weight), x, weight, FINE if fine else COARSE)


@by_isa
@by_bits
@pytest.mark.parametrize(("size", "scale"), FORMS[1:])
@pytest.mark.parametrize(("k", "n"), [(32, 1), (544, 40), (1056, 5), (700, 3)])
def test_larger_blocks_and_float16_scales_are_read_alike(
    isa: str, bits: int, size: int, scale: str, k: int, n: int
) -> None:
    weight = random_weight(k, n, bits, seed=k, size=size, scale=scale)
    session = open_session(serialized(product(k, n, bits, size=size, scale=scale)), isa=isa)
    for tokens in (1, 3, 9, 40):
        x = np.random.default_rng(tokens).standard_normal((tokens, k), np.float32)
        check(run(session, x, weight), x, weight, FINE if tokens <= EXACT_TOKENS else COARSE)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 300), st.integers(1, 90), st.integers(1, 20), st.sampled_from([4, 8]),
    st.integers(0, 99), st.floats(-12, 12), st.sampled_from(FORMS),
)  # fmt: skip
def test_sizes_and_magnitudes_do_not_matter(
    k: int, n: int, tokens: int, bits: int, seed: int, power: float, form: tuple[int, str]
) -> None:
    size, scale = form
    weight = random_weight(k, n, bits, seed, size=size, scale=scale)
    x = np.random.default_rng(seed).standard_normal((tokens, k)) * 10.0**power
    model = product(k, n, bits, size=size, scale=scale)
    session = open_session(serialized(model), isa="")
    x = x.astype(np.float32)
    check(run(session, x, weight), x, weight, FINE if tokens <= EXACT_TOKENS else COARSE)


@by_bits
def test_results_do_not_depend_on_the_number_of_threads(bits: int) -> None:
    weight, model = random_weight(320, 530, bits), serialized(product(320, 530, bits))
    for tokens in (1, 5, 40):
        x = np.random.default_rng(tokens).standard_normal((tokens, 320), np.float32)
        expected = run(open_session(model, isa=""), x, weight)
        for threads in (2, 3, 8):
            got = run(open_session(model, isa="", threads=threads), x, weight)
            np.testing.assert_array_equal(got, expected)


@by_isa
@by_bits
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_row(isa: str, bits: int, bad: float) -> None:
    weight, session = (
        random_weight(96, 37, bits),
        open_session(serialized(product(96, 37, bits)), isa=isa),
    )
    for tokens in (1, 5, 40):
        x = np.random.default_rng(tokens).standard_normal((tokens, 96), np.float32)
        expected = run(session, x, weight)
        x[-1, 40] = bad
        y = run(session, x, weight)
        np.testing.assert_array_equal(y[:-1], expected[:-1])
        assert not np.isfinite(y[-1]).any()


@by_isa
@by_bits
def test_zeros_give_zeros_and_tiny_inputs_next_to_nothing(isa: str, bits: int) -> None:
    weight, session = (
        random_weight(64, 20, bits),
        open_session(serialized(product(64, 20, bits)), isa=isa),
    )
    for tokens in (1, 5, 40):
        assert not run(session, np.zeros((tokens, 64), np.float32), weight).any()
        tiny = np.full((tokens, 64), 1e-40, np.float32)
        assert (np.abs(run(session, tiny, weight)) < 1e-30).all()


@by_bits
@pytest.mark.parametrize("rank", [1, 3])
def test_leading_axes_are_tokens(bits: int, rank: int) -> None:
    weight = random_weight(64, 20, bits)
    x = np.random.default_rng(0).standard_normal(((), (64,), (), (2, 3, 64))[rank], np.float32)
    y = run(open_session(serialized(product(64, 20, bits, rank=rank)), isa=""), x, weight)
    assert y.shape == (*x.shape[:-1], 20)
    check(y.reshape(-1, 20), x.reshape(-1, 64), weight, FINE)
    empty = np.zeros((0, *x.shape[1:]), np.float32) if rank > 1 else x
    assert (
        run(
            open_session(serialized(product(64, 20, bits, rank=rank)), isa=""), empty, weight
        ).shape[:-1]
        == empty.shape[:-1]
    )


@by_bits
@pytest.mark.parametrize(("size", "scale"), FORMS)
def test_weights_may_lie_anywhere_in_a_file(
    tmp_path: Path, bits: int, size: int, scale: str
) -> None:
    """At no alignment, the last byte of a weight being the last of the file and of its page."""
    weight = random_weight(160, 35, bits, size=size, scale=scale)
    model = product(160, 35, bits, size=size, scale=scale)
    data, place = bytearray(), {}
    for name, array in (("scales", weight.scale), ("B", weight.packed)):
        data += bytes(1 + (-(len(data) + 1 + array.nbytes) % 4096))
        place[name] = (len(data), array)
        data += array.tobytes()
    (tmp_path / "data").write_bytes(data)
    for name, (offset, array) in place.items():
        value = next(value for value in model.graph.inputs if value.name == name)
        model.graph.inputs.remove(value)
        value.const_value = ir.ExternalTensor(
            "data", offset, array.nbytes, value.dtype, shape=ir.Shape(array.shape), name=name
        )
        model.graph.register_initializer(value)
    (tmp_path / "model.onnx").write_bytes(serialized(model))
    session = open_session(str(tmp_path / "model.onnx"), isa="")
    for tokens in (1, 3, 20):
        x = np.random.default_rng(tokens).standard_normal((tokens, 160), np.float32)
        steps = FINE if tokens <= EXACT_TOKENS else COARSE
        check(session.run(None, {"x": x})[0], x, weight, steps)


@by_bits
@pytest.mark.parametrize(("size", "scale"), FORMS)
def test_without_the_library_onnx_runtime_s_own_product_runs(
    bits: int, size: int, scale: str
) -> None:
    weight = random_weight(256, 48, bits, size=size, scale=scale)
    model = serialized(product(256, 48, bits, size=size, scale=scale))
    for tokens in (1, 30):
        x = np.random.default_rng(tokens).standard_normal((tokens, 256), np.float32)
        theirs, ours = (run(open_session(model, isa=isa), x, weight) for isa in (None, ""))
        assert np.abs(theirs - ours).max() < 0.03 * np.abs(ours).max()


@pytest.mark.parametrize(
    ("attributes", "said"),
    [
        ({"bits": 3}, "bits 3"),
        ({"block_size": 16}, "block_size 16"),
        ({"block_size": 512}, "block_size 512"),
        ({"K": 0}, "K 0"),
        ({"N": -1}, "N -1"),
        ({"N": 1 << 40}, "N 1099511627776"),
    ],
    ids=str,
)
def test_attributes_that_mean_nothing_are_refused(attributes: dict[str, int], said: str) -> None:
    model = product(64, 20, 4)
    (node,) = model.graph
    for name, value in attributes.items():
        node.attributes[name] = ir.AttrInt64(name, value)
    with pytest.raises(Exception, match=f"{said}.*Export the model again"):
        open_session(serialized(model), isa="")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("x", (2, 96)),
        ("B", (20, 2, 32)),
        ("B", (19, 2, 16)),
        ("B", (20, 32)),
        ("scales", (20, 3)),
        ("scales", (40,)),
    ],
)
def test_wrong_shapes_are_refused(name: str, shape: tuple[int, ...]) -> None:
    model, weight = product(64, 20, 4), random_weight(64, 20, 4)
    for value in model.graph.inputs:
        value.shape = None
    session = open_session(serialized(model), isa="")
    feeds = {"x": np.zeros((2, 64), np.float32), "B": weight.packed, "scales": weight.scale}
    feeds[name] = np.zeros(shape, feeds[name].dtype)
    label = {"x": "A"}.get(name, name)
    with pytest.raises(Exception, match=f"MatMulNBits: input {label} has shape"):
        session.run(None, feeds)
