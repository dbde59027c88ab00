"""``python -m export.verify``: see ``export.verify.command``."""

from export.verify.command import main

raise SystemExit(main())
