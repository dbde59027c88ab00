"""Where the command ``phi4export`` begins: Ctrl-C while the rest is loaded ends it, too."""

from __future__ import annotations

import sys

from export.interrupts import hold_interrupts


def main() -> int:
    """Load the command and run it; see ``export.cli.main`` for the exit status."""
    try:
        with hold_interrupts():
            from export.cli import main as command
    except KeyboardInterrupt:
        return 130
    return command()


if __name__ == "__main__":
    sys.exit(main())
