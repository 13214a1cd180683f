"""The console: a page for the browser. Static files, read at the start; what they show, they ask the API for."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import rudder.server
from rudder.server.http.errors import Headers

FOLDER = Path(rudder.server.__file__).parent / "console"
PREFIX = b"/console/"
TYPES = {
    ".html": b"text/html; charset=utf-8",
    ".css": b"text/css; charset=utf-8",
    ".svg": b"image/svg+xml",
    ".js": b"text/javascript; charset=utf-8",
}
# No script, style or connection but the server's own, and none that text could become.
POLICY = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; base-uri 'none'; "
    b"form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS: Headers = [
    (b"content-security-policy", POLICY),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
]


@dataclass(frozen=True)
class Page:
    """An answer that is the same for everybody."""

    status: int
    headers: Headers
    content: bytes


def pages_of(folder: Path) -> Mapping[bytes, Page]:
    """Return the files of the console by their paths; the page itself is at `/console/`, where others lead."""
    pages = {PREFIX + path.name.encode(): page_of(path) for path in sorted(folder.iterdir()) if path.suffix in TYPES}
    pages[PREFIX] = pages.pop(PREFIX + b"index.html")
    moved = Page(307, [*HEADERS, (b"location", PREFIX)], b"")
    return pages | {PREFIX.rstrip(b"/"): moved, b"/": moved}


def page_of(path: Path) -> Page:
    """Read a file."""
    return Page(200, [*HEADERS, (b"content-type", TYPES[path.suffix])], path.read_bytes())
