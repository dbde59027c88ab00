"""``python -m export.verify``: see ``export.verify.command``; Ctrl-C ends loading, too."""

import sys

from export.interrupts import hold_interrupts

try:
    with hold_interrupts():
        from export.console import missing_extra
        from export.verify.command import main
except KeyboardInterrupt:
    raise SystemExit(130) from None
except ModuleNotFoundError as error:
    print(f"verify: error: {missing_extra(error)}", file=sys.stderr)
    raise SystemExit(2) from None
raise SystemExit(main())
