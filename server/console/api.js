// Calls of the server's API: the contract's methods in their JSON form, generation as events, live figures.

let token = "";

/** Set the token of the calls that follow; it is kept in this page's memory alone. */
export function setToken(value) { token = value.trim(); }

/** An error of a call, in words. `status`: of HTTP, 0 if there was no answer. */
export class CallError extends Error {
  constructor(status, message, code = "") {
    super(message);
    this.status = status;
    this.code = code;
  }
}

const ADVICE = {
  0: "The server does not answer. Is it running? Try again.",
  401: "The server asks for a valid token: enter one at the top of the page, then try again.",
  403: "This is not allowed:",
  429: "The server is busy:",
  503: "The server cannot answer now:",
};

async function failure(response) {
  const body = await response.json().catch(() => ({}));
  const error = body.error ?? {};
  const wait = response.headers.get("retry-after");
  const parts = [ADVICE[response.status] ?? "", error.message ?? `status ${response.status}`, wait ? `Try again in ${wait} s.` : ""];
  return new CallError(response.status, parts.filter(Boolean).join(" "), error.code ?? "");
}

async function post(path, body, signal) {
  const headers = { "content-type": "application/json" };
  if (token) headers.authorization = `Bearer ${token}`;
  let response;
  try {
    response = await fetch(path, { method: "POST", headers, body: JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new CallError(0, ADVICE[0]);
  }
  if (!response.ok) throw await failure(response);
  return response;
}

/** Call a method of the contract, as `FeatureService/Search`. */
export async function call(method, body = {}) {
  return (await post(`/rudder.v1.${method}`, body)).json();
}

/** Call `take` with each event of a stream, until it ends. Throws CallError if it fails or breaks off. */
export async function stream(path, body, take, { signal, endless = false } = {}) {
  const reader = (await post(path, body, signal)).body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  let ended = false;
  for (;;) {
    let part;
    try { part = await reader.read(); } catch (error) {
      if (error.name === "AbortError") throw error;
      break;
    }
    if (part.done) { ended ||= endless; break; }
    buffer += part.value;
    const blocks = buffer.split("\n\n");
    buffer = blocks.pop();
    for (const block of blocks) {
      const data = block.replace(/^data: /, "");
      if (data === "[DONE]") { ended = true; continue; }
      const event = JSON.parse(data);
      if (event.error) throw new CallError(503, `The answer broke off: ${event.error.message}`, event.error.code);
      take(event);
    }
  }
  if (!ended) throw new CallError(0, "The connection was lost before the answer was complete. What is shown is not whole; try again.");
}
