import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import jinja2
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer

from export.tokenizer import (
    CHAT_TEMPLATE,
    O200K_SPLIT,
    PUBLISHED_RANKS,
    PUBLISHED_SPECIAL,
    TokenizerError,
    build_tokenizer,
    byte_characters,
    write_tokenizer,
)

TEXT = "the cat sat on the mat, the rat ate 12345 oats at the gate; née Ünlü 你好 don't\n\n stop "
CHARS = byte_characters()


def trained_ranks(size: int = 400) -> dict[str, int]:
    """A small byte-level vocabulary whose ids are merge ranks, by training one."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(O200K_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=size, min_frequency=1, show_progress=False, initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer.get_vocab()


RANKS = trained_ranks()
ROLES = {"<|user|>": 500, "<|assistant|>": 501, "<|end|>": 502, "<|endoftext|>": 499}


def save(folder: Path, name: str, content: Any) -> None:
    (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def built_from(ranks: dict[str, int]) -> tokenizers.Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder), "vocab.json", ranks)
        return build_tokenizer(Path(folder))


BUILT = built_from(RANKS)
BYTES = {char: byte for byte, char in CHARS.items()}
SPLIT = pre_tokenizers.Split(Regex(O200K_SPLIT), behavior="isolated")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    save(folder, "vocab.json", RANKS)
    return folder


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "package"
    folder.mkdir()
    return folder


def written(source: Path, package: Path) -> tokenizers.Tokenizer:
    assert write_tokenizer(source, package) is None
    return tokenizers.Tokenizer.from_file(str(package / "tokenizer.json"))


def greedy(piece: bytes, ranks: dict[bytes, int]) -> list[int]:
    """Byte-pair encoding by its definition: join the neighbours of lowest rank, leftmost first."""
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while True:
        joined = [ranks.get(a + b, len(ranks)) for a, b in itertools.pairwise(parts)]
        if not joined or min(joined) == len(ranks):
            return [ranks[part] for part in parts]
        at = joined.index(min(joined))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@settings(max_examples=100)
@given(st.text(alphabet="the catsonm rg;né你好1\n'", max_size=40))
def test_a_built_tokenizer_joins_the_lowest_rank_first(text: str) -> None:
    ranks = {bytes(BYTES[char] for char in token): id for token, id in RANKS.items()}
    pieces = SPLIT.pre_tokenize_str(text)
    expected = [id for piece, _ in pieces for id in greedy(piece.encode(), ranks)]
    assert BUILT.encode(text).ids == expected


@given(st.text(max_size=40))
def test_decoding_gives_the_text_back(text: str) -> None:
    assert BUILT.decode(BUILT.encode(text).ids) == text


def test_bytes_have_characters_of_their_own() -> None:
    assert sorted(CHARS) == list(range(256))
    assert set(CHARS.values()) == set(pre_tokenizers.ByteLevel.alphabet())
    encoded = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("é")
    assert encoded[0][0] == "".join(CHARS[byte] for byte in "é".encode())


def test_digits_group_in_up_to_three() -> None:
    assert [piece for piece, _ in SPLIT.pre_tokenize_str("1234567")] == ["123", "456", "7"]


def test_special_tokens_keep_their_ids_and_flags(source: Path, package: Path) -> None:
    decoder = {
        str(id): {"content": text, "rstrip": text != "<|endoftext|>", "special": True}
        for text, id in ROLES.items()
    }
    save(source, "tokenizer_config.json", {"added_tokens_decoder": decoder})
    tokenizer = written(source, package)
    space = RANKS[CHARS[ord(" ")]]
    assert tokenizer.encode("<|user|> \n<|end|> ").ids == [500, 502]
    assert tokenizer.encode("<|endoftext|> ").ids == [499, space]
    assert {text: tokenizer.token_to_id(text) for text in ROLES} == ROLES


def test_added_tokens_without_flags_are_special(source: Path, package: Path) -> None:
    save(source, "added_tokens.json", ROLES)
    tokenizer = written(source, package)
    assert tokenizer.encode("<|user|><|end|>").ids == [500, 502]
    assert all(token.special for token in tokenizer.get_added_tokens_decoder().values())


def test_a_published_vocabulary_alone_gets_the_published_special_tokens(
    source: Path, package: Path
) -> None:
    # Pairs of bytes no UTF-8 text holds fill the vocabulary up to the published size.
    ranks = dict(RANKS)
    tails = (CHARS[a] + CHARS[b] for a in range(128, 192) for b in range(128, 192))
    for pair in list(tails):
        for byte in range(128, 192):
            if len(ranks) == PUBLISHED_RANKS:
                break
            ranks.setdefault(pair + CHARS[byte], len(ranks))
    save(source, "vocab.json", ranks)
    tokenizer = written(source, package)
    assert {text: tokenizer.token_to_id(text) for text in PUBLISHED_SPECIAL} == PUBLISHED_SPECIAL
    assert tokenizer.encode("<|user|>  <|end|>\n<|endofprompt|>").ids == [200021, 200020, 200018]
    assert len(tokenizer.encode("<|endoftext|> ").ids) == 2


def test_merges_of_the_checkpoint_are_used(source: Path, package: Path) -> None:
    # ids shuffled: no ranks any more, so only merges.txt tells what to join
    ids = {token: len(RANKS) - 1 - id for token, id in RANKS.items()}
    save(source, "vocab.json", ids)
    merges = json.loads(BUILT.to_str())["model"]["merges"]
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (source / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    expected = [len(RANKS) - 1 - id for id in BUILT.encode(TEXT).ids]
    assert written(source, package).encode(TEXT).ids == expected


def test_a_tokenizer_json_is_copied_as_it_is(source: Path, package: Path) -> None:
    BUILT.save(str(source / "tokenizer.json"))
    for name in ("special_tokens_map.json", "generation_config.json"):
        save(source, name, {"name": name})
    (source / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    assert write_tokenizer(source, package) is None
    for name in ("tokenizer.json", "special_tokens_map.json", "chat_template.jinja"):
        assert (package / name).read_bytes() == (source / name).read_bytes()


def test_without_any_tokenizer_a_note_says_so(source: Path, package: Path) -> None:
    (source / "vocab.json").unlink()
    note = write_tokenizer(source, package)
    assert note is not None
    assert "holds no tokenizer" in note
    assert "\n" not in note
    assert not list(package.iterdir())


def test_the_published_template_is_added_where_there_is_none(source: Path, package: Path) -> None:
    save(source, "added_tokens.json", ROLES)
    save(source, "tokenizer_config.json", {"model_max_length": 7, "chat_template": None})
    written(source, package)
    content = json.loads((package / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert content == {"model_max_length": 7, "chat_template": CHAT_TEMPLATE}


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_template_of_the_checkpoint_stays(source: Path, package: Path, place: str) -> None:
    save(source, "added_tokens.json", ROLES)
    save(source, place, {"chat_template": "mine"})
    written(source, package)
    content = json.loads((package / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert content.get("chat_template") in (None, "mine")
    assert (package / place).read_bytes() == (source / place).read_bytes()


def test_no_template_is_added_without_its_special_tokens(source: Path, package: Path) -> None:
    written(source, package)
    content = json.loads((package / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert "chat_template" not in content


def test_the_template_has_the_published_form() -> None:
    template = jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(CHAT_TEMPLATE)
    messages = [
        {"role": "system", "content": "Be kind.", "tools": "[]"},
        {"role": "user", "content": "Hi"},
    ]
    system = "<|system|>Be kind.<|tool|>[]<|/tool|><|end|>"
    asked = template.render(messages=messages, add_generation_prompt=True)
    assert asked == system + "<|user|>Hi<|end|><|assistant|>"
    ended = template.render(messages=messages, add_generation_prompt=False, eos_token="<|eos|>")
    assert ended == system + "<|user|>Hi<|end|><|eos|>"


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        ({"a": 0}, "lacks 255 of 256 bytes"),
        (RANKS | {"▁the": 9000}, "holds '▁the'"),
        (RANKS | {"": 9000}, "holds ''"),
        (RANKS | {"zz": "9"}, "gives 'zz' the id '9'"),
        (RANKS | {"zz": 7}, "contradict each other"),
    ],
    ids=["bytes", "sentencepiece", "empty", "text", "twice"],
)
def test_a_vocabulary_that_is_not_byte_level_is_refused(
    source: Path, package: Path, vocabulary: dict[str, Any], message: str
) -> None:
    save(source, "vocab.json", vocabulary)
    with pytest.raises(TokenizerError) as caught:
        write_tokenizer(source, package)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_token_that_does_not_come_back_is_named(source: Path, package: Path) -> None:
    save(source, "vocab.json", RANKS | {"zqxj": 9000})
    with pytest.raises(TokenizerError, match="the token 'zqxj', id 9000, is encoded as"):
        write_tokenizer(source, package)


def test_a_special_token_with_two_ids_is_refused(source: Path, package: Path) -> None:
    save(source, "vocab.json", RANKS | {"<|end|>": 600})
    save(source, "added_tokens.json", ROLES)
    with pytest.raises(TokenizerError, match=r"contradict each other at '<\|end\|>'"):
        write_tokenizer(source, package)


@pytest.mark.parametrize("name", ["tokenizer.json", "merges.txt", "added_tokens.json"])
@pytest.mark.parametrize("content", [b'{"a": "b"}', b"\xff\xff\xff", b"one"])
def test_a_damaged_file_is_named(source: Path, package: Path, name: str, content: bytes) -> None:
    (source / name).write_bytes(content)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")) as caught:
        write_tokenizer(source, package)
    assert "\n" not in str(caught.value)
