// Inspect: the features of each token of a text.

import { call } from "/console/api.js";
import { field, fill, h, onSubmit, statusLine } from "/console/dom.js";
import { byPosition, colour, number, pooled, solid } from "/console/figures.js";
import { attestation, featureName, pinButton, tokenStrip } from "/console/parts.js";
import { noteAnswer, state } from "/console/state.js";

const MOST = 30;
let last = { text: "The telescope showed the moons of Jupiter. The economy grew, and prices rose.", chat: false };

/** Show the view. */
export function show(view) {
  const text = h("textarea", { id: "text", rows: 4, value: last.text, spellcheck: false });
  const chat = h("input", { type: "checkbox", id: "chat", checked: last.chat });
  const count = h("input", { type: "number", id: "top-k", min: 1, max: state.model?.limits.max_top_k ?? 8, value: 8 });
  const status = statusLine();
  const result = h("section", { class: "result", "aria-label": "Features of the text" });
  const form = h("form", { class: "ask" }, field("Text", text), h("div", { class: "row" },
    field("As a user's message", chat), field("Strongest per token", count), h("button", { type: "submit" }, "Inspect")), status.line);
  onSubmit(form, status, async () => {
    last = { text: text.value, chat: chat.checked };
    fill(result);
    if (!last.text) throw new Error("There is no text: write some.");
    status.say("The model reads the text…");
    await inspect(last, Number(count.value), result);
    status.say("");
  });
  fill(view, h("h2", {}, "Inspect"),
    h("p", { class: "lead" }, "Which features are active at each token? Choose features to colour the text; pin those to steer by."), form, result);
  if (state.model && !state.model.bundles.length) status.fail("This server has no SAE bundle: there are no features to see.");
}

async function inspect({ text, chat }, topK, result) {
  const prompt = chat ? { chat: { messages: [{ role: "user", content: text }] } } : { text };
  const features = state.pins.map(({ site, bundle, index }) => ({ site, row: { feature: { bundle, index } } }));
  const answer = await call("InferenceService/Inspect", { prompt, report: { top_k: topK, features } });
  noteAnswer({ what: "Inspect", attestation: answer.attestation });
  present(answer, result);
}

function present(answer, result) {
  const { features = [], token_texts: texts } = answer;
  const active = byPosition(answer.activations, texts.length);
  const ranked = pooled(active);
  const maxima = new Map(ranked.map(({ feature, max }) => [feature, max]));
  let chosen = ranked.slice(0, 3).map(({ feature }) => feature);
  const here = h("section", { class: "panel", id: "here", "aria-label": "The chosen token", "aria-live": "polite" });
  const { strip, select, paint } = tokenStrip(texts, (position) => { fill(here, atToken(position)); tint(); });
  const repaint = () => paint((i) => {
    const found = colour(active[i], chosen, maxima);
    return found && { ...found, name: features[found.feature]?.index };
  });
  let swatches = [];
  const tint = () => {
    swatches = swatches.filter(({ input }) => input.isConnected);
    for (const { feature, input } of swatches) {
      const hue = chosen.indexOf(feature);
      input.checked = hue >= 0;
      input.style.setProperty("accent-color", hue < 0 ? "auto" : solid(hue));
    }
    repaint();
  };
  const choose = (feature, on) => {
    chosen = on ? [...chosen, feature] : chosen.filter((other) => other !== feature);
    tint();
  };
  function line(feature, words) {
    const input = h("input", { type: "checkbox", "aria-label": `Colour feature ${features[feature].index}`, onchange: () => choose(feature, input.checked) });
    swatches.push({ feature, input });
    return h("li", {}, input, featureName(features[feature]), h("span", { class: "value" }, words), pinButton(features[feature]));
  }
  function rows() {
    return ranked.slice(0, MOST).map(({ feature, max, tokens }) => line(feature, `max ${number(max)} · ${tokens} tokens`));
  }
  function atToken(position) {
    const found = active[position];
    return [h("h3", {}, `Token ${position}: `, h("q", {}, texts[position])),
      found.length ? h("ol", { class: "features" }, found.map(({ feature, value }) => line(feature, number(value))))
        : h("p", { class: "empty" }, "No feature is reported here. Tokens that the bundle excludes, such as the first, are not read.")];
  }
  const list = h("ol", { class: "features", id: "pooled" });
  fill(list, rows());
  const whole = h("section", { class: "panel", "aria-label": "The whole text" }, h("h3", {}, "Strongest in the whole text"), h("p", { class: "quiet" }, "Click tokens, or move along them with the arrow keys."),
    ranked.length ? list : h("p", { class: "empty" }, "No feature is active in this text."));
  fill(result, strip, h("div", { class: "columns" }, whole, here), attestation(answer.attestation));
  select(ranked[0]?.at ?? 0);
}
