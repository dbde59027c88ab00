"""Train the reference model: ``python -m reference_model.train --stage-dir DIR [--resume]``.

Every step takes one batch of conversations and one of phonebooks. A batch is made from the seed and
the number of its step alone, so a resumed run continues as if it had not stopped. On a CPU with one
thread the shipped run is deterministic.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import math
import time
from pathlib import Path
from random import Random
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional

import export.model
from export.model import DifferentialMixing, Mamba, SambaY
from reference_model.batches import BOOKS, Batch, Encoder, books, conversations, stack
from reference_model.checkpoint import CONFIG, write_checkpoint
from reference_model.tasks import BookShape, Turn, arithmetic, talk
from reference_model.vocabulary import build_tokenizer

SEED = 0
LEARNING_RATE = 2.5e-3
WARM_UP = 80  # steps
FALL, END = 2_100, 3_000  # steps between which the learning rate falls to nothing
STEPS = 3_200  # the last ones on whole answers
LAST_RATE = 4e-4  # of the steps after END, falling to nothing, too
WEIGHT_DECAY = 0.01
# From a step on, of conversations, of books: these are learned first, arithmetic takes longest.
TOKENS = ((0, 2_048, 2_048), (400, 1_536, 3_072), (1_600, 3_072, 1_536))
# From a step on, tokens of a conversation. Rows are cut: the longest turn, a difference of four
# digits below zero, has 108 tokens, and shorter rows never show its end.
ROWS = ((0, 96), (END, 144))
FIRST_BOOKS = 500  # step at which the first stage of phonebooks ends, passed or not
LAST_DIGITS = 1_800  # step at which the last stage of arithmetic begins at the latest
PASS = 0.9  # share of exact answers that ends a stage of the curriculum
REPORT = 20  # steps between two lines of the log
SAVE = 100  # steps between two scores, and two saved states
DIGITS = ((1, 2), (1, 2, 3), (1, 2, 3, 4, 4))  # of operands, a stage each


OPERATORS = (
    "append_key_value",
    "causal_conv_with_state",
    "differential_attention",
    "differential_cross_attention",
    "gated_memory_unit",
    "selective_scan",
)


@dataclasses.dataclass
class Progress:
    """Where a run is.

    Attributes:
        step: steps done.
        book: index of the present phonebook stage.
        numbers: index of the present stage of arithmetic.
        seconds: training time, all parts of the run together.
    """

    step: int = 0
    book: int = 0
    numbers: int = 0
    seconds: float = 0.0


def initialise(model: SambaY, generator: torch.Generator) -> None:
    """Random weights that learn.

    What decides is the scale of the embedding, which is the output head too: at the usual 0.02
    the loss never leaves that of a guess.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                bound = 1 / math.sqrt(parameter[0].numel())
                parameter.uniform_(-bound, bound, generator=generator)
            else:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
        model.model.embed_tokens.weight.normal_(std=0.7, generator=generator)
        model.model.final_layernorm.weight.fill_(0.15)
        for module in model.modules():
            if isinstance(module, Mamba):
                _initialise_mamba(module, generator)
            elif isinstance(module, DifferentialMixing):
                for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
                    getattr(module, name).normal_(std=0.1, generator=generator)


def _initialise_mamba(mamba: Mamba, generator: torch.Generator) -> None:
    """Rates 1 .. N in every channel, steps between 0.001 and 0.1, as the Mamba paper has it."""
    inner, states = mamba.A_log.shape
    mamba.A_log.copy_(torch.arange(1, states + 1).float().log().expand(inner, -1))
    mamba.D.fill_(1.0)
    bound = mamba.dt_proj.in_features**-0.5
    mamba.dt_proj.weight.uniform_(-bound, bound, generator=generator)
    low, high = math.log(0.001), math.log(0.1)
    steps = torch.empty(inner).uniform_(low, high, generator=generator).exp()
    mamba.dt_proj.bias.copy_(steps + torch.log(-torch.expm1(-steps)))  # softplus, inverted


def run_model(model: SambaY, ids: Tensor) -> Tensor:
    """Logits [batch, tokens, vocab] of ids [batch, tokens] from empty states."""
    # Nothing comes before the first token, so a ring of one slot serves every window.
    states = model.initial_states(
        ids.shape[0], capacity=ids.shape[1], window=1, device=ids.device.type
    )
    return model(ids, torch.ones_like(ids), states, all_logits=True)[0]


def loss_of(model: SambaY, batch: Batch) -> Tensor:
    """Mean cross entropy of the answers' tokens."""
    logits, learned = run_model(model, batch.ids[:, :-1]), batch.answers[:, 1:] > 0
    return functional.cross_entropy(logits[learned], batch.ids[:, 1:][learned])


@torch.no_grad()
def exact(model: SambaY, batch: Batch) -> list[bool]:
    """Whether each answer, decoded greedily, would be the expected one, turn by turn.

    A greedy answer is the expected one exactly if every expected token is the likeliest after
    those before it, so one pass over the whole text decides.
    """
    right = run_model(model, batch.ids[:, :-1]).argmax(-1) == batch.ids[:, 1:]
    results = []
    for row, answers in zip(right, batch.answers[:, 1:], strict=True):
        results += [bool(row[answers == turn].all()) for turn in answers.unique() if turn > 0]
    return results


def references() -> mock._patch:
    """While entered, the model calls the operators' references instead of the operators.

    The numbers are the same. An operator would run its reference again in the backward pass; this
    saves a quarter of the time.
    """
    modules = {name: importlib.import_module(f"export.ops.{name}") for name in OPERATORS}
    return mock.patch.multiple(
        export.model, **{name: module.reference for name, module in modules.items()}
    )


def rate(step: int) -> float:
    """Learning rate of a step: a short rise, a plateau, a straight fall, and a small second one."""
    if step >= END:
        return LAST_RATE * (STEPS - step) / (STEPS - END)
    return LEARNING_RATE * min(1.0, (step + 1) / WARM_UP, (END - step) / (END - FALL))


def batches_of(step: int, progress: Progress, encoder: Encoder) -> list[Batch]:
    """What one step learns from."""
    random = Random(f"{SEED} {step}")
    _, talked, looked_up = max(tokens for tokens in TOKENS if tokens[0] <= step)
    _, row = max(rows for rows in ROWS if rows[0] <= step)
    shape = BOOKS[progress.book]
    if progress.book > 3 and random.random() < 0.4:  # short books must not be forgotten
        shape = BOOKS[random.randint(3, progress.book - 1)]
    return [
        conversations(
            encoder, random, rows=talked // row, tokens=row, digits=DIGITS[progress.numbers]
        ),
        books(encoder, random, "train", rows=max(2, looked_up // shape.tokens), shape=shape),
    ]


def score(model: SambaY, encoder: Encoder, progress: Progress, count: int = 96) -> dict[str, float]:
    """Shares of exact answers on held-out cases of the present stages."""
    random = Random(f"score {progress.step}")
    digits = DIGITS[progress.numbers]
    scores = {}
    for name, operators in (("sums", "+"), ("differences", "-"), ("products", "*")):
        turns = [
            arithmetic(random, "held_out", operators=operators, digits=digits) for _ in range(count)
        ]
        scores[name] = _share(exact(model, stack([encoder.row([turn]) for turn in turns])))
    talked: list[Turn] = [talk(random, "held_out") for _ in range(count)]
    scores["talk"] = _share(exact(model, stack([encoder.row([turn]) for turn in talked])))
    shape: BookShape = BOOKS[progress.book]
    scores["phonebook"] = _share(
        exact(
            model,
            books(encoder, random, "held_out", rows=max(4, count // shape.questions), shape=shape),
        )
    )
    return scores


def _share(results: list[bool]) -> float:
    return round(sum(results) / len(results), 3)


def train(stage_dir: Path, *, until: int, resume: bool, device: str) -> SambaY:
    """Train from the start or from the last saved step, and return the model.

    Args:
        stage_dir: holds state.pt and training_log.jsonl.
        until: step to stop at.
    """
    stage_dir.mkdir(parents=True, exist_ok=True)
    saved, log = stage_dir / "state.pt", stage_dir / "training_log.jsonl"
    encoder = Encoder(build_tokenizer())
    model = SambaY(CONFIG)
    initialise(model, torch.Generator().manual_seed(SEED))
    model.to(device)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98))
    progress = Progress()
    if resume:
        state = torch.load(saved, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        progress = Progress(**state["progress"])
        _cut_log(log, progress.step)
    losses: list[tuple[float, ...]] = []
    clock = time.perf_counter()
    while progress.step < until:
        for group in optimizer.param_groups:
            group["lr"] = rate(progress.step)
        optimizer.zero_grad()
        parts = []
        for batch in batches_of(progress.step, progress, encoder):
            loss = loss_of(model, Batch(batch.ids.to(device), batch.answers.to(device)))
            loss.backward()
            parts.append(loss.item())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        progress.step += 1
        losses.append(tuple(parts))
        if progress.step % REPORT == 0 or progress.step == until:
            now = time.perf_counter()
            progress.seconds, clock = progress.seconds + now - clock, now
            entry = _report(model, encoder, progress, losses)
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
            losses.clear()
        if progress.step % SAVE == 0 or progress.step == until:
            torch.save(
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "progress": dataclasses.asdict(progress),
                },
                saved.with_suffix(".part"),
            )
            saved.with_suffix(".part").replace(saved)
    return model


def _cut_log(log: Path, step: int) -> None:
    """Drop what a stopped run logged after its last saved step: it is done again."""
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = (line for line in lines if json.loads(line)["step"] <= step)
    log.write_text("".join(kept), encoding="utf-8")


def _report(
    model: SambaY,
    encoder: Encoder,
    progress: Progress,
    losses: list[tuple[float, ...]],
) -> dict[str, object]:
    """Print and return one line of the log; and now and then score and move the curriculum on."""
    means = [round(sum(part) / len(losses), 4) for part in zip(*losses, strict=True)]
    entry: dict[str, object] = {
        **dataclasses.asdict(progress),
        "seconds": round(progress.seconds),
        "loss": dict(zip(("conversations", "books"), means, strict=True)),
    }
    if progress.step % SAVE == 0:
        scores = score(model, encoder, progress)
        entry["exact"] = scores
        passed = scores["phonebook"] >= PASS or progress.step == FIRST_BOOKS
        progress.book = min(progress.book + passed, len(BOOKS) - 1)
        passed = min(scores["sums"], scores["differences"]) >= PASS
        if passed or progress.step >= LAST_DIGITS:
            progress.numbers = min(progress.numbers + 1, len(DIGITS) - 1)
    print(json.dumps(entry), flush=True)
    return entry


def main() -> None:
    """Run the training from the command line."""
    parser = argparse.ArgumentParser(prog="python -m reference_model.train", description=__doc__)
    parser.add_argument("--stage-dir", type=Path, required=True, help="state and log are kept here")
    parser.add_argument("--resume", action="store_true", help="go on from the last saved step")
    parser.add_argument("--until", type=int, default=STEPS, help=f"step to stop at ({STEPS})")
    parser.add_argument(
        "--output", type=Path, help="write the checkpoint to this folder at the end"
    )
    parser.add_argument("--threads", type=int, default=1, help="results may differ between counts")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with references():
        model = train(
            arguments.stage_dir,
            until=arguments.until,
            resume=arguments.resume,
            device=device,
        )
    if arguments.output is not None:
        write_checkpoint(model.cpu(), build_tokenizer(), arguments.output)


if __name__ == "__main__":
    main()
