"""Run an exported SambaY package: tokens or text in, logits or text out.

>>> session = Session("package")                       # doctest: +SKIP
>>> for text in generate(session, "What is 6 * 7?"):   # doctest: +SKIP
...     print(text, end="")
"""

import importlib
from typing import TYPE_CHECKING

from runtime_py.errors import BrokenSequenceError, InputError, PackageError, SnapshotError

if TYPE_CHECKING:
    from runtime_py.conversation import Conversation, generate
    from runtime_py.sampling import Sampling
    from runtime_py.sequence import Sequence
    from runtime_py.session import Session

__all__ = [
    "BrokenSequenceError",
    "Conversation",
    "InputError",
    "PackageError",
    "Sampling",
    "Sequence",
    "Session",
    "SnapshotError",
    "generate",
]
_MODULES = {
    "Conversation": "conversation",
    "Sampling": "sampling",
    "Sequence": "sequence",
    "Session": "session",
    "generate": "conversation",
}


def __getattr__(name: str) -> object:
    """Import what is asked for: ONNX Runtime and numpy take a third of a second."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
