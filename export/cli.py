"""``phi4export``: from a SambaY checkpoint to an ONNX package."""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

if TYPE_CHECKING:
    from export.checkpoint import Checkpoint
    from targets.target import Target

REFERENCE = Path(__file__).parent / "reference"

EXAMPLES = """\
examples:
  phi4export                                   export the small model that comes with this program
  phi4export --checkpoint ./Phi-4-mini-flash-reasoning
  phi4export --checkpoint microsoft/Phi-4-mini-flash-reasoning --target cpu-int8 -o package
  phi4export --checkpoint ./checkpoint --inspect
  python -m runtime_py.chat package            talk with the result

A package is a folder that Python programs, ONNX Runtime and ONNX Runtime GenAI load as it is.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = _parse(arguments)
    console = Console(stderr=True)
    try:
        if options.list_targets:
            _list_targets()
        elif options.inspect:
            _inspect(options.checkpoint)
        else:
            _export(options, console)
    except KeyboardInterrupt:
        console.print("phi4export: interrupted, no package was written", style="yellow")
        return 130
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in _extra_modules():
            raise
        _complain(
            f"{error.name} is not installed; exporting needs: pip install 'phi4export[export]'"
        )
        return 2
    except (ValueError, OSError) as error:
        _complain(str(error))
        return 2
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
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
    parser.add_argument("--target", help="what the package runs on; see --list-targets (cpu-int4)")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="DIR", help="package folder (./<checkpoint>-<target>)"
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
        "--inspect", action="store_true", help="describe the checkpoint from its headers, then stop"
    )
    parser.add_argument("--list-targets", action="store_true", help="print the targets, then stop")
    version = importlib.metadata.version("phi4export")
    parser.add_argument("--version", action="version", version=f"phi4export {version}")
    return parser.parse_args(arguments)


def _list_targets() -> None:
    from targets import DEFAULT, TARGETS

    table = Table("target", "provider", "what it is", box=None)
    for target in TARGETS:
        name = f"{target.name} (default)" if target is DEFAULT else target.name
        table.add_row(name, target.provider, target.summary)
    Console().print(table)


def _inspect(source: str | None) -> None:
    from export.checkpoint import open_checkpoint
    from export.inspect import describe

    Console().print(describe(open_checkpoint(source or REFERENCE)))


def _export(options: argparse.Namespace, console: Console) -> None:
    begin = time.perf_counter()
    from targets import DEFAULT, find_target

    target = find_target(options.target) if options.target else DEFAULT
    from export.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(options.checkpoint or REFERENCE)
    if not options.checkpoint:
        console.print(_introduction())
    name = checkpoint.folder.absolute().name
    destination = options.output or Path(f"{name}-{target.name}")
    package = _write(checkpoint, target, destination, options, console)
    size = sum(file.stat().st_size for file in package.iterdir())
    console.print(
        f"wrote [bold]{package}[/bold] for {target.name}: {size / 1e6:,.1f} MB in "
        f"{time.perf_counter() - begin:.0f} s, {_peak_memory()}"
    )
    console.print(f"talk with it: python -m runtime_py.chat {package}", highlight=False)


def _write(
    checkpoint: Checkpoint,
    target: Target,
    destination: Path,
    options: argparse.Namespace,
    console: Console,
) -> Path:
    from export.checkpoint import CheckpointError, find_non_finite
    from export.tokenizer import write_tokenizer
    from graph_passes.pipeline import run_passes
    from runtime_py.native import library_path
    from targets.destination import check_destination
    from targets.package import package_size, write_package

    check_destination(destination, force=options.force)
    with _progress(console) as progress:

        def stage(text: str, total: int | None = None) -> Callable[[int], object]:
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
        from export.trace import trace

        model = trace(checkpoint, all_logits=options.all_logits)
        stage(f"shaping it for {target.name}")
        model = run_passes(model, target.passes)
        notes: list[str] = []

        def add_tokenizer(folder: Path) -> None:
            note = write_tokenizer(checkpoint.folder, folder)
            if note is not None:
                notes.append(note)

        package = write_package(
            model,
            destination,
            target=target,
            facts={
                "checkpoint": checkpoint.folder.absolute().name,
                "tensors": len(checkpoint.tensors),
                "bytes": checkpoint.total_bytes,
                "all_logits": options.all_logits,
            },
            library=library_path() if target.native and not options.portable else None,
            extra_files=add_tokenizer,
            force=options.force,
            progress=stage("writing", package_size(model)),
        )
    for note in notes:
        console.print(f"note: {note}")
    return package


def _progress(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def _introduction() -> str:
    """The first lines of the shipped model's card, which say what it is and is not."""
    card = (REFERENCE / "README.md").read_text(encoding="utf-8")
    paragraphs = [part for part in card.split("\n\n") if part and not part.startswith(("#", "---"))]
    return "no --checkpoint given, exporting the model shipped inside: " + " ".join(
        paragraphs[0].split()
    )


def _peak_memory() -> str:
    from runtime_py.peak_memory import peak_bytes

    peak = peak_bytes()
    return "peak memory unknown" if peak is None else f"peak memory {peak / 1e9:.2f} GB"


def _extra_modules() -> set[str]:
    return {"torch", "onnx", "onnx_ir", "onnxscript", "ml_dtypes"}


def _complain(message: str) -> None:
    print(f"phi4export: error: {' '.join(message.split())}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
