"""`python -m server` is `rudder`."""

import sys

from rudder.server.cli import main

sys.exit(main())
