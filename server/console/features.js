// Features: search by words, and everything that is known of one.

import { call } from "/console/api.js";
import { field, fill, h, onSubmit, statusLine, table } from "/console/dom.js";
import { css, number, percent } from "/console/figures.js";
import { featureName, pinButton } from "/console/parts.js";
import { state } from "/console/state.js";

const last = { query: "", bundle: "", meaning: false };

/** Show the view; `rest` of the address may name a feature, as bundle and index. */
export async function show(view, rest) {
  const status = statusLine();
  const query = h("input", { type: "search", id: "query", value: last.query, placeholder: "planets, enzyme, price … or an index" });
  const bundles = state.model?.bundles ?? [];
  last.bundle ||= bundles[0]?.name ?? "";
  const bundle = h("select", { id: "bundle" }, bundles.map(({ name }) => h("option", { value: name, selected: name === last.bundle }, name)));
  const meaning = h("input", { type: "checkbox", id: "meaning", checked: last.meaning });
  const found = h("section", { "aria-label": "Found features" }, h("p", { class: "empty" }, "Search for words of features' labels."));
  const detail = h("section", { id: "detail", "aria-label": "Feature", "aria-live": "polite" });
  const form = h("form", { class: "ask", role: "search" }, h("div", { class: "row" }, field("Words or index", query), field("Bundle", bundle),
    field("By meaning", meaning), h("button", { type: "submit" }, "Search")), status.line);
  const open = async (name, index) => {
    try { await showDetail(detail, name, index, open); status.say(""); } catch (error) { status.fail(error); }
  };
  onSubmit(form, status, async () => {
    Object.assign(last, { query: query.value.trim(), bundle: bundle.value, meaning: meaning.checked });
    if (/^\d+$/.test(last.query)) { await open(last.bundle, Number(last.query)); return; }
    const answer = await call("FeatureService/Search", { bundle: last.bundle, query: last.query, limit: 30, by_meaning: last.meaning });
    status.say("");
    list(found, answer.features ?? [], open);
  });
  fill(view, h("h2", {}, "Features"), h("p", { class: "lead" }, "What the SAE has learnt: search labels, look at examples, pin what to steer by."), form,
    h("div", { class: "columns wide" }, found, detail));
  if (state.model && !bundles.length) status.fail("This server has no SAE bundle.");
  const [name, index] = rest;
  if (index) await open(name, Number(index));
  else if (last.query) form.requestSubmit();
}

function list(found, features, open) {
  if (!features.length) { fill(found, h("p", { class: "empty" }, "No feature has these words in its label. Try others.")); return; }
  fill(found, table(`${features.length} features`, ["feature", "frequency", "label's score", "steer by it"], features.map((feature) => [
    h("button", { type: "button", class: "link", onclick: () => open(feature.bundle, feature.index) }, featureName(feature)),
    percent(feature.frequency), number(feature.label_score), pinButton(feature)])));
}

async function showDetail(detail, bundle, index, open) {
  const { feature } = await call("FeatureService/Get", { bundle, index });
  const { summary } = feature;
  const facts = [["active on", percent(summary.frequency)], ["largest activation", number(summary.max_activation)],
    ["label by", summary.label_origin || "nobody"], ["label's score", number(summary.label_score)],
    ["says what it promotes", number(summary.output_score)], ["site", summary.site]];
  fill(detail, h("h3", {}, featureName(summary), " ", pinButton(summary)),
    h("dl", {}, facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)))),
    quantiles(feature.quantiles ?? [], summary.max_activation), contexts(feature.contexts ?? [], summary.max_activation),
    h("div", { class: "columns" }, words("Makes more likely next", feature.promoted ?? []), words("Makes less likely next", feature.suppressed ?? [])),
    neighbours(feature.neighbours ?? [], bundle, open));
}

function contexts(found, most) {
  const line = ({ before, token, after, activation, source }) => {
    const mark = h("mark", {}, token);
    mark.style.setProperty("background-color", css({ hue: 0, share: Math.min(1, activation / (most || activation)) }));
    return h("li", { title: source }, h("span", { class: "value" }, number(activation)), " ", h("span", { class: "context" }, before, mark, after));
  };
  const part = (name, list) => (list.length ? [h("h4", {}, name), h("ul", { class: "contexts" }, list.map(line))] : []);
  if (!found.length) return h("p", { class: "empty" }, "The catalogue has no examples of it.");
  return h("div", {}, part("Strongest examples", found.filter((c) => !c.held_out)), part("Drawn from other text", found.filter((c) => c.held_out)));
}

function quantiles(found, most) {
  if (!found.length) return null;
  return h("div", {}, h("h4", {}, "How strong it is where it is active"), found.map(({ share, activation }) => {
    const bar = h("meter", { min: 0, max: most || activation || 1, value: activation, "aria-label": `${percent(share)} are below` });
    return h("div", { class: "quantile" }, h("span", {}, `${percent(share)} below`), bar, h("span", { class: "value" }, number(activation)));
  }));
}

function words(name, list) {
  return h("section", {}, h("h4", {}, name), list.length
    ? h("ul", { class: "words" }, list.map(({ token, logit }) => h("li", {}, h("q", {}, token), " ", h("span", { class: "value" }, number(logit)))))
    : h("p", { class: "empty" }, "Not measured."));
}

function neighbours(list, bundle, open) {
  if (!list.length) return null;
  return h("div", {}, h("h4", {}, "Nearest features"), h("ul", { class: "words" }, list.map(({ index, label, cosine }) => h("li", {},
    h("button", { type: "button", class: "link", onclick: () => open(bundle, index) }, featureName({ index, label, bundle })), " ", h("span", { class: "value" }, number(cosine))))));
}
