"""The pod of overlay cpu-demo, started by its own command, arguments, environment and mounts.

As a container runtime would: an unprivileged user without capabilities, a read-only root, and a network of its own. The
image's files are those of this installation, at the image's paths.
"""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.k8s.caller import TOKENS
from tests.k8s.manifests import REPOSITORY, Object, config_map, pods, server_config, server_of
from tests.k8s.sandbox import Sandbox

# What an image of Debian has; `/bin` and its like are links into /usr.
SYSTEM = ("/usr", "/sys", "/etc/passwd", "/etc/group", "/etc/hosts", "/etc/nsswitch.conf", "/etc/ld.so.cache")
PACKAGES = ("rudder", "server", "sae_models", "clients")
LINKS = ("bin", "sbin", "lib", "lib64")
UNITS = {"Mi": 1 << 20, "Gi": 1 << 30}
NAMESPACES = ("--mount", "--net", "--pid", "--ipc", "--uts", "--fork", "--kill-child")
TOOLS = ("unshare", "nsenter", "setpriv", "mount")
INSTALLED = "/opt/rudder"
CALLER_S = 400

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not all(map(shutil.which, TOOLS)), reason="needs root, and util-linux"
)


def sandbox_of(name: str, pod: Object, folder: Path) -> Sandbox:
    """Return what a container runtime would make of the server's container."""
    container = server_of(pod)
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    read_only, writable = dict(image()), {}
    for mount in container["volumeMounts"]:
        volume, path = volumes[mount["name"]], mount["mountPath"]
        if "configMap" in volume:
            assert mount["readOnly"]
            read_only[path] = str(mounted(folder / mount["name"], config_map(name, volume["configMap"]["name"])))
        else:
            writable[path] = size_of(volume["emptyDir"]["sizeLimit"])
    return {
        "root": str(made(folder / "root")),
        "read_only": read_only,
        "links": {f"/{link}": str(Path("/", link).readlink()) for link in LINKS if Path("/", link).is_symlink()},
        "writable": writable,
        "user": pod["securityContext"]["runAsUser"],
        "environment": environment_of(container),
        "command": [*container["command"], *container["args"]],
    }


def made(folder: Path) -> Path:
    """Return a new folder."""
    folder.mkdir(parents=True)
    return folder


def image() -> Iterator[tuple[str, str]]:
    """Yield the paths in the image with the files of this installation."""
    for path in SYSTEM:
        if Path(path).exists():
            yield path, path
    yield INSTALLED, sys.prefix
    # Scripts name the interpreter's place; the packages are in the repository, whose folder may be root's alone.
    for path in (sys.prefix, sys.base_prefix, *(str(REPOSITORY / name) for name in PACKAGES)):
        if not Path(path).is_relative_to("/usr"):
            yield path, path


def environment_of(container: Object) -> dict[str, str]:
    """Return the container's environment over that of the image."""
    image_environment = dict(re.findall(r"([A-Z]+)=(\S+)", dockerfile_environment()))
    image_environment["PATH"] = image_environment["PATH"].replace("$PATH", "/usr/local/bin:/usr/bin:/bin")
    own = {entry["name"]: entry.get("value") or from_field(container, entry) for entry in container["env"]}
    # The image has the packages in its site-packages; here they are in the repository.
    packages = f"{REPOSITORY}:{REPOSITORY / 'clients' / 'python'}"
    return image_environment | own | {"PYTHONPATH": packages}


def dockerfile_environment() -> str:
    """Return the last ENV of the Dockerfile: that of the image."""
    last: str = re.findall(r"^ENV (.*)$", (REPOSITORY / "k8s" / "Dockerfile").read_text(), re.MULTILINE)[-1]
    return last


def from_field(container: Object, entry: Object) -> str:
    """Return a variable that is a limit of the container, as whole cores."""
    resource = entry["valueFrom"]["resourceFieldRef"]["resource"]
    limit = container["resources"][resource.partition(".")[0]][resource.partition(".")[2]]
    return str(int(limit))


def size_of(limit: str) -> int:
    """Return the bytes of a quantity."""
    return int(limit[:-2]) * UNITS[limit[-2:]]


def mounted(folder: Path, files: dict[str, str]) -> Path:
    """Write the files of a ConfigMap as the kubelet does: links into a folder that is replaced as a whole."""
    data = made(folder / "..2026_11_27_12_00_00.1")
    (folder / "..data").symlink_to(data.name)
    for name, text in files.items():
        (data / name).write_text(text)
        (folder / name).symlink_to(f"..data/{name}")
    return folder


@contextmanager
def started(sandbox: Sandbox, folder: Path) -> Iterator[tuple["subprocess.Popen[bytes]", int]]:
    """Start a pod; yield the process that ends as it does, and the id of its first one. Kill what is left of it."""
    spec, log = folder / "sandbox.json", folder / "log"
    spec.write_text(json.dumps(sandbox))
    command = ["unshare", *NAMESPACES, sys.executable, str(REPOSITORY / "tests" / "k8s" / "sandbox.py"), str(spec)]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)
    try:
        yield process, first_process(process, log)
    finally:
        process.kill()
        process.wait()


def first_process(process: "subprocess.Popen[bytes]", log: Path) -> int:
    """Return the process of a new pid namespace, once it runs the pod's command."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 60
    while True:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        if pids := children.read_text().split():
            words = Path(f"/proc/{pids[0]}/cmdline").read_bytes().split(b"\0")
            if b"serve" in words and b"/usr/bin/setpriv" not in words:
                return int(pids[0])
        time.sleep(0.05)


def status_of(pid: int) -> dict[str, str]:
    """Return the fields of /proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def test_pod_becomes_ready_serves_and_lets_a_stream_end_when_it_is_told_to_stop(tmp_path: Path) -> None:
    ((_, pod),) = pods("cpu-demo")
    config = server_config("cpu-demo", pod, tmp_path)
    probes = [server_of(pod)[probe]["grpc"] for probe in ("readinessProbe", "livenessProbe")]
    sandbox = sandbox_of("cpu-demo", pod, tmp_path)
    hidden = [path for path in sandbox["writable"] if REPOSITORY.is_relative_to(path)]
    if hidden:
        pytest.skip(f"the pod's own {hidden[0]} would hide this repository, which stands for the image's packages")
    with started(sandbox, tmp_path) as (pod_process, pid):
        command = ["nsenter", f"--net=/proc/{pid}/ns/net", sys.executable, "-m", "tests.k8s.caller"]
        ports = [str(config.listen.port), str(probes[0]["port"]), *(probe["service"] for probe in probes)]
        environment = os.environ | {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'clients' / 'python'}"}
        caller = subprocess.Popen(
            [*command, *ports], stdout=subprocess.PIPE, text=True, env=environment, cwd=REPOSITORY
        )
        assert caller.stdout is not None
        assert caller.stdout.readline() == "streaming\n", (tmp_path / "log").read_text()[-6000:]
        assert_unprivileged(pid)
        os.kill(pid, signal.SIGTERM)
        seen = json.loads(caller.communicate(timeout=CALLER_S)[0])
        assert caller.returncode == 0
        log = (tmp_path / "log").read_text()
        assert seen["answer"]
        # The stream ended whole, and in its middle the pod said that it takes no more, and that it is alive.
        assert seen["tokens"] == TOKENS, log[-4000:]
        assert seen["drained"]["alive"] is True
        assert 0 < seen["drained"]["tokens"] < TOKENS
        assert pod_process.wait(60) == 0


def assert_unprivileged(pid: int) -> None:
    """Fail unless a process is of an unprivileged user, cannot become another, and cannot write its root."""
    status = status_of(pid)
    assert status["Uid"].split() == ["65532"] * 4
    assert {status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd")} == {"0" * 16}
    assert status["NoNewPrivs"] == "1"
    for folder in ("", "etc/rudder/", "opt/rudder/"):
        with pytest.raises(OSError, match="Read-only") as caught:
            Path(f"/proc/{pid}/root/{folder}written").touch()
        assert caught.value.errno == errno.EROFS
