// Elements built of text nodes: whatever a model, a label or a policy says is shown as text and never parsed.

const CONTROLS = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]/g;

/** Return text in which control characters, those that turn the direction of writing included, are seen and do nothing. */
export function shown(text) {
  return String(text).replace(CONTROLS, (c) => `⟨U+${c.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);
}

/** Make an element. Properties that begin with `on` are listeners; `class`, `for` and names with a dash are attributes. */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "class" || name === "for" || name === "role" || name.includes("-")) element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false)
    .map((child) => (child instanceof Node ? child : shown(child))));
  return element;
}

/** Put children in the place of those that an element has. */
export function fill(element, ...children) {
  element.replaceChildren(...h("div", {}, ...children).childNodes);
  return element;
}

/** A labelled field. */
export function field(label, control, hint = "") {
  return h("label", { class: "field" }, h("span", {}, label), control, hint ? h("small", {}, hint) : null);
}

/** A table with a caption for those who do not see it. */
export function table(caption, heads, rows) {
  return h("div", { class: "scroll", role: "region", tabIndex: 0, "aria-label": caption }, h("table", {},
    h("caption", { class: "quiet" }, caption),
    h("thead", {}, h("tr", {}, heads.map((head) => h("th", { scope: "col" }, head)))),
    h("tbody", {}, rows.map((row) => h("tr", {}, row.map((cell) => h("td", {}, cell)))))));
}

/** A line for what a view is doing or what went wrong; screen readers speak it. */
export function statusLine() {
  const line = h("p", { class: "status", role: "status" });
  return {
    line,
    say(text) { line.className = "status"; line.textContent = shown(text); },
    fail(error) { line.className = "status error"; line.textContent = shown(error.message ?? error); },
  };
}

/** Run `work` when a form is sent, one at a time; its errors are shown. */
export function onSubmit(form, status, work) {
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const button = form.querySelector("button[type=submit]");
    if (button.disabled) return;
    button.disabled = true;
    try { await work(); } catch (error) { status.fail(error); } finally { button.disabled = false; }
  });
  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
}
