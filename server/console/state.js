// What the views share: the served model, pinned features, the last answers. It ends with the page, but for pins.

const KEY = "rudder.pins";

function stored() {
  try { return JSON.parse(sessionStorage.getItem(KEY) ?? "[]"); } catch { return []; }
}

export const state = { model: null, pins: stored(), answers: [] };

const MAX_ANSWERS = 50;

const keep = () => sessionStorage.setItem(KEY, JSON.stringify(state.pins));

/** Return whether a feature is pinned. */
export function isPinned({ bundle, index }) {
  return state.pins.some((pin) => pin.bundle === bundle && pin.index === index);
}

/** Pin a feature, or let it go. */
export function togglePin({ bundle, site, index, label }) {
  state.pins = isPinned({ bundle, index })
    ? state.pins.filter((pin) => pin.bundle !== bundle || pin.index !== index)
    : [...state.pins, { bundle, site, index, label, dose: 0.1, phase: "PHASE_BOTH" }];
  keep();
}

/** Change a pin. */
export function changePin(pin, change) {
  Object.assign(pin, change);
  keep();
}

/** Note an answer for the view of verdicts. */
export function noteAnswer(answer) {
  state.answers = [answer, ...state.answers].slice(0, MAX_ANSWERS);
}
