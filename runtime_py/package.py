"""Open a package: find its model file, check that it is ours, read what its metadata says."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence as Many
from dataclasses import dataclass
from pathlib import Path

import onnxruntime as ort

from runtime_py.cuda_graph import OLDEST
from runtime_py.errors import InputError, PackageError
from runtime_py.model_file import read_metadata_props
from runtime_py.native import CPU, CUDA, library_path
from runtime_py.pipeline import Pipeline, Stage, read_stages
from runtime_py.plugins import MODULES, add_plugin, compiled_file, is_installed

MODEL_FILE, MANIFEST = "model.onnx", "manifest.json"
VERSION = "1"
THREADS_A_CORE = 8  # far beyond what helps; thousands take minutes to start
NOT_CAPTURED = "leave cuda_graph out"
AGAIN = "export the checkpoint again with this version of phi4export"


@dataclass(frozen=True, kw_only=True)
class Config:
    """What the runtime needs of the model's ``sambay.config`` metadata.

    Attributes:
        sliding_window: slots of a window layer's ring.
        eos_token_ids: any of them ends an answer.
        context_length: tokens the model was made for; beyond it a sequence warns.
        max_position_embeddings: tokens no sequence may exceed.
    """

    vocab_size: int
    sliding_window: int
    eos_token_ids: tuple[int, ...]
    context_length: int
    max_position_embeddings: int


def find_model(path: str | os.PathLike[str]) -> Path:
    """Path of the model file: ``path`` itself, or ``model.onnx`` in the folder ``path``.

    Of a package of several graphs it is ``manifest.json``, which lists them.

    Raises:
        PackageError: there is no such file.
    """
    given = Path(path)
    if given.is_file():
        return given
    if not given.exists():
        raise PackageError(f"{given} does not exist; give a package folder or its {MODEL_FILE}")
    if (given / MODEL_FILE).is_file():
        return given / MODEL_FILE
    if read_stages(given / MANIFEST):
        return given / MANIFEST
    if any(given.glob("*.safetensors")):
        raise PackageError(
            f"{given} is a checkpoint, expected a package: phi4export --checkpoint {given}"
        )
    raise PackageError(f"{given} holds no {MODEL_FILE}; give the folder that phi4export wrote")


def open_model(
    path: Path, *, threads: int | None, providers: Many[str] | None, cuda_graph: bool = False
) -> ort.InferenceSession | Pipeline:
    """Load a model into ONNX Runtime.

    Args:
        path: what ``find_model`` returned.
        threads: of one operator; None takes one a physical core.
        providers: execution providers, best first; None takes the one the package was made for.
        cuda_graph: whether the CUDA provider may capture calls.

    Raises:
        InputError: threads is below 1 or far beyond the cores, or a provider is not in this ONNX
            Runtime; or nothing can be captured.
        PackageError: a file cannot be read as a model.
    """
    cores = os.cpu_count() or 1
    if threads is not None and not 1 <= threads <= THREADS_A_CORE * cores:
        raise InputError(
            f"threads is {threads}; give 1 to {THREADS_A_CORE * cores}, best at most {cores}: "
            "more than this machine has cores wait for each other"
        )
    _check_sizes(path)
    stages = read_stages(path) if path.name == MANIFEST else ()
    if not stages:
        return _open_graph(path, threads, providers, cuda_graph=cuda_graph)
    if cuda_graph:
        raise InputError(f"{path} lists several graphs, which are not captured; {NOT_CAPTURED}")

    def open_stage(stage: Stage) -> ort.InferenceSession:
        asked = (CPU,) if stage.provider == CPU else providers
        return _open_graph(path.with_name(stage.file), threads, asked, stage.provider)

    return Pipeline(stages, open_stage)


def _open_graph(
    path: Path,
    threads: int | None,
    providers: Many[str] | None,
    made_for: str | None = None,
    *,
    cuda_graph: bool = False,
) -> ort.InferenceSession:
    told = read_metadata_props(path)
    made_for = made_for or told.get("sambay.provider", CPU)
    chosen = _choose_providers(path, providers, made_for, told.get("sambay.target", ""))
    if cuda_graph:
        _check_capture(chosen[0])
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or _physical_cores()
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # an error arrives as an exception, told once
    if chosen[0] == CUDA:  # its fast kernels for symmetric blocks are off unless asked for
        options.add_session_config_entry("ep.cuda.fpa_intb_gemm", "1")
    # A library pins our operators to its provider and knows the types of packages for it.
    library = library_path(made_for) if chosen[0] == made_for else None
    try:
        if library is not None:
            options.register_custom_ops_library(str(library))
        if is_installed(chosen[0]):
            add_plugin(options, chosen[0])
            compiled = compiled_file(path)
            return ort.InferenceSession(str(compiled if compiled.exists() else path), options)
        # Unasked, Python's session would go on with the CPU where a provider cannot start.
        settings = [
            {"enable_cuda_graph": "1"} if name == CUDA and cuda_graph else {} for name in chosen
        ]
        return ort.InferenceSession(str(path), options, chosen, settings, enable_fallback=0)
    except Exception as error:  # ONNX Runtime's exceptions share no narrower base
        reason = " ".join(str(error).split())[:300]
        remedy = "copy or export the package again"
        if chosen[0] != CPU:
            remedy = f"if {chosen[0]} cannot start here, ask for {CPU}"
        if cuda_graph:
            remedy = f"{NOT_CAPTURED}, or {AGAIN}"
        if made_for not in chosen:
            remedy = f"it was made for {made_for}, not for {chosen[0]}"
        raise PackageError(f"{path} cannot be read as a model ({reason}); {remedy}") from error


def _check_capture(provider: str) -> None:
    if provider != CUDA:
        raise InputError(f"cuda_graph captures on {CUDA}, not on {provider}; {NOT_CAPTURED}")
    if tuple(int(part) for part in ort.__version__.split(".")[:2]) < OLDEST:
        raise InputError(
            f"cuda_graph needs ONNX Runtime {'.'.join(map(str, OLDEST))} or later, this is "
            f"{ort.__version__}: update onnxruntime-gpu, or {NOT_CAPTURED}"
        )


def _choose_providers(path: Path, asked: Many[str] | None, made_for: str, target: str) -> list[str]:
    """The providers asked for, or the one the package was made for; all must be there."""
    plugins = [name for name in MODULES if is_installed(name)]
    available = list(dict.fromkeys([*ort.get_available_providers(), *plugins]))
    for name in asked or ():
        if name not in available:
            known = ", ".join(available)
            raise InputError(f"this ONNX Runtime has no provider {name!r}; it has {known}")
    if not asked and made_for not in available:
        raise InputError(
            f"{path.parent} was made for {made_for} (target {target}), and this ONNX Runtime has "
            f"{', '.join(available)}: install the ONNX Runtime for it, export a cpu target, or ask "
            f"for one of these providers (Session(..., providers=[{CPU!r}]) or --provider {CPU}), "
            "which may be slow"
        )
    return list(asked or dict.fromkeys((made_for, CPU)))


def read_metadata(
    path: Path, model: ort.InferenceSession | Pipeline
) -> tuple[Config, bool, int | None]:
    """Sizes of the model, whether it gives all tokens' logits, most tokens of a run if limited.

    Raises:
        PackageError: the model is not one of ours, or is of another version.
    """
    metadata = model.get_modelmeta().custom_metadata_map
    version = metadata.get("sambay.version")
    if version is None:
        raise PackageError(
            f"{path} is an ONNX model, but has no sambay.version in its metadata; "
            "give a package that phi4export wrote"
        )
    if version != VERSION:
        raise PackageError(
            f"{path} has sambay.version {version!r}, this runtime reads {VERSION!r}; {AGAIN}"
        )
    try:
        told = json.loads(metadata["sambay.config"])
        sizes = {field.name: told[field.name] for field in dataclasses.fields(Config)}
        sizes["eos_token_ids"] = tuple(int(token) for token in sizes["eos_token_ids"])
        all_logits = {"last": False, "all": True}[metadata["sambay.logits"]]
        limit = metadata.get("sambay.max_tokens")
        most = None if limit is None else int(limit)
    except (KeyError, TypeError, ValueError) as error:
        raise PackageError(
            f"{path}: metadata sambay.config or sambay.logits is incomplete ({error!r}); {AGAIN}"
        ) from error
    return Config(**sizes), all_logits, most


def fingerprint(path: Path) -> str:
    """Digest of a model's files: one and the weights beside it, or all that a manifest lists.

    Graphs of two checkpoints may be equal byte for byte, so weights count too. Of a large file
    evenly spread blocks stand for the whole: reading gigabytes would take longer than a session.
    """
    block, blocks = 1 << 16, 256  # 16 MiB of a file at most
    digest = hashlib.sha256()
    for file in (path.with_name(name) for name in _files(path)):
        if not file.is_file():
            continue
        size = file.stat().st_size
        digest.update(f"{size};".encode())
        stride = max(block, size // blocks)
        with file.open("rb") as stream:
            for offset in range(0, size, stride):
                stream.seek(offset)
                digest.update(stream.read(block))
    return digest.hexdigest()


def _files(path: Path) -> list[str]:
    """Names of a model's files, weights included."""
    if path.name != MANIFEST:
        return [path.name, f"{path.name}.data"]
    return [*(stage.file for stage in read_stages(path)), f"{MODEL_FILE}.data"]


def _check_sizes(path: Path) -> None:
    """A file that was copied half way is told by the manifest beside it, if there is one."""
    try:
        told = json.loads((path.parent / MANIFEST).read_text(encoding="utf-8"))["files"]
        sizes = {name: int(told[name]["bytes"]) for name in _files(path)}
    except (OSError, KeyError, TypeError, ValueError):
        return  # a model without a package around it, or with another's
    for name, size in sizes.items():
        file = path.with_name(name)
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            fault = "is missing" if found is None else f"has {found} bytes"
            raise PackageError(
                f"{file} {fault}, {MANIFEST} says {size} bytes: copy or export the package again"
            )


def _physical_cores() -> int:
    """Cores this process may use, each counted once; 0, ONNX Runtime's own count, if unknown.

    A second thread on one core only adds waiting, and ONNX Runtime's count ignores that a
    container may have been given fewer cores than the machine has.
    """
    if not hasattr(os, "sched_getaffinity"):
        return 0
    cpus = os.sched_getaffinity(0)
    try:
        cores = {
            Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
            for cpu in cpus
        }
    except OSError:
        return len(cpus)
    return len(cores)
