"""Run the `rudder` command as `python -m rudder.server`, which also works under torchrun."""

import sys

from rudder.server.cli import main

sys.exit(main())
