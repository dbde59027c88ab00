"""Hold a package against its checkpoint: what storing and computing it otherwise has cost.

    python -m export.verify PACKAGE [--checkpoint DIR] [--text FILE] [--json FILE] [--html FILE]

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
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from rich.console import Console

from export.checkpoint import Checkpoint, open_checkpoint
from export.console import stdout_console
from export.verify.bounds import layer_bound, token_bounds, weight_bounds
from export.verify.measure import Sample, Stage, measure
from export.verify.options import Settings, add_options, settings_of
from export.verify.package_slices import SlicedPackage
from export.verify.page import write_html
from export.verify.report import Report, print_report, to_json
from export.verify.stored_weights import compare_weights
from runtime_py.errors import InputError, PackageError
from runtime_py.native import library_path
from runtime_py.package import MANIFEST, find_model
from runtime_py.peak_memory import peak_bytes
from runtime_py.tokenizer import Tokenizer

PROGRAM = "python -m export.verify"
EXAMPLES = f"""\
examples:
  {PROGRAM} demo                   a package of the small model that comes with phi4export
  {PROGRAM} phi4-flash --checkpoint microsoft/Phi-4-mini-flash-reasoning
  {PROGRAM} phi4-flash --checkpoint ./checkpoint --html report.html --json report.json
                                                   a page with plots, and every figure
  {PROGRAM} phi4-flash --checkpoint ./checkpoint --text questions.txt --tokens 2000 --max-kl 0.05
                                                   on a text of one's own, with a bound of one's own

Exit status: 0 where every bound holds, 1 where one is exceeded, 2 where nothing can be measured.
"""
CALIBRATION = "calibration.txt"  # beside a checkpoint's weights: text of the kind it knows
_REFERENCE = Path(__file__).parents[1] / "reference"  # the small model shipped inside
_RANDOM_TOKENS = 128
_WIDE = 512  # below this width a second thread would only be waited for


class VerifyError(ValueError):
    """Something that cannot be verified."""


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
    if file.name == MANIFEST:
        raise VerifyError(
            f"{path} has several graphs, and only a package of one can be verified: export the "
            "checkpoint for a cpu target"
        )
    checkpoint = open_checkpoint(source)
    threads = settings.threads or _threads_for(checkpoint)
    package = SlicedPackage.of_file(file, library=library_path(), threads=threads)
    if package.config != json.loads(checkpoint.config.to_json()):
        raise VerifyError(
            f"{file.parent} was exported from another model than {checkpoint.folder}: their sizes "
            "or special tokens differ; give the checkpoint it was made from"
        )
    notes: list[str] = []
    samples = [_random_tokens(checkpoint), *_text(file.parent, checkpoint, settings, notes)]
    with console.status("reading weights") as status:
        damaged = _changed_files(file.parent, status.update)
        status.update("comparing weights")
        weights, left_out = compare_weights(package.model, checkpoint)
        with torch_threads(settings.threads, checkpoint):
            measured = measure(checkpoint, package, samples, status.update)
    if left_out:
        notes.append(f"weights stored in another shape, not compared: {', '.join(left_out)}")
    bits = min(package.cache_bits, *(each.bits for each in weights if len(each.shape) > 1), 32)
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
def torch_threads(wanted: int | None, checkpoint: Checkpoint) -> Iterator[None]:
    """Torch's threads for a while; without a wish one for a small model."""
    threads = wanted or _threads_for(checkpoint)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _threads_for(checkpoint: Checkpoint) -> int | None:
    return 1 if checkpoint.config.hidden_size < _WIDE else None


def _random_tokens(checkpoint: Checkpoint) -> Sample:
    ids = np.random.default_rng(0).integers(0, checkpoint.config.vocab_size, (1, _RANDOM_TOKENS))
    return Sample("random tokens", ids)


def _text(
    package: Path, checkpoint: Checkpoint, settings: Settings, notes: list[str]
) -> list[Sample]:
    """The text's tokens; nothing where the package has no tokenizer and no text was given."""
    if settings.text is None and not (package / "tokenizer.json").is_file():
        notes.append("the package has no tokenizer, so it was measured on random tokens only")
        return []
    return [read_sample(Tokenizer(package), checkpoint, settings)]


def read_sample(tokenizer: Tokenizer, checkpoint: Checkpoint, settings: Settings) -> Sample:
    """Tokens of the text to measure on.

    Raises:
        VerifyError: the file is empty or no text.
        OSError: it cannot be read.
    """
    own = checkpoint.folder / CALIBRATION
    file = settings.text or (own if own.is_file() else Path(__file__).with_name(CALIBRATION))
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise VerifyError(f"{file} is no UTF-8 text ({error.reason} at {error.start})") from error
    if not text.strip():
        raise VerifyError(f"{file} is empty: give some text of the kind the model is used for")
    ids = tokenizer.encode(text)[: settings.tokens]
    if len(ids) < 2:
        raise VerifyError(f"{file} is {len(ids)} token long, expected 2 or more: give more text")
    return Sample(file.name, np.array([ids], np.int64))


def _changed_files(package: Path, stage: Stage) -> list[str]:
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


def deliver(report: Report, settings: Settings) -> int:
    """Show and write a report; returns the exit status."""
    if settings.json is not None:
        settings.json.write_text(json.dumps(to_json(report), indent=2) + "\n", encoding="utf-8")
    if settings.html is not None:
        write_html(report, settings.html)
    with stdout_console() as console:
        print_report(report, console)
    for failure in report.failures:
        print(f"verify: {failure}", file=sys.stderr)
    return 1 if report.failures else 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, as every other error."""
        _complain(f"{message}; {PROGRAM} --help explains")
        self.exit(2)


def _complain(message: str) -> None:
    print(f"verify: error: {' '.join(message.split())}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = _Parser(
        prog=PROGRAM,
        description=(__doc__ or "").partition("\n")[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("package", type=Path, metavar="PACKAGE", help="folder phi4export wrote")
    parser.add_argument(
        "--checkpoint",
        default=_REFERENCE,
        metavar="DIR|ID",
        help="what the package was made from; default: the small model shipped inside",
    )
    add_options(parser)
    options = parser.parse_args(arguments)
    try:
        settings = settings_of(options)
        report = verify(options.package, options.checkpoint, settings, Console(stderr=True))
        return deliver(report, settings)
    except (ValueError, OSError, PackageError, InputError) as error:
        _complain(str(error))
        return 2
    except KeyboardInterrupt:
        print("verify: interrupted", file=sys.stderr)
        return 130
