"""Start a process as a container runtime does: `python sandbox.py SPEC`, in namespaces of its own, as root.

SPEC is a JSON file (`Sandbox`). The root is built of read-only binds and then made read only itself; only the folders
in `writable` are written. The process becomes the user `user`, without capabilities, in a network of its own.
"""

import fcntl
import json
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import TypedDict

SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 0x1
# Of the interface: its name in 16 bytes, and its flags.
IFREQ = "16sh22x"
DEVICES = ("null", "zero", "full", "random", "urandom")


class Sandbox(TypedDict):
    """`read_only`: source of each path in the root; `links`: target of each link; `writable`: bytes of each folder."""

    root: str
    read_only: dict[str, str]
    links: dict[str, str]
    writable: dict[str, int]
    user: int
    environment: dict[str, str]
    command: list[str]


def main() -> None:
    sandbox: Sandbox = json.loads(Path(sys.argv[1]).read_text())
    raise_loopback()
    build_root(sandbox)
    os.chroot(sandbox["root"])
    os.chdir("/")
    user = str(sandbox["user"])
    privileges = [f"--reuid={user}", f"--regid={user}", "--clear-groups", "--no-new-privs", "--bounding-set=-all"]
    command = ["/usr/bin/setpriv", *privileges, "--inh-caps=-all", "--", *sandbox["command"]]
    os.execve(command[0], command, sandbox["environment"])


def raise_loopback() -> None:
    """Bring up the only interface of a new network."""
    with socket.socket() as any_socket:
        request = struct.pack(IFREQ, b"lo", 0)
        _, flags = struct.unpack(IFREQ, fcntl.ioctl(any_socket, SIOCGIFFLAGS, request))
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack(IFREQ, b"lo", flags | IFF_UP))


def build_root(sandbox: Sandbox) -> None:
    """Mount everything below the root, which no other process sees."""
    root = sandbox["root"]
    mount("--make-rprivate", "/")
    mount("-t", "tmpfs", "-o", "mode=0755", "tmpfs", root)
    for path, source in sandbox["read_only"].items():
        bind(Path(source), Path(root + path))
    for path, target in sandbox["links"].items():
        Path(root + path).symlink_to(target)
    for device in DEVICES:
        bind(Path("/dev", device), Path(root, "dev", device), "rw")
    for path, size in sandbox["writable"].items():
        Path(root + path).mkdir(parents=True, exist_ok=True)
        # As the kubelet makes an emptyDir for a pod with an fsGroup.
        mount("-t", "tmpfs", "-o", f"size={size},gid={sandbox['user']},mode=2777", "tmpfs", root + path)
    Path(root, "proc").mkdir()
    mount("-t", "proc", "proc", root + "/proc")
    mount("-o", "remount,ro", root)


def bind(source: Path, target: Path, access: str = "ro") -> None:
    """Mount a file or folder at another place."""
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
    mount("--bind", str(source), str(target))
    mount("-o", f"remount,bind,{access}", str(target))


def mount(*arguments: str) -> None:
    """Call mount(8)."""
    subprocess.run(["mount", *arguments], check=True)


if __name__ == "__main__":
    main()
