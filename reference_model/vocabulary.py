"""The vocabulary of the reference model: byte-level BPE, digits one token each.

The special tokens, roles and chat template are those of Phi-4-mini-flash-reasoning; only the ids
are the small vocabulary's own.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from reference_model.tasks import known_texts

MODEL_MAX_LENGTH = 4_096  # tokens

# From <|assistant|> on, white space behind a token is eaten, as published.
_SPECIAL = (
    "<|endoftext|>",
    "<|endofprompt|>",
    "<|assistant|>",
    "<|end|>",
    "<|user|>",
    "<|system|>",
    "<|tool|>",
    "<|/tool|>",
    "<|tool_call|>",
    "<|/tool_call|>",
    "<|tool_response|>",
    "<|tag|>",
)

# One alternative a kind of piece: thinking marks, box, digit, word, colon, mark, white space. Only
# ASCII classes: ONNX Runtime GenAI compiles the pattern as a C++ regular expression.
_PIECES = r"</?think>|\\boxed[{]|[0-9]| ?[^\s!-@\[-`{-~]+|: ?| ?[!-/:-@\[-`{-~]|\s"
_WORDS = r"</?think>|\\boxed\{| ?[A-Za-z]+|: "

_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'system' and message.get('tools') %}"
    "{{ '<|tool|>' + message['tools'] + '<|/tool|>' }}"
    "{% endif %}"
    "{{ '<|end|>' }}"
    "{% endfor %}"
    "{{ '<|assistant|>' if add_generation_prompt else eos_token }}"
)


def build_tokenizer() -> Tokenizer:
    """Train the tokenizer; every word of the tasks becomes one token, any other text bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2_048,  # more than there are words: training stops when nothing is left to merge
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_words(), trainer)
    tokenizer.add_special_tokens(
        [
            AddedToken(text, special=True, normalized=False, rstrip=index >= 2)
            for index, text in enumerate(_SPECIAL)
        ]
    )
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json as a checkpoint has them."""
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")
    settings = {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": "<|endoftext|>",
        "chat_template": _CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "model_max_length": MODEL_MAX_LENGTH,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "GPT2TokenizerFast",
        "unk_token": "<|endoftext|>",
    }
    text = json.dumps(settings, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _words() -> list[str]:
    """Every piece of text the tasks can say, once each, in a fixed order."""
    return sorted({piece for text in known_texts() for piece in re.findall(_WORDS, text)})
