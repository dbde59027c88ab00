"""Execution providers that are Python packages of their own, beside ONNX Runtime."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import platform
from pathlib import Path
from typing import Any

import onnxruntime as ort

QNN = "QNNExecutionProvider"
MODULES = {QNN: "onnxruntime_qnn"}  # with get_library_path()


def is_installed(provider: str) -> bool:
    """Whether the package of a provider is there; False for those without one."""
    return provider in MODULES and importlib.util.find_spec(MODULES[provider]) is not None


def add_plugin(options: ort.SessionOptions, provider: str, compiled: Path | None = None) -> None:
    """Make a session run on a provider of a package that is installed, and on nothing else.

    Args:
        compiled: where the session writes its graph as compiled for the device; what is large in
            it goes into a file beside.

    Raises:
        RuntimeError: the package finds no device.
    """
    devices = [device for device in _devices(provider) if device.ep_name == provider]
    if not devices:
        raise RuntimeError(f"{MODULES[provider]} is installed, but offers no device here")
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    if compiled is not None:
        options.add_session_config_entry("ep.context_enable", "1")
        options.add_session_config_entry("ep.context_embed_mode", "0")
        options.add_session_config_entry("ep.context_file_path", str(compiled))
    options.add_provider_for_devices(devices[:1], _settings(provider))


def compiled_file(graph: Path) -> Path:
    """Where ``runtime_py.compile`` puts what it makes of a graph."""
    return graph.with_suffix(".compiled.onnx")


@functools.cache
def _devices(provider: str) -> Any:
    module = importlib.import_module(MODULES[provider])
    ort.register_execution_provider_library(provider, module.get_library_path())
    return ort.get_ep_devices()


def _settings(provider: str) -> dict[str, str]:
    """Options of a provider. Without a Hexagon processor QNN emulates the one that is named."""
    emulated = platform.machine().lower() in ("x86_64", "amd64")
    snapdragon_x = {"soc_model": "60", "htp_arch": "73"}
    return {"backend_type": "htp", **(snapdragon_x if emulated else {})} if provider == QNN else {}
