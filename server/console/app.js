// The page: its views by the address, the token, what is served.

import { call, setToken } from "/console/api.js";
import { fill, h } from "/console/dom.js";
import { state } from "/console/state.js";
import * as features from "/console/features.js";
import * as inspect from "/console/inspect.js";
import * as live from "/console/live.js";
import * as saes from "/console/saes.js";
import * as safety from "/console/safety.js";
import * as steer from "/console/steer.js";

const VIEWS = { inspect, steer, features, safety, live, saes };
const NAMES = { inspect: "Inspect", steer: "Steer", features: "Features", safety: "Safety", live: "Live", saes: "SAEs" };
const main = document.getElementById("view");
const server = document.getElementById("server");
let leaving = new AbortController();

/** Ask what is served; the views need it. */
async function learn() {
  try {
    state.model = await call("ModelService/Get");
    server.className = "";
    server.textContent = `${state.model.model} · Rudder ${state.model.server_version}`;
  } catch (error) {
    state.model = null;
    server.className = "error";
    server.textContent = error.message;
  }
}

async function showView() {
  const [name, ...rest] = decodeURIComponent(location.hash.slice(1)).split("/");
  const view = name in VIEWS ? name : "inspect";
  leaving.abort();
  leaving = new AbortController();
  for (const link of document.querySelectorAll("#views a")) {
    if (link.hash === `#${view}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${NAMES[view]} · Rudder`;
  // A view that comes late must not write over the next one.
  const place = h("div", { class: `view-${view}` });
  fill(main, place);
  try { await VIEWS[view].show(place, rest, leaving.signal); } catch (error) { fill(place, h("p", { class: "status error", role: "alert" }, error.message)); }
}

fill(document.getElementById("views"), Object.keys(VIEWS).map((view) => h("a", { href: `#${view}` }, NAMES[view])));
document.getElementById("access").addEventListener("submit", (event) => event.preventDefault());
document.getElementById("token").addEventListener("change", async (event) => {
  setToken(event.target.value);
  await learn();
  await showView();
});
window.addEventListener("hashchange", () => { if (location.hash !== "#view") showView(); });
await learn();
await showView();
document.body.dataset.ready = "yes";
