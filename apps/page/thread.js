// The messages of the conversation that is shown.

import { isRunning, parts } from "./chat.js";
import { $, copy, count, el, icon, iconButton, isNumber, rate, seconds } from "./dom.js";
import { render } from "./markdown.js";

const NEAR = 80; // px from the end that still count as being there
const views = new Map(); // message -> its parts
const waiting = new Set();
let shown = null;
let act = {};
let following = true;

// `actions`: {retry(), edit(message, text), suggest(text)}
export function connect(actions) {
  act = actions;
  const scroller = $("scroller");
  scroller.addEventListener("scroll", () => {
    following = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEAR;
    $("latest").hidden = following;
  }, { passive: true });
  $("latest").addEventListener("click", () => toEnd(true));
  for (const button of document.querySelectorAll("[data-suggestion]")) {
    button.addEventListener("click", () => act.suggest(button.dataset.suggestion));
  }
}

export function show(conversation) {
  shown = conversation;
  views.clear();
  waiting.clear();
  const messages = conversation?.messages ?? [];
  $("welcome").hidden = messages.length > 0;
  $("messages").replaceChildren(...messages.map((message) => made(message)));
  for (const message of messages) draw(message);
  toEnd(true);
}

// Draw what has changed of a message at the next frame; of a new one, begin it.
export function update(conversation, message) {
  if (conversation !== shown) return;
  if (!views.has(message)) {
    $("welcome").hidden = true;
    $("messages").append(made(message));
    for (const other of views.keys()) if (other !== message) draw(other);
    draw(message);
    return toEnd(message.role === "user");
  }
  if (!waiting.size) requestAnimationFrame(flush);
  waiting.add(message);
}

export function toEnd(always = false) {
  if (!always && !following) return;
  const scroller = $("scroller");
  scroller.scrollTop = scroller.scrollHeight;
  following = true;
  $("latest").hidden = true;
}

// Put a user's message into a box of its own, to be changed and sent again.
export function edit(message) {
  const view = views.get(message);
  if (!view || isRunning(shown.id)) return;
  const area = el("textarea", { "aria-label": "Edit your message", rows: Math.min(message.content.split("\n").length + 1, 12) });
  area.value = message.content;
  const back = () => {
    view.node.classList.remove("editing");
    view.body.replaceChildren(message.content);
    $("prompt").focus();
  };
  const send = () => (area.value.trim() ? act.edit(message, area.value.trim()) : back());
  area.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) (event.preventDefault(), send());
    if (event.key === "Escape") (event.stopPropagation(), back());
  });
  const cancel = el("button", { type: "button", class: "plain", onclick: back }, "Cancel");
  const go = el("button", { type: "button", class: "primary", onclick: send }, "Send again");
  view.node.classList.add("editing");
  view.body.replaceChildren(area, el("div", { class: "row end" }, cancel, go));
  area.focus();
}

function flush() {
  const messages = [...waiting];
  waiting.clear();
  messages.forEach(draw);
  toEnd();
}

function made(message) {
  const view = message.role === "user" ? userView(message) : replyView(message);
  views.set(message, view);
  return view.node;
}

function userView(message) {
  const body = el("div", { class: "bubble" }, message.content);
  const actions = el("div", { class: "actions" });
  return { body, actions, node: el("article", { class: "message user", "aria-label": "You" }, body, actions) };
}

function replyView(message) {
  const said = el("div", { class: "prose" });
  const thought = el("div", { class: "prose" });
  const label = el("span", {}, "Thoughts");
  const thoughts = el("details", { class: "thoughts", hidden: true }, el("summary", {}, icon("thought"), label), thought);
  const error = el("div", { class: "failure", role: "alert", hidden: true });
  const note = el("p", { class: "note", hidden: true });
  const actions = el("div", { class: "actions" });
  const stats = el("ul", { class: "stats", "aria-label": "How fast this reply came" });
  const who = el("div", { class: "who" }, icon("mark"), message.model || "Model");
  const foot = el("div", { class: "foot" }, actions, stats);
  const node = el("article", { class: "message reply", "aria-label": `Reply of ${message.model || "the model"}` });
  node.append(who, thoughts, said, note, error, foot);
  return { node, said, thought, thoughts, label, error, note, actions, stats };
}

function draw(message) {
  const view = views.get(message);
  if (!view) return;
  const busy = isRunning(shown.id);
  const last = message === shown.messages.findLast((other) => other.role === message.role);
  if (message.role === "user") drawUser(message, view, last && !busy);
  else drawReply(message, view, { live: last && busy, last });
}

function drawUser(message, view, editable) {
  const copying = iconButton("copy", "Copy", () => copy(message.content, copying));
  view.actions.replaceChildren(copying, ...(editable ? [iconButton("edit", "Edit and send again", () => edit(message))] : []));
}

function drawReply(message, view, { live, last }) {
  const { thought, said } = parts(message.content);
  const thinking = message.reasoning || thought;
  render(view.said, said);
  view.thoughts.hidden = !thinking;
  if (thinking) render(view.thought, thinking);
  view.label.textContent = live && !said ? "Thinking…" : "Thoughts";
  view.node.classList.toggle("live", live);
  view.node.classList.toggle("silent", live && !said && !thinking);
  view.node.setAttribute("aria-busy", String(live));
  view.note.hidden = live || !notes(message);
  view.note.textContent = notes(message);
  drawFailure(message, view, last);
  if (live) return view.actions.replaceChildren();
  const copying = iconButton("copy", "Copy", () => copy(said, copying));
  const again = iconButton("again", "Regenerate", () => act.retry());
  view.actions.replaceChildren(...(said ? [copying] : []), ...(last && message.finish !== "error" ? [again] : []));
  view.stats.replaceChildren(...statistics(message.stats ?? {}).map(([text, title]) => el("li", { title }, text)));
}

function drawFailure(message, view, last) {
  const failed = message.finish === "error";
  if (failed && view.error.hidden) {
    const retry = el("button", { type: "button", class: "plain", onclick: () => act.retry() }, icon("again"), "Try again");
    view.error.replaceChildren(icon("alert"), el("span", {}, message.error || "Something went wrong"), ...(last ? [retry] : []));
  }
  view.error.hidden = !failed;
}

function notes(message) {
  if (message.finish === "length") return "Ended at the most tokens allowed.";
  if (message.finish === "stopped") return message.content ? "Stopped." : "Stopped before the first word.";
  return message.finish === "stop" && !message.content.trim() ? "The model ended its reply without saying anything." : "";
}

function statistics(stats) {
  const lines = [];
  const { tokens_per_s, about_per_s, first_seconds, prompt_seconds, new_tokens, prompt_tokens, reused_tokens } = stats;
  if (isNumber(tokens_per_s)) lines.push([`${rate(tokens_per_s)} tokens/s`, "As the server measured it, from the second token on"]);
  else if (about_per_s) lines.push([`about ${rate(about_per_s)} pieces/s`, "As it arrived here; the server said nothing of its own"]);
  if (isNumber(first_seconds)) {
    const read = isNumber(prompt_seconds) ? `; reading the prompt took ${seconds(prompt_seconds)} of it` : "";
    lines.push([`${seconds(first_seconds)} to the first token`, `From sending to the first piece of the reply${read}`]);
  }
  if (isNumber(new_tokens)) lines.push([`${count(new_tokens)} tokens`, "Length of the reply"]);
  if (reused_tokens > 0) {
    const of = isNumber(prompt_tokens) ? ` of ${count(prompt_tokens)}` : "";
    lines.push([`${count(reused_tokens)}${of} prompt tokens reused`, "What was in the cache already and did not have to be read again"]);
  }
  return lines;
}
