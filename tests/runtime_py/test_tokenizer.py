import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime_py import InputError, PackageError
from runtime_py.tokenizer import Tokenizer

MESSAGES = [{"role": "user", "content": "hi"}]


@settings(max_examples=50)
@given(st.text(max_size=20))
def test_streamed_text_is_the_text_and_never_half_a_character(session, text):
    stream = session.tokenizer.stream()
    pieces = [stream.add(id) for id in session.tokenizer.encode(text)] + [stream.end()]
    assert "".join(pieces) == text or "<|" in text
    assert all("\ufffd" not in piece for piece in pieces if "\ufffd" not in text)


@settings(max_examples=50)
@given(st.lists(st.integers(0, 255), max_size=12))
def test_any_tokens_stream_to_what_they_decode_to_at_once(session, ids):
    stream = session.tokenizer.stream()
    text = "".join([*map(stream.add, ids), stream.end()])
    assert text == session.tokenizer._tokenizer.decode(ids, skip_special_tokens=True)


def test_special_tokens_and_ids_beyond_the_vocabulary_show_nothing(session):
    stream = session.tokenizer.stream()
    assert [stream.add(id) for id in (256, 257, 9999)] == ["", "", ""]


def test_special_tokens_in_a_text_become_themselves(session):
    assert session.tokenizer.encode("<|user|>  a")[0] == 258
    assert len(session.tokenizer.encode("<|user|>  a")) == 2  # white space after it is eaten


def test_the_template_renders_messages_up_to_the_answer(session):
    assert session.tokenizer.render(MESSAGES) == "<|user|>hi<|end|><|assistant|>"


def test_a_lone_surrogate_is_refused(session):
    with pytest.raises(InputError, match="character 1"):
        session.tokenizer.encode("a\udc80")


def test_templates_are_found_in_each_place_they_may_stand(tmp_path, tokenizer_files):
    named = [{"name": "tools", "template": "no"}, {"name": "default", "template": "yes"}]
    tokenizer_files(tmp_path, chat_template=named)
    assert Tokenizer(tmp_path).render(MESSAGES) == "yes"
    (tmp_path / "chat_template.jinja").write_text("{{ eos_token }}", encoding="utf-8")
    assert Tokenizer(tmp_path).render(MESSAGES) == "<|endoftext|>"


def test_a_template_may_refuse_messages(tmp_path, tokenizer_files):
    tokenizer_files(tmp_path, chat_template="{{ raise_exception('no such role') }}")
    with pytest.raises(InputError, match="no such role"):
        Tokenizer(tmp_path).render(MESSAGES)


def test_a_template_cannot_reach_the_machine(tmp_path, tokenizer_files):
    tokenizer_files(tmp_path, chat_template="{{ messages.__class__.__mro__ }}")
    with pytest.raises(InputError, match="unsafe"):
        Tokenizer(tmp_path).render(MESSAGES)


def test_a_package_without_a_tokenizer_says_so(tmp_path):
    with pytest.raises(PackageError, match=r"has no tokenizer.*Session works with token ids"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_file_is_named(tmp_path, tokenizer_files, file):
    tokenizer_files(tmp_path)
    (tmp_path / file).write_text("{", encoding="utf-8")
    with pytest.raises(PackageError, match=file.replace(".", "[.]")):
        Tokenizer(tmp_path)


def test_a_wrong_template_is_refused(tmp_path, tokenizer_files):
    tokenizer_files(tmp_path, chat_template="{% if %}")
    with pytest.raises(PackageError, match="template is wrong"):
        Tokenizer(tmp_path)


def test_without_a_template_messages_are_refused(tmp_path, tokenizer_files):
    tokenizer_files(tmp_path, chat_template=None)
    with pytest.raises(PackageError, match="no chat template"):
        Tokenizer(tmp_path).render(MESSAGES)


def test_a_tokenizer_that_is_not_byte_level_is_refused(tmp_path, tokenizer_files):
    tokenizer_files(tmp_path)
    file = tmp_path / "tokenizer.json"
    told = json.loads(file.read_text(encoding="utf-8")) | {"decoder": None}
    file.write_text(json.dumps(told), encoding="utf-8")
    with pytest.raises(PackageError, match="byte-level"):
        Tokenizer(tmp_path)
