"""The table of architectures and hook points is what the parity tests assert."""

from rudder.sae_models.hookpoints import POINTS
from tests.engine import architectures, models


def test_document_is_up_to_date() -> None:
    assert architectures.DOCUMENT.read_text() == architectures.document(), "run make architectures"


def test_every_refusal_names_a_hook_point_of_a_tested_architecture() -> None:
    tested = models.ARCHITECTURES | models.OTHERS
    assert len(tested) >= 16
    assert all(name in tested and set(refused) <= set(POINTS) for name, refused in models.REFUSED.items())
