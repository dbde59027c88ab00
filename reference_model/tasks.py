"""What the reference model learns: column arithmetic, a phonebook, and a little talk.

A turn is a question and the one right answer, so a score is exact. Every generator takes its own
random source and the split it may draw from; a hash of the case decides its split, so no held-out
case is ever trained on.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from random import Random
from typing import Literal

Split = Literal["train", "held_out"]

MOST_DIGITS = 4  # of an operand
_HELD_OUT = 10  # one case in so many

_FIRST = (
    "Ada Amy Ann Ben Bob Carl Cleo Dan Dora Eli Emma Eva Finn Gus Hal Ida "
    "Ivan Jack Joy Kim Leo Lily Max Mia Nora Olga Otto Paul Rosa Sam Tom Zoe"
)
_LAST = (
    "Adler Bell Berg Cole Cruz Dahl Day Diaz Ford Fox Gray Haas Hill Hunt Jung King "
    "Lang Lee Lund Marsh Moon Nash Park Pike Reed Ross Shaw Stone Vale Webb Wolf Young"
)
FIRST_NAMES, LAST_NAMES = tuple(_FIRST.split()), tuple(_LAST.split())
_PAIRS = [f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES]


@dataclass(frozen=True)
class Turn:
    """A question and its one right answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class Book:
    """A phonebook and questions on it.

    Attributes:
        text: the lines "name: number", each with its line end; begins the first question.
        turns: questions without the text of the book.
    """

    text: str
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class BookShape:
    """How hard a phonebook is.

    Attributes:
        entries: lines of the book.
        words: words of a name, 1 or 2.
        digits: digits of a number.
        questions: how many, over entries chosen without repetition while there are any left.
        listed: no questions; one answer gives the lines again in another order. An exercise: it
            takes half the tokens.
    """

    entries: int
    words: int = 2
    digits: int = 4
    questions: int = 8
    listed: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of a book and its questions, about."""
        line = self.words + self.digits + 2
        question = 0 if self.listed else self.words + 5
        return self.entries * line + self.questions * (question + line)


def split_of(case: str) -> Split:
    """The split a case belongs to, for ever: a hash of its text decides."""
    return "held_out" if zlib.crc32(case.encode("utf-8")) % _HELD_OUT == 0 else "train"


def work_out(a: int, operator: str, b: int) -> str:
    """The answer to a question: columns from the right, then the boxed value.

    A column is two digits, what the column before handed on, the digit that results, and what is
    handed on to the next: "7+9+0=6c1" (carry 1), "7-9-0=8b1" (borrow 1). A difference that still
    borrows at its end is negative: it is worked out again the other way round.

    Args:
        a, b: 0 or more. In a product at least one has one digit.
        operator: "+", "-" or "*".
    """
    if operator == "*" and b > 9:
        a, b = b, a
    columns, result = _columns(a, operator, b)
    if operator == "-" and a < b:
        again, _ = _columns(b, operator, a)
        columns += ["swap", *again]
        result = a - b
    return f"<think>{' '.join(columns)}</think>\\boxed{{{result}}}"


def boxed(answer: str) -> str | None:
    """The last boxed value of an answer; None where there is none."""
    found = re.findall(r"\\boxed\{([^{}]*)\}", answer)
    return found[-1].strip() if found else None


def arithmetic(
    random: Random,
    split: Split,
    *,
    operators: str = "+-*",
    digits: tuple[int, ...] = (1, 2, 3, 4),
    plain: bool = False,
) -> Turn:
    """A sum, difference or product in plain words.

    Args:
        operators: drawn from with equal chance.
        digits: digits of the operands, each drawn with equal chance. One factor has one digit.
        plain: always ask "What is a + b?".
    """
    while True:
        operator = random.choice(operators)
        a = _number(random, random.choice(digits))
        b = _number(random, 1 if operator == "*" else random.choice(digits))
        # Few negative results: each takes twice the tokens to learn from.
        if operator == "-" and a < b and random.random() < 0.5:
            a, b = b, a
        if operator == "*" and random.random() < 0.3:
            a, b = b, a
        if split_of(f"{a}{operator}{b}") == split:
            break
    question = f"What is {a} {operator} {b}?"
    if not plain and random.random() < 0.6:
        sign = random.choice(_SIGNS[operator])
        question = random.choice(_QUESTIONS).format(f"{a}{sign}{b}")
    return Turn(question, work_out(a, operator, b))


def phonebook(random: Random, split: Split, shape: BookShape) -> Book:
    """A book of random names and numbers, and questions on it."""
    while True:
        names = _names(random, shape)
        if split_of("\n".join(sorted(names))) == split:
            break
    entries = {name: "".join(random.choices("0123456789", k=shape.digits)) for name in names}
    asked: list[str] = []
    while len(asked) < shape.questions:
        asked += random.sample(names, min(len(names), shape.questions - len(asked)))
    lines = (f"{name}: {number}\n" for name, number in entries.items())
    turns = tuple(Turn(f"{name}?", f"{name}: {entries[name]}") for name in asked)
    return Book("".join(lines), turns)


def talk(random: Random, split: Split) -> Turn:
    """A greeting, a question about the model, or something it does not know."""
    while True:
        kind = random.choice(tuple(_TALK))
        questions, answer = _TALK[kind]
        question = random.choice(questions)
        if "{" in question:
            question = question.format(_topic(random))
        question = _vary(random, question)
        # There are too few greetings to hold any out; what is outside its scope is endless.
        if kind != "outside" or split_of(question) == split:
            return Turn(question, answer)


def is_right(turn: Turn, answer: str) -> bool:
    """Whether an answer is exactly right: the boxed value where there is one, else the text."""
    expected = boxed(turn.answer)
    if expected is not None:
        return boxed(answer) == expected
    return answer.strip() == turn.answer


def known_texts() -> list[str]:
    """Texts that together hold every fixed word of the tasks, in the forms the tasks use."""
    names = [f"{name}: " for name in _PAIRS]
    names += [f"{name}: " for name in LAST_NAMES]
    talked = [text for questions, answer in _TALK.values() for text in (*questions, answer)]
    asked = [question.format(sign) for question in _QUESTIONS for sign in sum(_SIGNS.values(), ())]
    asked += [text[0].lower() + text[1:] for text in (*asked, *talked)]
    topics = [f"{topic} {topic}" for topic in TOPICS]
    return [*names, *talked, *asked, *topics, work_out(1, "+", 2), work_out(1, "-", 2)]


def _columns(a: int, operator: str, b: int) -> tuple[list[str], int]:
    """The columns of a operator b, and its value; for a < b, what the columns give."""
    width = len(str(a)) if operator == "*" else max(len(str(a)), len(str(b)))
    mark = "b" if operator == "-" else "c"
    second = "+" if operator == "*" else operator
    columns, handed, result = [], 0, 0
    for place in range(width):
        x = a // 10**place % 10
        y = b if operator == "*" else b // 10**place % 10
        value = x * y + handed if operator == "*" else x + y + handed
        if operator == "-":
            value = x - y - handed
        digit, onward = value % 10, abs(value // 10)
        columns.append(f"{x}{operator}{y}{second}{handed}={digit}{mark}{onward}")
        result += digit * 10**place
        handed = onward
    if operator != "-":
        result += handed * 10**width
    return columns, result


def _number(random: Random, digits: int) -> int:
    return random.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)


def _names(random: Random, shape: BookShape) -> list[str]:
    if shape.words == 1:
        return random.sample([*FIRST_NAMES, *LAST_NAMES], shape.entries)
    return random.sample(_PAIRS, shape.entries)


def _topic(random: Random) -> str:
    """Something to ask about: a known word, or letters never seen before."""
    if random.random() < 0.6:
        return random.choice(TOPICS)
    return "".join(random.choices("abcdefghijklmnoprstuvw", k=random.randint(3, 7)))


def _vary(random: Random, question: str) -> str:
    """People write with and without capitals and marks."""
    if random.random() < 0.2:
        question = question.rstrip("?.!")
    if random.random() < 0.2:
        question = question[0].lower() + question[1:]
    return question


_SIGNS = {"+": (" + ", "+", " plus "), "-": (" - ", "-", " minus "), "*": (" * ", " x ", " times ")}
_QUESTIONS = (
    "What is {}?",
    "{}",
    "{} =",
    "{} = ?",
    "Calculate {}.",
    "How much is {}?",
    "Compute {}",
)

TOPICS = (
    "France",
    "Paris",
    "music",
    "the weather",
    "football",
    "history",
    "the moon",
    "cats",
    "dogs",
    "love",
    "money",
    "a poem",
    "a story",
    "a joke",
    "Python",
    "code",
    "the sun",
    "Rome",
    "the news",
    "cooking",
    "chess",
)

_TALK: dict[str, tuple[tuple[str, ...], str]] = {
    "greeting": (
        ("Hello", "Hello!", "Hi", "Hi!", "Hey", "Good morning!", "Good evening!", "Hi there!"),
        "Hello! Ask me for a sum, a difference, a product by one digit, "
        "or a number from a phonebook.",
    ),
    "who": (
        (
            "Who are you?",
            "What are you?",
            "What is your name?",
            "Tell me about yourself.",
            "Are you a person?",
            "Are you an AI?",
            "What model are you?",
        ),
        "I am a very small SambaY language model, made to test an exporter.",
    ),
    "what": (
        (
            "What can you do?",
            "How can you help me?",
            "Help",
            "Can you help me?",
            "What do you know?",
            "What should I ask?",
        ),
        "I can add, subtract, multiply by one digit, and look up numbers in a phonebook.",
    ),
    "thanks": (
        ("Thanks", "Thanks!", "Thank you", "Thank you!", "Great!", "Good"),
        "You are welcome!",
    ),
    "bye": (("Bye", "Bye!", "Goodbye", "Good night!", "See you!"), "Goodbye!"),
    "outside": (
        (
            "What is {}?",
            "Who is {}?",
            "Tell me about {}.",
            "Write {}.",
            "Where is {}?",
            "Do you like {}?",
            "What do you think about {}?",
            "Explain {}.",
            "Why is {} good?",
            "What is the capital of {}?",
            "How are {} made?",
            "Tell me {}.",
        ),
        "I do not know. I am a very small model: I know only numbers and phonebooks.",
    ),
}
