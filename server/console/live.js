// Live: load and watched features, from the server's stream of figures.

import { stream } from "/console/api.js";
import { fill, h, statusLine, table } from "/console/dom.js";
import { number, percent } from "/console/figures.js";

const RETRY_MS = 3000;
const KEPT = 120;

/** Show the view, until the signal says that another is shown. */
export async function show(view, _, signal) {
  const status = statusLine();
  const figures = h("section", { id: "figures", "aria-label": "Figures", class: "result" });
  fill(view, h("h2", {}, "Live"), h("p", { class: "lead" }, "What the server is doing, second by second, over all callers."), status.line, figures);
  const history = [];
  watch(figures, history, status, signal);
}

async function watch(figures, history, status, signal) {
  while (!signal.aborted) {
    try {
      status.say("Connected.");
      await stream("/rudder.v1.Live/Watch", {}, (event) => {
        history.push(event);
        if (history.length > KEPT) history.shift();
        if (!signal.aborted) present(figures, history);
      }, { signal, endless: true });
    } catch (error) {
      if (error.name === "AbortError") return;
      status.fail(error);
    }
    await new Promise((resolve) => { setTimeout(resolve, RETRY_MS); });
  }
}

function gauge(name, value, most, unit = "") {
  return h("div", { class: "gauge" }, h("span", {}, name), h("meter", { min: 0, max: most || 1, high: 0.8 * most, optimum: 0, value, "aria-label": name }),
    h("span", { class: "value" }, `${number(value)} of ${number(most)}${unit}`));
}

/** Return rates of a feature over the kept seconds: the share of tokens on which it was active; null without tokens. */
function rate(history, i) {
  const [first, last] = [history[0].features[i], history.at(-1).features[i]];
  const tokens = last.tokens - (first?.tokens ?? 0);
  return tokens > 0 ? (last.active_tokens - (first?.active_tokens ?? 0)) / tokens : null;
}

function present(figures, history) {
  const now = history.at(-1);
  const calls = Object.entries(now.calls).map(([outcome, count]) => [outcome, number(count)]);
  const features = now.features.map((feature, i) => [h("span", {}, h("b", {}, `#${feature.index}`), " ", feature.label || "without a label"),
    percent(rate(history, i) ?? undefined).replace("not measured", "no tokens"), number(feature.tokens), percent(feature.tokens ? feature.active_tokens / feature.tokens : undefined), number(feature.max)]);
  fill(figures, now.draining ? h("p", { class: "status error" }, "The server is shutting down.") : null,
    h("div", { class: "gauges" }, gauge("Running choices", now.running, now.max_running), gauge("Waiting choices", now.waiting, now.queue),
      now.slots ? gauge("Slots of programs", now.slots.used, now.slots.used + now.slots.free) : null,
      now.rows.map(({ site, used, free }) => gauge(`Rows at ${site}`, used, used + free)),
      gauge("Pending requests", now.pending_bytes / 1e6, now.max_pending_bytes / 1e6, " MB")),
    h("h3", {}, "Watched features"),
    features.length ? table("Over all calls", ["feature", `active, last ${history.length} s`, "tokens", "active, in all", "largest"], features)
      : h("p", { class: "empty" }, "No feature is watched: name some in `watch` of the server's configuration."),
    h("h3", {}, "Calls that ended"), calls.length ? table("Since the start", ["outcome", "calls"], calls) : h("p", { class: "empty" }, "None yet."));
}
