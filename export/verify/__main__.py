"""``python -m export.verify``: see ``export.verify.command``; Ctrl-C ends loading, too."""

from export.interrupts import hold_interrupts

try:
    with hold_interrupts():
        from export.verify.command import main
except KeyboardInterrupt:
    raise SystemExit(130) from None
raise SystemExit(main())
