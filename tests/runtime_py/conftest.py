"""A package small enough to compute by hand: a model that follows the contract, a tokenizer.

The model counts what it was fed, so that a wrong state, slot, mask or length shows in the logits:

    recurrent = sum over a row's tokens of id * (position + 1)     fixed state
    cache     = sum over slots p of key[p] * (p + 1), key[p] = id   growing state
    logits[v] = recurrent + cache - |v - follows[last id]|

Both sums are taken modulo 4096, which float32 holds exactly.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import tokenizers
from onnx import TensorProto, helper, numpy_helper
from tokenizers import decoders, models, pre_tokenizers

from runtime_py import Session

SPECIAL = ("<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}"
)
VOCAB, STATES = 256 + len(SPECIAL), ("conv_state", "recurrent_state", "key", "value")

BODY = """
one = Constant<value_ints = [1]>()
zero = Constant<value_ints = [0]>()
ids_shape = Shape(input_ids)
tokens = Gather(ids_shape, one)
mask_shape = Shape(attention_mask)
total = Gather(mask_shape, one)
i0 = Constant<value_int = 0>()
i1 = Constant<value_int = 1>()
total_scalar = Squeeze(total)
places = Range(i0, total_scalar, i1)
numbers = Add(places, i1)
marked = Mul(attention_mask, numbers)
end = ReduceMax<keepdims = 0>(marked)
end_1 = Reshape(end, one)
begin = Sub(end_1, tokens)
now = Slice(attention_mask, begin, end_1, one)
lengths = ReduceSum<keepdims = 1>(now, one)
both = ReduceSum<keepdims = 1>(attention_mask, one)
past_lengths = Sub(both, lengths)
tokens_scalar = Squeeze(tokens)
columns = Range(i0, tokens_scalar, i1)
positions = Add(past_lengths, columns)
ranks = Add(positions, i1)
weighted = Mul(input_ids, ranks)
real = Mul(weighted, now)
added_all = ReduceSum<keepdims = 1>(real, one)
modulus_int = Constant<value_int = 4096>()
added = Mod(added_all, modulus_int)
modulus = Constant<value_float = 4096.0>()
added_f = Cast<to = 1>(added)
added_3 = Unsqueeze(added_f, one)
recurrent = Add(S_recurrent_state, added_3)
P_recurrent_state = Mod<fmod = 1>(recurrent, modulus)
lengths_f = Cast<to = 1>(lengths)
lengths_3 = Unsqueeze(lengths_f, one)
P_conv_state = Add(S_conv_state, lengths_3)
cache_shape = Shape(S_key)
batch = Gather(cache_shape, zero)
batch_scalar = Squeeze(batch)
row_list = Range(i0, batch_scalar, i1)
rows_1 = Unsqueeze(row_list, one)
ids_zero = Sub(input_ids, input_ids)
rows = Add(rows_1, ids_zero)
minus = Constant<value_ints = [-1]>()
rows_3 = Unsqueeze(rows, minus)
head_3 = Unsqueeze(ids_zero, minus)
positions_3 = Unsqueeze(positions, minus)
indices = Concat<axis = 2>(rows_3, head_3, positions_3)
ids_f = Cast<to = 1>(input_ids)
updates = Unsqueeze(ids_f, minus)
P_key = ScatterND(S_key, indices, updates)
lengths_4 = Unsqueeze(lengths_3, one)
P_value = Add(S_value, lengths_4)
squeezed = Constant<value_ints = [1, 3]>()
keys = Squeeze(P_key, squeezed)
capacity = Shape<start = 2, end = 3>(S_key)
capacity_scalar = Squeeze(capacity)
slots = Range(i0, capacity_scalar, i1)
used = Less(slots, both)
slot_ranks = Add(slots, i1)
used_f = Cast<to = 1>(used)
slot_ranks_f = Cast<to = 1>(slot_ranks)
slot_weights = Mul(used_f, slot_ranks_f)
products = Mul(keys, slot_weights)
contribution = Mod<fmod = 1>(products, modulus)
cache_all = ReduceSum<keepdims = 1>(contribution, one)
cache = Mod<fmod = 1>(cache_all, modulus)
last = Sub(lengths, one)
last_some = Max(last, zero)
last_id = GatherElements<axis = 1>(input_ids, last_some)
next = Gather(follows, ASKED)
next_f = Cast<to = 1>(next)
next_3 = Unsqueeze(next_f, minus)
vocabulary = Gather(vocab_size, i0)
words = Range(i0, vocabulary, i1)
words_f = Cast<to = 1>(words)
distance = Sub(next_3, words_f)
far = Abs(distance)
near = Neg(far)
cache_3 = Unsqueeze(cache, one)
with_cache = Add(near, cache_3)
logits = Add(with_cache, P_recurrent_state)
"""


def build_model(
    path: Path,
    *,
    follows: list[int] | None = None,
    all_logits: bool = False,
    metadata: dict[str, str] | None = None,
    **config: object,
) -> Path:
    """Write the model; ``follows[id]`` is the most likely token after ``id``."""
    names = {f"S_{state}": f"past_key_values.0.{state}" for state in STATES}
    names |= {f"P_{state}": f"present.0.{state}" for state in STATES}
    nodes = []
    for line in BODY.replace("ASKED", "input_ids" if all_logits else "last_id").split("\n")[1:-1]:
        node = onnx.parser.parse_node(line)
        for values in (node.input, node.output):
            for index, name in enumerate(values):
                values[index] = names.get(name, name)
        nodes.append(node)
    shapes: dict[str, list[int | str | None]] = {
        "conv_state": ["batch", 1, 3],
        "recurrent_state": ["batch", 1, 1],
        "key": ["batch", 1, "capacity", 1],
        "value": ["batch", 1, "window", 1],
    }
    value = helper.make_tensor_value_info
    rows: int | str = "tokens" if all_logits else 1
    graph = helper.make_graph(
        nodes,
        "counting",
        [
            value("input_ids", TensorProto.INT64, ["batch", "tokens"]),
            value("attention_mask", TensorProto.INT64, ["batch", "total"]),
            *(value(names[f"S_{s}"], TensorProto.FLOAT, shapes[s]) for s in STATES),
        ],
        [
            value("logits", TensorProto.FLOAT, ["batch", rows, VOCAB]),
            *(value(names[f"P_{s}"], TensorProto.FLOAT, shapes[s]) for s in STATES),
        ],
        [
            numpy_helper.from_array(
                np.array(follows or [(id + 1) % VOCAB for id in range(VOCAB)]), "follows"
            ),
            numpy_helper.from_array(np.array([VOCAB]), "vocab_size"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    sizes = {
        "vocab_size": VOCAB,
        "sliding_window": 4,
        "eos_token_ids": [257, 256],
        "context_length": 2000,
        "max_position_embeddings": 3000,
        **config,
    }
    told = {
        "sambay.version": "1",
        "sambay.config": json.dumps(sizes),
        "sambay.logits": "all" if all_logits else "last",
    }
    helper.set_model_props(model, told if metadata is None else metadata)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def write_tokenizer(folder: Path, **settings: object) -> None:
    """Bytes as tokens 0 to 255, then the special tokens; no merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = models.BPE({char: index for index, char in enumerate(alphabet)}, [])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(text, rstrip=index > 0) for index, text in enumerate(SPECIAL)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    told = {"chat_template": TEMPLATE, "eos_token": "<|endoftext|>", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(told), encoding="utf-8")


def follow(*texts: str) -> list[int]:
    """A table after which the model says text by text what follows the assistant's token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    table = [257] * VOCAB
    for text in texts:
        ids = [259, *(alphabet.index(char) for char in _as_bytes(text)), 257]
        for before, after in itertools.pairwise(ids):
            table[before] = after
    return table


def _as_bytes(text: str) -> str:
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    return "".join(piece for piece, _ in pieces)


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package that answers everything with "héy" and a line end."""
    folder = tmp_path_factory.mktemp("package")
    build_model(folder / "model.onnx", follows=follow("héy\n"))
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def session(package: Path) -> Session:
    return Session(package, threads=1)


@pytest.fixture
def make_session(tmp_path: Path) -> Callable[..., Session]:
    """Build a session of a model of one's own; ``tokenizer`` are settings, None leaves it out."""

    def make(tokenizer: dict[str, object] | None = None, **settings: object) -> Session:
        path = build_model(tmp_path / "model.onnx", **settings)  # type: ignore[arg-type]
        if tokenizer is not None:
            write_tokenizer(tmp_path, **tokenizer)
        return Session(path, threads=1)

    return make


@pytest.fixture(scope="session")
def expected() -> Callable[[list[int]], float]:
    """What the largest logit must be after these tokens."""
    return lambda ids: 2.0 * (sum(id * (place + 1) for place, id in enumerate(ids)) % 4096)


@pytest.fixture(scope="session")
def answering() -> Callable[..., list[int]]:
    return follow


@pytest.fixture(scope="session")
def model_file() -> Callable[..., Path]:
    return build_model


@pytest.fixture(scope="session")
def tokenizer_files() -> Callable[..., None]:
    return write_tokenizer
