// The list of conversations.

import { $, download, el, iconButton, toast } from "./dom.js";
import * as store from "./store.js";

const DAY = 86400000;
let act = {};

// `actions`: {open(id), opened(): id or null, gone(id)}
export function connect(actions) {
  act = actions;
  $("export").addEventListener("click", exportAll);
  $("import").addEventListener("click", () => $("import-file").click());
  $("import-file").addEventListener("change", importFile);
  $("filter").addEventListener("input", draw);
}

export function draw() {
  const wanted = $("filter").value.trim().toLowerCase();
  const all = store.list();
  const found = wanted ? all.filter((conversation) => matches(conversation, wanted)) : all;
  $("filter").hidden = all.length < 6 && !wanted;
  const rows = [];
  let group = "";
  for (const conversation of found) {
    const named = age(conversation.updated);
    if (named !== group) rows.push(el("li", { class: "group", role: "presentation" }, (group = named)));
    rows.push(row(conversation));
  }
  if (!found.length) rows.push(el("li", { class: "nothing" }, wanted ? "Nothing found" : "Your conversations stay in this browser."));
  $("conversations").replaceChildren(...rows);
}

export function step(by) {
  const all = store.list();
  const at = all.findIndex((conversation) => conversation.id === act.opened());
  const next = all[Math.max(0, Math.min(all.length - 1, at + by))];
  if (next) act.open(next.id);
}

export function removeWithUndo(conversation) {
  store.remove(conversation.id);
  act.gone(conversation.id);
  draw();
  toast(`Deleted “${conversation.title || "New chat"}”`, ["Undo", () => {
    store.save(conversation, { touch: false });
    draw();
    act.open(conversation.id);
  }]);
}

function row(conversation) {
  const title = conversation.title || "New chat";
  const current = conversation.id === act.opened();
  const link = el("a", { href: `#/chat/${conversation.id}`, "aria-current": current ? "page" : null, title }, title);
  const item = el("li", { class: current ? "current" : null }, link);
  item.append(
    iconButton("edit", `Rename “${title}”`, () => rename(conversation, item)),
    iconButton("trash", `Delete “${title}”`, () => removeWithUndo(conversation)),
  );
  return item;
}

function rename(conversation, item) {
  const input = el("input", { type: "text", "aria-label": "Name of the conversation", maxlength: 120 });
  let done = false;
  const finish = (kept) => {
    if (done) return;
    done = true;
    if (kept && input.value.trim()) {
      conversation.title = input.value.trim();
      store.save(conversation, { touch: false });
    }
    draw();
  };
  input.value = conversation.title;
  input.addEventListener("blur", () => finish(true));
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter") finish(true);
    if (event.key === "Escape") (event.stopPropagation(), finish(false));
  });
  item.replaceChildren(input);
  input.select();
  input.focus();
}

function matches(conversation, wanted) {
  const has = (text) => text.toLowerCase().includes(wanted);
  return has(conversation.title) || conversation.messages.some((message) => has(message.content));
}

function age(when) {
  const midnight = new Date().setHours(0, 0, 0, 0);
  if (when >= midnight) return "Today";
  if (when >= midnight - DAY) return "Yesterday";
  return when >= midnight - 7 * DAY ? "This week" : "Earlier";
}

function exportAll() {
  if (!store.list().length) return toast("There is no conversation yet");
  download(`rlkit-conversations-${new Date().toISOString().slice(0, 10)}.json`, store.exported());
}

async function importFile() {
  const [file] = $("import-file").files;
  if (!file) return;
  try {
    const number = store.imported(await file.text());
    toast(number === 1 ? "1 conversation imported" : `${number} conversations imported`);
  } catch (error) {
    toast(`${file.name} cannot be imported: ${error.message}`);
  }
  $("import-file").value = "";
  draw();
}
