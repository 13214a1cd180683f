"""docs/kubernetes.md names what exists: overlays, components, files, tests, figures."""

import re

from tests.k8s.manifests import K8S, OVERLAYS, REPOSITORY

TEXT = (REPOSITORY / "docs" / "kubernetes.md").read_text()


def first_cells(heading: str) -> set[str]:
    """Return the names in the first column of a table."""
    rows = TEXT.partition(f"| {heading} |")[2].partition("\n\n")[0]
    return {name for line in rows.splitlines()[2:] for name in re.findall(r"`([\w-]+)`", line.split("|")[1])}


def test_tables_list_all_overlays_and_components() -> None:
    assert first_cells("overlay") == set(OVERLAYS)
    folders = {folder.name for folder in (K8S / "components").iterdir()}
    listed = {name for line in component_rows() for name in re.findall(r"`([a-z-]+)`", line.split("|")[1])}
    assert listed == folders


def component_rows() -> list[str]:
    """Return the rows of the table of components."""
    return TEXT.partition("| component |")[2].partition("\n\n")[0].splitlines()[2:]


def test_tests_of_the_requirements_exist() -> None:
    file, found = "", 0
    for path, name in re.findall(r"`(?:((?:tests/[\w/]+/)?test_\w+\.py)(?:::)?)?(test_\w+)?`", TEXT):
        file = path or file
        if file:
            source = REPOSITORY / (file if "/" in file else f"tests/k8s/{file}")
            assert source.is_file(), source
            assert f"def {name}" in source.read_text(), (file, name)
            found += 1
    assert found > 20


def test_paths_exist() -> None:
    paths = set(re.findall(r"\bk8s/(?:overlays|components)/[\w-]+|k8s/Dockerfile", TEXT)) - {"k8s/overlays/mine"}
    assert len(paths) > 2
    assert all((REPOSITORY / path).exists() for path in paths)
