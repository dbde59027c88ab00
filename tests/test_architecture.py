"""The packages keep to the import directions of docs/architecture.md."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"export", "graph_passes", "targets", "runtime_py", "benchmarks", "reference_model"}
MAY_IMPORT = {
    "export": {"export"},
    "graph_passes": {"graph_passes"},
    "targets": {"targets", "graph_passes"},
    "runtime_py": {"runtime_py"},
    "examples": set(),  # programs of others, as it were
}
# the modules that join the packages
JOINS = {
    "export/cli.py",
    "export/olive_passes.py",
    "export/optimum_hook.py",
    "export/quantize/equalization.py",
    "export/quantize/placement.py",
    "export/quantize/options.py",
    "export/verify/command.py",
}
HEAVY = {"torch", "onnx", "onnx_ir", "onnxscript", "ml_dtypes", "transformers"}
FORBIDDEN = {"graph_passes": {"torch"}, "targets": {"torch"}, "runtime_py": HEAVY}


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_imports_only_what_it_may(package: str) -> None:
    modules = sorted((ROOT / package).rglob("*.py"))
    assert modules
    for path in modules:
        if path.relative_to(ROOT).as_posix() in JOINS:
            continue
        found = imported(path)
        assert found & OURS <= MAY_IMPORT[package], path
        assert not found & FORBIDDEN.get(package, set()), path


def test_the_runtime_imports_where_torch_and_onnx_are_missing() -> None:
    blocked = ", ".join(repr(name) for name in sorted(HEAVY))
    code = f"""
import sys
for name in ({blocked}): sys.modules[name] = None
from runtime_py import *
import runtime_py.chat
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_runtime_loads_what_is_asked_for() -> None:
    code = """
import sys
import runtime_py
assert not {"numpy", "onnxruntime"} & set(sys.modules)
import runtime_py.conversation
assert runtime_py.generate is runtime_py.conversation.generate
assert all(getattr(runtime_py, name).__name__ == name for name in dir(runtime_py))
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
