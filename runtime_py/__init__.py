"""Run an exported SambaY package: tokens or text in, logits or text out.

>>> session = Session("package")                       # doctest: +SKIP
>>> for text in generate(session, "What is 6 * 7?"):   # doctest: +SKIP
...     print(text, end="")
"""

from runtime_py.errors import BrokenSequenceError, InputError, PackageError, SnapshotError
from runtime_py.generate import Conversation, generate
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
