"""Where the command ``phi4export`` begins: Ctrl-C while the rest is loaded ends it, too."""

from __future__ import annotations

from typing import NoReturn

from export.interrupts import hold_interrupts, leave


def main() -> NoReturn:
    """Load the command and run it; see ``export.cli.main`` for the exit status."""
    try:
        with hold_interrupts():
            from export.cli import main as command
    except KeyboardInterrupt:
        leave(130)
    leave(command())


if __name__ == "__main__":
    main()
