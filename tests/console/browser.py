"""A page in headless Chromium, driven over its DevTools protocol: https://chromedevtools.github.io/devtools-protocol."""

import base64
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from websockets.sync.client import ClientConnection, connect

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Without its sandbox, since tests run as root in containers; the page is the project's own.
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--remote-debugging-port=0", "about:blank",
)  # fmt: skip
WAIT_S = 60.0
KEYS = {"ArrowRight": 39, "ArrowLeft": 37, "End": 35, "Home": 36, "Tab": 9, "Enter": 13, " ": 32}


class Page:
    """A tab. `problems`: exceptions, errors on its console and violations of its content policy, as they came."""

    def __init__(self, connection: ClientConnection) -> None:
        self.connection, self.last_id = connection, 0
        self.problems: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result."""
        self.last_id += 1
        self.connection.send(json.dumps({"id": self.last_id, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.connection.recv(timeout=WAIT_S))
            if message.get("id") == self.last_id:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result
            self.note(message)

    def note(self, event: dict[str, Any]) -> None:
        """Note an event if it is a problem."""
        parameters = event.get("params", {})
        match event.get("method"):
            case "Runtime.exceptionThrown":
                self.problems.append(json.dumps(parameters["exceptionDetails"]))
            case "Log.entryAdded" if parameters["entry"]["level"] == "error":
                self.problems.append(f"{parameters['entry']['text']} {parameters['entry'].get('url', '')}")
            case "Runtime.consoleAPICalled" if parameters["type"] == "error":
                self.problems.append(json.dumps(parameters["args"]))

    def evaluate(self, expression: str) -> Any:
        """Return the value of an expression, awaited if it is a promise."""
        result = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, condition: str) -> None:
        """Wait until an expression is true; fail with the page's text."""
        deadline = time.monotonic() + WAIT_S
        while not self.evaluate(f"Boolean({condition})"):
            assert time.monotonic() < deadline, f"never: {condition}\n{self.evaluate('document.body.innerText')}"
            time.sleep(0.05)

    def open(self, url: str) -> None:
        """Open an address and wait until the console has drawn itself."""
        self.send("Page.navigate", url="about:blank")
        self.send("Page.navigate", url=url)
        self.wait("document.body?.dataset.ready === 'yes'")

    def show(self, view: str) -> None:
        """Change the view by its link, and wait until it has drawn itself."""
        if self.evaluate(f"location.hash === '#{view}'"):
            return
        self.evaluate("document.querySelector('main > div').dataset.old = 'yes'")
        self.click(f'#views a[href="#{view}"]')
        self.wait(f"document.querySelector('.view-{view}:not([data-old]) h2')")

    def text(self, selector: str) -> str:
        """Return the text of the first element."""
        self.wait(f"document.querySelector({json.dumps(selector)})")
        return str(self.evaluate(f"document.querySelector({json.dumps(selector)}).textContent"))

    def click(self, selector: str) -> None:
        """Click the middle of the first element, as a mouse does."""
        self.wait(f"document.querySelector({json.dumps(selector)})")
        element = f"document.querySelector({json.dumps(selector)})"
        self.evaluate(f"{element}.scrollIntoView({{block: 'center'}})")
        box = self.evaluate(
            f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])({element}.getClientRects()[0])"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def write(self, selector: str, text: str) -> None:
        """Replace the text of a field by typing, and leave the field."""
        self.wait(f"document.querySelector({json.dumps(selector)})")
        self.evaluate(f"((e) => {{ e.focus(); e.select(); }})(document.querySelector({json.dumps(selector)}))")
        self.send("Input.insertText", text=text)
        self.evaluate("document.activeElement.blur()")

    def press(self, key: str, control: bool = False) -> None:
        """Press a key."""
        for kind in ("rawKeyDown", "keyUp"):
            self.send(
                "Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=KEYS[key], modifiers=2 * control
            )

    def media(self, scheme: str) -> None:
        """Prefer a light or dark scheme."""
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def picture(self, path: Path) -> None:
        """Write a picture of the window."""
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))


@contextmanager
def browser(folder: Path, width: int = 1280, height: int = 900) -> Iterator[Page]:
    """Run Chromium with a profile in this folder, and yield its page."""
    assert CHROMIUM
    command = [CHROMIUM, f"--user-data-dir={folder / 'profile'}", f"--window-size={width},{height}", *FLAGS]
    with (folder / "chromium.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        port = wait_port(folder / "profile" / "DevToolsActivePort", process)
        (tab,) = [t for t in json.load(urlopen(f"http://127.0.0.1:{port}/json")) if t["type"] == "page"]
        with connect(tab["webSocketDebuggerUrl"], max_size=None, compression=None) as connection:
            page = Page(connection)
            page.send(
                "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
            )
            yield page
    finally:
        process.terminate()
        process.wait(30)


def wait_port(path: Path, process: "subprocess.Popen[bytes]") -> int:
    """Return the port of the protocol, once Chromium has written it."""
    deadline = time.monotonic() + WAIT_S
    while not (path.exists() and path.read_text().count("\n")):
        assert process.poll() is None, "Chromium ended"
        assert time.monotonic() < deadline, "Chromium did not open its port"
        time.sleep(0.05)
    return int(path.read_text().splitlines()[0])
