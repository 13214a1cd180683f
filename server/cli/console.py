"""`rudder console`: start the demo's server and open its console in the browser."""

import subprocess
import tempfile
import webbrowser
from collections.abc import Sequence

from rudder.server.cli.arguments import command
from rudder.server.cli.demo import flags_of, print_tail, say
from rudder.server.models import served
from rudder.server.process import free_port, server_command, stop, wait_serving

EXAMPLES = """\
examples:
  rudder console
  rudder console --model small --no-browser
"""


def main(argv: Sequence[str]) -> int:
    """Serve until interrupted; the server's log is shown if it ends by itself."""
    parser = command("console", "Start a server on free ports and open its console in the browser.", EXAMPLES)
    parser.add_argument("--model", choices=served.NAMES, default=served.AUTO, help=f"{served.HELP} (%(default)s)")
    parser.add_argument("--no-browser", action="store_true", help="print the address alone")
    args = parser.parse_args(argv)
    ports = {name: str(free_port()) for name in ("listen.port", "listen.metrics_port", "listen.http_port")}
    flags = flags_of(served.fields_of(args.model, say) | ports)
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(server_command(*flags), stdout=log, stderr=log, start_new_session=True)
        try:
            wait_serving(process, f"127.0.0.1:{ports['listen.port']}")
            open_page(f"http://localhost:{ports['listen.http_port']}/console/", browser=not args.no_browser)
            return process.wait()
        finally:
            if process.poll() is not None:
                print_tail(log)
            stop(process)


def open_page(url: str, *, browser: bool) -> None:
    """Print the address, and open it if there is a browser."""
    say(f"the console: {url} (Ctrl-C stops the server)")
    if browser:
        webbrowser.open(url)
