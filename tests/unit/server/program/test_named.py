"""Named programs are read from YAML files."""

from pathlib import Path

import pytest

from rudder.server.program.compile import compile_program
from rudder.server.program.named import ProgramFileError, load_programs
from tests.unit.programs import REGISTRY

GOOD = """
name: calm
sites:
  - site: layers.1.resid_post
    edits:
      - row: {feature: {index: 3}}
        clamp: -2
        unit: UNIT_RESIDUAL_NORM
"""


def test_programs_are_read_from_yaml(tmp_path: Path) -> None:
    (tmp_path / "calm.yaml").write_text(GOOD)
    (tmp_path / "notes.txt").write_text("not a program")
    programs = load_programs(tmp_path)
    assert list(programs) == ["calm"]
    assert compile_program(programs["calm"], REGISTRY).edits[0].operation == "clamp -2 residual norms"


BAD = {
    "unknown key": (GOOD + "gates: {}\n", "gates"),
    "unknown enum": (GOOD.replace("UNIT_RESIDUAL_NORM", "UNIT_MILES"), "unit"),
    "wrong type": (GOOD.replace("-2", "much"), "clamp"),
    "no name": (GOOD.replace("name: calm\n", ""), "name"),
    "bad yaml": ("sites: [", "line 1"),
    "no mapping": ("- 1", "mapping"),
    "object": ("!!python/object/apply:os.getcwd []", "python/object"),
}


@pytest.mark.parametrize("case", BAD)
def test_invalid_file_is_named_with_the_field(tmp_path: Path, case: str) -> None:
    text, word = BAD[case]
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ProgramFileError, match=word) as caught:
        load_programs(tmp_path)
    assert "bad.yaml" in str(caught.value)


def test_duplicate_name_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text(GOOD)
    with pytest.raises(ProgramFileError, match=r"b\.yaml: name: 'calm'"):
        load_programs(tmp_path)
