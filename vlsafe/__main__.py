"""`python -m vlsafe` is the command `vlsafe`."""

from vlsafe.cli import main

raise SystemExit(main())
