"""Tokens and loss masks to train on: rows of conversations, and rows of phonebooks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from random import Random

import torch
from tokenizers import Tokenizer

from reference_model.tasks import Book, BookShape, Split, Turn, arithmetic, phonebook, talk

SHARE_OF_TALK = 0.12  # of the turns of a conversation

# The curriculum: a model that cannot yet match one word to one digit learns nothing from more.
BOOKS = (
    BookShape(entries=8, words=1, digits=1, questions=24),
    BookShape(entries=8, words=1, digits=1, questions=24, listed=True),
    BookShape(entries=8, words=2, digits=2, questions=16, listed=True),
    BookShape(entries=8, questions=16, listed=True),
    BookShape(entries=16, questions=16),
    BookShape(entries=32, questions=24),
    BookShape(entries=64, questions=24),
)


@dataclass(frozen=True)
class Batch:
    """Rows to learn from.

    Attributes:
        ids: [batch, tokens] int64, padded on the right.
        answers: [batch, tokens] int64: 0 outside answers, else the number of the turn in its
            row, from 1; the token that ends an answer belongs to it.
    """

    ids: torch.Tensor
    answers: torch.Tensor


class Encoder:
    """Turns into token ids; questions are not learned, answers are."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._user, self._assistant, self._end = tokenizer.encode(
            "<|user|><|assistant|><|end|>"
        ).ids

    def row(self, turns: Iterable[Turn], book: str = "") -> tuple[list[int], list[int]]:
        """Ids and answer numbers of one conversation; the book begins its first question."""
        ids: list[int] = []
        answers: list[int] = []
        for number, turn in enumerate(turns, 1):
            question = self._ids(book + turn.question)
            answer = [*self._ids(turn.answer), self._end]
            ids += [self._user, *question, self._end, self._assistant, *answer]
            answers += [0] * (len(question) + 3) + [number] * len(answer)
            book = ""
        return ids, answers

    def listing(self, book: Book) -> tuple[list[int], list[int]]:
        """Ids and answer numbers where one answer lists lines; only their numbers are learned."""
        ids = [self._user, *self._ids(book.text), self._end, self._assistant]
        answers = [0] * len(ids)
        for place, turn in enumerate(book.turns, 1):
            name, mark, number = turn.answer.partition(": ")
            key, digits, end = (self._ids(text) for text in (name + mark, number, "\n"))
            ids += [*key, *digits, *end]
            answers += [0] * len(key) + [place] * len(digits) + [0] * len(end)
        return ids, answers

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids


def conversations(
    encoder: Encoder, random: Random, *, rows: int, tokens: int, digits: tuple[int, ...]
) -> Batch:
    """Rows of several turns, cut at `tokens`, so that no token is padding."""
    made = []
    for _ in range(rows):
        turns: list[Turn] = []
        length = 0
        while length <= tokens:
            if random.random() < SHARE_OF_TALK:
                turns.append(talk(random, "train"))
            else:
                turns.append(arithmetic(random, "train", digits=digits))
            length += len(encoder.row(turns[-1:])[0])
        made.append(encoder.row(turns))
    return stack(made, tokens)


def books(encoder: Encoder, random: Random, split: Split, *, rows: int, shape: BookShape) -> Batch:
    """Rows of one phonebook each, all of one shape."""
    made = [phonebook(random, split, shape) for _ in range(rows)]
    if shape.listed:
        return stack([encoder.listing(book) for book in made])
    return stack([encoder.row(book.turns, book.text) for book in made])


def stack(rows: list[tuple[list[int], list[int]]], tokens: int | None = None) -> Batch:
    """Rows to one batch: cut at `tokens`, else padded with 0 to the longest."""
    width = tokens or max(len(ids) for ids, _ in rows)
    ids, answers = (
        torch.tensor([(each + [0] * width)[:width] for each in part])
        for part in zip(*rows, strict=True)
    )
    return Batch(ids, answers)
