// SAEs: the bundles that are served, and how good they are.

import { fill, h, table } from "/console/dom.js";
import { number, percent } from "/console/figures.js";
import { state } from "/console/state.js";

/** Show the view. */
export function show(view) {
  const { model, bundles = [] } = state.model ?? {};
  fill(view, h("h2", {}, "SAEs"), h("p", { class: "lead" }, "Sparse autoencoders that read the model. FVU: share of the residual stream's variance that they leave out. L0: features active at a token."),
    !state.model ? h("p", { class: "empty" }, "The server has not said what it serves: see the top of the page.") : bundles.length ? [
      table(`Bundles of ${model}`, ["bundle", "site", "architecture", "features", "FVU", "L0", "density", "programs may edit it", "SHA-256"],
        bundles.map((bundle) => [h("b", {}, bundle.name), bundle.site, `${bundle.architecture}, ${bundle.activation}`, number(bundle.latents), number(bundle.fvu), number(bundle.l0),
          bundle.l0 === undefined ? "not measured" : percent(bundle.l0 / bundle.latents), bundle.editable ? "yes" : `no: ${bundle.not_editable_because}`, h("code", {}, bundle.sha256.slice(0, 16))])),
    ] : h("p", { class: "empty" }, "This server has no SAE bundle. Name bundles in engine.bundles of its configuration."));
}
