"""Hold a package against its checkpoint: what storing and computing it otherwise has cost.

    python -m export.verify PACKAGE --checkpoint DIR [--text FILE] [--json FILE] [--html FILE]

Weights are read back from the package's own bytes. Layers, states and next tokens are compared with
the float32 reference on random tokens and on a text, layer by layer, so that neither model is ever
whole in memory. Exit status 1 says that a bound is exceeded, and a line says which.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from export.bounds import layer_bound, token_bounds, weight_bounds
from export.checkpoint import Checkpoint, open_checkpoint
from export.measure import Sample, measure
from export.package_slices import SlicedPackage
from export.stored_weights import compare_weights
from export.verify_page import write_html
from export.verify_report import Report, print_report, to_json
from runtime_py.errors import InputError, PackageError
from runtime_py.native import library_path
from runtime_py.package import find_model
from runtime_py.peak_memory import peak_bytes
from runtime_py.tokenizer import Tokenizer

CALIBRATION = "calibration.txt"  # beside a checkpoint's weights: text of the kind it knows
TOKENS = 512  # of the text, at most
RANDOM_TOKENS = 128
_WIDE = 512  # below this width a second thread would only be waited for


class VerifyError(ValueError):
    """Something that cannot be verified."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to verify on, and what must hold.

    Attributes:
        text: a file; None takes the checkpoint's calibration.txt, else the text shipped here.
        tokens: of the text, at most.
        threads: of both models; None takes one for a small model, else what they choose.
        max_kl, min_top1: instead of the defaults of ``export.bounds``.
    """

    text: Path | None = None
    tokens: int = TOKENS
    threads: int | None = None
    max_kl: float | None = None
    min_top1: float | None = None


def verify(path: Path, source: str | Path, settings: Settings, console: Console) -> Report:
    """Measure a package.

    Args:
        path: package folder.
        source: its checkpoint.
        console: shows what is being measured.

    Raises:
        ValueError: package, checkpoint or text cannot be read, or do not belong together.
        OSError: the same of a file.
    """
    begin = time.perf_counter()
    file = find_model(path)
    checkpoint = open_checkpoint(source)
    narrow = checkpoint.config.hidden_size < _WIDE
    threads = settings.threads or (1 if narrow else None)
    package = SlicedPackage(file, library=library_path(), threads=threads)
    if package.config != json.loads(checkpoint.config.to_json()):
        raise VerifyError(
            f"{file.parent} was exported from another model than {checkpoint.folder}: their sizes "
            "or special tokens differ; give the checkpoint it was made from"
        )
    notes: list[str] = []
    samples = [_random_tokens(checkpoint), *_text(file.parent, checkpoint, settings, notes)]
    with console.status("reading weights") as status:

        def stage(text: str) -> None:
            status.update(text)

        damaged = _changed_files(file.parent, stage)
        stage("comparing weights")
        weights, left_out = compare_weights(package.model, checkpoint)
        with _torch_threads(threads):
            measured = measure(checkpoint, package, samples, stage)
    if left_out:
        notes.append(f"weights stored in another shape, not compared: {', '.join(left_out)}")
    bits = min((weight.bits for weight in weights if len(weight.shape) > 1), default=32)
    bounds = [*weight_bounds(weights), layer_bound(measured.layers, bits)]
    for sample in samples[1:]:
        quality = measured.tokens[sample.name]
        limits = (settings.max_kl, settings.min_top1)
        found = token_bounds(sample.name, quality, bits, checkpoint.config.vocab_size, *limits)
        if not found:
            notes.append(
                f"the reference knows no text such as {sample.name} (perplexity "
                f"{quality.summary()['reference_perplexity']:.3g}), so no bound is set on it"
            )
        bounds += found
    return Report(
        package=file.parent.name,
        checkpoint=checkpoint.folder.absolute().name,
        target=package.model.metadata_props.get("sambay.target", ""),
        weights=weights,
        measured=measured,
        bounds=bounds,
        damaged=damaged,
        notes=notes,
        seconds=time.perf_counter() - begin,
        peak_bytes=peak_bytes(),
    )


@contextlib.contextmanager
def _torch_threads(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _random_tokens(checkpoint: Checkpoint) -> Sample:
    ids = np.random.default_rng(0).integers(0, checkpoint.config.vocab_size, (1, RANDOM_TOKENS))
    return Sample("random tokens", ids)


def _text(
    package: Path, checkpoint: Checkpoint, settings: Settings, notes: list[str]
) -> list[Sample]:
    """The text's tokens; nothing where the package has no tokenizer and no text was given."""
    own = checkpoint.folder / CALIBRATION
    file = settings.text or (own if own.is_file() else Path(__file__).with_name(CALIBRATION))
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise VerifyError(f"{file} is no UTF-8 text ({error.reason} at {error.start})") from error
    if not text.strip():
        raise VerifyError(f"{file} is empty: give some text of the kind the model is used for")
    if settings.text is None and not (package / "tokenizer.json").is_file():
        notes.append("the package has no tokenizer, so it was measured on random tokens only")
        return []
    ids = Tokenizer(package).encode(text)[: settings.tokens]
    if len(ids) < 2:
        raise VerifyError(f"{file} is {len(ids)} token long, expected 2 or more: give more text")
    return [Sample(file.name, np.array([ids], np.int64))]


def _changed_files(package: Path, stage: Any) -> list[str]:
    """Files that are not as the manifest says."""
    manifest = package / "manifest.json"
    if not manifest.is_file():
        return []
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        digests = {name: each["sha256"] for name, each in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise VerifyError(f"{manifest} cannot be read ({error!r}): export again") from error
    changed = []
    for name, digest in digests.items():
        stage(f"reading {name}")
        if not (package / name).is_file():
            changed.append(f"{name} is missing")
            continue
        with (package / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                changed.append(f"{name} is not the file that was written: its digest differs")
    return changed


def deliver(report: Report, *, json_file: Path | None, html_file: Path | None) -> int:
    """Show and write a report; returns the exit status."""
    print_report(report, Console())
    if json_file is not None:
        json_file.write_text(json.dumps(to_json(report), indent=2) + "\n", encoding="utf-8")
    if html_file is not None:
        write_html(report, html_file)
    for failure in report.failures:
        print(f"verify: {failure}", file=sys.stderr)
    return 1 if report.failures else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m export.verify", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("package", type=Path, metavar="PACKAGE")
    parser.add_argument(
        "--checkpoint", required=True, metavar="DIR|ID", help="what the package was made from"
    )
    add_options(parser)
    options = parser.parse_args(arguments)
    try:
        settings = settings_of(options)
        report = verify(options.package, options.checkpoint, settings, Console(stderr=True))
        return deliver(report, json_file=options.json, html_file=options.html)
    except (ValueError, OSError, PackageError, InputError) as error:
        print(f"verify: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("verify: interrupted", file=sys.stderr)
        return 130


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options that every command has which verifies."""
    group = parser.add_argument_group("verification")
    group.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text to measure on")
    group.add_argument("--tokens", type=int, default=TOKENS, help=f"of it, at most ({TOKENS})")
    group.add_argument("--threads", type=int, help="of one operator")
    group.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    group.add_argument("--html", type=Path, metavar="FILE", help="write a page with plots")
    group.add_argument("--max-kl", type=float, metavar="NATS", help="bound on the text's mean KL")
    group.add_argument("--min-top1", type=float, metavar="SHARE", help="bound, between 0 and 1")


def settings_of(options: argparse.Namespace) -> Settings:
    """Settings from options.

    Raises:
        VerifyError: a number that makes no sense.
    """
    for name, number, least in (("tokens", options.tokens, 2), ("threads", options.threads, 1)):
        if number is not None and number < least:
            raise VerifyError(f"--{name} is {number}, expected {least} or more")
    if options.min_top1 is not None and not 0 <= options.min_top1 <= 1:
        raise VerifyError(f"--min-top1 is {options.min_top1}, expected a share between 0 and 1")
    return Settings(
        text=options.text,
        tokens=options.tokens,
        threads=options.threads,
        max_kl=options.max_kl,
        min_top1=options.min_top1,
    )


if __name__ == "__main__":
    sys.exit(main())
