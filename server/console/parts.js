// Parts that views share: a token strip, a button that pins, an attestation in words.

import { h } from "/console/dom.js";
import { attestationWords, css, number } from "/console/figures.js";
import { isPinned, togglePin } from "/console/state.js";

/** A feature's name: index and label. */
export function featureName({ index, label, bundle }) {
  return h("span", { class: "feature", title: bundle }, h("b", {}, `#${index}`), " ", label || "without a label");
}

/** A button that pins a feature for the view Steer. */
export function pinButton(feature, changed = () => {}) {
  const button = h("button", { type: "button", class: "pin" });
  const show = () => {
    const pinned = isPinned(feature);
    button.textContent = pinned ? "Unpin" : "Pin";
    button.setAttribute("aria-pressed", String(pinned));
    button.setAttribute("aria-label", `${pinned ? "Unpin" : "Pin"} feature ${feature.index}`);
  };
  button.addEventListener("click", () => { togglePin(feature); show(); changed(); });
  show();
  return button;
}

/** What an attestation says, in words. */
export function attestation(message) {
  return h("ul", { class: "attestation", "aria-label": "What ran" },
    attestationWords(message).map(({ ok, text }) => h("li", { class: ok ? "" : "warn" }, ok ? "" : "⚠ ", text)));
}

const SEEN = { "\n": "⏎", "\t": "⇥" };

/** Return a token's text with its line breaks visible. */
function tokenText(text) {
  return text.replace(/[\n\t]/g, (c) => `${SEEN[c]}${c}`) || "∅";
}

/** Tokens in a row. Arrow keys move along them; `choose` is called with the position. `paint(colourOf)` colours them. */
export function tokenStrip(texts, choose) {
  const spans = texts.map((text, i) => h("span", { class: "token", role: "option", id: `token-${i}`, "aria-selected": "false" }, tokenText(text)));
  const strip = h("div", { class: "tokens", role: "listbox", tabIndex: 0, "aria-label": "Tokens" }, spans);
  let at = -1;
  const select = (position) => {
    if (position < 0 || position >= spans.length) return;
    spans[at]?.setAttribute("aria-selected", "false");
    at = position;
    spans[at].setAttribute("aria-selected", "true");
    strip.setAttribute("aria-activedescendant", spans[at].id);
    choose(at);
  };
  strip.addEventListener("click", (event) => select(spans.indexOf(event.target.closest(".token"))));
  strip.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: spans.length - 1 }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    select(Math.max(0, Math.min(spans.length - 1, step)));
    spans[at].scrollIntoView({ block: "nearest" });
  });
  const paint = (colourOf) => spans.forEach((span, i) => {
    const found = colourOf(i);
    span.style.setProperty("background-color", found ? css(found) : "transparent");
    span.title = found ? `#${found.name ?? ""} ${number(found.value)}` : "";
  });
  return { strip, select, paint };
}
