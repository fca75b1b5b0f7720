// Elements made in code. Text only ever arrives as text nodes, so nothing a model says can become markup.

const SVG = document.querySelector("svg").namespaceURI;

export const $ = (id) => document.getElementById(id);

// el("button", {class: "ghost", onclick: stop, "aria-label": "Stop"}, icon("stop"), "Stop")
export function el(tag, props = {}, ...children) {
  return filled(document.createElement(tag), props, children);
}

export function svg(tag, props = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), props, children);
}

export function icon(name) {
  return svg("svg", { class: "icon", "aria-hidden": "true" }, svg("use", { href: `#icon-${name}` }));
}

export function iconButton(name, label, onclick, props = {}) {
  return el("button", { type: "button", class: "ghost", title: label, "aria-label": label, onclick, ...props }, icon(name));
}

function filled(node, props, children) {
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

// A message at the foot of the page; `action` is [label, function], such as Undo.
let fading = 0;
export function toast(text, action = null) {
  const box = $("toast");
  clearTimeout(fading);
  const hide = () => box.classList.remove("shown");
  const button = action && el("button", { type: "button", class: "link", onclick: () => (hide(), action[1]()) }, action[0]);
  box.replaceChildren(el("span", {}, text), ...(button ? [button] : []));
  box.classList.add("shown");
  fading = setTimeout(hide, action ? 8000 : 3500);
}

// What a screen reader says; the same words twice are said twice.
export function announce(text) {
  const live = $("live");
  live.textContent = "";
  requestAnimationFrame(() => (live.textContent = text));
}

export async function copy(text, button = null) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    if (!copiedByHand(text)) return toast("The browser does not let this page copy; select the text instead");
  }
  announce("Copied");
  if (!button) return toast("Copied");
  const before = [...button.childNodes];
  button.replaceChildren(icon("check"));
  setTimeout(() => button.replaceChildren(...before), 1200);
}

// Pages served over plain http to another machine have no clipboard of their own.
function copiedByHand(text) {
  const area = el("textarea", { class: "unseen", readonly: true, "aria-hidden": "true" });
  const focused = document.activeElement;
  area.value = text;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  focused?.focus();
  return done;
}

export function download(name, text) {
  const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  el("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
}

const UNITS = ["B", "kB", "MB", "GB", "TB"];
export function bytes(count) {
  let value = count;
  let unit = 0;
  while (value >= 1000 && unit < UNITS.length - 1) [value, unit] = [value / 1000, unit + 1];
  return `${unit && value < 100 ? value.toPrecision(3) : Math.round(value)} ${UNITS[unit]}`;
}

export function seconds(value) {
  if (value < 0.9995) return `${value < 0.0995 ? significant(1000 * value) : Math.round(1000 * value)} ms`;
  return value < 99.5 ? `${significant(value)} s` : `${Math.round(value)} s`;
}

const significant = (value) => (value === 0 ? "0" : value.toPrecision(3));
export const count = (value) => Math.round(value).toLocaleString("en");
export const rate = (value) => (value < 99.95 ? significant(value) : count(value));
export const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
