// Steer: pinned features, a topic or a program of the operator's; plain and steered side by side from one seed.

import { call, stream } from "/console/api.js";
import { field, fill, h, onSubmit, statusLine } from "/console/dom.js";
import { asCode, DOUBTFUL, expectation, FLUENT, generationRequest, MAX_DOSE, number, programOf, wordDifference } from "/console/figures.js";
import { attestation, featureName, pinButton } from "/console/parts.js";
import { changePin, noteAnswer, state } from "/console/state.js";

const last = { text: "The history of", chat: false, maxTokens: 60, temperature: 0.7, seed: 7, by: "features", topic: "", strength: 1, program: "" };
const PHASES = { PHASE_BOTH: "everywhere", PHASE_PROMPT: "in the prompt", PHASE_GENERATED: "in the answer" };
let running = null;

const option = (value, text, selected) => h("option", { value, selected }, text);

/** Show the view. */
export async function show(view) {
  const status = statusLine();
  const input = (type, name, rest = {}) => h("input", { type, id: `steer-${name}`, ...rest, [type === "checkbox" ? "checked" : "value"]: last[name],
    oninput: (event) => { last[name] = type === "checkbox" ? event.target.checked : type === "number" || type === "range" ? Number(event.target.value) : event.target.value; code.update(); } });
  const text = h("textarea", { id: "steer-text", rows: 3, value: last.text, oninput: () => { last.text = text.value; code.update(); } });
  const by = h("div", { id: "by" });
  const code = codePanel();
  const panes = ["Plain", "Steered"].map(pane);
  const stop = h("button", { type: "button", onclick: () => running?.abort() }, "Stop");
  const form = h("form", { class: "ask" }, field("Prompt", text), h("div", { class: "row" },
    field("As a user's message", input("checkbox", "chat")), field("Tokens", input("number", "maxTokens", { min: 1, max: 4096 })),
    field("Temperature", input("number", "temperature", { min: 0, max: 2, step: 0.1 })), field("Seed", input("number", "seed", { min: 0 })),
    h("button", { type: "submit" }, "Compare"), stop), by, status.line);
  onSubmit(form, status, () => compare(panes, status));
  fill(view, h("h2", {}, "Steer"), h("p", { class: "lead" }, "The same prompt and seed twice: as it is, and steered. Policies that bind you act on both."),
    form, h("div", { class: "columns" }, panes.map((p) => p.element)), code.element);
  await chooseBy(by, code, status);
}

async function chooseBy(by, code, status) {
  const programs = await call("ModelService/ListPrograms").then((answer) => answer.programs ?? []).catch((error) => { status.fail(error); return []; });
  const choice = h("select", { id: "steer-by", onchange: () => { last.by = choice.value; update(); } },
    option("features", "pinned features", last.by === "features"), option("topic", "a topic", last.by === "topic"),
    option("program", "a program of the operator's", last.by === "program"));
  const panel = h("div", {});
  function update() {
    fill(panel, { features: featurePanel, topic: topicPanel, program: () => programPanel(programs) }[last.by](code.update, update));
    code.update();
  }
  fill(by, field("Steer by", choice), panel);
  update();
}

function featurePanel(changed, redraw) {
  if (!state.pins.length) {
    return [h("p", { class: "empty" }, "No feature is pinned. Find some in ", h("a", { href: "#features" }, "Features"), " or ", h("a", { href: "#inspect" }, "Inspect"), " and pin them.")];
  }
  return [h("ul", { class: "sliders" }, state.pins.map((pin) => slider(pin, changed, redraw))),
    h("p", { class: "quiet" }, `Doses are norms of the displacement as a share of the residual stream's. Marked: up to ${FLUENT}, every concept calibrated for the shipped small model kept its text fluent; beyond ${DOUBTFUL}, none did. For another model it is a rule of thumb.`)];
}

function slider(pin, changed, redraw) {
  const name = `Dose of feature ${pin.index}`;
  const words = h("small", {});
  const range = h("input", { type: "range", min: -MAX_DOSE, max: MAX_DOSE, step: 0.01, value: pin.dose, "aria-label": name });
  const exact = h("input", { type: "number", min: -MAX_DOSE, max: MAX_DOSE, step: 0.01, value: pin.dose, "aria-label": `${name}, as a number` });
  const set = (value) => {
    changePin(pin, { dose: Number(value) });
    range.value = exact.value = pin.dose;
    const { kind, words: text } = expectation(pin.dose);
    words.className = kind;
    words.textContent = pin.dose ? text : "no effect";
    changed();
  };
  range.addEventListener("input", () => set(range.value));
  exact.addEventListener("change", () => set(exact.value));
  const phase = h("select", { "aria-label": `Where feature ${pin.index} is steered`, onchange: () => { changePin(pin, { phase: phase.value }); changed(); } },
    Object.entries(PHASES).map(([value, text]) => option(value, text, value === pin.phase)));
  set(pin.dose);
  return h("li", {}, featureName(pin), h("div", { class: "slider" }, h("span", { class: "track" }, range), exact, phase, pinButton(pin, redraw)), words);
}

function topicPanel(changed) {
  const topic = h("input", { id: "topic", value: last.topic, placeholder: "astronomy", oninput: () => { last.topic = topic.value; changed(); } });
  const shown = h("output", {}, number(last.strength));
  const strength = h("input", { type: "range", id: "strength", min: 0.05, max: 1, step: 0.05, value: last.strength,
    oninput: () => { last.strength = Number(strength.value); shown.textContent = number(last.strength); changed(); } });
  return [h("div", { class: "row" }, field("Topic", topic), field("Strength", h("span", {}, strength, shown), "calibrated: all of this range is fluent, 1 is its end"))];
}

function programPanel(programs) {
  return (changed) => {
    if (!programs.length) return [h("p", { class: "empty" }, "The operator has no programs here.")];
    const named = programs.filter((program) => !program.always);
    last.program ||= named[0]?.name ?? "";
    const about = h("p", { class: "quiet" });
    const choice = h("select", { id: "program", onchange: () => update() }, named.map(({ name }) => option(name, name, name === last.program)));
    const update = () => { last.program = choice.value; about.textContent = named.find(({ name }) => name === last.program)?.description ?? ""; changed(); };
    update();
    return [field("Program", choice), about];
  };
}

function steering() {
  if (last.by === "topic") return last.topic ? { topic: { topic: last.topic, strength: last.strength } } : null;
  if (last.by === "program") return last.program ? { program: last.program } : null;
  const program = programOf(state.pins);
  return program.sites.length ? { program } : null;
}

const request = (rudder) => generationRequest({ ...last, model: state.model?.model ?? "", rudder });

function pane(name) {
  const text = h("div", { class: "answer", id: name.toLowerCase(), "aria-label": `${name} answer`, role: "region", tabIndex: 0 });
  const below = h("div", { class: "below" });
  return { name, text, below, element: h("section", { class: "panel" }, h("h3", {}, name), text, below) };
}

async function compare(panes, status) {
  const rudder = steering();
  if (!rudder) throw new Error("Nothing steers: pin a feature and give it a dose, name a topic, or choose a program.");
  running = new AbortController();
  status.say("Both answers run…");
  const runs = await Promise.allSettled(panes.map((p, i) => generate(p, i ? rudder : null, running.signal)));
  const failed = runs.find((run) => run.status === "rejected");
  if (failed?.reason.name === "AbortError") { status.say("Stopped."); return; }
  if (failed) throw failed.reason;
  panes.forEach((p, i) => showDifference(p, runs[i].value, runs[1 - i].value));
  status.say(runs[0].value === runs[1].value ? "Both texts are the same." : "Underlined words are in one text alone.");
}

async function generate({ name, text, below }, rudder, signal) {
  const { path, body } = request(rudder);
  fill(text, h("span", { class: "empty" }, "…"));
  fill(below);
  let whole = "";
  let choiceEnd = {};
  try {
    await stream(path, { ...body, stream: true }, (event) => {
      for (const choice of event.choices) {
        whole += choice.delta?.content ?? choice.text ?? "";
        choiceEnd = { ...choiceEnd, ...choice.rudder };
      }
      fill(text, whole);
    }, { signal });
  } catch (error) {
    fill(below, h("p", { class: "status error" }, error.name === "AbortError" ? "Stopped: this is not the whole answer." : error.message));
    throw error;
  }
  noteAnswer({ what: name, text: whole, ...choiceEnd });
  fill(below, refusalWords(choiceEnd.refusal), attestation(choiceEnd.attestation));
  return whole;
}

function refusalWords(refusal) {
  return refusal ? h("p", { class: "status error" }, `Refused by policy ${refusal.policy}, rule ${refusal.rule}, at token ${refusal.position}: ${refusal.text}`) : null;
}

function showDifference({ text }, own, other) {
  if (own === other) return;
  fill(text, wordDifference(own, other).map(({ word, same }) => (same ? word : h("u", {}, word))));
}

function codePanel() {
  const kinds = { python: "Python", curl: "curl", yaml: "YAML policy" };
  let kind = "python";
  const code = h("pre", { id: "code", tabIndex: 0, "aria-label": "Code" });
  const update = () => { code.textContent = asCode(kind, request(steering()), location.origin, state.model?.bundles); };
  const said = h("span", { role: "status" });
  const copy = h("button", { type: "button", onclick: async () => {
    try { await navigator.clipboard.writeText(code.textContent); said.textContent = " copied"; } catch { getSelection().selectAllChildren(code); said.textContent = " selected: copy it with the keyboard"; }
  } }, "Copy");
  const choices = Object.entries(kinds).map(([value, name]) => h("button", { type: "button", "aria-pressed": String(value === kind), id: `as-${value}`, onclick: (event) => {
    kind = value;
    for (const button of event.target.parentNode.querySelectorAll("[aria-pressed]")) button.setAttribute("aria-pressed", String(button === event.target));
    update();
  } }, name));
  return { update, element: h("details", { class: "panel" }, h("summary", {}, "The steered request as code"), h("div", { class: "row" }, choices, copy, said), code) };
}
