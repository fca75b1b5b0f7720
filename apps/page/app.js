// The page as a whole: which view and conversation is shown, which model answers, and the keyboard.

import { ApiError, getJson, onKeyNeeded } from "./api.js";
import * as chat from "./chat.js";
import { $, announce, copy, count, el, isNumber, toast } from "./dom.js";
import * as profile from "./profile.js";
import * as settings from "./settings.js";
import * as sidebar from "./sidebar.js";
import * as store from "./store.js";
import * as thread from "./thread.js";

const NARROW = matchMedia("(max-width: 800px)");
const MOST_ANNOUNCED = 1500; // characters of a reply that are read out
let current = fresh();
let models = new Map(); // name -> {context, adapters: [name, ...]}

function fresh() {
  return store.create(store.preference("model", ""), { ...store.DEFAULTS, ...store.preference("settings", {}) });
}

// Models

async function loadModels() {
  try {
    const { data } = await getJson("v1/models");
    models = grouped(data ?? []);
    $("model-trouble").hidden = true;
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    $("model-trouble").hidden = false;
    $("model-trouble-text").textContent = error.message;
  }
  drawModels();
  drawContext();
  await learnContext();
}

// How much a model holds, where the list of models does not say.
async function learnContext() {
  const name = chosen()?.name;
  const about = models.get(name);
  if (!about || about.context) return;
  try {
    about.context = (await getJson(`rlkit/profile/${encodeURIComponent(name)}`)).context_length;
    drawContext();
  } catch (error) {
    if (!(error instanceof ApiError)) throw error; // then there is no bar
  }
}

function grouped(entries) {
  const found = new Map();
  const names = new Set(entries.map(({ id }) => id));
  for (const entry of entries) {
    const cut = entry.id.lastIndexOf(":");
    const base = cut > 0 && names.has(entry.id.slice(0, cut)) ? entry.id.slice(0, cut) : null;
    if (base === null) found.set(entry.id, { context: entry.context_length, adapters: found.get(entry.id)?.adapters ?? [] });
    else {
      if (!found.has(base)) found.set(base, { adapters: [] });
      found.get(base).adapters.push(entry.id.slice(cut + 1));
    }
  }
  return found;
}

function chosen() {
  if (models.has(current.model)) return { name: current.model, adapter: "" };
  const cut = current.model.lastIndexOf(":");
  const name = current.model.slice(0, cut);
  const adapter = current.model.slice(cut + 1);
  return models.get(name)?.adapters.includes(adapter) ? { name, adapter } : null;
}

function drawModels() {
  const first = models.keys().next().value;
  if (first && !chosen()) current.model = first;
  const { name = "", adapter = "" } = chosen() ?? {};
  const option = (value, label = value) => new Option(label, value, false, value === name || value === adapter);
  const adapters = models.get(name)?.adapters ?? [];
  $("model").replaceChildren(...(models.size ? [...models.keys()].map((id) => option(id)) : [new Option("No model", "")]));
  $("model").disabled = !models.size;
  $("model").value = name;
  $("adapter").replaceChildren(option("", "no adapter"), ...adapters.map((id) => option(id)));
  $("adapter").value = adapter;
  $("adapter-box").hidden = !adapters.length;
  $("welcome-model").textContent = name || "The model";
}

function choose() {
  const name = $("model").value;
  const adapter = models.get(name)?.adapters.includes($("adapter").value) ? $("adapter").value : "";
  current.model = adapter ? `${name}:${adapter}` : name;
  store.prefer("model", current.model);
  if (current.messages.length) store.save(current, { touch: false });
  drawModels();
  drawContext();
  learnContext();
  if (!$("profile").hidden) profile.show(current.model);
}

// Conversations

function open(id) {
  location.hash = `#/chat/${id}`;
}

function startNew() {
  if (location.hash === "#/") route();
  else location.hash = "#/";
  closeSidebar();
  $("prompt").focus();
}

// The address says what is shown: #/profile, #/chat/ID, else a new conversation.
function route() {
  const [, view, id] = location.hash.split("/");
  const isProfile = view === "profile";
  for (const [name, active] of [["tab-chat", !isProfile], ["tab-profile", isProfile]]) {
    if (active) $(name).setAttribute("aria-current", "page");
    else $(name).removeAttribute("aria-current");
  }
  $("chat").hidden = isProfile;
  if (isProfile) {
    profile.show(current.model);
    return;
  }
  profile.hide();
  const wanted = view === "chat" ? store.get(id) : null;
  if (wanted !== current || !current.messages.length) current = wanted ?? fresh();
  closeSidebar();
  drawConversation();
}

function drawConversation() {
  document.title = current.title ? `${current.title} · rlkit` : "rlkit";
  $("tab-chat").href = current.messages.length ? `#/chat/${current.id}` : "#/";
  drawModels();
  settings.show(current.settings);
  thread.show(current);
  drawComposer();
  drawContext();
  sidebar.draw();
}

async function send(text) {
  const trimmed = text.trim();
  if (!trimmed || chat.isRunning(current.id) || !ready()) return;
  const conversation = current;
  conversation.messages = conversation.messages.filter((message) => message.finish !== "error" || message.content);
  conversation.messages.push({ role: "user", content: trimmed });
  conversation.title ||= store.titled(conversation);
  store.save(conversation);
  $("prompt").value = "";
  grow();
  history.replaceState(null, "", `#/chat/${conversation.id}`);
  drawConversation();
  await answer(conversation);
}

function ready() {
  const wrong = settings.check(current.settings);
  if (wrong) {
    toggleSettings(true);
    wrong.focus();
  } else if (!models.size) loadModels();
  return !wrong && models.size > 0;
}

async function answer(conversation) {
  announce("The model is answering");
  const done = chat.reply(conversation, (message) => {
    thread.update(conversation, message);
    if (conversation === current) drawComposer();
  });
  const message = await done;
  if (conversation !== current) toast(`“${conversation.title}” has its reply`);
  thread.show(current);
  drawComposer();
  drawContext();
  sidebar.draw();
  const { said } = chat.parts(message.content);
  announce(message.finish === "error" ? "" : `Reply: ${said.slice(0, MOST_ANNOUNCED)}`);
}

function retry() {
  if (chat.isRunning(current.id) || !current.messages.length || !ready()) return;
  if (current.messages.at(-1).role === "assistant") current.messages.pop();
  thread.show(current);
  answer(current);
}

function editLast(message, text) {
  current.messages.length = current.messages.indexOf(message);
  send(text);
}

function lastOf(role) {
  return current.messages.findLast((message) => message.role === role);
}

// The composer

function drawComposer() {
  const busy = chat.isRunning(current.id);
  $("send").hidden = busy;
  $("stop").hidden = !busy;
  $("send").disabled = !$("prompt").value.trim();
  const parts = settings.summary(current.settings);
  $("active-settings").replaceChildren(...parts.map((part) => el("li", {}, part)));
  $("settings-toggle").classList.toggle("marked", parts.length > 0);
}

function drawContext() {
  const { stats } = current.messages.findLast((message) => message.stats?.prompt_tokens) ?? {};
  const used = stats ? stats.prompt_tokens + (stats.new_tokens ?? 0) : 0;
  const most = models.get(chosen()?.name)?.context;
  const known = isNumber(most) && most > 0;
  $("context").hidden = !known || !used;
  if (!known) return;
  const share = Math.min(1, used / most);
  const bar = $("context-bar");
  bar.setAttribute("aria-valuemax", most);
  bar.setAttribute("aria-valuenow", used);
  bar.setAttribute("aria-valuetext", `${count(used)} of ${count(most)} tokens`);
  bar.firstElementChild.style.width = `${100 * share}%`;
  bar.classList.toggle("tight", share > 0.8);
  $("context-text").textContent = `${count(used)} of ${count(most)} tokens of context`;
}

function grow() {
  const prompt = $("prompt");
  prompt.style.height = "auto";
  prompt.style.height = `${Math.min(prompt.scrollHeight, innerHeight * 0.4)}px`;
  drawComposer();
}

// Panels, theme, dialogs

function toggleSettings(shown = $("settings").hidden) {
  $("settings").hidden = !shown;
  $("settings-toggle").setAttribute("aria-expanded", String(shown));
  if (shown) $("set-system").focus();
  else $("settings-toggle").focus();
}

function toggleSidebar() {
  const shown = document.body.classList.toggle(NARROW.matches ? "sidebar-shown" : "sidebar-hidden") === NARROW.matches;
  $("sidebar-toggle").setAttribute("aria-expanded", String(shown));
  if (shown && NARROW.matches) $("new-chat").focus();
}

function closeSidebar() {
  if (NARROW.matches && $("sidebar").contains(document.activeElement)) $("sidebar-toggle").focus();
  document.body.classList.remove("sidebar-shown");
  $("sidebar-toggle").setAttribute("aria-expanded", String(!NARROW.matches && !document.body.classList.contains("sidebar-hidden")));
}

const THEMES = ["system", "light", "dark"];
function theme() {
  return document.documentElement.dataset.theme ?? "system";
}

function switchTheme() {
  const next = THEMES[(THEMES.indexOf(theme()) + 1) % THEMES.length];
  if (next === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = next;
  try {
    localStorage.setItem("rlkit.theme", next);
  } catch {
    // for this visit only
  }
  drawTheme();
  announce(`Theme: ${next}`);
}

function drawTheme() {
  $("theme").querySelector("use").setAttribute("href", `#icon-${theme()}`);
  $("theme-name").textContent = `${theme()[0].toUpperCase()}${theme().slice(1)} theme`;
}

function askForKey(wasWrong) {
  const dialog = $("key-dialog");
  $("key-wrong").hidden = !wasWrong;
  $("key").value = "";
  dialog.returnValue = "";
  dialog.showModal();
  $("key").focus();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "given" ? $("key").value.trim() : null), { once: true });
  });
}

function connectDialogs() {
  for (const button of document.querySelectorAll("dialog [data-close]")) {
    button.addEventListener("click", () => button.closest("dialog").close());
  }
  $("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    if ($("key").value.trim()) $("key-dialog").close("given");
  });
}

// The keyboard

const SHORTCUTS = {
  KeyN: startNew,
  KeyR: retry,
  KeyC: () => lastOf("assistant") && copy(chat.parts(lastOf("assistant").content).said),
  KeyE: () => lastOf("user") && thread.edit(lastOf("user")),
  KeyM: () => $("model").focus(),
  KeyS: () => toggleSettings(),
  KeyP: () => (location.hash = $("profile").hidden ? "#/profile" : $("tab-chat").getAttribute("href")),
  KeyB: toggleSidebar,
  KeyT: switchTheme,
  ArrowUp: () => sidebar.step(-1),
  ArrowDown: () => sidebar.step(1),
};

function onKey(event) {
  if (event.defaultPrevented || event.isComposing || document.querySelector("dialog[open]")) return;
  const typing = /^(INPUT|TEXTAREA)$/.test(event.target.tagName);
  const shortcut = event.altKey && !event.ctrlKey && !event.metaKey && SHORTCUTS[event.code];
  if (shortcut) {
    event.preventDefault();
    shortcut();
  } else if (event.key === "Escape") escape();
  else if (event.key === "?" && !typing) $("shortcuts").showModal();
  else if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey) {
    event.preventDefault();
    $("prompt").focus();
  }
}

function escape() {
  if (chat.isRunning(current.id)) chat.stop(current.id);
  else if (document.body.classList.contains("sidebar-shown")) closeSidebar();
  else if (!$("settings").hidden) toggleSettings(false);
  else $("prompt").focus();
}

function onPromptKey(event) {
  if (event.key === "Enter" && !event.shiftKey && !event.altKey && !event.isComposing) {
    event.preventDefault();
    send($("prompt").value);
  } else if (event.key === "ArrowUp" && !event.altKey && !$("prompt").value && lastOf("user")) {
    event.preventDefault();
    thread.edit(lastOf("user"));
  }
}

function start() {
  store.open(() => sidebar.draw(), () => toast("The browser has no room left: export and delete conversations"));
  onKeyNeeded(askForKey);
  thread.connect({ retry, edit: editLast, suggest: send });
  sidebar.connect({ open, opened: () => current.id, gone: (id) => id === current.id && (chat.stop(id), startNew()) });
  settings.connect((typed) => {
    current.settings = typed;
    store.prefer("settings", typed);
    if (current.messages.length) store.save(current, { touch: false });
    drawComposer();
  });
  connectDialogs();
  $("composer").addEventListener("submit", (event) => (event.preventDefault(), send($("prompt").value)));
  $("prompt").addEventListener("input", grow);
  $("prompt").addEventListener("keydown", onPromptKey);
  for (const [id, act] of Object.entries({
    stop: () => chat.stop(current.id),
    "new-chat": startNew,
    "settings-toggle": () => toggleSettings(),
    "settings-close": () => toggleSettings(false),
    "sidebar-toggle": toggleSidebar,
    shade: closeSidebar,
    theme: switchTheme,
    help: () => $("shortcuts").showModal(),
    "model-retry": loadModels,
  })) $(id).addEventListener("click", act);
  $("model").addEventListener("change", choose);
  $("adapter").addEventListener("change", choose);
  addEventListener("keydown", onKey);
  addEventListener("hashchange", route);
  addEventListener("pagehide", () => chat.isRunning(current.id) && store.save(current));
  drawTheme();
  route();
  loadModels().then(() => $("profile").hidden || profile.refresh(current.model));
  if (!NARROW.matches) $("prompt").focus();
}

start();
