"""What a package of the reference model gets right, and what changed against another package.

    python -m benchmarks.quality PACKAGE [--against PACKAGE] [--cases 500] [--json]

Answers are greedy, cases are held out and the same in every run. All questions of a book share one
prefill. The comparison feeds the package the other's answers: the mean KL divergence of its next
token from the other's, and how often both find the same token likeliest.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe_setup
from reference_model.tasks import BookShape, Turn, arithmetic, is_right, phonebook, talk
from runtime_py.errors import InputError, PackageError
from runtime_py.session import Session

CASES = 500  # of a task: a standard error of at most 2.2 points
QUESTIONS = 20  # of a book
MOST_TOKENS = 160  # of an answer; the longest right one has 91

ARITHMETIC = {  # operator and digits of the operands
    "sums, 3 digits": ("+", (1, 2, 3)),
    "sums, 4 digits": ("+", (4,)),
    "differences, 3 digits": ("-", (1, 2, 3)),
    "differences, 4 digits": ("-", (4,)),
    "products, 3 digits by 1": ("*", (1, 2, 3)),
}
BOOKS = {f"phonebook, {entries}": entries for entries in (32, 64, 128, 256)}
TASKS = (*ARITHMETIC, "talk", *BOOKS)


@dataclass(frozen=True)
class Group:
    """Questions that begin with the same text."""

    text: str
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Answer:
    """A greedy answer.

    Attributes:
        tokens: without the end token.
        logits: [tokens + 1, vocab] float32, what each token and the end were chosen from.
    """

    tokens: list[int]
    logits: np.ndarray
    right: bool


@dataclass(frozen=True)
class Row:
    """One task's line of the table.

    Attributes:
        error: standard error of the score.
        against: score of the other package.
        divergence: mean KL divergence from the other package, nats a token.
        agreement: share of tokens both find likeliest.
        lost, won: cases only the other, only this package answers rightly.
        chance: probability of a split at least as uneven as lost against won if neither were
            better (McNemar's exact test).
    """

    task: str
    n: int
    score: float
    error: float
    against: float | None = None
    divergence: float | None = None
    agreement: float | None = None
    lost: int | None = None
    won: int | None = None
    chance: float | None = None


def held_out(task: str, cases: int) -> list[Group]:
    """The cases of a task, no question twice; the same for the same count."""
    random = Random(f"quality {task}")
    if task in BOOKS:
        shape = BookShape(entries=BOOKS[task], questions=QUESTIONS)
        books = [phonebook(random, "held_out", shape) for _ in range(-(-cases // QUESTIONS))]
        groups = [Group(book.text, book.turns) for book in books]
        groups[-1] = Group(
            groups[-1].text, groups[-1].turns[: cases - QUESTIONS * (len(books) - 1)]
        )
        return groups
    turns: dict[str, Turn] = {}
    while len(turns) < cases:
        if task == "talk":
            turn = talk(random, "held_out")
        else:
            operator, digits = ARITHMETIC[task]
            turn = arithmetic(random, "held_out", operators=operator, digits=digits)
        turns[turn.question] = turn
    return [Group("", tuple(turns.values()))]


def measure(session: Session, task: str, cases: int, other: Session | None = None) -> Row:
    """Score a package on a task, and compare it with another one."""
    right, others_right, divergences, agreements = [], [], [], []
    for group in held_out(task, cases):
        ask = _Asker(session, group.text)
        ask_other = None if other is None else _Asker(other, group.text)
        for turn in group.turns:
            answer = ask(turn)
            right.append(answer.right)
            if ask_other is None:
                continue
            reference = ask_other(turn)
            others_right.append(reference.right)
            followed = ask(turn, follow=reference.tokens)
            divergences.append(divergence(reference.logits, followed.logits))
            agreements.append(reference.logits.argmax(-1) == followed.logits.argmax(-1))
    score = sum(right) / len(right)
    row = Row(task, len(right), score, math.sqrt(score * (1 - score) / len(right)))
    if other is None:
        return row
    lost = sum(b and not a for a, b in zip(right, others_right, strict=True))
    won = sum(a and not b for a, b in zip(right, others_right, strict=True))
    return dataclasses.replace(
        row,
        against=sum(others_right) / len(right),
        divergence=float(np.concatenate(divergences).mean()),
        agreement=float(np.concatenate(agreements).mean()),
        lost=lost,
        won=won,
        chance=mcnemar(lost, won),
    )


def divergence(reference: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """KL divergence of softmax(logits) from softmax(reference), [rows] in nats."""
    wanted, found = (_log_softmax(each.astype(np.float64)) for each in (reference, logits))
    return (np.exp(wanted) * (wanted - found)).sum(-1)


def mcnemar(lost: int, won: int) -> float:
    """Two-sided exact probability of a split at least as uneven, if both were equally likely."""
    flipped = lost + won
    tail = sum(math.comb(flipped, count) for count in range(min(lost, won) + 1))
    return min(1.0, 2 * tail / 2**flipped)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


class _Asker:
    """Asks questions that begin with one text; that text is run once."""

    def __init__(self, session: Session, text: str) -> None:
        self._session = session
        mark = "\N{OBJECT REPLACEMENT CHARACTER}"  # where the template puts the question
        rendered = session.tokenizer.render([{"role": "user", "content": text + mark}])
        before, self._after = rendered.split(mark)
        self._begun = session.start()
        self._begun.step(session.tokenizer.encode(before))

    def __call__(self, turn: Turn, follow: list[int] | None = None) -> Answer:
        """Answer greedily, or give the logits along the tokens to follow."""
        session = self._session
        sequence = self._begun.fork()
        rows = [sequence.step(session.tokenizer.encode(turn.question + self._after))[0]]
        tokens: list[int] = []
        while len(tokens) < (MOST_TOKENS if follow is None else len(follow)):
            token = int(rows[-1].argmax()) if follow is None else follow[len(tokens)]
            if follow is None and token in session.config.eos_token_ids:
                break
            tokens.append(token)
            rows.append(sequence.step([token])[0])
        stream = session.tokenizer.stream()
        text = "".join(stream.add(token) for token in tokens) + stream.end()
        return Answer(tokens, np.stack(rows), is_right(turn, text))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("package", type=Path)
    parser.add_argument("--against", type=Path, metavar="PACKAGE", help="compare with this one")
    parser.add_argument("--cases", type=_count, default=CASES, help=f"of a task ({CASES})")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, metavar="NAME")
    parser.add_argument("--threads", type=_count, help="of ONNX Runtime (one a core)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    try:
        session = Session(options.package, threads=options.threads)
        other = None
        if options.against is not None:
            other = Session(options.against, threads=options.threads)
        rows = []
        for task in options.tasks:
            with console.status(f"{task}: {options.cases} cases"):
                rows.append(measure(session, task, options.cases, other))
    except (PackageError, InputError) as error:
        console.print(f"quality: {error}", style="red", soft_wrap=True, markup=False)
        return 2
    if options.json:
        tasks = [dataclasses.asdict(row) for row in rows]
        print(json.dumps({"machine": describe_setup(), "tasks": tasks}, indent=1))
    else:
        Console().print(_table(rows, compared=other is not None))
    return 0


def _table(rows: list[Row], *, compared: bool) -> Table:
    table = Table("task", "n", "right", "+-")
    if compared:
        for title in ("against", "KL", "top 1", "lost", "won", "p"):
            table.add_column(title)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        cells = [row.task, str(row.n), f"{row.score:.1%}", f"{row.error:.1%}"]
        if row.against is not None:
            cells += [f"{row.against:.1%}", f"{row.divergence:.2g}", f"{row.agreement:.2%}"]
            cells += [str(row.lost), str(row.won), f"{row.chance:.2g}"]
        table.add_row(*cells)
    return table


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise ValueError
    return count


if __name__ == "__main__":
    sys.exit(main())
