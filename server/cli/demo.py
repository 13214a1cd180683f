"""`rudder demo`: start a server on free ports, run the client's tour, stop the server."""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import IO

from rich.markup import escape

from rudder.server.cli.arguments import command
from rudder.server.cli.output import err
from rudder.server.process import free_port, server_command, stop, wait_serving
from rudder_client import RudderError

LOG_TAIL_LINES = 120


def main(argv: Sequence[str]) -> int:
    """Run the tour; the server is stopped however it ends, and its log is shown after a failure."""
    command("demo", "Start a server on free ports, run the client's tour, stop the server.").parse_args(argv)
    port, metrics_port = free_port(), free_port()
    address, metrics = f"127.0.0.1:{port}", f"http://127.0.0.1:{metrics_port}/metrics"
    ports = ["--listen.port", str(port), "--listen.metrics_port", str(metrics_port)]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(server_command(*ports), stdout=log, stderr=log, start_new_session=True)
        try:
            wait_serving(process, address)
            tour = [sys.executable, "-m", "rudder_client.tour", address, metrics]
            status = subprocess.run(tour, check=False).returncode
        except RudderError as error:
            err.print(f"[bold red]the server did not start:[/] {escape(str(error))}")
            status = 1
        finally:
            stop(process)
        if status:
            print_tail(log)
    return status


def print_tail(log: IO[str]) -> None:
    """Print the last lines of a server's log on stderr."""
    log.seek(0)
    err.rule("last lines of the server's log")
    err.print("".join(log.readlines()[-LOG_TAIL_LINES:]), markup=False)
