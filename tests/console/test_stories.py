"""The console in headless Chromium against a real server: each story ends with the page and with the server's record.

Pictures are written into build/console.
"""

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format

from rudder.server.identity import tokens
from rudder.server.identity.tokens import TokenFile
from rudder.v1 import policy_pb2
from rudder_client import Client
from tests.console.browser import CHROMIUM, Page, browser
from tests.e2e.conftest import Running, running

pytestmark = [
    pytest.mark.long,
    pytest.mark.e2e,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium"),
]
PICTURES = Path(__file__).parents[2] / "build" / "console"
SITE = "layers.2.resid_post"
ROLES = ("generate", "steer", "raw", "observe", "operate", "administer")
SKY = "The telescope showed the moons of Jupiter. Banks lend money, and prices rose."
HOSTILE = '<img src=x onerror="document.title=1"><script>document.title=2</script> \u202edesrever\u202c ' + "x" * 400


@dataclass(frozen=True)
class Console:
    """A server that asks for tokens, and the token of somebody who may do everything."""

    server: Running
    token: str

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.http_port}/console/"

    def calls(self, method: str) -> float:
        return self.server.metric("rudder_requests_total", method=method, outcome="OK")

    def record(self, request_id: str) -> dict[str, str]:
        """Return the fields of a call's line in the server's log."""
        line = self.server.log_line(rf"call ended .*request_id={request_id}")
        return dict(re.findall(r"(\w+)=(\S+)", line))


@pytest.fixture(scope="module")
def console(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Console]:
    folder = tmp_path_factory.mktemp("console")
    token, entry = tokens.create("operator", ROLES)
    (folder / "tokens.yaml").write_bytes(tokens.write(TokenFile((entry,))))
    with running(folder, **{"identity.tokens": str(folder / "tokens.yaml")}) as server:
        yield Console(server, token)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    PICTURES.mkdir(parents=True, exist_ok=True)
    with browser(tmp_path_factory.mktemp("chromium")) as page:
        yield page


@pytest.fixture
def page(console: Console, chromium: Page) -> Iterator[Page]:
    """The console with its token and without pins. An error on the browser's console fails the test."""
    chromium.open(console.url)
    chromium.evaluate("sessionStorage.clear()")
    chromium.open(console.url)
    chromium.write("#token", console.token)
    chromium.wait("document.querySelector('#server').textContent.includes('textbook')")
    chromium.problems.clear()
    yield chromium
    assert chromium.problems == []
    console.server.wait_idle()


def inspect(page: Page, text: str) -> None:
    page.show("inspect")
    page.write("#text", text)
    page.click("form.ask button[type=submit]")
    page.wait("document.querySelector('.tokens')")


def request_id(page: Page, selector: str) -> str:
    """Return the id of the request that an attestation on the page names."""
    found = re.search(r"Request ([0-9a-f]{24})", page.text(f"{selector} .attestation"))
    assert found
    return found[1]


def test_the_page_asks_for_a_token_that_the_server_asks_for(console: Console, chromium: Page) -> None:
    chromium.open(console.url)
    assert "asks for a valid token" in chromium.text("#server")
    chromium.write("#token", "rudder.x.y")
    assert "asks for a valid token" in chromium.text("#server")
    chromium.write("#token", console.token)
    chromium.wait("document.querySelector('#server').textContent.includes('textbook')")
    assert console.server.metric("rudder_requests_total", method="ModelService.Get", outcome="UNAUTHENTICATED") >= 2
    assert not [problem for problem in chromium.problems if "401" not in problem]


def test_inspect_shows_the_features_of_each_token(page: Page, console: Console) -> None:
    before = console.calls("InferenceService.Inspect")
    inspect(page, SKY)
    shown = page.evaluate("[...document.querySelectorAll('.token')].map((t) => t.textContent)")
    with Client(console.server.address, token=console.token) as client:
        expected = [token.text for token in client.tokenize(SKY)]
    assert shown == expected
    assert (
        page.evaluate(
            "[...document.querySelectorAll('.token')].filter((t) => t.style.backgroundColor.includes('rgb')).length"
        )
        > 3
    )
    page.evaluate("document.querySelector('.tokens').focus()")
    page.press("End")
    page.press("ArrowLeft")
    assert f"Token {len(shown) - 2}:" in page.text("#here h3")
    assert "did NOT run" not in page.text(".attestation")
    page.click("#pooled button.pin")
    pins = json.loads(page.evaluate("sessionStorage.getItem('rudder.pins')"))
    assert len(pins) == 1
    record = console.record(request_id(page, ".result"))
    assert (record["method"], record["outcome"], record["caller"]) == ("InferenceService.Inspect", "OK", "operator")
    assert console.calls("InferenceService.Inspect") == before + 1
    page.evaluate("window.scrollTo(0, 0)")
    page.picture(PICTURES / "inspect.png")


def test_steer_compares_two_answers_and_says_what_ran(page: Page, console: Console) -> None:
    inspect(page, SKY)
    page.click("#pooled button.pin")
    page.show("steer")
    page.write("#steer-text", "The history of")
    page.write(".slider input[type=number]", "0.25")
    assert "calibrated concepts already spoilt" in page.text(".sliders")
    page.click("form.ask button[type=submit]")
    page.wait("document.querySelectorAll('.below .attestation').length === 2")
    page.wait("!document.querySelector('form.ask button[type=submit]').disabled")
    plain, steered = page.text("#plain"), page.text("#steered")
    assert plain != steered
    assert page.evaluate("document.querySelectorAll('#steered u').length") > 0
    first, second = page.evaluate("[...document.querySelectorAll('.below')].map((e) => e.textContent)")
    assert "not steered" in first
    touched = re.search(r"touched (\d+) of (\d+) tokens", second)
    assert touched
    ids = [re.search(r"Request ([0-9a-f]{24})", words) for words in (first, second)]
    records = [console.record(found[1]) for found in ids if found]
    assert [record["edited_tokens"] for record in records] == ["0", touched[1]]
    digest = re.search(r"program ([0-9a-f]{16})", second)
    assert digest
    assert records[1]["program"].startswith(digest[1])
    page.evaluate("document.querySelector('details').open = true")
    assert "extra_body" in page.text("#code")
    page.click("#as-yaml")
    require_valid_policy(page.text("#code"), console)
    page.evaluate("window.scrollTo(0, 0)")
    page.picture(PICTURES / "steer.png")


def require_valid_policy(text: str, console: Console) -> None:
    """The server finds no problem in the policy that the page wrote."""
    import yaml

    policy = json_format.ParseDict(yaml.safe_load(text), policy_pb2.Policy())
    with Client(console.server.address, token=console.token) as client:
        assert [problem for problem in client.validate(policy) if problem.field != "certificate"] == []


def test_steer_by_a_topic_and_by_a_program(page: Page, console: Console) -> None:
    page.show("steer")
    page.click("form.ask button[type=submit]")
    page.wait("document.querySelector('.status.error')?.textContent.includes('Nothing steers')")
    choose(page, "#steer-by", "topic")
    page.write("#topic", "astronomy")
    page.click("form.ask button[type=submit]")
    page.wait("document.querySelectorAll('.below .attestation').length === 2")
    assert "Topic astronomy: strength 1" in page.text(".columns .panel:nth-child(2) .attestation")
    choose(page, "#steer-by", "program")
    choose(page, "#program", "less-history")
    page.click("form.ask button[type=submit]")
    page.wait("document.querySelectorAll('.below .attestation').length === 2")
    words = page.text(".columns .panel:nth-child(2) .attestation")
    record = console.record(str(re.search(r"Request ([0-9a-f]{24})", words)[1]))  # type: ignore[index]
    assert record["outcome"] == "OK"


def choose(page: Page, selector: str, value: str) -> None:
    """Choose an option of a list."""
    page.wait(f"document.querySelector({json.dumps(selector)})")
    element = f"document.querySelector({json.dumps(selector)})"
    page.evaluate(f"{element}.value = {json.dumps(value)}; {element}.dispatchEvent(new Event('change'))")


def test_features_are_found_read_and_pinned(page: Page, console: Console) -> None:
    before = console.calls("FeatureService.Search"), console.calls("FeatureService.Get")
    page.show("features")
    page.write("#query", "planets")
    page.click("form.ask button[type=submit]")
    page.click("table button.link")
    page.wait("document.querySelector('#detail .contexts')")
    with Client(console.server.address, token=console.token) as client:
        bundle = client.model().bundles[0].name
        found = client.search("planets", bundle=bundle, limit=1)[0]
    assert page.text("#detail h3").startswith(f"#{found.index} {found.label}")
    assert page.evaluate("document.querySelectorAll('#detail mark').length") > 2
    page.click("#detail h3 button.pin")
    assert json.loads(page.evaluate("sessionStorage.getItem('rudder.pins')"))[0]["index"] == found.index
    assert console.calls("FeatureService.Search") == before[0] + 2
    assert console.calls("FeatureService.Get") == before[1] + 1
    page.picture(PICTURES / "features.png")
    page.write("#query", "zzzzzz")
    page.click("form.ask button[type=submit]")
    page.wait("document.querySelector('.columns').textContent.includes('No feature has these words')")


@pytest.fixture
def guarded(console: Console) -> Iterator[policy_pb2.Policy]:
    """A policy that stops every answer, with a name and text that are no markup."""
    score = {"terms": [{"site": SITE, "row": {"probe": {"weights": [1.0] * 192}}, "weight": 1}]}
    guard: dict[str, Any] = {
        "name": "long<b>", "score": score, "level": -1e6, "min_tokens": 6, "action": "GUARD_ACTION_STOP",
        "refusal": "<i>Not this.</i>",
    }  # fmt: skip
    with Client(console.server.address, token=console.token) as client:
        bundles = {bundle.name: bundle.sha256 for bundle in client.model().bundles}
        document = {
            "name": "guard",
            "version": 1,
            "description": "<u>stops</u> " + "w" * 10_000,
            "binds": {"all": True},
            "bundles": bundles,
            "guards": [guard],
        }
        policy = json_format.ParseDict(document, policy_pb2.Policy())
        client.apply(policy)
        yield policy
        client.apply(policy_pb2.Policy(name="guard", version=2))


@pytest.mark.usefixtures("guarded")
def test_safety_shows_policies_and_what_they_did(page: Page, console: Console) -> None:
    page.show("steer")
    choose(page, "#steer-by", "topic")
    page.write("#topic", "astronomy")
    page.click("form.ask button[type=submit]")
    page.wait("document.querySelectorAll('.below .attestation').length === 2")
    assert "Refused by policy guard, rule long<b>" in page.text(".below .error")
    refused = request_id(page, ".below")
    page.show("safety")
    assert "long<b>" in page.text("table")
    assert "<u>stops</u>" in page.text("table")
    assert "Policy 'guard', version 1, binds this caller." in page.text("#statements")
    answers = page.text(".answers")
    assert "refused by policy guard, rule long<b>" in answers
    assert refused in answers
    record = console.record(refused)
    assert (record["outcome"], "guard@1" in record["policies"]) == ("POLICY_REFUSED", True)
    assert console.server.metric("rudder_guard_verdicts_total", policy="guard", rule="long<b>") >= 2
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.picture(PICTURES / "safety.png")


def test_live_and_saes(page: Page, console: Console) -> None:
    page.show("saes")
    assert "textbook-lm-layers.2" in page.text("table")
    page.show("live")
    page.wait("document.querySelectorAll('.gauge').length >= 4")
    assert "#7" in page.text("#figures table")
    with Client(console.server.address, token=console.token) as client:
        client.complete("The cell", max_tokens=8)
    tokens_seen = console.server.metric("rudder_feature_tokens_total", feature="7")
    shown = page.evaluate(f"({tokens_seen}).toLocaleString('en')")
    page.wait(f"document.querySelector('#figures tbody td:nth-child(3)').textContent === '{shown}'")
    page.picture(PICTURES / "live.png")
    page.show("saes")
    console.server.log_line(r"call ended .*method=Live.Watch")


def test_hostile_text_is_shown_as_text(page: Page) -> None:
    inspect(page, HOSTILE)
    assert page.evaluate("document.querySelectorAll('main img, main script').length") == 0
    text = page.text(".tokens")
    assert "<script>document.title=2</script>" in text
    assert "\u202e" not in text
    assert page.evaluate("document.title") == "Inspect · Rudder"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_names_and_labels_for_those_who_hear_the_page(page: Page) -> None:
    """Every control has a name, in each view and both schemes."""
    for view in ("inspect", "steer", "features", "safety", "live", "saes"):
        page.show(view)
        tree = page.send("Accessibility.getFullAXTree")["nodes"]
        roles = {"button", "textbox", "combobox", "slider", "checkbox", "spinbutton", "link", "searchbox"}
        controls = [node for node in tree if node.get("role", {}).get("value") in roles and not node["ignored"]]
        assert controls
        assert [node for node in controls if not node.get("name", {}).get("value")] == [], view


def test_a_server_that_is_away_is_said_and_a_retry_works(page: Page) -> None:
    page.show("inspect")
    page.write("#text", SKY)
    offline = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    page.send("Network.emulateNetworkConditions", offline=True, **offline)
    page.click("form.ask button[type=submit]")
    page.wait("document.querySelector('.status.error')?.textContent.includes('does not answer')")
    page.send("Network.emulateNetworkConditions", offline=False, **offline)
    assert any("ERR_INTERNET_DISCONNECTED" in problem for problem in page.problems)
    page.problems.clear()
    page.click("form.ask button[type=submit]")
    page.wait("document.querySelector('.tokens')")
    assert page.evaluate("document.querySelectorAll('.status.error').length") == 0


def test_many_tokens(page: Page) -> None:
    """Prints how long the page takes to colour and to draw a text as long as the model reads."""
    inspect(page, " ".join(["The moons of Jupiter are small."] * 60))
    count = page.evaluate("document.querySelectorAll('.token').length")
    toggle = "document.querySelector('#pooled input').click(); document.body.offsetHeight"
    took = page.evaluate(
        f"(() => {{ const begun = performance.now(); {toggle}; return performance.now() - begun; }})()"
    )
    assert count > 300
    print(f"{count} tokens coloured and laid out in {took:.0f} ms at {time.strftime('%H:%M')}")
