"""The laws of sequences hold with caches of float16 and of 8 bits, within stated bounds."""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from export.checkpoint import open_checkpoint
from export.trace import trace
from graph_passes.pipeline import run_passes
from runtime_py import Session
from targets import find_target
from targets.caches import with_cache
from targets.package import write_package
from tests.conftest import PackageRun, Start, start_of

# Absolute, on logits of standard deviation 2.5. First: against the published code's numbers, which
# are float32's. Second: of one cache type against itself, where another order of sums may round a
# cell to its neighbour.
BOUNDS = {"float16": (0.02, 5e-3), "int8": (0.4, 0.05)}
few = settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


class Caches:
    """A golden checkpoint's package with one type of cache, on native or portable operators."""

    def __init__(self, start: Start, cache: str) -> None:
        self.start, self.dtype = start, np.dtype(cache)
        self.from_golden, self.from_itself = BOUNDS[cache]

    def check(self, actual: np.ndarray, expected: np.ndarray) -> None:
        np.testing.assert_allclose(actual, expected, atol=self.from_itself, rtol=0)


@pytest.fixture(scope="module")
def package(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """package(cache, target) -> the golden checkpoint with that cache; traced once."""
    traced = trace(open_checkpoint(golden))

    @functools.cache
    def write(cache: str, name: str = "cpu-fp32") -> Path:
        target = with_cache(find_target(name), cache)
        folder = tmp_path_factory.mktemp("caches") / cache
        return write_package(run_passes(traced, target.passes), folder, target=target, facts={})

    return write


@pytest.fixture(scope="module", params=BOUNDS)
def cache(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=["portable", "native"])
def caches(request: pytest.FixtureRequest, package: Callable[[str], Path], cache: str) -> Caches:
    return Caches(start_of(package(cache), request.param), cache)


def random_ids(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, count)


def test_keys_and_values_have_the_type_and_other_states_stay_float32(caches: Caches) -> None:
    dtypes = {name: state.dtype for name, state in caches.start().states.items()}
    scales = [name for name in dtypes if name.endswith("_scale")]
    assert bool(scales) == (caches.dtype == np.int8)
    for name, dtype in dtypes.items():
        kind = name.rsplit(".", 1)[1]
        wanted = np.float16 if kind.endswith("_scale") else np.float32
        assert dtype == (caches.dtype if kind in ("key", "value") else wanted), name


def test_decoding_stays_near_the_golden(caches: Caches, golden: Path) -> None:
    data = np.load(golden / "decode.npz")
    ids, prompt = data["input_ids"][0], int(data["prompt_len"])
    run = caches.start()
    logits = [run.step(ids[:prompt])] + [run.step([token]) for token in ids[prompt:]]
    expected = [data["prefill_logits"][:, -1], *np.moveaxis(data["decode_logits"], 1, 0)]
    np.testing.assert_allclose(logits, expected, atol=caches.from_golden, rtol=0)


@few
@given(cuts=st.sets(st.integers(1, 35)))
def test_a_text_in_pieces_gives_the_logits_of_the_whole(caches: Caches, cuts) -> None:
    ids = random_ids(36)
    expected = caches.start().step(ids)
    pieces = caches.start()
    for piece in np.split(ids, sorted(cuts)):
        logits = pieces.step(piece)
    caches.check(logits, expected)


def test_a_padded_row_equals_the_row_alone(caches: Caches) -> None:
    rows = [random_ids(100 + i)[:n] for i, n in enumerate((3, 11, 7))]
    ids, mask = np.zeros((2, 3, 11), np.int64)
    for i, row in enumerate(rows):
        ids[i, 11 - len(row) :], mask[i, 11 - len(row) :] = row, 1
    run, follow = caches.start(3), random_ids(3)
    logits, after = run.step(ids, mask), run.step(follow[:, None])
    for i, row in enumerate(rows):
        alone = caches.start()
        caches.check(logits[i], alone.step(row)[0])
        caches.check(after[i], alone.step(follow[i : i + 1])[0])


def test_forks_snapshots_and_growth_keep_every_cell_and_scale(
    package: Callable[[str], Path], cache: str, tmp_path: Path
) -> None:
    session = Session(package(cache), threads=1)
    ids, sequence = random_ids(250), session.start()
    sequence.step(ids)
    sequence.save(tmp_path / "saved")
    others = [sequence.fork(), session.load(tmp_path / "saved")]
    more = random_ids(40)  # beyond the first block of slots
    expected = sequence.step(more)
    for other in others:
        np.testing.assert_array_equal(other.step(more), expected)


def test_a_cuda_target_takes_caches_of_8_bits(package: Callable[..., Path]) -> None:
    """By their bodies, on the CPU: operators take float16 activations, cells and scales as ever."""
    on_cpu = Session(package("int8", "cuda-fp16"), providers=["CPUExecutionProvider"], threads=1)
    ids, (exact, _) = random_ids(60), BOUNDS["int8"]
    got, wanted = on_cpu.start(), Session(package("float32"), threads=1).start()
    for part in (ids[:40], ids[40:41], ids[41:]):
        np.testing.assert_allclose(got.step(part), wanted.step(part), atol=exact, rtol=0)
    assert {state.dtype.name for state in on_cpu.states} == {"float16", "float32", "int8"}


def test_a_narrower_cache_takes_less_memory(package: Callable[[str], Path]) -> None:
    sizes = []
    for cache in ("float32", "float16", "int8"):
        sequence = Session(package(cache), threads=1).start()
        sequence.step(random_ids(3))
        run = PackageRun(sequence.session)
        assert sequence.state_bytes == sum(state.nbytes for state in run.states.values())
        sizes.append(sequence.state_bytes)
    assert sizes == sorted(sizes, reverse=True)
