import json
import math
from pathlib import Path

import pytest
import torch

import reference_model.train as training
from export.checkpoint import open_checkpoint
from export.config import read_config
from export.weights import load_weights
from reference_model.batches import Encoder, stack
from reference_model.checkpoint import CONFIG, write_checkpoint
from reference_model.tasks import BookShape, Turn, work_out
from reference_model.train import exact, initialise, loss_of, rate, train
from reference_model.vocabulary import build_tokenizer
from runtime_py.tokenizer import Tokenizer

SHIPPED = Path(training.__file__).parents[1] / "export" / "reference"


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def encoder():
    return Encoder(build_tokenizer())


def test_a_resumed_run_equals_one_without_a_stop(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "TOKENS", ((0, 96, 96), (3, 48, 96)))
    monkeypatch.setattr(training, "ROWS", ((0, 48),))
    monkeypatch.setattr(training, "SAVE", 2)
    monkeypatch.setattr(training, "BOOKS", (BookShape(2, words=1, digits=1, questions=2),))
    whole = train(tmp_path / "whole", until=4, resume=False, device="cpu")
    train(tmp_path / "parts", until=2, resume=False, device="cpu")
    resumed = train(tmp_path / "parts", until=4, resume=True, device="cpu")
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=0)
    log = (tmp_path / "parts" / "training_log.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line)["step"] for line in log.splitlines()] == [2, 4]


def test_the_learning_rate_rises_stays_and_falls_to_nothing():
    rates = [rate(step) for step in range(training.STEPS + 1)]
    assert rates[0] < rates[40] < rates[200] == rates[2_000] == training.LEARNING_RATE
    assert rates[2_100] > rates[2_500] > rates[2_999] > 0
    assert rates[3_000] == training.LAST_RATE > rates[3_100] > 0 == rates[training.STEPS]


def test_the_last_rows_hold_the_longest_turn_whole(encoder):
    longest = Turn("How much is 1234 minus 9876?", work_out(1234, "-", 9876))
    assert len(encoder.row([longest])[0]) <= training.ROWS[-1][1]


def test_loss_and_exactness_ignore_what_is_not_an_answer(encoder):
    model = training.SambaY(CONFIG)
    initialise(model, torch.Generator().manual_seed(1))
    turn = Turn("Hi", "Hello!")
    row, padded = encoder.row([turn]), encoder.row([turn, turn])
    alone = stack([row])
    with_padding = stack([row, (padded[0], [0] * len(padded[0]))])
    torch.testing.assert_close(loss_of(model, with_padding), loss_of(model, alone))
    assert exact(model, with_padding) == exact(model, alone) == [False]


def test_references_give_the_gradients_of_the_operators(encoder):
    model = training.SambaY(CONFIG)
    initialise(model, torch.Generator().manual_seed(1))
    batch = stack([encoder.row([Turn("Hi", "Hello!")])])
    parameters = list(model.parameters())
    expected = torch.autograd.grad(loss_of(model, batch), parameters)
    with training.references():
        found = torch.autograd.grad(loss_of(model, batch), parameters)
    torch.testing.assert_close(found, expected)


def test_a_written_checkpoint_is_the_model_rounded(tmp_path):
    model = training.SambaY(CONFIG)
    initialise(model, torch.Generator().manual_seed(1))
    write_checkpoint(model, build_tokenizer(), tmp_path)
    assert read_config(tmp_path).hidden_size == CONFIG.hidden_size
    read = load_weights(open_checkpoint(tmp_path)).state_dict()
    for name, value in model.state_dict().items():
        wide = "A_log" in name or "lambda_" in name
        expected = value if wide else value.to(torch.bfloat16).float()
        torch.testing.assert_close(read[name], expected, rtol=0, atol=0)


def test_the_shipped_tokenizer_is_the_one_the_program_builds():
    shipped = (SHIPPED / "tokenizer.json").read_text(encoding="utf-8")
    assert json.loads(shipped) == json.loads(build_tokenizer().to_str())


def test_the_shipped_chat_template_writes_what_training_saw(encoder):
    tokenizer = Tokenizer(SHIPPED)
    turns = [Turn("Hi", "Hello!"), Turn("Bye", "Goodbye!")]
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    messages.append({"role": "user", "content": "Bye"})
    ids, answers = encoder.row(turns)
    asked = ids[: answers.index(2)]
    assert tokenizer.encode(tokenizer.render(messages)) == asked


def test_the_shipped_checkpoint_is_small_and_ends_its_answers():
    checkpoint = open_checkpoint(SHIPPED)
    parameters = sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values())
    assert 1_000_000 < parameters < 8_000_000
    assert checkpoint.total_bytes < 4_000_000
    end = Tokenizer(SHIPPED).encode("<|end|>")[0]
    assert checkpoint.config.eos_token_ids[0] == end
