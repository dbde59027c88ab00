"""Text to tokens and back: ``tokenizer.json`` and ``tokenizer_config.json`` beside the model."""

from __future__ import annotations

import codecs
import datetime
import json
from collections.abc import Mapping
from collections.abc import Sequence as Many
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

from runtime_py.errors import InputError, PackageError

Message = Mapping[str, Any]  # role and content


class Tokenizer:
    """Byte-level BPE with the chat template of the checkpoint.

    Attributes:
        chat_template: whether the package has one.
    """

    def __init__(self, folder: Path) -> None:
        """Read the tokenizer of a package.

        Raises:
            PackageError: there is none, it cannot be read, or it is not byte-level.
        """
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise PackageError(
                f"this package has no tokenizer ({file} is missing); put the checkpoint's "
                "tokenizer files there and export again. Session works with token ids"
            )
        try:
            text = file.read_text(encoding="utf-8")
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # tokenizers raises bare Exception
            raise PackageError(f"{file} cannot be read ({error}); export again") from error
        if '"ByteLevel"' not in json.dumps(json.loads(text).get("decoder")):
            raise PackageError(f"{file} has no ByteLevel decoder; only byte-level BPE is supported")
        self._special = {
            id for id, token in self._tokenizer.get_added_tokens_decoder().items() if token.special
        }
        self._settings = _read_settings(folder)
        template = _chat_template(folder, self._settings)
        self.chat_template = template is not None
        self._template = _compile(template or "")

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; special tokens written in it become themselves.

        Raises:
            InputError: the text is not Unicode (a lone surrogate, from an undecodable byte).
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(
                f"the text is no valid Unicode at character {error.start}; give UTF-8"
            ) from error
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def render(self, messages: Many[Message]) -> str:
        """Text of a conversation, up to where the assistant's answer begins.

        Raises:
            PackageError: there is no chat template, or it is wrong.
            InputError: the template refuses these messages.
        """
        if not self.chat_template:
            raise PackageError(
                "this package has no chat template; give the prompt as one plain text"
            )
        special = {
            name: _token_text(value)
            for name, value in self._settings.items()
            if name.endswith("_token") and isinstance(value, str | dict)
        }
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=True, tools=None, **special
            )
        except jinja2.TemplateError as error:
            raise InputError(f"the chat template refuses the messages: {error}") from error

    def stream(self) -> TextStream:
        """A decoder for the tokens of one answer."""
        return TextStream(self)

    def token_bytes(self, id: int) -> bytes:
        """UTF-8 bytes a token stands for, maybe part of a character; none for a special one."""
        token = self._tokenizer.id_to_token(id)
        if token is None or id in self._special:  # rows beyond the vocabulary stand for nothing
            return b""
        try:
            return bytes(BYTES[char] for char in token)
        except KeyError:  # an added token, written as it is
            return token.encode("utf-8")


class TextStream:
    """Turns tokens into text one by one and never shows half a character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Begin an answer."""
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, id: int) -> str:
        """Text that is complete with this token; empty in the middle of a character."""
        return self._decoder.decode(self._tokenizer.token_bytes(id))

    def end(self) -> str:
        """What is left: a replacement character if the answer stopped inside one."""
        return self._decoder.decode(b"", final=True)


def _byte_characters() -> dict[str, int]:
    """Character that stands for each byte in a byte-level vocabulary.

    Printable bytes stand for themselves, the others for the characters from U+0100 on.
    Source: the byte-level BPE of GPT-2.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + index): byte for index, byte in enumerate(others)}


BYTES = _byte_characters()


def _read_settings(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return {}
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PackageError(f"{file} cannot be read ({error}); export again") from error
    if not isinstance(settings, dict):
        raise PackageError(f"{file} holds no JSON object; export again")
    return settings


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The template: a file of its own, or a setting (one text, or a list of named ones)."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    return template


def _compile(template: str) -> jinja2.Template:
    # Sandboxed: a template comes with the checkpoint and must not reach the machine.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent
    )
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise PackageError(f"the chat template is wrong: {error}; export again") from error


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _token_text(value: str | dict[str, Any]) -> str:
    return value if isinstance(value, str) else str(value.get("content", ""))
