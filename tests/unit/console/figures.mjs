// Tests of server/console/figures.js for Node: `node --test figures.mjs`, with its path in FIGURES.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import test from "node:test";

const source = readFileSync(process.env.FIGURES, "utf8");
const figures = await import(`data:text/javascript,${encodeURIComponent(source)}`);

const COLUMNS = { positions: [0, 1, 1, 2, 9], features: [0, 0, 1, 1, 0], activations: [1, 4, 2, 0, 5] };

test("columns become the active features of each position, strongest first", () => {
  assert.deepEqual(figures.byPosition(COLUMNS, 3), [
    [{ feature: 0, value: 1 }], [{ feature: 0, value: 4 }, { feature: 1, value: 2 }], []]);
  assert.deepEqual(figures.byPosition(undefined, 1), [[]]);
  assert.deepEqual(figures.pooled(figures.byPosition(COLUMNS, 3)), [
    { feature: 0, max: 4, tokens: 2, at: 1 }, { feature: 1, max: 2, tokens: 1, at: 1 }]);
});

test("a token has the colour of the chosen feature that is nearest to its maximum", () => {
  const active = [{ feature: 0, value: 4 }, { feature: 1, value: 2 }];
  const maxima = new Map([[0, 8], [1, 2]]);
  assert.equal(figures.colour(active, [0, 1], maxima).feature, 1);
  assert.equal(figures.colour(active, [0], maxima).share, 0.5);
  assert.equal(figures.colour(active, [7], maxima), null);
});

test("an attestation says what did not run", () => {
  const edit = { origin: "request", site: "s", row: "r", operation: "add 1", tokens_touched: 0, tokens_rejected: 0 };
  const words = (attestation) => figures.attestationWords(attestation).filter(({ ok }) => !ok).map(({ text }) => text);
  assert.match(words({ edits: [edit], tokens_seen: 5 })[0], /did NOT run: 0 of 5 tokens/);
  assert.deepEqual(words({ edits: [{ ...edit, tokens_touched: 3 }], tokens_seen: 5 }), []);
  assert.match(words(undefined)[0], /no attestation/);
  const held = { name: "p", version: "1", verdicts: [{ rule: "long", position: 7 }] };
  assert.match(words({ policies: [held], tokens_seen: 5 })[0], /rule long held at token 7/);
  assert.match(figures.attestationWords({ tokens_seen: 5 })[0].text, /edited nothing/);
});

test("a dose is fluent, doubtful or beyond", () => {
  const kinds = [0.15, -0.15, 0.2, -0.27, 0.3].map((dose) => figures.expectation(dose).kind);
  assert.deepEqual(kinds, ["fluent", "fluent", "doubtful", "doubtful", "beyond"]);
});

test("pins without a dose are no edits, and each site has its own", () => {
  const pin = { bundle: "b", site: "s", index: 3, dose: 0.1, phase: "PHASE_GENERATED" };
  const { sites } = figures.programOf([pin, { ...pin, site: "t", phase: "PHASE_BOTH" }, { ...pin, index: 4, dose: 0 }]);
  assert.deepEqual(sites.map(({ site, edits }) => [site, edits.length, edits[0].phase]), [["s", 1, "PHASE_GENERATED"], ["t", 1, undefined]]);
  assert.deepEqual(figures.programOf([]).sites, []);
});

test("words that one text alone has are told", () => {
  const marked = figures.wordDifference("the old moon rose", "the moon rose late").filter(({ same }) => !same);
  assert.deepEqual(marked.map(({ word }) => word.trim()), ["old"]);
});

test("code quotes what a prompt holds", () => {
  const request = figures.generationRequest({ model: "m", chat: true, text: `it's "x"\n$(rm)`, maxTokens: 3, temperature: 0, seed: 1, rudder: { program: { name: "p", sites: [] } } });
  assert.equal(request.path, "/v1/chat/completions");
  const curl = figures.asCode("curl", request, "http://h");
  assert.ok(curl.includes(String.raw`it'\''s \"x\"\n$(rm)`));
  assert.ok(figures.asCode("python", request, "http://h").includes("client.chat.completions.create("));
  assert.match(figures.asCode("yaml", request, "http://h", [{ name: "b", sha256: "ab" }]), /bundles: \{"b":"ab"\}/);
  assert.match(figures.asCode("yaml", { path: "", body: { rudder: { program: "named" } } }, ""), /^# /);
});
