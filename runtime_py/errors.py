"""What can go wrong, by who can mend it. Every message is one line that says what to do."""


class PackageError(ValueError):
    """The model file or something beside it is missing, broken or not a SambaY package."""


class InputError(ValueError):
    """The caller's tokens, text or settings cannot be used; nothing was run."""


class SnapshotError(ValueError):
    """A saved sequence cannot be read, or belongs to another model."""


class BrokenSequenceError(RuntimeError):
    """A run failed half-way, so the states of this sequence mean nothing any more."""
