"""Rows of tokens on their way through a model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from runtime_py.cuda_graph import CudaGraph, run_options
from runtime_py.errors import BrokenSequenceError, InputError
from runtime_py.snapshot import write_snapshot
from runtime_py.states import IDS, LOGITS, Buffers, grown_capacity

if TYPE_CHECKING:
    from runtime_py.session import Session

# A bit pattern that no arithmetic gives: a NaN with a payload of our own.
NOT_WRITTEN = np.uint32(0x7FA5C3E1)

Progress = Callable[[int, int], None]  # tokens fed, tokens in all


class Sequence:
    """Rows of tokens on their way through a model, and the states they left behind.

    Made by ``Session.start``. After an interruption (Ctrl-C) it stands before or after a whole
    chunk, and ``length`` says where.
    """

    def __init__(
        self, session: Session, buffers: Buffers, length: int = 0, logits: np.ndarray | None = None
    ) -> None:
        """Not for callers: use ``Session.start`` or ``Session.load``."""
        self.session = session
        self._buffers = buffers
        self._graph: CudaGraph | None = None  # of these buffers
        self._length = length
        self._logits = logits
        self._run: _Run | None = None
        self._failure: str | None = None
        self._warned = False

    @property
    def batch(self) -> int:
        """Rows."""
        return len(self._buffers.mask)

    @property
    def length(self) -> int:
        """Tokens fed so far: columns, so a shorter row of a batch counts with its padding."""
        self._settle()
        return self._length

    @property
    def logits(self) -> np.ndarray | None:
        """What the last ``step`` returned, float32 [batch, vocab]; None before the first."""
        self._settle()
        return self._logits

    @property
    def state_bytes(self) -> int:
        """Memory of the states, with the room they have for tokens to come."""
        return self._buffers.state_bytes

    def step(
        self,
        ids: npt.ArrayLike,
        mask: npt.ArrayLike | None = None,
        progress: Progress | None = None,
    ) -> np.ndarray:
        """Feed tokens. Any split of a text into steps gives the same logits and states.

        Args:
            ids: integers, [tokens] for a batch of one, else [batch, tokens]; one token or more.
            mask: as ids, 1 for a token and 0 for padding, which leaves no trace wherever it
                stands; None takes all as tokens.
            progress: called before the first chunk and after each.

        Returns:
            float32 [batch, vocab], logits of each row's last token. A row that is all padding in
            this call keeps those it had.

        Raises:
            InputError: ids or mask cannot be fed, or the sequence would get longer than
                max_position_embeddings; nothing was run.
            BrokenSequenceError: ONNX Runtime failed in this step or an earlier one.
        """
        self._feed(*self._check(ids, mask), progress, None)
        assert self._logits is not None
        return self._logits.copy()

    def step_all(self, ids: npt.ArrayLike, mask: npt.ArrayLike | None = None) -> np.ndarray:
        """As ``step``, but returns the logits of every token, float32 [batch, tokens, vocab].

        Padding gets zeros. Needs a model exported with all logits.

        Raises:
            InputError: as ``step``; or the model gives the last token's logits only.
        """
        if not self.session.all_logits:
            raise InputError(
                "this model gives the logits of the last token only; export with --all-logits"
            )
        tokens, lengths = self._check(ids, mask)
        packed = np.zeros((*tokens.shape, self.session.config.vocab_size), np.float32)
        self._feed(tokens, lengths, None, packed)
        shape = np.atleast_2d(np.asarray(ids)).shape
        real = np.ones(shape, bool) if mask is None else np.reshape(mask, shape).astype(bool)
        logits = np.zeros((*shape, packed.shape[-1]), np.float32)
        logits[real] = packed[np.arange(packed.shape[1]) < lengths[:, None]]
        return logits

    def fork(self) -> Sequence:
        """An independent copy. Of the growing cache only the used part is copied."""
        self._settle()
        forked = self._buffers.forked(self._length)
        return Sequence(self.session, forked, self._length, self._logits)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the states to a file, for ``Session.load``. An existing file is replaced."""
        self._settle()
        write_snapshot(path, self.session, self._buffers, self._length, self._logits)

    def _check(
        self, ids: npt.ArrayLike, mask: npt.ArrayLike | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int64 [batch, tokens], each row's moved to its left end, and how many they are."""
        self._settle()
        config, batch = self.session.config, self.batch
        tokens = _integers(ids, "ids", batch)
        if tokens.ndim != 2 or len(tokens) != batch:
            raise InputError(f"ids have shape {list(tokens.shape)}; expected [{batch}, tokens]")
        if tokens.shape[1] == 0:
            raise InputError("ids are empty; give at least one token")
        real = np.ones_like(tokens) if mask is None else _integers(mask, "mask", batch)
        if real.shape != tokens.shape or not np.isin(real, (0, 1)).all():
            raise InputError(
                f"mask has shape {list(real.shape)} and values {np.unique(real)[:4].tolist()}; "
                f"expected {list(tokens.shape)} of 0 and 1"
            )
        wrong = np.argwhere((real == 1) & ((tokens < 0) | (tokens >= config.vocab_size)))
        if len(wrong):
            row, column = wrong[0].tolist()
            raise InputError(
                f"token id {tokens[row, column]} (row {row}, token {column}) is outside the "
                f"vocabulary; ids are 0 to {config.vocab_size - 1}"
            )
        never = ~(real.any(axis=1) | self._buffers.mask[:, : self._length].any(axis=1))
        if never.any():
            row = int(never.argmax())
            raise InputError(f"row {row} has no token yet, only padding; give it at least one")
        tokens, lengths = _aligned(tokens, real)
        total = self._length + tokens.shape[1]
        if total > config.max_position_embeddings:
            raise InputError(
                f"{self._length} tokens and {tokens.shape[1]} more are {total}; this model takes "
                f"{config.max_position_embeddings} at most: shorten the input or start anew"
            )
        if total > config.context_length and not self._warned:
            self._warned = True
            warnings.warn(
                f"{total} tokens are more than the {config.context_length} this model was made "
                "for; its answers may get worse",
                stacklevel=3,
            )
        return tokens, lengths

    def _feed(
        self,
        tokens: np.ndarray,
        lengths: np.ndarray,
        progress: Progress | None,
        every: np.ndarray | None,
    ) -> None:
        """Run checked tokens, chunk after chunk; ``every`` takes the logits of all of them."""
        count = tokens.shape[1]
        if self._length + count > self._buffers.capacity:
            # Once for all chunks, and whole before it replaces the old one.
            most = self.session.config.max_position_embeddings
            capacity = grown_capacity(self._buffers.capacity, self._length + count, most)
            self._graph, self._buffers = None, self._buffers.grown(capacity, self._length)
        if progress is not None:
            progress(0, count)
        for start in range(0, count, self.session.chunk):
            part = np.ascontiguousarray(tokens[:, start : start + self.session.chunk])
            end = start + part.shape[1]
            logits = self._run_chunk(part, np.clip(lengths - start, 0, part.shape[1]))
            if every is not None:
                every[:, start:end] = logits
            if progress is not None:
                progress(end, count)

    def _run_chunk(self, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Run the model once; logits float32 [batch, tokens or 1, vocab]."""
        buffers, end = self._buffers, self._length + ids.shape[1]
        rows = ids.shape[1] if self.session.all_logits else 1
        logits = np.empty((self.batch, rows, self.session.config.vocab_size), np.float32)
        logits.view(np.uint32).flat[0] = NOT_WRITTEN
        buffers.mask[:, self._length :] = 0  # a run that did not come about may have left ones
        buffers.mask[:, self._length : end] = np.arange(ids.shape[1]) < lengths[:, None]
        self._run = _Run(logits, lengths, end)
        try:
            if self.session.cuda_graph and ids.shape[1] == 1:
                self._graph = self._graph or CudaGraph(buffers, self.session.config.vocab_size)
                self._graph.run(ids, logits)
            else:
                self._call(ids, logits)
        except Exception as error:
            self._failure = " ".join(str(error).split())[:300]
        self._settle()
        return logits

    def _call(self, ids: np.ndarray, logits: np.ndarray) -> None:
        """Run the model once, launch by launch."""
        model: Any = self.session.model
        binding = self._buffers.binding
        self._buffers.bind_again()
        binding.bind_cpu_input(IDS, ids)
        binding.bind_ortvalue_output(LOGITS, ort.OrtValue.ortvalue_from_numpy(logits))
        if self.session.cuda_graph:
            model.run_with_iobinding(binding, run_options())
        else:
            model.run_with_iobinding(binding)

    def _settle(self) -> None:
        """Count a run as done if it was.

        Ctrl-C cannot stop a run, but Python may raise it right before or right after one. The
        states have changed in place after, so the logits are asked whether the run took place.
        """
        if self._failure is not None:
            raise BrokenSequenceError(
                f"a run failed ({self._failure}), its states are lost; start a new sequence"
            )
        run = self._run
        if run is None:
            return
        logits, length = self._logits, self._length
        if run.logits.view(np.uint32).flat[0] != NOT_WRITTEN:
            length = run.end
            latest = run.logits[:, 0]
            if self.session.all_logits:
                latest = run.logits[np.arange(self.batch), run.lengths - 1]
            fed = run.lengths > 0
            logits = latest if logits is None else np.where(fed[:, None], latest, logits)
        self._logits, self._length, self._run = logits, length, None


@dataclass(frozen=True)
class _Run:
    """A run that was begun."""

    logits: np.ndarray
    lengths: np.ndarray  # tokens of each row
    end: int  # columns fed once it is done


def _aligned(tokens: np.ndarray, real: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Move padding behind the tokens of each row, and drop columns that are padding alone."""
    lengths = real.sum(axis=1)
    if real.all():
        return tokens, lengths
    columns = np.arange(lengths.max())
    order = np.argsort(1 - real, axis=1, kind="stable")[:, : len(columns)]
    moved = np.take_along_axis(tokens, order, axis=1)
    return np.where(columns < lengths[:, None], moved, 0), lengths


def _integers(values: npt.ArrayLike, name: str, batch: int) -> np.ndarray:
    """As int64 [batch, tokens]; for one row the first axis may be left out."""
    try:
        array = np.asarray(values)
    except ValueError as error:  # rows of different lengths
        raise InputError(f"{name} form no rectangle ({error}); pad the rows, use mask") from error
    if array.size and not (np.issubdtype(array.dtype, np.integer) or array.dtype == bool):
        raise InputError(f"{name} are {array.dtype}; expected integers")
    array = array.astype(np.int64)
    return array[None] if array.ndim == 1 and batch == 1 else array
