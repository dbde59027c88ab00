import re
from random import Random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from reference_model.batches import Encoder, conversations, stack
from reference_model.tasks import (
    BookShape,
    Turn,
    arithmetic,
    boxed,
    is_right,
    phonebook,
    split_of,
    talk,
    work_out,
)
from reference_model.vocabulary import build_tokenizer

numbers = st.integers(0, 9_999)
seeds = st.integers(0, 2**32)
quick = settings(max_examples=40, deadline=None)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@quick
@given(numbers, numbers)
def test_the_boxed_value_is_the_sum_and_the_difference(a, b):
    assert boxed(work_out(a, "+", b)) == str(a + b)
    assert boxed(work_out(a, "-", b)) == str(a - b)


@quick
@given(numbers, st.integers(0, 9))
def test_the_boxed_value_is_the_product_in_either_order(a, b):
    assert boxed(work_out(a, "*", b)) == boxed(work_out(b, "*", a)) == str(a * b)


@quick
@given(numbers, st.sampled_from("+-*"), numbers)
def test_every_column_of_a_trace_is_true(a, operator, b):
    columns = re.findall(
        r"(\d)([-+*])(\d)[-+](\d)=(\d)[bc](\d)",
        work_out(a, operator, b % 10 if operator == "*" else b),
    )
    assert columns
    for x, sign, y, handed, digit, onward in columns:
        x, y, handed, digit, onward = map(int, (x, y, handed, digit, onward))
        if sign == "-":
            assert x - y - handed == digit - 10 * onward
        else:
            assert (x * y if sign == "*" else x + y) + handed == digit + 10 * onward


@quick
@given(seeds, st.sampled_from(["train", "held_out"]))
def test_a_case_belongs_to_the_split_it_was_drawn_for(seed, split):
    random = Random(seed)
    turn = arithmetic(random, split, plain=True)
    a, operator, b = re.fullmatch(r"What is (\d+) (.) (\d+)\?", turn.question).groups()
    assert split_of(f"{a}{operator}{b}") == split
    book = phonebook(random, split, BookShape(entries=5))
    names = [line.partition(":")[0] for line in book.text.splitlines()]
    assert split_of("\n".join(sorted(names))) == split


@quick
@given(seeds)
def test_every_answer_on_a_book_is_a_line_of_it(seed):
    book = phonebook(Random(seed), "train", BookShape(entries=6, questions=14))
    lines = book.text.splitlines()
    assert len(set(lines)) == 6
    assert len(book.turns) == 14
    for turn in book.turns:
        assert turn.answer in lines
        assert turn.answer.startswith(turn.question.rstrip("?") + ": ")


@quick
@given(seeds)
def test_the_right_answer_is_right_and_another_is_not(seed):
    random = Random(seed)
    book = phonebook(random, "held_out", BookShape(entries=4))
    for turn in (arithmetic(random, "held_out"), talk(random, "held_out"), book.turns[0]):
        assert is_right(turn, turn.answer)
        assert not is_right(turn, turn.answer[:-2])
        assert not is_right(turn, "")


def test_only_the_last_box_counts():
    turn = Turn("What is 1 + 2?", work_out(1, "+", 2))
    assert is_right(turn, r"\boxed{4} no, \boxed{3}")
    assert not is_right(turn, r"\boxed{3} no, \boxed{4}")


@quick
@given(st.text())
def test_any_text_survives_the_tokenizer(tokenizer, text):
    special = (token.content for token in tokenizer.get_added_tokens_decoder().values())
    assume(not any(token in text for token in special))  # those are no text
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text


def test_digits_names_and_marks_are_single_tokens(tokenizer):
    for text in (*"0123456789", "<think>", "</think>", "\\boxed{", "Ann", " Webb", ": "):
        assert len(tokenizer.encode(text).ids) == 1
    assert len(tokenizer.encode("1234").ids) == 4


def test_special_tokens_eat_white_space_as_published(tokenizer):
    user, assistant = (tokenizer.token_to_id(text) for text in ("<|user|>", "<|assistant|>"))
    assert tokenizer.encode("<|user|> \n<|assistant|>").ids == [user, assistant]
    assert len(tokenizer.encode("<|endoftext|> ").ids) == 2


@quick
@given(seeds)
def test_only_answers_are_learned(tokenizer, seed):
    random = Random(seed)
    turns = [arithmetic(random, "train"), talk(random, "train")]
    ids, answers = Encoder(tokenizer).row(turns, "Ann Lee: 1234\n")
    for number, turn in enumerate(turns, 1):
        learned = [id for id, answer in zip(ids, answers, strict=True) if answer == number]
        text = tokenizer.decode(learned, skip_special_tokens=False)
        assert text == turn.answer + "<|end|>"


def test_rows_of_a_batch_are_cut_or_padded_to_one_length(tokenizer):
    encoder = Encoder(tokenizer)
    batch = conversations(encoder, Random(0), rows=3, tokens=40, digits=(1, 2))
    assert batch.ids.shape == batch.answers.shape == (3, 40)
    padded = stack([([5, 6, 7], [0, 1, 1]), ([5], [0])])
    assert padded.ids.tolist() == [[5, 6, 7], [5, 0, 0]]
    assert padded.answers.tolist() == [[0, 1, 1], [0, 0, 0]]
