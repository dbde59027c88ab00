import itertools

import pytest

from runtime_py import Conversation, InputError, PackageError, Sampling, generate

GREEDY = Sampling(temperature=0)


class Spy:
    """Notes the ids of each step of a session's sequences."""

    def __init__(self, session, monkeypatch):
        self.fed, self.started = [], 0
        start = session.start

        def started(batch=1):
            self.started += 1
            sequence = start(batch)
            step = sequence.step

            def noted(ids, mask=None, progress=None):
                self.fed.append(list(ids))
                return step(ids, mask, progress)

            sequence.step = noted
            return sequence

        monkeypatch.setattr(session, "start", started)

    def take(self):
        fed, self.fed = list(itertools.chain(*self.fed)), []
        return fed


@pytest.fixture
def spy(session, monkeypatch):
    return Spy(session, monkeypatch)


def encoded(session, text):
    return session.tokenizer.encode(text)


def test_an_answer_comes_in_whole_characters_and_ends_at_the_end_token(session):
    assert list(generate(session, "hi", GREEDY)) == ["h", "é", "y", "\n"]


def test_a_prompt_is_put_into_the_chat_template(session, spy):
    list(generate(session, "hi", GREEDY))
    fed = encoded(session, "<|user|>hi<|end|><|assistant|>héy\n")
    assert spy.take() == fed


def test_messages_are_answered_as_they_are(session, spy):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert "".join(generate(session, messages, GREEDY)) == "héy\n"
    text = "<|system|>s<|end|><|user|>u<|end|><|assistant|>héy\n"
    assert spy.take() == encoded(session, text)


def test_without_a_template_a_text_is_continued(make_session, monkeypatch):
    session = make_session(tokenizer={"chat_template": None}, eos_token_ids=[68])
    spy = Spy(session, monkeypatch)  # token 64 is "a", and each token follows the one before
    assert "".join(generate(session, "za", GREEDY)) == "bcd"
    assert spy.take() == [89, 64, 65, 66, 67]


def test_a_limit_of_tokens_ends_an_answer_even_inside_a_character(session):
    assert "".join(generate(session, "hi", GREEDY, max_new_tokens=2)) == "h\ufffd"


def test_a_seed_repeats_an_answer_and_another_gives_another(session):
    def answer(seed):
        sampling = Sampling(temperature=50, top_p=1, seed=seed)
        return "".join(generate(session, "hi", sampling, max_new_tokens=20))

    assert answer(1) == answer(1)
    assert len({answer(seed) for seed in range(5)}) > 1


@pytest.mark.parametrize(
    ("prompt", "limit", "said"),
    [
        ("", 9, "empty"),
        ("  \n", 9, "empty"),
        ([], 9, "no messages"),
        ("x", 0, "max_new_tokens"),
        ("x" * 3000, 9, "3003 tokens"),
    ],
    ids=str,
)
def test_a_prompt_that_cannot_be_answered_is_refused_at_once(session, prompt, limit, said):
    with pytest.raises(InputError, match=said):
        generate(session, prompt, max_new_tokens=limit)


def test_without_a_tokenizer_a_prompt_is_refused_at_once(make_session):
    with pytest.raises(PackageError, match="no tokenizer"):
        generate(make_session(), "hi")


def test_an_answer_ends_where_the_context_does(make_session):
    session = make_session(tokenizer={}, follows=[64] * 261, context_length=10)
    assert "".join(generate(session, "hi", GREEDY)) == "a" * 5  # 5 tokens of the prompt


def test_a_second_turn_costs_its_own_tokens_only(session, spy):
    talk = Conversation(session)
    assert "".join(talk.answer("a", GREEDY)) == "héy\n"
    spy.take()
    assert "".join(talk.answer("b", GREEDY)) == "héy\n"
    assert spy.take() == encoded(session, "<|end|><|user|>b<|end|><|assistant|>héy\n")
    assert spy.started == 1
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 2
    assert talk.timing.prompt_tokens == 5


@pytest.mark.parametrize("stop", [1, 2, 3])
@pytest.mark.parametrize("how", ["closed", "interrupted", "limit"])
def test_after_an_answer_cut_short_the_next_turn_is_right(session, spy, monkeypatch, how, stop):
    talk = Conversation(session)
    pieces = talk.answer("a", GREEDY, max_new_tokens=stop if how == "limit" else 99)
    if how == "interrupted":
        begin = len(spy.fed)
        step = talk._sequence.step

        def interrupted(*arguments, **named):
            if len(spy.fed) - begin == stop:
                raise KeyboardInterrupt
            return step(*arguments, **named)

        monkeypatch.setattr(talk._sequence, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(pieces)
        monkeypatch.setattr(talk._sequence, "step", step)
    elif how == "closed":
        list(itertools.islice(pieces, stop))
        pieces.close()
    else:
        list(pieces)
    said = talk._ids[len(encoded(session, "<|user|>a<|end|><|assistant|>")) :]
    list(talk.answer("b", GREEDY))
    assert spy.started == 1
    assert spy.take() == [
        *encoded(session, "<|user|>a<|end|><|assistant|>"),
        *said,
        *encoded(session, "<|end|><|user|>b<|end|><|assistant|>héy\n"),
    ]


def test_a_prompt_stopped_while_it_is_read_is_read_on_in_the_next_turn(session, spy):
    def stop(done, total):
        if done:
            raise KeyboardInterrupt

    talk = Conversation(session)
    with pytest.raises(KeyboardInterrupt):
        list(talk.answer("x" * 600, GREEDY, progress=stop))
    assert talk._sequence.length == 512
    spy.take()
    assert "".join(talk.answer("b", GREEDY)) == "héy\n"
    whole = f"<|user|>{'x' * 600}<|end|><|assistant|><|end|><|user|>b<|end|><|assistant|>héy\n"
    assert spy.take() == encoded(session, whole)[512:]


def test_a_template_that_rewrites_what_was_said_starts_anew(make_session, monkeypatch):
    template = "{% for m in messages %}[{{ m['content'] | trim }}]{% endfor %}<|assistant|>"
    answer = [257] * 261
    answer[259], answer[64] = 64, 198  # "a" and a line end, which the template drops
    session = make_session(tokenizer={"chat_template": template}, follows=answer)
    spy = Spy(session, monkeypatch)
    talk = Conversation(session)
    said = "".join(talk.answer("u", GREEDY))
    spy.take()
    list(talk.answer("v", GREEDY, max_new_tokens=1))
    assert spy.started == 2
    assert spy.take() == encoded(session, f"[u][{said.strip()}][v]<|assistant|>")


def test_a_refused_turn_leaves_the_conversation_as_it_was(session):
    talk = Conversation(session)
    list(talk.answer("a", GREEDY))
    before = list(talk.messages)
    with pytest.raises(InputError):
        talk.answer("x" * 3000, GREEDY)
    assert talk.messages == before
    assert "".join(talk.answer("b", GREEDY)) == "héy\n"


def test_timing_counts_the_tokens_of_prompt_and_answer(session):
    talk = Conversation(session)
    list(talk.answer("a", GREEDY))
    assert (talk.timing.prompt_tokens, talk.timing.answer_tokens) == (4, 6)  # with the end token
    assert talk.timing.prompt_seconds > 0
    assert talk.timing.answer_seconds > 0
