// From the API's answers to what is shown: pure functions, without a document.

// Hues that colour-blind people tell apart (Okabe and Ito, 2008), as red, green, blue.
export const HUES = [[0, 114, 178], [230, 159, 0], [0, 158, 115], [204, 121, 167], [86, 180, 233], [213, 94, 0]];
// Doses, in norms of the residual stream: the least and largest s_max of the concepts that ship calibrated.
export const FLUENT = 0.15;
export const DOUBTFUL = 0.27;
export const MAX_DOSE = 0.6;

/** Return a number as text: a whole one as it is, another to three significant digits. */
export function number(value) {
  if (value === undefined || value === null || Number.isNaN(Number(value))) return "not measured";
  const rounding = Number.isInteger(Number(value)) ? {} : { maximumSignificantDigits: 3 };
  return Number(value).toLocaleString("en", rounding);
}

/** Return a share as per cent. */
export function percent(share) {
  return share === undefined || share === null ? "not measured" : `${number(100 * share)} %`;
}

/** Return the active features of each position, strongest first: an array over positions of `{feature, value}`. */
export function byPosition(columns, length) {
  const result = Array.from({ length }, () => []);
  const { positions = [], features = [], activations = [] } = columns ?? {};
  positions.forEach((position, i) => {
    if (activations[i] > 0) result[position]?.push({ feature: features[i], value: activations[i] });
  });
  for (const active of result) active.sort((a, b) => b.value - a.value);
  return result;
}

/** Return the features of a text by their largest activation: `{feature, max, tokens, at}`. */
export function pooled(active) {
  const found = new Map();
  active.forEach((list, at) => {
    for (const { feature, value } of list) {
      const entry = found.get(feature) ?? { feature, max: 0, tokens: 0, at };
      entry.tokens += 1;
      if (value > entry.max) { entry.max = value; entry.at = at; }
      found.set(feature, entry);
    }
  });
  return [...found.values()].sort((a, b) => b.max - a.max);
}

/** Return the colour of a token for chosen features: `{hue, share}` of the one nearest to its maximum; null if none is active. */
export function colour(active, chosen, maxima) {
  let best = null;
  for (const { feature, value } of active) {
    const hue = chosen.indexOf(feature);
    if (hue < 0) continue;
    const share = Math.min(1, value / (maxima.get(feature) || value));
    if (!best || share > best.share) best = { hue: hue % HUES.length, share, feature, value };
  }
  return best;
}

/** Return CSS for a colour; faint activations stay visible. */
export function css({ hue, share }) {
  const [red, green, blue] = HUES[hue];
  return `rgb(${red} ${green} ${blue} / ${(0.12 + 0.48 * share).toFixed(3)})`;
}

/** Return CSS for a chosen feature itself. */
export function solid(hue) {
  return `rgb(${HUES[hue % HUES.length].join(" ")})`;
}

/** Return a program that adds pinned features, each by its dose in norms of the residual stream. */
export function programOf(pins) {
  const sites = new Map();
  for (const pin of pins) {
    if (!pin.dose) continue;
    const edit = { row: { feature: { bundle: pin.bundle, index: pin.index } }, add: pin.dose, unit: "UNIT_RESIDUAL_NORM" };
    if (pin.phase && pin.phase !== "PHASE_BOTH") edit.phase = pin.phase;
    sites.set(pin.site, [...(sites.get(pin.site) ?? []), edit]);
  }
  return { name: "console", sites: [...sites].map(([site, edits]) => ({ site, edits })) };
}

const fluency = (dose) => (Math.abs(dose) <= FLUENT ? "fluent" : Math.abs(dose) <= DOUBTFUL ? "doubtful" : "beyond");
const FLUENCY = {
  fluent: "within the dose at which every concept calibrated for the shipped model kept its text fluent",
  doubtful: "where some calibrated concepts already spoilt their text",
  beyond: "beyond the dose at which any calibrated concept kept its text fluent: expect repetition",
};

/** Return what to expect of a dose: its class, and words. It is a rule of thumb, as the feature itself is not calibrated. */
export function expectation(dose) {
  return { kind: fluency(dose), words: FLUENCY[fluency(dose)] };
}

function editWords(edit, seen) {
  const who = edit.origin === "policy" ? `Policy ${edit.policy}` : "This request";
  const what = `${who}: ${edit.operation} on ${edit.row} at ${edit.site}`;
  const lost = edit.tokens_rejected ? `; rejected at ${edit.tokens_rejected}` : "";
  if (!edit.tokens_touched) return { ok: false, text: `${what} did NOT run: 0 of ${seen} tokens touched${lost}.` };
  return { ok: true, text: `${what} touched ${edit.tokens_touched} of ${seen} tokens${lost}.` };
}

function policyWords(policy) {
  const mode = policy.shadow ? "in shadow: it counted and changed nothing" : "in force";
  const verdicts = policy.verdicts ?? [];
  const held = verdicts.map((v) => `rule ${v.rule} held at token ${v.position}${v.score === undefined ? "" : ` (${number(v.score)})`}`);
  return { ok: !verdicts.length, text: `Policy ${policy.name}, version ${policy.version}, ${mode}; ${held.join(", ") || "no guard held"}.` };
}

/** Return what an attestation says, in sentences `{ok, text}`; what did not run is not ok. */
export function attestationWords(attestation) {
  if (!attestation) return [{ ok: false, text: "There is no attestation: nothing says what ran." }];
  const { edits = [], gates = [], policies = [], tokens_seen: seen = 0, program_digest: digest } = attestation;
  const lines = edits.map((edit) => editWords(edit, seen));
  if (!edits.some((edit) => edit.origin === "request")) {
    lines.unshift({ ok: true, text: "This request edited nothing: the answer is not steered by it." });
  }
  for (const gate of gates) {
    lines.push({ ok: gate.open_tokens > 0, text: `Gate of ${gate.policy ? `policy ${gate.policy}` : "this request"} at ${gate.site} was open at ${gate.open_tokens} of ${seen} tokens.` });
  }
  if (attestation.topic) {
    const topic = attestation.topic;
    lines.push({ ok: true, text: `Topic ${topic.concept}: strength ${number(topic.strength)} of the largest fluent dose, ${number(topic.dose)} residual norms.` });
  }
  lines.push(...policies.map(policyWords));
  if (!policies.length) lines.push({ ok: true, text: "No policy bound this call." });
  lines.push({ ok: true, text: `Request ${attestation.request_id}${digest ? `, program ${digest.slice(0, 16)}` : ""}, ${seen} tokens seen.` });
  return lines;
}

/** Return the words of a text, each with whether the other text has it too (longest common subsequence). */
export function wordDifference(text, other) {
  const words = text.split(/(?<=\s)/);
  const others = other.split(/(?<=\s)/).map((word) => word.trim());
  if (words.length * others.length > 1e6) return words.map((word) => ({ word, same: true }));
  const lengths = Array.from({ length: words.length + 1 }, () => new Uint16Array(others.length + 1));
  for (let i = words.length - 1; i >= 0; i--) {
    for (let j = others.length - 1; j >= 0; j--) {
      lengths[i][j] = words[i].trim() === others[j] ? lengths[i + 1][j + 1] + 1 : Math.max(lengths[i + 1][j], lengths[i][j + 1]);
    }
  }
  let j = 0;
  return words.map((word, i) => {
    while (j < others.length && word.trim() !== others[j] && lengths[i][j + 1] >= lengths[i + 1][j]) j++;
    const same = j < others.length && word.trim() === others[j];
    if (same) j++;
    return { word, same };
  });
}

/** Return a request of `/v1/completions`, or of `/v1/chat/completions`, and its path. */
export function generationRequest({ model, chat, text, maxTokens, temperature, seed, rudder }) {
  const prompt = chat ? { messages: [{ role: "user", content: text }] } : { prompt: text };
  const body = { model, ...prompt, max_tokens: maxTokens, temperature, seed };
  return { path: chat ? "/v1/chat/completions" : "/v1/completions", body: rudder ? { ...body, rudder } : body };
}

/** Return a JSON value as Python. */
function python(value, indent = "") {
  const inner = `${indent}    `;
  if (value === null || value === undefined) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value !== "object") return JSON.stringify(value).replace(/[\u2028\u2029]/g, (c) => `\\u${c.charCodeAt(0).toString(16)}`);
  const [open, close] = Array.isArray(value) ? "[]" : "{}";
  const entries = Array.isArray(value) ? value.map((entry) => python(entry, inner))
    : Object.entries(value).map(([name, entry]) => `${JSON.stringify(name)}: ${python(entry, inner)}`);
  return entries.length ? `${open}\n${entries.map((entry) => `${inner}${entry},\n`).join("")}${indent}${close}` : open + close;
}

/** Return a request as code: `python`, `curl` or `yaml`, a policy with the same program on the bundles that are served. */
export function asCode(kind, { path, body }, origin, bundles = []) {
  if (kind === "yaml") {
    const program = body.rudder?.program;
    if (!program || typeof program === "string") return "# A policy needs a program: pin features and give them a dose.";
    return ["name: console", "version: 1", "description: made in the console", "binds: {all: true}",
      `bundles: ${JSON.stringify(Object.fromEntries(bundles.map(({ name, sha256 }) => [name, sha256])))}`,
      `program: ${JSON.stringify({ sites: program.sites })}`, ""].join("\n");
  }
  if (kind === "curl") {
    const json = JSON.stringify(body, null, 2).replaceAll("'", "'\\''");
    return `curl ${origin}${path} \\\n  -H 'content-type: application/json' \\\n  -d '${json}'\n`;
  }
  const { rudder, ...rest } = body;
  const method = path.includes("chat") ? "chat.completions" : "completions";
  const fields = Object.entries(rest).map(([name, value]) => `    ${name}=${python(value, "    ")},`);
  const extra = rudder ? [`    extra_body=${python({ rudder }, "    ")},`] : [];
  const text = method === "completions" ? "text" : "message.content";
  return ["from openai import OpenAI", "", `client = OpenAI(base_url="${origin}/v1", api_key="none")`,
    `answer = client.${method}.create(`, ...fields, ...extra, ")", `print(answer.choices[0].${text})`, ""].join("\n");
}
