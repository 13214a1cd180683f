"""The bank's shape, and the key it gives to the engine's compile cache."""

import json

import pytest

from rudder.server.program.layout import Layout


def test_sites_stand_in_the_order_of_the_forward_pass() -> None:
    names = (
        "layers.10.resid_pre",
        "layers.2.resid_post",
        "layers.2.mlp_out",
        "layers.2.attn_out",
        "layers.2.resid_pre",
    )
    assert Layout(names).sites == (*reversed(names[1:]), names[0])


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"sites": ("layers.0.resid",)}, "sites"),
        ({"sites": ("layers.-1.resid_post",)}, "sites"),
        ({"sites": ("layers.0.resid_post ",)}, "sites"),
        ({"sites": ("layers.0.resid_post",) * 2}, "sites"),
        ({"rows": 0}, "rows"),
        ({"slots": 0}, "slots"),
        ({"stages": 0}, "stages"),
        ({"window": 0}, "window"),
        ({"sequence_sites": ("layers.1.resid_post",)}, "sequence_sites"),
    ],
)
def test_refusals_name_the_field(fields: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: "):
        Layout(**({"sites": ("layers.0.resid_post",)} | fields))  # type: ignore[arg-type]


def test_sequence_sites_default_to_all() -> None:
    sites = ("layers.0.resid_post", "layers.1.resid_post")
    assert all(Layout(sites).keeps_sequences(site) for site in sites)
    assert [Layout(sites, sequence_sites=sites[:1]).keeps_sequences(site) for site in sites] == [True, False]
    assert not Layout(sites, sequence_sites=()).keeps_sequences(sites[0])


LAYOUT = Layout(("layers.0.resid_post", "layers.1.mlp_out"), 8, 4, 2, 16, ("layers.1.mlp_out",), 100)


def test_additional_config_survives_json() -> None:
    config = json.loads(json.dumps(LAYOUT.additional_config("code")))
    assert Layout.from_additional_config(config) == LAYOUT


def test_every_field_and_the_code_change_the_additional_config() -> None:
    """A stale artifact would silently serve unsteered text."""
    others = (
        Layout(("layers.0.resid_post", "layers.2.mlp_out"), 8, 4, 2, 16, (), 100),
        Layout(LAYOUT.sites, 9, 4, 2, 16, LAYOUT.sequence_sites, 100),
        Layout(LAYOUT.sites, 8, 5, 2, 16, LAYOUT.sequence_sites, 100),
        Layout(LAYOUT.sites, 8, 4, 1, 16, LAYOUT.sequence_sites, 100),
        Layout(LAYOUT.sites, 8, 4, 2, 17, LAYOUT.sequence_sites, 100),
        Layout(LAYOUT.sites, 8, 4, 2, 16, None, 100),
        Layout(LAYOUT.sites, 8, 4, 2, 16, LAYOUT.sequence_sites, 101),
    )
    configs = [layout.additional_config("code") for layout in (LAYOUT, *others)]
    keys = {json.dumps(config) for config in (*configs, LAYOUT.additional_config("other code"))}
    assert len(keys) == 2 + len(others)
