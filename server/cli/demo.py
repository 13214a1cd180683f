"""`rudder demo`: start a server on free ports, take the tour of it, stop it."""

import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import IO

from rich.markup import escape

from rudder.server.cli.arguments import command
from rudder.server.cli.output import err
from rudder.server.models import served
from rudder.server.process import busy_message, free_port, server_command, stop, wait_serving
from rudder_client import RudderError

LOG_TAIL_LINES = 120


def main(argv: Sequence[str]) -> int:
    """Take the tour; the server is stopped however it ends, and its log is shown after a failure."""
    parser = command("demo", "Start a server on free ports, take the tour of it, stop it.")
    parser.add_argument("--model", choices=served.NAMES, default=served.AUTO, help=f"{served.HELP} (%(default)s)")
    model = parser.parse_args(argv).model
    if model == served.INSTRUCT:
        served.require_programs()
    fields = served.fields_of(model, say)
    if message := busy_message():
        say(message)
    port, metrics_port = free_port(), free_port()
    fields |= {"listen.port": str(port), "listen.metrics_port": str(metrics_port)}
    flags = flags_of(fields)
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(server_command(*flags), stdout=log, stderr=log, start_new_session=True)
        try:
            wait_serving(process, f"127.0.0.1:{port}")
            status = tour(port, metrics_port, flags, log)
        except RudderError as error:
            err.print(f"[bold red]the server did not start:[/] {escape(str(error))}")
            status = 1
        finally:
            stop(process)
        if status:
            print_tail(log)
    return status


def say(message: str) -> None:
    """Print a line on stderr."""
    err.print(escape(message))


def flags_of(fields: Mapping[str, str]) -> list[str]:
    """Return fields of the configuration as flags of `rudder serve`."""
    return [f"--{name}={value}" for name, value in fields.items()]


def tour(port: int, metrics_port: int, flags: Sequence[str], log: IO[str]) -> int:
    """Run the client's steps of the tour, then the one that compares with plain vLLM; return the exit status."""
    address = f"127.0.0.1:{port}"
    steps = [sys.executable, "-m", "rudder_client.tour", address, f"http://127.0.0.1:{metrics_port}/metrics"]
    cost = [sys.executable, "-m", "rudder.server.bench.cost", address, *flags]
    # vLLM writes on stderr.
    return subprocess.run(steps, check=False).returncode or subprocess.run(cost, stderr=log, check=False).returncode


def print_tail(log: IO[str]) -> None:
    """Print the last lines of a server's log on stderr."""
    log.seek(0)
    err.rule("last lines of the server's log")
    err.print("".join(log.readlines()[-LOG_TAIL_LINES:]), markup=False)
