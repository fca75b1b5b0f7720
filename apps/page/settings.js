// The settings beside a conversation: what was typed is kept as it is, and checked when it changes.

import { fields } from "./chat.js";
import { $ } from "./dom.js";
import { DEFAULTS } from "./store.js";

const LABELS = { temperature: "temperature", top_p: "top-p", max_tokens: "max tokens", seed: "seed" };

// `changed(settings)` gets every change.
export function connect(changed) {
  const form = $("settings-form");
  form.addEventListener("input", () => {
    const settings = read();
    check(settings);
    changed(settings);
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  $("settings-reset").addEventListener("click", () => {
    show({ ...DEFAULTS });
    changed({ ...DEFAULTS });
  });
}

export function show(settings) {
  for (const name of Object.keys(DEFAULTS)) field(name).value = settings[name] ?? "";
  check(settings);
}

// Show what is wrong; returns the field that is, or null.
export function check(settings) {
  for (const name of Object.keys(DEFAULTS)) mark(name, "");
  try {
    fields(settings);
  } catch (error) {
    if (!error.field) throw error;
    mark(error.field, error.message);
    return field(error.field);
  }
  return null;
}

// What differs from the defaults, in words.
export function summary(settings) {
  const typed = (name) => settings[name].trim();
  const changed = (name) => typed(name) !== DEFAULTS[name];
  const parts = typed("system") ? ["system message"] : [];
  for (const [name, label] of Object.entries(LABELS)) if (changed(name)) parts.push(`${label} ${typed(name) || "of the server"}`);
  if (typed("stop")) parts.push("stop strings");
  if (typed("schema")) parts.push("JSON schema");
  return parts;
}

function read() {
  return Object.fromEntries(Object.keys(DEFAULTS).map((name) => [name, field(name).value]));
}

function field(name) {
  return $(`set-${name}`);
}

function mark(name, message) {
  const said = $(`set-${name}-error`);
  if (!said) return;
  said.textContent = message;
  field(name).setAttribute("aria-invalid", message ? "true" : "false");
}
