"""`rudder policy`: the policies of a server and their files. One module of this package per command."""

from collections.abc import Sequence

from rudder.server.cli.arguments import run_module

EXAMPLES = """\
examples:
  rudder policy validate POLICY.yaml --config server.yaml
  rudder policy explain
  rudder policy COMMAND --help
"""
POLICY_COMMANDS = {
    "list": "policies in force on a server",
    "get": "print a policy of a server",
    "validate": "check a file, against a server if one is named",
    "apply": "put a file in force on a server",
    "explain": "say which policies bind a caller, and what they lock",
    "schema": "print the JSON schema of a policy file",
    "derive": "derive a policy that forgets a topic of a labelled corpus",
    "certify": "rerun a policy's stored evaluation against the engine as it is configured now",
}


def main(argv: Sequence[str]) -> int:
    """Run a command."""
    return run_module(__name__, POLICY_COMMANDS, argv, "Write, check and apply policies.", EXAMPLES, "command")
