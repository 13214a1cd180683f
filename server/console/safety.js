// Safety: policies in force, which bind you, and what they did to the last answers.

import { call } from "/console/api.js";
import { fill, h, table } from "/console/dom.js";
import { attestation } from "/console/parts.js";
import { state } from "/console/state.js";

const MODES = { POLICY_MODE_ENFORCE: "enforced", POLICY_MODE_SHADOW: "in shadow: counts, changes nothing" };

const part = (name, content) => h("section", { class: "panel", "aria-label": name }, h("h3", {}, name), content);
const error = (problem) => h("p", { class: "status error" }, problem.message);

/** Show the view. */
export async function show(view) {
  const [list, explained] = await Promise.all([
    call("PolicyService/List").then(({ policies = [] }) => policyTable(policies)).catch(error),
    call("PolicyService/Explain").then(explanation).catch(error)]);
  fill(view, h("h2", {}, "Safety"), h("p", { class: "lead" }, "Policies are the operator's. They act on every call that they bind, whatever the call asks for."),
    part("Policies in force", list), part("What binds you", explained), part("Your last answers on this page", answers()));
}

function policyTable(policies) {
  if (!policies.length) {
    return h("p", { class: "empty" }, "No policy is in force: nothing is steered, watched or refused but what a request asks for. An operator puts files into policies.folder, or uses `rudder policy apply`.");
  }
  return table(`${policies.length} in force`, ["policy", "version", "mode", "guards", "certificate", "digest"], policies.map((policy) => [
    h("span", {}, h("b", {}, policy.name), h("br"), policy.description), policy.version, MODES[policy.mode] ?? policy.mode,
    (policy.guards ?? []).join(", ") || "none", policy.certificate || "none", h("code", {}, policy.digest.slice(0, 16))]));
}

function explanation({ policies = [], statements = [] }) {
  const names = policies.map(({ name }) => name).join(", ") || "none";
  return [h("p", {}, `Policies that bind you: ${names}.`), h("ul", { id: "statements" }, statements.map((statement) => h("li", {}, statement)))];
}

function answers() {
  if (!state.answers.length) {
    return h("p", { class: "empty" }, "There is none yet. Ask something in ", h("a", { href: "#inspect" }, "Inspect"), " or ", h("a", { href: "#steer" }, "Steer"), ".");
  }
  return h("ol", { class: "answers" }, state.answers.map(({ what, refusal, attestation: message }) => h("li", {}, h("b", {}, what), " ",
    refusal ? h("span", { class: "error" }, `refused by policy ${refusal.policy}, rule ${refusal.rule}, at token ${refusal.position}`) : "not refused", attestation(message))));
}
