// Asking the model: a conversation and its settings to a request, and the reply as it comes into its message.

import { streamChat } from "./api.js";
import { isNumber } from "./dom.js";
import * as store from "./store.js";

const running = new Map(); // conversation id -> AbortController
const SAVE_EVERY = 1000; // ms
const FEWEST = 8; // pieces that a rate can be made of

export const isRunning = (id) => running.has(id);
export const stop = (id) => running.get(id)?.abort();

// Settings as typed -> fields of the request; throws {field, message} for what is none.
export function fields(settings) {
  const made = {};
  number(made, settings, "temperature", (value) => value >= 0 && value <= 100, "a number from 0 (always the likeliest) to 100");
  number(made, settings, "top_p", (value) => value > 0 && value <= 1, "a number above 0, up to 1 (every token)");
  number(made, settings, "max_tokens", (value) => Number.isInteger(value) && value >= 1, "a whole number from 1 on");
  number(made, settings, "seed", (value) => Number.isSafeInteger(value) && value >= 0, "a whole number from 0 on");
  const stops = settings.stop.split("\n").filter(Boolean).map(unescaped);
  if (stops.length > 16) throw fault("stop", "at most 16 lines");
  if (stops.length) made.stop = stops;
  if (settings.schema.trim()) {
    made.response_format = { type: "json_schema", json_schema: { name: "reply", strict: true, schema: schema(settings.schema) } };
  }
  return made;
}

// Ask for the reply to the conversation's last message. `changed(message)` is called for every piece and at the end.
export async function reply(conversation, changed) {
  const request = body(conversation);
  const message = { role: "assistant", content: "", model: conversation.model };
  const controller = new AbortController();
  conversation.messages.push(message);
  running.set(conversation.id, controller);
  const meter = new Meter();
  try {
    changed(message);
    for await (const chunk of streamChat(request, controller.signal)) {
      take(message, chunk, meter);
      if (meter.due() && store.get(conversation.id)) store.save(conversation);
      changed(message);
    }
    message.finish ??= "stop";
  } catch (error) {
    ended(message, error, controller.signal.aborted);
  } finally {
    message.stats = meter.stats();
    running.delete(conversation.id);
    if (store.get(conversation.id)) store.save(conversation); // else it was deleted meanwhile
    changed(message);
  }
  return message;
}

function body(conversation) {
  const { system } = conversation.settings;
  const turns = conversation.messages.map(({ role, content }) => ({ role, content: role === "user" ? content : parts(content).said }));
  const messages = turns.filter((message) => message.content.trim());
  if (system.trim()) messages.unshift({ role: "system", content: system });
  const asked = { model: conversation.model, messages, stream: true, stream_options: { include_usage: true } };
  return { ...asked, ...fields(conversation.settings) };
}

// A reply whose server leaves the thoughts inside: "<think>...</think>said".
export function parts(content) {
  const found = /^\s*<think>([^]*?)(?:<\/think>\s*|$)/.exec(content);
  return found ? { thought: found[1].trim(), said: content.slice(found[0].length) } : { thought: "", said: content };
}

function take(message, chunk, meter) {
  const choice = chunk.choices?.[0];
  const thought = choice?.delta?.reasoning_content;
  const said = choice?.delta?.content;
  if (thought) message.reasoning = (message.reasoning ?? "") + thought;
  if (said) message.content += said;
  if (thought || said) meter.piece();
  if (choice?.finish_reason) message.finish = choice.finish_reason;
  if (chunk.usage) meter.usage = chunk.usage;
  if (chunk.timings) meter.timings = chunk.timings;
}

function ended(message, error, aborted) {
  if (aborted) message.finish = "stopped";
  else {
    message.finish = "error";
    message.error = error.message;
    if (error.retryAfter) message.error += ` (try again in ${Math.ceil(error.retryAfter)} s)`;
    if (!error.status && error.name !== "Error") console.error(error);
  }
}

// What the page itself sees, and what the server says in its last chunk.
class Meter {
  usage = null;
  timings = null;
  #began = performance.now();
  #first = null;
  #last = null;
  #pieces = 0;
  #saved = performance.now();

  piece() {
    this.#last = performance.now();
    this.#first ??= this.#last;
    this.#pieces += 1;
  }

  due() {
    const now = performance.now();
    if (now - this.#saved < SAVE_EVERY) return false;
    this.#saved = now;
    return true;
  }

  stats() {
    const { usage, timings } = this;
    const between = (this.#last - this.#first) / 1000;
    const stats = {
      first_seconds: this.#first === null ? null : (this.#first - this.#began) / 1000,
      prompt_seconds: timings?.prompt_seconds,
      tokens_per_s: timings?.tokens_per_s,
      about_per_s: this.#pieces >= FEWEST && between > 0 ? (this.#pieces - 1) / between : null,
      reused_tokens: timings?.reused_tokens ?? usage?.prompt_tokens_details?.cached_tokens,
      prompt_tokens: usage?.prompt_tokens,
      new_tokens: usage?.completion_tokens,
    };
    return Object.fromEntries(Object.entries(stats).filter(([, value]) => isNumber(value)));
  }
}

function number(made, settings, name, valid, what) {
  const typed = settings[name].trim();
  if (!typed) return;
  const value = Number(typed);
  if (!Number.isFinite(value) || !valid(value)) throw fault(name, `${typed} is not ${what}`);
  made[name] = value;
}

function schema(typed) {
  let made;
  try {
    made = JSON.parse(typed);
  } catch (error) {
    throw fault("schema", `this is no JSON: ${error.message}`);
  }
  if (!made || typeof made !== "object" || Array.isArray(made)) throw fault("schema", "a JSON schema is an object: {…}");
  return made;
}

const unescaped = (line) => line.replace(/\\([nt\\])/g, (_, mark) => ({ n: "\n", t: "\t", "\\": "\\" })[mark]);

function fault(field, message) {
  return Object.assign(new Error(message), { field });
}
