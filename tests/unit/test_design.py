"""docs/design.md names folders and files that exist, and every package of the source tree."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DESIGN = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
PATH = re.compile(r"`((?:server|sae_models|tests|proto|clients)/[\w./]*)`")


def test_paths_in_the_design_exist() -> None:
    paths = set(PATH.findall(DESIGN))
    assert len(paths) > 30
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


def test_the_design_lists_every_package() -> None:
    packages = [path.parent for tree in ("server", "sae_models") for path in (ROOT / tree).rglob("__init__.py")]
    folders = DESIGN.partition("## Folders")[2].partition("## ")[0]
    names = {path.name for path in packages if path not in (ROOT / "server", ROOT / "sae_models")}
    assert len(names) > 15
    assert [name for name in sorted(names) if f"{name}/" not in folders] == []


def test_the_design_lists_every_file_above_the_packages() -> None:
    folders = DESIGN.partition("## Folders")[2].partition("## ")[0]
    files = [path.name for tree in ("server", "sae_models") for path in (ROOT / tree).glob("[a-z]*.py")]
    assert [name for name in sorted(files) if name not in folders] == []
