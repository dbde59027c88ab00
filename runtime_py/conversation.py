"""From a prompt to an answer, token by token, and from one turn of a conversation to the next."""

from __future__ import annotations

import time
from collections.abc import Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass, replace

from runtime_py.errors import InputError
from runtime_py.sampling import Sampling, choose
from runtime_py.sequence import Progress, Sequence
from runtime_py.session import Session
from runtime_py.tokenizer import Message

MAX_NEW_TOKENS = 32_768  # what the published model recommends
DEFAULT = Sampling()


def generate(
    session: Session,
    prompt: str | Many[Message],
    sampling: Sampling = DEFAULT,
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    progress: Progress | None = None,
) -> Iterator[str]:
    """Answer a prompt.

    Args:
        session: a package with a tokenizer.
        prompt: a question, or messages with ``role`` and ``content``. Where the package has no
            chat template, a text to continue.
        sampling: how tokens are chosen.
        max_new_tokens: most tokens of the answer; the model's context may end it earlier.
        progress: called before the prompt is read and after each chunk of it, with the tokens fed
            and the tokens in all.

    Returns:
        Pieces of the answer, none of them half a character. The prompt is checked at once and
        run when the first piece is asked for.

    Raises:
        InputError: the prompt is empty or too long, or max_new_tokens is below 1.
        PackageError: the package has no usable tokenizer.
    """
    if isinstance(prompt, str):
        return Conversation(session).answer(
            prompt, sampling, max_new_tokens=max_new_tokens, progress=progress
        )
    if not prompt:
        raise InputError("there are no messages; give at least one")
    *earlier, last = prompt
    conversation = Conversation(session, earlier)
    return conversation.reply(last, sampling, max_new_tokens=max_new_tokens, progress=progress)


@dataclass(frozen=True)
class Timing:
    """How long an answer took. Seconds of the reader of the answer are not counted.

    Attributes:
        prompt_tokens, prompt_seconds: tokens fed before the answer began.
        answer_tokens, answer_seconds: tokens of the answer, and running the model for all of
            them but the first, which comes from the prompt.
    """

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    answer_tokens: int = 0
    answer_seconds: float = 0.0


class Conversation:
    """Turns of a chat on one sequence: a new turn costs its own tokens only.

    Attributes:
        messages: what was said so far.
        timing: of the latest answer.
    """

    def __init__(self, session: Session, messages: Many[Message] = ()) -> None:
        """Begin with these messages; nothing is run yet.

        Raises:
            PackageError: the package has no usable tokenizer.
        """
        self.session = session
        self._tokenizer = session.tokenizer
        self.messages: list[Message] = list(messages)
        self.timing = Timing()
        # The tokens of the conversation, fed or not, and the text they stand for. How many are
        # fed is the sequence's length, so an interruption at any point leaves all three true.
        self._sequence: Sequence = session.start()
        self._ids: list[int] = []
        self._text = ""

    def answer(
        self,
        prompt: str,
        sampling: Sampling = DEFAULT,
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        progress: Progress | None = None,
    ) -> Iterator[str]:
        """Ask something; arguments, result and errors are those of ``generate``."""
        if not prompt.strip():
            raise InputError("the prompt is empty; give some text")
        message = {"role": "user", "content": prompt}
        return self.reply(message, sampling, max_new_tokens=max_new_tokens, progress=progress)

    def reply(
        self,
        message: Message,
        sampling: Sampling = DEFAULT,
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        progress: Progress | None = None,
    ) -> Iterator[str]:
        """As ``answer``, for a message of any role the chat template knows.

        What was answered until the end, or until the iterator was closed or interrupted, becomes
        part of the conversation.
        """
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {max_new_tokens}; give 1 or more")
        messages = [*self.messages, message]
        text = self._render(messages)
        if not text.startswith(self._text):  # a template may rewrite what was said
            self._sequence, self._ids, self._text = self.session.start(), [], ""
        ids = self._ids + self._tokenizer.encode(text[len(self._text) :])
        config = self.session.config
        if len(ids) >= config.max_position_embeddings:
            raise InputError(
                f"the conversation has {len(ids)} tokens; this model takes "
                f"{config.max_position_embeddings - 1} at most: shorten it or start anew"
            )
        if len(ids) == self._sequence.length:
            raise InputError("the prompt holds no token; give some text")
        self.messages, self._text, self._ids = messages, text, ids
        within = len(ids) < config.context_length
        end = config.context_length if within else config.max_position_embeddings
        room = min(max_new_tokens, end - len(ids))
        return self._pieces(sampling, room, progress)

    def _render(self, messages: list[Message]) -> str:
        if self._tokenizer.chat_template:
            return self._tokenizer.render(messages)
        return "".join(str(message["content"]) for message in messages)

    def _pieces(self, sampling: Sampling, room: int, progress: Progress | None) -> Iterator[str]:
        stream = self._tokenizer.stream()
        begin = len(self._text)
        try:
            for token in self._tokens(sampling, room, progress):
                piece = stream.add(token)
                self._text += piece
                if piece:
                    yield piece
            rest = stream.end()
            self._text += rest
            if rest:
                yield rest
        finally:
            self.messages.append({"role": "assistant", "content": self._text[begin:]})

    def _tokens(self, sampling: Sampling, room: int, progress: Progress | None) -> Iterator[int]:
        """Sampled tokens up to the end token, which the next turn's template text brings."""
        random, fed = sampling.random(), self._sequence.length
        clock = time.perf_counter()
        logits = self._sequence.step(self._ids[fed:], progress=progress)
        self.timing = Timing(len(self._ids) - fed, time.perf_counter() - clock)
        for count in range(1, room + 1):
            clock = time.perf_counter()
            if count > 1:
                logits = self._sequence.step(self._ids[-1:])
            token = choose(logits[0], sampling, random)
            seconds = self.timing.answer_seconds + (time.perf_counter() - clock) * (count > 1)
            self.timing = replace(self.timing, answer_tokens=count, answer_seconds=seconds)
            if token in self.session.config.eos_token_ids:
                return
            self._ids.append(token)
            yield token
