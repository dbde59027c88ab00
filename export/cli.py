"""``phi4export``: from a SambaY checkpoint to an ONNX package."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from export.console import bytes_progress, missing_extra, stdout_console, whole
from export.interrupts import (
    hold_interrupts,
    interrupt_on_termination,
    keep_interrupts,
    leave,
    run_apart,
)
from export.verify.options import (
    RANKED_TOKENS,
    add_options,
    refuse_idle_options,
    settings_of,
)

if TYPE_CHECKING:
    from export.checkpoint import Checkpoint
    from export.quantize.costs import Costs
    from export.quantize.options import Quantization
    from targets.target import Target

REFERENCE = Path(__file__).parent / "reference"

EXAMPLES = """\
examples:
  phi4export -o demo                           export the small model that comes with this program
  python -m runtime_py.chat demo               talk with the result
  phi4export --checkpoint ./checkpoint         a folder in Hugging Face layout
  phi4export --checkpoint ./checkpoint --inspect
                                               its layers, sizes and memory; writes nothing
  phi4export --checkpoint microsoft/Phi-4-mini-flash-reasoning --target cpu-int8 -o phi4-flash
                                               from the hub, with 8-bit weights

A package is a folder that Python programs, ONNX Runtime and ONNX Runtime GenAI load as it is.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: of the command line, without the program's name; None takes the process's own.

    Returns:
        Exit status: 0; 1 where --verify finds a bound exceeded; 2 for a wrong input, told in one
        line on stderr; 130 after Ctrl-C, 143 after SIGTERM.
    """
    options = _parse(arguments)
    with interrupt_on_termination() as came:
        status = _run(options, Console(stderr=True, soft_wrap=True, highlight=False))
    return 143 if came and status == 130 else status


def _run(options: argparse.Namespace, console: Console) -> int:
    try:
        with keep_interrupts():
            refuse_idle_options(options)
            if options.list_targets:
                _list_targets()
            elif options.inspect:
                _inspect(_source(options))
            elif options.sensitivity:
                _rank(options, console)
            else:
                return _export(options, console)
    except KeyboardInterrupt:
        console.print("phi4export: interrupted, nothing unfinished is kept", style="yellow")
        return 130
    except ModuleNotFoundError as error:
        _complain(missing_extra(error))
        return 2
    except (ValueError, OSError) as error:
        _complain(str(error))
        return 2
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, as every other error."""
        _complain(f"{message}; phi4export --help explains")
        self.exit(2)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="phi4export",
        description="Export a SambaY checkpoint (Phi-4-mini-flash-reasoning) to an ONNX package.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--checkpoint",
        metavar="DIR|ID",
        help="folder in Hugging Face layout, or a hub id; default: the small model shipped inside",
    )
    parser.add_argument(
        "--target", help="see --list-targets; auto: what this machine has (default: cpu-int4)"
    )
    parser.add_argument(
        "-o", "--output", type=Path, metavar="DIR", help="default: ./<checkpoint>-<target>"
    )
    parser.add_argument(
        "--cache",
        choices=("float32", "float16", "int8"),
        help="what keys and values are stored in while the model runs; default: the target's. "
        "ONNX Runtime GenAI loads float32 and float16 only",
    )
    parser.add_argument("--force", action="store_true", help="replace an existing package")
    parser.add_argument(
        "--portable",
        action="store_true",
        help="leave out the native operators, so that GenAI loads the package on other systems too",
    )
    parser.add_argument(
        "--all-logits",
        action="store_true",
        help="for evaluation: logits of every token and the output of every layer; slower prefill",
    )
    parser.add_argument(
        "--quantizer",
        metavar="NAME",
        help="how the bits of weights are found: rtn (round to nearest), search (the default), "
        "gptq (calibrated: best, slowest)",
    )
    parser.add_argument(
        "--equalize",
        action="store_true",
        help="even out the inputs of layers first, exactly; calibrates; gptq does so untold",
    )
    parser.add_argument(
        "--recipe", type=Path, metavar="FILE", help="JSON: bits, blocks, quantizer by weight"
    )
    parser.add_argument(
        "--activations",
        choices=("float16", "uint16"),
        help="what an NPU computes linear layers and gates in; default: float16",
    )
    parser.add_argument(
        "--ranges",
        choices=("minmax", "percentile", "mse"),
        help="of uint16: all a text gives, 99.999 %% of it, or least squared error (default: mse)",
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="text to learn from, some 50 KB",
    )
    parser.add_argument(
        "--calibration-cache",
        type=Path,
        metavar="DIR",
        help="keep what is learned from it here; an interrupted calibration goes on",
    )
    parser.add_argument(
        "--size-budget",
        metavar="SIZE",
        help="bits of every weight so that the package has this size and loses least, as 2.2GB",
    )
    parser.add_argument(
        "--costs", type=Path, metavar="FILE", help="for it: what --sensitivity --json wrote"
    )
    parser.add_argument(
        "--verify", action="store_true", help="then hold the package against its checkpoint"
    )
    parser.add_argument(
        "--sensitivity",
        action="store_true",
        help="rank the weights by what the model loses with one of them in 4 bits, then stop",
    )
    parser.add_argument(
        "--inspect", action="store_true", help="describe the checkpoint from its headers, then stop"
    )
    parser.add_argument("--list-targets", action="store_true", help="print the targets, then stop")
    add_options(parser)
    version = importlib.metadata.version("phi4export")
    parser.add_argument("--version", action="version", version=f"phi4export {version}")
    return parser.parse_args(arguments)


def _list_targets() -> None:
    from targets import DEFAULT, TARGETS

    table = Table("target", "provider", "what it is", box=None, pad_edge=False)
    for target in TARGETS:
        name = f"{target.name} (default)" if target is DEFAULT else target.name
        table.add_row(name, target.provider, target.summary)
    _print(whole(table))


def _inspect(source: str | Path) -> None:
    from export.checkpoint import open_checkpoint
    from export.inspect import describe

    _print(describe(open_checkpoint(source)))


def _rank(options: argparse.Namespace, console: Console) -> None:
    settings = settings_of(options, tokens=RANKED_TOKENS)
    from export.checkpoint import open_checkpoint
    from export.quantize.placement import measure_sensitivity
    from export.quantize.sensitivity import ranking_table

    progress = Progress(*Progress.get_default_columns(), console=console, transient=True)
    with contextlib.ExitStack() as stack:

        def begin(text: str, total: int) -> Callable[[int], None]:
            stack.enter_context(progress)  # from here on: an error before it is one line
            task = progress.add_task(text, total=total)
            return lambda count: progress.advance(task, count)

        found = measure_sensitivity(open_checkpoint(_source(options)), settings, begin)
    _print(whole(ranking_table(found)))


def _print(result: RenderableType) -> None:
    with stdout_console() as console:
        console.print(result)


def _source(options: argparse.Namespace) -> str | Path:
    return REFERENCE if options.checkpoint is None else options.checkpoint


def _export(options: argparse.Namespace, console: Console) -> int:
    begin = time.perf_counter()
    settings = settings_of(options)
    with hold_interrupts():
        from export.checkpoint import open_checkpoint
        from targets import DEFAULT, find_target
        from targets.caches import with_cache
        from targets.destination import check_destination

    target = DEFAULT if options.target is None else find_target(options.target)
    if options.cache is not None:
        target = with_cache(target, options.cache)
    idle = "--verify" if options.verify else "--all-logits" if options.all_logits else None
    if target.graphs and idle:
        raise ValueError(
            f"{idle} needs a package of one graph, {target.name} has {len(target.graphs)}: "
            "choose a cpu target"
        )
    source = _source(options)
    name = Path(os.path.abspath(source)).name  # a hub's folder is called by a digest
    destination = options.output or Path(f"{name}-{target.name}")
    # First of all: to fetch a checkpoint from the hub may take an hour.
    check_destination(destination, force=options.force)
    budget = _budget(options)
    told = _quantization(options)
    if told is not None:
        from export.quantize.options import check, check_text

        check(target, told)
    checkpoint = open_checkpoint(source)
    if told is not None:
        check_text(target, told, checkpoint)
    package = _write(checkpoint, name, target, destination, options, budget, console)
    size = sum(file.stat().st_size for file in package.iterdir())
    shown = escape(str(package))
    console.print(
        f"wrote [bold]{shown}[/bold] for {target.name}: {size / 1e6:,.1f} MB in "
        f"{time.perf_counter() - begin:.0f} s, {_peak_memory()}"
    )
    if (package / "tokenizer.json").is_file():
        quote = subprocess.list2cmdline if os.name == "nt" else shlex.join
        console.print(f"talk with it: python -m runtime_py.chat {escape(quote([str(package)]))}")
    if not options.verify:
        return 0
    from export.verify.command import deliver, verify

    return deliver(verify(package, source, settings, console), settings)


def _quantization(options: argparse.Namespace) -> Quantization | None:
    """What is told about quantization, if anything."""
    names = (
        "recipe",
        "quantizer",
        "equalize",
        "calibration",
        "calibration_cache",
        "activations",
        "ranges",
    )
    told = {name: getattr(options, name) for name in names}
    if not any(told.values()):
        return None
    if options.recipe is not None and options.size_budget is not None:
        raise ValueError("--recipe and --size-budget both choose the bits of weights: give one")
    with hold_interrupts():  # torch
        from export.quantize.options import Quantization

    return Quantization(folder=told.pop("calibration_cache"), **told)


def _budget(options: argparse.Namespace) -> tuple[int, Costs | None] | None:
    """Bytes the package may have, and what its weights cost; None where no size was given."""
    if options.size_budget is None:
        return None
    from export.quantize.costs import read_costs
    from targets.size_budget import parse_size

    costs = None if options.costs is None else read_costs(options.costs)
    return parse_size(options.size_budget), costs


def _write(
    checkpoint: Checkpoint,
    name: str,
    target: Target,
    destination: Path,
    options: argparse.Namespace,
    budget: tuple[int, Costs | None] | None,
    console: Console,
) -> Path:
    with hold_interrupts():
        from export.checkpoint import CheckpointError, find_non_finite
        from export.tokenizer import write_tokenizer
        from graph_passes.pipeline import run_passes
        from runtime_py.native import CUDA, library_path
        from targets.package import GENAI, package_size, write_package

    notes = [_introduction()] if options.checkpoint is None else []
    with bytes_progress(console) as progress, contextlib.ExitStack() as stack:

        def stage(text: str, total: int | None = None) -> Callable[[int], None]:
            for task in progress.tasks:
                progress.update(task.id, visible=False)
            task_id = progress.add_task(text, total=total)
            return lambda count: progress.advance(task_id, count)

        damaged = find_non_finite(checkpoint, stage("checking weights", checkpoint.total_bytes))
        if damaged is not None:
            raise CheckpointError(
                f"tensor {damaged!r} of {checkpoint.folder} holds NaN or infinity, expected finite "
                "weights: the checkpoint is damaged, fetch it again"
            )
        stage("tracing the graph")
        with hold_interrupts():  # torch
            from export.quantize.options import quantized_as_told, with_activations_as_told
            from export.trace import trace

        model = run_apart(lambda: trace(checkpoint, all_logits=options.all_logits))
        told = _quantization(options)
        if told is not None:
            target = stack.enter_context(quantized_as_told(target, told, checkpoint, model, stage))
        library = None if options.portable else library_path(target.provider)
        if budget is not None:
            stage("choosing the bits of every weight")
            from export.quantize.placement import fit_to_budget

            size, costs = budget
            target = fit_to_budget(
                model, target, size, checkpoint=checkpoint, library=library, costs=costs
            )
        stage(f"shaping it for {target.name}")
        traced, model = model, run_passes(model, target.passes)
        if told is not None:
            target = with_activations_as_told(target, told, checkpoint, traced, model, stage)

        def add_tokenizer(folder: Path) -> None:
            note = write_tokenizer(checkpoint.folder, folder)
            if note is not None:
                notes.append(note)

        package = write_package(
            model,
            destination,
            target=target,
            facts={
                "checkpoint": name,
                "tensors": len(checkpoint.tensors),
                "bytes": checkpoint.total_bytes,
                "all_logits": options.all_logits,
            },
            library=library,
            extra_files=add_tokenizer,
            force=options.force,
            progress=stage("writing", package_size(model)),
        )
    if not (package / GENAI).is_file() and not target.graphs:
        notes.append(
            f"ONNX Runtime GenAI does not know caches of {target.cache}, so there is no {GENAI}; "
            "for GenAI choose --cache float16"
        )
    if target.cache == "int8" and target.provider == CUDA and library is None:
        notes.append(
            "the native operators for CUDA devices were not built, and without them caches of int8 "
            "are read on the CPU: part of every step will run there; python setup.py build_cuda "
            "builds them, float16 does without"
        )
    for note in notes:
        console.print(f"note: {escape(note)}")
    return package


def _introduction() -> str:
    """The first lines of the shipped model's card, which say what it is and is not."""
    card = (REFERENCE / "README.md").read_text(encoding="utf-8")
    paragraphs = [part for part in card.split("\n\n") if part and not part.startswith(("#", "---"))]
    return "no --checkpoint was given, this is the model shipped inside: " + " ".join(
        paragraphs[0].split()
    )


def _peak_memory() -> str:
    from runtime_py.peak_memory import peak_bytes

    peak = peak_bytes()
    return "peak memory unknown" if peak is None else f"peak memory {peak / 1e9:.2f} GB"


def _complain(message: str) -> None:
    """One line on stderr, whatever names of files or tensors hold."""
    line = " ".join(message.split())
    shown = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in line)
    print(f"phi4export: error: {shown}", file=sys.stderr)


if __name__ == "__main__":
    leave(main())
