"""`python -m server` is `rudder`."""

import sys

from server.cli import main

sys.exit(main())
