// The server's endpoints. Addresses are relative, so the page also works behind a proxy that adds a prefix.

const KEY = "rlkit.key"; // sessionStorage only: it goes with the tab

export class ApiError extends Error {
  constructor(message, { status = 0, retryAfter = null } = {}) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

let asking = null;
let askForKey = async () => null;

// `ask(wasWrong)` resolves to the key, or to null if the user gives none.
export function onKeyNeeded(ask) {
  askForKey = ask;
}

export async function request(path, { body = null, signal = null } = {}) {
  for (;;) {
    const key = stored();
    const response = await fetched(path, body, key, signal);
    if (response.ok) return response;
    if (response.status !== 401) throw await failure(response);
    const newer = stored();
    if (newer && newer !== key) continue; // another request has asked meanwhile
    asking ??= askForKey(Boolean(key)).finally(() => (asking = null));
    const given = await asking;
    if (given === null) throw new ApiError("This server asks for an API key", { status: 401 });
    keep(given);
    signal?.throwIfAborted();
  }
}

export async function getJson(path, signal = null) {
  const response = await request(path, { signal });
  try {
    return await response.json();
  } catch {
    throw new ApiError(`The server's answer to ${path} is no JSON`);
  }
}

// The chunks of a chat completion as they come; the error of a stream that breaks off is thrown.
export async function* streamChat(body, signal) {
  const response = await request("v1/chat/completions", { body, signal });
  let ended = false;
  for await (const data of events(response.body, signal)) {
    if (data === "[DONE]") {
      ended = true;
      continue;
    }
    const chunk = parsed(data);
    if (chunk.error) throw new ApiError(chunk.error.message ?? "The server reports an error");
    yield chunk;
  }
  if (!ended) throw new ApiError("The connection ended before the reply did");
}

// Data of server-sent events: lines "data: ...", events apart by an empty line.
export async function* events(stream, signal = null) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      rest += decoder.decode(value, { stream: !done });
      const parts = rest.split(/\r?\n\r?\n/);
      rest = done ? "" : parts.pop();
      for (const part of parts) {
        const lines = part.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(line[5] === " " ? 6 : 5)).join("\n");
      }
      if (done) return;
    }
  } catch (error) {
    if (signal?.aborted || error.name === "AbortError") throw error;
    throw new ApiError("The connection to the server broke off");
  } finally {
    reader.cancel().catch(() => {}); // whoever stops listening also stops the server
  }
}

function parsed(data) {
  try {
    return JSON.parse(data);
  } catch {
    throw new ApiError("The server sent something that is no JSON");
  }
}

async function fetched(path, body, key, signal) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const options = { headers, signal, cache: "no-store" };
  if (body) {
    headers["Content-Type"] = "application/json";
    Object.assign(options, { method: "POST", body: JSON.stringify(body) });
  }
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer; is it still running?");
  }
}

async function failure(response) {
  const wait = Number.parseFloat(response.headers.get("Retry-After") ?? "");
  const details = { status: response.status, retryAfter: Number.isFinite(wait) ? wait : null };
  let message = "";
  try {
    const { error, detail } = await response.json();
    message = error?.message ?? (typeof detail === "string" ? detail : "");
  } catch {
    // no JSON: the status has to do
  }
  return new ApiError(message || `The server answered ${response.status} ${response.statusText}`.trim(), details);
}

let remembered = null; // where sessionStorage is switched off
function stored() {
  try {
    return sessionStorage.getItem(KEY) ?? remembered;
  } catch {
    return remembered;
  }
}

function keep(key) {
  remembered = key;
  try {
    sessionStorage.setItem(KEY, key);
  } catch {
    // remembered above
  }
}
