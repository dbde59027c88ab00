"""Options of the commands that measure a package or a checkpoint; imports nothing heavy."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

TOKENS = 512  # of a text, at most
RANKED_TOKENS = 128  # the same for a ranking, which runs the text once for every weight


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure on, and what must hold.

    Attributes:
        text: a file; None takes the checkpoint's calibration.txt, else the text shipped here.
        tokens: of the text, at most.
        threads: of both models; None takes one for a small model, else what they choose.
        max_kl, min_top1: instead of the defaults of ``export.verify.bounds``.
        json, html: files to write.
    """

    text: Path | None = None
    tokens: int = TOKENS
    threads: int | None = None
    max_kl: float | None = None
    min_top1: float | None = None
    json: Path | None = None
    html: Path | None = None


def add_options(parser: argparse.ArgumentParser) -> None:
    """What every command that measures takes."""
    group = parser.add_argument_group("measuring")
    group.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text to measure on")
    group.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        help=f"of it, at most ({TOKENS}; {RANKED_TOKENS} for a ranking)",
    )
    group.add_argument("--threads", type=int, metavar="N", help="of one operator")
    group.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    group.add_argument("--html", type=Path, metavar="FILE", help="write a page with plots")
    group.add_argument("--max-kl", type=float, metavar="NATS", help="bound on the text's mean KL")
    group.add_argument(
        "--min-top1", type=float, metavar="SHARE", help="bound on top-1 agreement, 0 to 1"
    )


def refuse_idle_options(options: argparse.Namespace) -> None:
    """Refuse options of measuring where nothing is measured.

    Raises:
        ValueError: naming the first of them.
    """
    if options.costs is not None and options.size_budget is None:
        raise ValueError("--costs is for --size-budget: give a size, or leave it out")
    if options.verify or options.sensitivity:
        return
    given = [
        name
        for name in ("text", "tokens", "threads", "json", "html", "max_kl", "min_top1")
        if getattr(options, name) is not None
    ]
    if given:
        name = given[0].replace("_", "-")
        raise ValueError(f"--{name} is for --verify or --sensitivity: add one, or leave it out")


def settings_of(options: argparse.Namespace, *, tokens: int = TOKENS) -> Settings:
    """Settings from options.

    Args:
        tokens: where the options say nothing.

    Raises:
        ValueError: a number that makes no sense.
    """
    for name, number, least in (("tokens", options.tokens, 2), ("threads", options.threads, 1)):
        if number is not None and number < least:
            raise ValueError(f"--{name} is {number}, expected {least} or more")
    if options.min_top1 is not None and not 0 <= options.min_top1 <= 1:
        raise ValueError(f"--min-top1 is {options.min_top1}, expected a share between 0 and 1")
    for name, file in (("json", options.json), ("html", options.html)):
        if file is not None and not file.absolute().parent.is_dir():
            raise ValueError(f"--{name} {file}: there is no folder {file.absolute().parent}")
        if file is not None and file.is_dir():
            raise ValueError(f"--{name} {file} is a folder, expected a file to write")
    return Settings(
        text=options.text,
        tokens=tokens if options.tokens is None else options.tokens,
        threads=options.threads,
        max_kl=options.max_kl,
        min_top1=options.min_top1,
        json=options.json,
        html=options.html,
    )
