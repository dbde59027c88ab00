"""The two ways to run a checkpoint that must agree: the torch model, and an exported package."""

import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from export.checkpoint import open_checkpoint
from export.cli import main as phi4export
from export.model import SambaY
from export.states import all_states
from export.weights import load_weights
from runtime_py import Session
from runtime_py.native import library_path

GOLDEN = Path(__file__).parent / "golden"
# What a shell runs in the background ignores Ctrl-C, and so would the programs under test.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # the tensors are small: a second thread only waits


class TorchRun:
    """A sequence of calls on the torch model."""

    def __init__(self, model: SambaY, batch: int = 1, capacity: int = 128) -> None:
        self.model, self.config = model, model.config
        self.pairs = model.initial_states(batch, capacity=capacity)
        self.mask = torch.zeros(batch, 0, dtype=torch.int64)

    @torch.no_grad()
    def step(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """Logits [batch, vocab] of each row's last token."""
        return self._call(ids, mask, all_logits=False)[:, 0]

    @torch.no_grad()
    def step_all(self, ids: np.ndarray) -> np.ndarray:
        """Logits [batch, tokens, vocab]."""
        return self._call(ids, None, all_logits=True)

    def _call(self, ids, mask, *, all_logits: bool) -> np.ndarray:
        ids = torch.as_tensor(np.atleast_2d(ids)).long()
        new = torch.ones_like(ids) if mask is None else torch.as_tensor(mask).long()
        self.mask = torch.cat([self.mask, new], dim=1)
        logits, self.pairs, hidden = self.model(ids, self.mask, self.pairs, all_logits=all_logits)
        self.hidden = [tensor.numpy() for tensor in hidden]
        return logits.numpy()

    @property
    def states(self) -> dict[str, np.ndarray]:
        """States by name, as the graph calls its inputs."""
        flat = [tensor.numpy() for pair in self.pairs for tensor in pair]
        names = [state.past for state in all_states(self.config)]
        return dict(zip(names, flat, strict=True))


class PackageRun:
    """The same on a package."""

    def __init__(self, session: Session, batch: int = 1) -> None:
        self.config = session.config
        self.sequence = session.start(batch)
        self.step = self.sequence.step
        self.step_all = self.sequence.step_all

    @property
    def states(self) -> dict[str, np.ndarray]:
        """States by name."""
        buffers = self.sequence._buffers
        return {s.past: a for s, a in zip(buffers.states, buffers.arrays, strict=True)}


Start = Callable[..., TorchRun | PackageRun]


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Export a checkpoint once a test session: export(checkpoint, target, *options) -> package."""
    made: dict[tuple, Path] = {}

    def run(checkpoint: Path | None, target: str, *options: str) -> Path:
        key = (checkpoint, target, *options)
        if key not in made:
            package = tmp_path_factory.mktemp("package") / target
            source = [] if checkpoint is None else ["--checkpoint", str(checkpoint)]
            arguments = [*source, "--target", target, "-o", str(package), *options]
            assert phi4export(arguments) == 0
            made[key] = package
        return made[key]

    return run


@pytest.fixture(scope="session", params=["A8", "C4"])
def golden(request: pytest.FixtureRequest) -> Path:
    """A small checkpoint with the published code's numbers."""
    return GOLDEN / request.param


RUNNERS = ["torch", "portable", "native"]


def runner(
    kind: str, golden: Path, export: Callable[..., Path], *options: str, capacity: int = 128
) -> Start:
    """How to start a run: the torch model, or a package with portable or with native operators.

    The torch model takes `capacity` tokens at most.
    """
    if kind == "torch":
        model = load_weights(open_checkpoint(golden)).eval()
        return lambda batch=1: TorchRun(model, batch, capacity)
    return start_of(export(golden, "cpu-fp32", *options), kind)


def start_of(package: Path, kind: str) -> Start:
    """How to start a run of a package, with portable or with native operators."""
    if kind == "native" and library_path() is None:
        pytest.skip("the native operators were not built: needs a C++ compiler")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAMBAY_NATIVE", "1" if kind == "native" else "0")
        session = Session(package, threads=2)
    return lambda batch=1: PackageRun(session, batch)


@pytest.fixture(scope="session", params=RUNNERS)
def start(request: pytest.FixtureRequest, golden: Path, export: Callable[..., Path]) -> Start:
    """start(batch) -> a fresh run of the golden checkpoint, last-token logits."""
    return runner(request.param, golden, export)


@pytest.fixture(scope="session", params=RUNNERS)
def start_all(request: pytest.FixtureRequest, golden: Path, export: Callable[..., Path]) -> Start:
    """As start, for logits of all tokens."""
    return runner(request.param, golden, export, "--all-logits")
