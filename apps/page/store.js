// Conversations in localStorage, one key each, so that two tabs do not overwrite each other's.
//
//   {schema_version, id, title, model, created, updated, settings, messages}
//   message: {role, content} and for replies: reasoning, finish ("stop", "length", "stopped", "error"), error, stats, model

const SCHEMA_VERSION = 1;
const PREFIX = "rlkit.conversation.";
const known = new Map();

export const DEFAULTS = Object.freeze({
  system: "",
  temperature: "0.7", // what a server takes by itself is 1, at which small models ramble
  top_p: "",
  max_tokens: "",
  seed: "",
  stop: "",
  schema: "",
});

// Read what there is; `changed()` is called when another tab changes something, `full()` when there is no room left.
let outOfRoom = () => {};
export function open(changed, full) {
  outOfRoom = full;
  for (const key of keys()) load(key);
  addEventListener("storage", (event) => {
    if (!event.key?.startsWith(PREFIX)) return;
    if (event.newValue === null) known.delete(event.key.slice(PREFIX.length));
    else load(event.key);
    changed();
  });
}

export const list = () => [...known.values()].sort((a, b) => b.updated - a.updated);
export const get = (id) => known.get(id) ?? null;

export function create(model, settings) {
  const now = Date.now();
  const id = crypto.getRandomValues(new Uint32Array(3)).join("-");
  return { schema_version: SCHEMA_VERSION, id, title: "", model, created: now, updated: now, settings, messages: [] };
}

export function save(conversation, { touch = true } = {}) {
  if (touch) conversation.updated = Date.now();
  known.set(conversation.id, conversation);
  try {
    localStorage.setItem(PREFIX + conversation.id, JSON.stringify(conversation));
  } catch {
    outOfRoom();
  }
}

export function remove(id) {
  known.delete(id);
  try {
    localStorage.removeItem(PREFIX + id);
  } catch {
    // nothing is stored then
  }
}

export function preference(name, fallback) {
  try {
    return JSON.parse(localStorage.getItem(`rlkit.${name}`)) ?? fallback;
  } catch {
    return fallback;
  }
}

export function prefer(name, value) {
  try {
    localStorage.setItem(`rlkit.${name}`, JSON.stringify(value));
  } catch {
    // for this visit only
  }
}

export function exported() {
  return JSON.stringify({ schema_version: SCHEMA_VERSION, conversations: list() }, null, 2);
}

// Take in an export, or one conversation, or {messages: [...]}; existing ones stay. Throws Error with the reason.
export function imported(text) {
  let table;
  try {
    table = JSON.parse(text);
  } catch {
    throw new Error("the file is no JSON");
  }
  if (table?.schema_version !== undefined && table.schema_version !== SCHEMA_VERSION) {
    throw new Error(`the file has schema_version ${table.schema_version}, this page reads ${SCHEMA_VERSION}`);
  }
  const found = (Array.isArray(table?.conversations) ? table.conversations : [table]).map(cleaned);
  for (const conversation of found) {
    while (known.has(conversation.id)) conversation.id = crypto.randomUUID?.() ?? `${conversation.id}-${Date.now()}`;
    save(conversation, { touch: false });
  }
  return found.length;
}

// Only what is known, of the types expected: a file may come from anywhere.
function cleaned(raw) {
  if (!raw || !Array.isArray(raw.messages)) throw new Error("a conversation without messages");
  const made = create(text(raw.model), { ...DEFAULTS });
  for (const name of Object.keys(raw.settings ?? {})) if (name in DEFAULTS) made.settings[name] = text(raw.settings[name]);
  if (/^[\w-]{1,64}$/.test(raw.id)) made.id = raw.id;
  for (const name of ["created", "updated"]) if (Number.isFinite(raw[name])) made[name] = raw[name];
  for (const message of raw.messages) {
    if (message?.role === "system") made.settings.system ||= text(message.content);
    else if (message?.role === "user" || message?.role === "assistant") made.messages.push(cleanedMessage(message));
    else throw new Error(`a message of the role ${JSON.stringify(message?.role)}`);
  }
  made.title = text(raw.title) || titled(made);
  return made;
}

function cleanedMessage(raw) {
  const made = { role: raw.role, content: text(raw.content) };
  for (const name of ["reasoning", "finish", "error", "model"]) if (raw[name]) made[name] = text(raw[name]);
  if (raw.stats && typeof raw.stats === "object") {
    made.stats = Object.fromEntries(Object.entries(raw.stats).filter(([, value]) => Number.isFinite(value)));
  }
  return made;
}

const text = (value) => (typeof value === "string" || Number.isFinite(value) ? String(value) : "");

export function titled(conversation) {
  const first = conversation.messages.find((message) => message.role === "user")?.content ?? "";
  const line = first.trim().split("\n", 1)[0];
  return line.length > 60 ? `${line.slice(0, 58).trimEnd()}…` : line;
}

function load(key) {
  try {
    const conversation = cleaned(JSON.parse(localStorage.getItem(key)));
    known.set(conversation.id, conversation);
  } catch {
    // not ours, or damaged: left alone
  }
}

function keys() {
  try {
    return Object.keys(localStorage).filter((key) => key.startsWith(PREFIX));
  } catch {
    return [];
  }
}
