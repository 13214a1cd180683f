"""`rudder policy schema`: print the JSON schema of a policy file."""

import json
import sys
from collections.abc import Sequence

from rudder.server.cli.arguments import command
from rudder.server.program.schema import schema_of
from rudder.v1 import policy_pb2

DESCRIPTION = """\
Print the JSON schema of a policy file, for editors that check YAML while it is written: docs/policy.schema.json.
"""


def main(argv: Sequence[str]) -> None:
    """Print the schema."""
    command("policy schema", DESCRIPTION).parse_args(argv)
    sys.stdout.write(json.dumps(schema_of(policy_pb2.Policy.DESCRIPTOR), indent=2) + "\n")
