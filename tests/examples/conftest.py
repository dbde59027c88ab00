"""What the example programs must answer: the greedy tokens of our own runtime."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from runtime_py import Session

QUESTION = "What is 347 + 589?"


@dataclass(frozen=True)
class Expected:
    """A package, a question, and our runtime's answer to it."""

    package: Path
    question: str
    prompt: list[int]  # the question as the model reads it
    tokens: list[int]  # the end token is the last
    text: str


@pytest.fixture(scope="session")
def expected(export: Callable[..., Path]) -> Callable[[str], Expected]:
    """expected(target) -> the shipped model exported for it, and its answer to QUESTION."""

    def run(target: str) -> Expected:
        package = export(None, target)
        session = Session(package, threads=1)
        tokenizer, ends = session.tokenizer, session.config.eos_token_ids
        prompt = tokenizer.encode(tokenizer.render([{"role": "user", "content": QUESTION}]))
        sequence, tokens = session.start(), list[int]()
        while not tokens or (tokens[-1] not in ends and len(tokens) < 200):
            tokens.append(int(sequence.step(tokens[-1:] or prompt)[0].argmax()))
        text = b"".join(map(tokenizer.token_bytes, tokens)).decode()
        assert r"\boxed{936}" in text
        return Expected(package, QUESTION, prompt, tokens, text)

    return run
