"""A loaded model.

    session = Session("package", threads=2)
    sequence = session.start()
    logits = sequence.step([1, 2, 3])  # float32 [1, vocab]

States are bound once: past and present are the same memory, so a step copies none of them.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence as Many

from runtime_py.errors import InputError, PackageError
from runtime_py.native import tell_if_missing
from runtime_py.package import AGAIN, find_model, fingerprint, open_model, read_metadata
from runtime_py.sequence import Sequence
from runtime_py.snapshot import read_snapshot
from runtime_py.states import IDS, LOGITS, MASK, Buffers, find_states, grown_capacity
from runtime_py.tokenizer import Tokenizer


class Session:
    """A package, loaded. Sequences started from it share its weights.

    Attributes:
        path: the model file.
        config: sizes and special tokens.
        all_logits: whether the model gives the logits of every token (for evaluation).
        chunk: most tokens of one run; longer inputs are split, which bounds memory.
        states: what each sequence carries, in the order of the model's inputs.
        cuda_graph: whether calls of one token are replayed from a captured graph.
    """

    chunk: int = 512

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        threads: int | None = None,
        providers: Many[str] | None = None,
        cuda_graph: bool = False,
    ) -> None:
        """Load a package.

        Args:
            path: the package folder or its ``model.onnx``.
            threads: of one operator; None takes one a physical core.
            providers: ONNX Runtime execution providers, best first; None takes the one that the
                package was made for. States live on a CUDA device, or else in the CPU's memory.
            cuda_graph: on a CUDA device, replay calls of one token from a captured graph. Needs
                onnxruntime-gpu 1.31 or later.

        Raises:
            PackageError: there is no model, it cannot be read, or it is none of ours.
            InputError: threads, providers or cuda_graph cannot be had.
        """
        self.path = find_model(path)
        self.cuda_graph = cuda_graph
        self.model = open_model(
            self.path, threads=threads, providers=providers, cuda_graph=cuda_graph
        )
        self.config, self.all_logits, most = read_metadata(self.path, self.model)
        self.chunk = min(self.chunk, most or self.chunk)
        self.states = find_states(self.model.get_inputs(), self.model.get_outputs())
        inputs = {value.name for value in self.model.get_inputs()}
        odd = inputs ^ {IDS, MASK, *(state.past for state in self.states)}
        if odd or LOGITS not in {value.name for value in self.model.get_outputs()}:
            raise PackageError(
                f"{self.path} has inputs of its own or lacks some ({', '.join(sorted(odd))}); "
                f"expected {IDS}, {MASK} and states, and the output {LOGITS}: {AGAIN}"
            )
        tell_if_missing()

    def start(self, batch: int = 1) -> Sequence:
        """Begin a sequence: ``batch`` rows of tokens, states all zero."""
        if batch < 1:
            raise InputError(f"batch is {batch}; give 1 or more")
        fixed = next(value.shape[0] for value in self.model.get_inputs() if value.name == IDS)
        if isinstance(fixed, int) and batch != fixed:
            raise InputError(f"batch is {batch}; this package was made for {fixed}")
        return Sequence(self, self.buffers(batch, 0))

    def load(self, path: str | os.PathLike[str]) -> Sequence:
        """Take up a sequence where ``Sequence.save`` left it.

        Raises:
            SnapshotError: the file is no snapshot, is damaged, or is one of another model.
        """
        return Sequence(self, *read_snapshot(path, self))

    @functools.cached_property
    def fingerprint(self) -> str:
        """Tells this model from others, weights included; read once, from the files."""
        return fingerprint(self.path)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer beside the model.

        Raises:
            PackageError: the package has none, or it cannot be read.
        """
        return Tokenizer(self.path.parent)

    def buffers(self, batch: int, length: int) -> Buffers:
        """Zero states with room for ``length`` tokens and some more; used by sequences."""
        most = self.config.max_position_embeddings
        return Buffers.allocate(
            self.model,
            self.states,
            window=self.config.sliding_window,
            batch=batch,
            capacity=grown_capacity(0, max(length, 1), most),
        )
