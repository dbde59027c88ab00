"""Tokenizer files of a package: copied from the checkpoint, or built from its vocab.json.

The published checkpoint holds no tokenizer.json. Its vocabulary is byte-level BPE whose token id
is the rank of the merge that makes the token, so the merges follow from the vocabulary.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from export.config import read_json_object

COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)

_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
# How o200k cuts a text into pieces before any merge. Source: the o200k_base encoding of tiktoken.
O200K_SPLIT = "|".join(
    (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}",  # a word, one sign before it
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)

# Special tokens of the published checkpoint, for a vocab.json that comes alone.
PUBLISHED_RANKS = 199_998
PUBLISHED_SPECIAL = {
    "<|endoftext|>": 199_999,
    "<|endofprompt|>": 200_018,
    "<|assistant|>": 200_019,
    "<|end|>": 200_020,
    "<|user|>": 200_021,
    "<|system|>": 200_022,
    "<|tool|>": 200_023,
    "<|/tool|>": 200_024,
    "<|tool_call|>": 200_025,
    "<|/tool_call|>": 200_026,
    "<|tool_response|>": 200_027,
    "<|tag|>": 200_028,
}
_FIRST_RSTRIP = 200_019  # from here on, white space after the token is dropped

# The form of the published template. Tools are a text that the system message brings along.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'system' and 'tools' in message and message['tools'] %}"
    "{{ '<|tool|>' + message['tools'] + '<|/tool|>' }}"
    "{% endif %}"
    "{{ '<|end|>' }}"
    "{% endfor %}"
    "{{ '<|assistant|>' if add_generation_prompt else eos_token | default('') }}"
)
_ROLES = ("<|user|>", "<|assistant|>", "<|end|>")  # what the template cannot do without

_SAMPLE = 4096  # tokens encoded again to check a built tokenizer


class TokenizerError(ValueError):
    """Tokenizer files that are damaged, or a vocabulary no tokenizer can be built from."""


def write_tokenizer(source: Path, destination: Path) -> str | None:
    """Put a checkpoint's tokenizer into a package folder, with a chat template where one fits.

    Args:
        source: checkpoint folder. tokenizer.json wins over vocab.json (and merges.txt).
        destination: existing folder of the package.

    Returns:
        None, or one line of note if the checkpoint holds no tokenizer.

    Raises:
        TokenizerError: the files cannot be read, or the built tokenizer does not give a token
            of its vocabulary back.
        ConfigError: a JSON file of the tokenizer is no JSON object.
    """
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, destination / name)
    if (source / "tokenizer.json").is_file():
        tokenizer = _load(source / "tokenizer.json")
    elif (source / "vocab.json").is_file():
        tokenizer = build_tokenizer(source)
        tokenizer.save(str(destination / "tokenizer.json"), pretty=False)
    else:
        return (
            f"{source} holds no tokenizer (tokenizer.json or vocab.json): "
            "the package takes token ids, chat needs a tokenizer"
        )
    _complete_settings(destination, tokenizer)
    return None


@contextlib.contextmanager
def tokenizer_files(source: Path, purpose: str) -> Iterator[Path]:
    """A folder with the files that a package would get, for a while.

    Raises:
        TokenizerError: the checkpoint has no tokenizer; names what needs one.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tokenizer(source, folder)
        if not (folder / "tokenizer.json").is_file():
            raise TokenizerError(
                f"{source} has no tokenizer, and {purpose} needs one: put the published tokenizer "
                "files there"
            )
        yield folder


def build_tokenizer(source: Path) -> tokenizers.Tokenizer:
    """Build byte-level BPE from vocab.json, and merges.txt where there is one, and check it.

    Without merges.txt a token's id is taken for the rank of its merge, as in o200k.

    Raises:
        TokenizerError: the vocabulary is not byte-level BPE, or ids collide.
        ConfigError: a JSON file is no JSON object.
    """
    path = source / "vocab.json"
    vocabulary = read_json_object(path)
    special = _special_tokens(source, len(vocabulary))
    ordinary = {text: id for text, id in vocabulary.items() if text not in special}
    ids = {text: id for text, (id, _) in special.items()}
    _check_vocabulary(path, vocabulary, ordinary, ids)

    merges_file = source / "merges.txt"
    merges = _read_merges(merges_file) if merges_file.is_file() else _derive_merges(ordinary)
    try:
        # Special tokens stand in the model's vocabulary too: ids with holes are kept only there.
        tokenizer = tokenizers.Tokenizer(models.BPE(vocab=ordinary | ids, merges=merges))
    except Exception as error:  # tokenizers raises bare Exception
        raise TokenizerError(
            f"{path} and merges.txt do not fit ({error}): download them again"
        ) from error
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(O200K_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    _check_round_trip(path, tokenizer, ordinary)
    tokenizer.add_tokens([token for _, token in sorted(special.values(), key=lambda pair: pair[0])])
    return tokenizer


def byte_characters() -> dict[int, str]:
    """The character that stands for each byte in a byte-level vocabulary.

    Printable Latin-1 stands for itself, the rest follows from U+0100 on in byte order.

    Source: GPT-2's vocabulary.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(0x100 + place) for place, byte in enumerate(others)
    }


def _special_tokens(source: Path, size: int) -> dict[str, tuple[int, AddedToken]]:
    """Id and behaviour of each special token, by its text."""
    found: dict[str, tuple[int, AddedToken]] = {}
    settings, added = source / "tokenizer_config.json", source / "added_tokens.json"
    if settings.is_file():
        for id, entry in (read_json_object(settings).get("added_tokens_decoder") or {}).items():
            text, token = _described_token(settings, id, entry)
            found[text] = (int(id), token)
    if added.is_file():
        for text, id in read_json_object(added).items():
            if type(id) is not int:
                raise TokenizerError(
                    f"{added} gives {text!r} the id {id!r}, expected an integer: download it again"
                )
            found.setdefault(text, (id, AddedToken(text, special=True, normalized=False)))
    if not found and not added.is_file() and size >= PUBLISHED_RANKS:
        for text, id in PUBLISHED_SPECIAL.items():
            rstrip = id >= _FIRST_RSTRIP
            token = AddedToken(text, special=True, normalized=False, rstrip=rstrip)
            found[text] = (id, token)
    return found


def _described_token(path: Path, id: str, entry: Any) -> tuple[str, AddedToken]:
    text = entry.get("content") if isinstance(entry, dict) else None
    if not isinstance(text, str) or not text or not id.isdecimal():
        raise TokenizerError(
            f"{path}: the token {id!r} of added_tokens_decoder is {entry!r}, "
            "expected an id with a content: download it again"
        )
    flags = {
        flag: bool(entry.get(flag, default))
        for flag, default in (
            ("single_word", False),
            ("lstrip", False),
            ("rstrip", False),
            ("normalized", False),
            ("special", True),
        )
    }
    return text, AddedToken(text, **flags)


def _check_vocabulary(
    path: Path, vocabulary: dict[str, Any], ordinary: dict[str, Any], special: dict[str, int]
) -> None:
    """Every id once, every byte present, nothing but bytes."""
    owners: dict[int, str] = {}
    for text, id in (vocabulary | special).items():
        if type(id) is not int or id < 0:
            raise TokenizerError(
                f"{path} gives {text!r} the id {id!r}, expected a count: download it again"
            )
        if owners.setdefault(id, text) != text or vocabulary.get(text, id) != id:
            raise TokenizerError(
                f"{path} and the special tokens contradict each other at {text!r}, id {id} "
                f"(also {owners[id]!r}): download the tokenizer files again"
            )
    alphabet = set(byte_characters().values())
    missing = sorted(alphabet - ordinary.keys())
    foreign = next((text for text in ordinary if not text or not alphabet.issuperset(text)), None)
    if missing or foreign is not None:
        fault = f"lacks {len(missing)} of 256 bytes" if missing else f"holds {foreign!r}"
        raise TokenizerError(
            f"{path} {fault}: only a byte-level BPE vocabulary can be built into a tokenizer, "
            "put a tokenizer.json beside it"
        )


def _derive_merges(ranks: dict[str, int]) -> list[tuple[str, str]]:
    """Every split of a token into two tokens, lowest rank of the result first.

    The greedy search of tiktoken joins the two neighbours whose union has the lowest rank; these
    merges, in this order, make the usual BPE do the same.
    """
    merges: list[tuple[str, str]] = []
    for token in sorted(ranks, key=ranks.__getitem__):
        splits = [
            (token[:cut], token[cut:])
            for cut in range(1, len(token))
            if token[:cut] in ranks and token[cut:] in ranks
        ]
        merges += sorted(splits, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return merges


def _read_merges(path: Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except ValueError as error:
        raise TokenizerError(f"{path} is no UTF-8 text ({error}): download it again") from error
    merges = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        parts = line.split(" ")
        if len(parts) != 2:
            raise TokenizerError(
                f"{path}, line {number}: {line[:40]!r} is no pair of tokens: download it again"
            )
        merges.append((parts[0], parts[1]))
    return merges


def _check_round_trip(path: Path, tokenizer: tokenizers.Tokenizer, ranks: dict[str, int]) -> None:
    """Encode the text of a sample of tokens; each must come back as that token alone.

    It fails where ids are no merge ranks, or the split pattern is not the vocabulary's.
    """
    byte_of = {character: byte for byte, character in byte_characters().items()}
    tokens = sorted(ranks)
    for token in random.Random(0).sample(tokens, min(_SAMPLE, len(tokens))):
        try:
            text = bytes(byte_of[character] for character in token).decode("utf-8")
        except UnicodeDecodeError:
            continue  # part of a character: no text gives it alone
        if len(tokenizer.pre_tokenizer.pre_tokenize_str(text)) != 1:
            continue  # two pieces: never joined
        found = tokenizer.encode(text, add_special_tokens=False).ids
        if found != [ranks[token]]:
            raise TokenizerError(
                f"{path}: the token {token!r}, id {ranks[token]}, is encoded as {found}: "
                "its ids are not the ranks of byte-level merges, put a tokenizer.json beside it"
            )


def _load(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise TokenizerError(f"{path} cannot be read ({error}): download it again") from error


def _complete_settings(folder: Path, tokenizer: tokenizers.Tokenizer) -> None:
    """Write tokenizer_config.json where it is missing or lacks the chat template that fits."""
    path = folder / "tokenizer_config.json"
    settings = read_json_object(path) if path.is_file() else {}
    has_template = bool(settings.get("chat_template")) or (folder / "chat_template.jinja").is_file()
    fits = all(tokenizer.token_to_id(role) is not None for role in _ROLES)
    wanted = dict(settings)
    if fits and not has_template:
        wanted["chat_template"] = CHAT_TEMPLATE
    if not path.is_file():
        wanted |= {"tokenizer_class": "PreTrainedTokenizerFast"}
        if tokenizer.token_to_id("<|endoftext|>") is not None:
            wanted |= {f"{name}_token": "<|endoftext|>" for name in ("bos", "eos", "pad")}
    if wanted != settings:
        text = json.dumps(wanted, indent=2, ensure_ascii=False) + "\n"
        path.write_text(text, encoding="utf-8")
