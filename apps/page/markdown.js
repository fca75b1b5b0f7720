// Markdown to elements, without any HTML on the way: what looks like a tag in the text stays text.
//
// Blocks: headings, paragraphs, fenced code, lists, quotes, tables, rules. Inline: code, bold, italic, struck out, links
// (http and https only). Formulas ($...$, $$...$$, \(...\), \[...\]) are left as they are written.

import { copy, el, icon } from "./dom.js";
import { highlighted } from "./highlight.js";

const MOST_DEPTH = 8; // of lists, quotes and emphasis in each other: a reply may nest without end
const FENCE = /^( {0,3})(`{3,}|~{3,})\s{0,8}([^`\s]{0,40})[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})\s(.*)$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])(\s+|$)(.*)$/;
const QUOTE = /^ {0,3}> ?/;

// Draw `text` into `node`; blocks that have not changed since the last time keep their elements.
export function render(node, text) {
  const blocks = split(text.split("\n"));
  const before = drawn.get(node) ?? [];
  let same = 0;
  while (same < blocks.length && same < before.length && blocks[same].source === before[same]) same += 1;
  while (node.childNodes.length > same) node.lastChild.remove();
  node.append(...blocks.slice(same).map((block) => element(block, 0)));
  drawn.set(node, blocks.map((block) => block.source));
}

const drawn = new WeakMap();

// Lines to blocks {kind, source, ...}; `source` tells whether a block has changed.
function split(lines) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const [block, next] = taken(lines, at);
    block.source = `${block.kind}\n${lines.slice(at, next).join("\n")}`;
    blocks.push(block);
    at = next;
  }
  return blocks;
}

function taken(lines, at) {
  const line = lines[at];
  const fence = FENCE.exec(line);
  if (fence) return code(lines, at, fence);
  const heading = HEADING.exec(line);
  if (heading) return [{ kind: "heading", level: heading[1].length, text: unclosed(heading[2].trim()) }, at + 1];
  if (RULE.test(line)) return [{ kind: "rule" }, at + 1];
  if (QUOTE.test(line)) return quote(lines, at);
  if (ITEM.test(line)) return list(lines, at);
  if (/^\s*(\$\$|\\\[)/.test(line)) return formula(lines, at);
  if (line.includes("|") && isDivider(lines[at + 1] ?? "")) return table(lines, at);
  let end = at + 1;
  while (end < lines.length && lines[end].trim() && !interrupts(lines[end])) end += 1;
  return [{ kind: "paragraph", text: lines.slice(at, end).join("\n") }, end];
}

// "Title ##" to "Title"
function unclosed(title) {
  let end = title.length;
  while (title[end - 1] === "#") end -= 1;
  return end === 0 || /\s/.test(title[end - 1]) ? title.slice(0, end).trimEnd() : title;
}

function isDivider(line) {
  const inside = line.trim().replace(/^\|/, "").replace(/\|$/, "");
  return line.includes("|") && inside.split("|").every((part) => /^:?-+:?$/.test(part.trim()));
}

function interrupts(line) {
  const item = ITEM.exec(line);
  const listed = item && item[4].trim() && (!/\d/.test(item[2]) || /^1[.)]$/.test(item[2]));
  return listed || FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line);
}

function code(lines, at, [, indent, mark, language]) {
  let end = at + 1;
  const closes = (line) => line.trim().startsWith(mark) && !line.trim().replaceAll(mark[0], "");
  while (end < lines.length && !closes(lines[end])) end += 1;
  const strip = new RegExp(`^ {0,${indent.length}}`);
  const text = lines.slice(at + 1, end).map((line) => line.replace(strip, "")).join("\n");
  return [{ kind: "code", language, text }, Math.min(end + 1, lines.length)];
}

function quote(lines, at) {
  let end = at;
  while (end < lines.length && lines[end].trim() && (QUOTE.test(lines[end]) || !interrupts(lines[end]))) end += 1;
  return [{ kind: "quote", lines: lines.slice(at, end).map((line) => line.replace(QUOTE, "")) }, end];
}

function formula(lines, at) {
  const closer = lines[at].trim().startsWith("$$") ? "$$" : "\\]";
  const first = lines[at].trim().slice(2);
  let end = at;
  if (!first.includes(closer)) {
    end += 1;
    while (end < lines.length && lines[end].trim() && !lines[end].includes(closer)) end += 1;
  }
  return [{ kind: "formula", text: lines.slice(at, end + 1).join("\n").trim() }, Math.min(end + 1, lines.length)];
}

// Items of one list: each has the lines that are indented under its first.
function list(lines, at) {
  const [, indent, mark] = ITEM.exec(lines[at]);
  const ordered = /\d/.test(mark);
  const kin = (item) => item && /\d/.test(item[2]) === ordered && item[2].at(-1) === mark.at(-1);
  const items = [];
  let end = at;
  let inner = 0;
  while (end < lines.length) {
    const line = lines[end];
    const item = ITEM.exec(line);
    const depth = line.length - line.trimStart().length;
    if (item && depth < indent.length + 2 && (!items.length || depth < inner) && !RULE.test(line)) {
      if (!kin(item)) break;
      inner = item[1].length + item[2].length + Math.min(item[3].length || 1, 4);
      items.push([item[4]]);
    } else if (!line.trim()) {
      while (end + 1 < lines.length && !lines[end + 1].trim()) end += 1;
      const next = lines[end + 1] ?? "";
      const below = next.length - next.trimStart().length;
      if (below <= indent.length && !kin(ITEM.exec(next))) break;
      items.at(-1).push("");
    } else if (depth > indent.length || !(interrupts(line) || !lines[end - 1].trim())) {
      items.at(-1).push(line.slice(Math.min(depth, inner)));
    } else break;
    end += 1;
  }
  return [{ kind: "list", ordered, start: Number.parseInt(mark, 10), items }, end];
}

function table(lines, at) {
  const cells = (line) => {
    const parts = line.trim().replace(/^\|/, "").match(/(?:\\\||`[^`]*`|[^|])+|(?=\|\|)/g) ?? [];
    return parts.map((part) => part.trim().replaceAll("\\|", "|")).filter((part, place) => part || place < parts.length - 1);
  };
  const aligned = cells(lines[at + 1]).map((part) => {
    const ends = [part.startsWith(":"), part.endsWith(":")];
    return ends[0] && ends[1] ? "center" : ends[1] ? "end" : "start";
  });
  let end = at + 2;
  while (end < lines.length && lines[end].trim() && lines[end].includes("|")) end += 1;
  return [{ kind: "table", head: cells(lines[at]), rows: lines.slice(at + 2, end).map(cells), aligned }, end];
}

const MAKERS = {
  heading: (block) => el(`h${Math.min(block.level + 2, 6)}`, {}, inline(block.text)),
  paragraph: (block) => el("p", {}, inline(block.text.trim())),
  formula: (block) => el("p", { class: "formula" }, block.text),
  rule: () => el("hr"),
  code: codeBlock,
  quote: (block, depth) => el("blockquote", {}, nested(block.lines, depth)),
  list: (block, depth) => {
    const start = block.ordered && block.start !== 1 ? block.start : null;
    return el(block.ordered ? "ol" : "ul", { start }, block.items.map((lines) => el("li", {}, nested(lines, depth, true))));
  },
  table: (block) => {
    const row = (tag, cells) =>
      el("tr", {}, block.aligned.map((align, place) => el(tag, { class: `to-${align}` }, inline(cells[place] ?? ""))));
    const head = el("thead", {}, row("th", block.head));
    const body = el("tbody", {}, block.rows.map((cells) => row("td", cells)));
    return el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Table" }, el("table", {}, head, body));
  },
};

function element(block, depth) {
  return MAKERS[block.kind](block, depth);
}

function nested(lines, depth, tight = false) {
  if (depth >= MOST_DEPTH) return [el("p", {}, lines.join("\n"))];
  return split(lines).map((block) =>
    tight && block.kind === "paragraph" ? el("span", { class: "tight" }, inline(block.text.trim())) : element(block, depth + 1),
  );
}

function codeBlock(block) {
  const button = el("button", { type: "button", class: "ghost small", "aria-label": "Copy code" }, icon("copy"), "Copy");
  button.addEventListener("click", () => copy(block.text, button));
  const label = block.language || "text";
  const body = el("pre", { tabindex: "0", "aria-label": `Code, ${label}` }, el("code", {}, highlighted(block.text, block.language)));
  return el("figure", { class: "code" }, el("figcaption", {}, el("span", {}, label), button), body);
}

const ESCAPE = /\\([\\`*_{}[\]()#+\-.!~|<>$])/y;
const TICKS = /(`+)(?!`)/y;
const LINK = /!?\[([^[\]\n]{0,400})\]\(\s*<?([^\s<>()]{1,2000}(?:\([^\s<>()]{0,400}\)[^\s<>()]{0,400}){0,4})>?(?:\s+"[^"\n]{0,400}")?\s*\)/y;
const ADDRESS = /<?(https?:\/\/[^\s<>"`]{1,2000})>?/iy;
const FORMULA = /\$\$[^$]{1,2000}\$\$|\$(?![\s\d])[^$\n]{0,400}?[^$\s\\]\$(?!\d)|\\\((?:(?!\\\)).){1,2000}\\\)|\\\[(?:(?!\\\])[^]){1,2000}\\\]/y;
const MARKS = [["**", "strong"], ["__", "strong"], ["~~", "s"], ["*", "em"], ["_", "em"]];

// One run of text to nodes. Every pattern is bounded, and a mark without an end is looked for once.
export function inline(text, depth = 0, linked = false) {
  const nodes = [];
  const state = { depth, linked, endless: new Set() };
  let plain = "";
  let at = 0;
  while (at < text.length) {
    const [node, length] = special(text, at, state) ?? [text[at], 1];
    at += length;
    if (typeof node === "string") {
      plain += node;
      continue;
    }
    if (plain) nodes.push(plain);
    plain = "";
    nodes.push(node);
  }
  if (plain) nodes.push(plain);
  return nodes;
}

// [node or text, length] of what begins at `at`, or null for an ordinary character.
function special(text, at, state) {
  const first = text[at];
  if (!"\\`[!<hH$*_~".includes(first)) return null;
  const formula = first === "$" || first === "\\" ? match(FORMULA, text, at) : null;
  if (formula) return [formula[0], formula[0].length];
  if (first === "\\") {
    const escaped = match(ESCAPE, text, at);
    return escaped && [escaped[1], 2];
  }
  if (first === "`") return codeSpan(text, at, state.endless);
  if ("*_~".includes(first)) return state.depth < MOST_DEPTH ? emphasis(text, at, state) : null;
  if (state.linked || first === "$") return null;
  return first === "[" || first === "!" ? link(match(LINK, text, at), state) : address(text, at);
}

function codeSpan(text, at, endless) {
  const [ticks] = match(TICKS, text, at) ?? ["`"];
  if (endless.has(ticks)) return [ticks, ticks.length];
  let end = at + ticks.length;
  for (;;) {
    end = text.indexOf(ticks, end);
    if (end < 0) {
      endless.add(ticks);
      return [ticks, ticks.length];
    }
    if (text[end + ticks.length] !== "`") break;
    while (text[end] === "`") end += 1;
  }
  const inside = text.slice(at + ticks.length, end);
  const shown = /^ .*[^ ].* $/.test(inside) ? inside.slice(1, -1) : inside;
  return [el("code", {}, shown), end + ticks.length - at];
}

function link(found, state) {
  if (!found) return null;
  const [whole, label, to] = found;
  return [anchor(to, inline(label || to, state.depth + 1, true)) ?? whole, whole.length];
}

function address(text, at) {
  if (text[at] !== "<" && /\w/.test(text[at - 1] ?? "")) return null;
  const found = match(ADDRESS, text, at);
  if (!found) return null;
  if (text[at] === "<") return found[0].endsWith(">") ? [anchor(found[1], [found[1]]) ?? found[0], found[0].length] : null;
  let to = found[1].replace(/[.,;:!?'*_~]+$/, "");
  while (to.endsWith(")") && to.split(")").length > to.split("(").length) to = to.slice(0, -1);
  return [anchor(to, [to]) ?? to, to.length];
}

function anchor(to, children) {
  if (!/^https?:\/\//i.test(to) || !URL.canParse(to)) return null;
  const url = new URL(to);
  if (url.protocol !== "http:" && url.protocol !== "https:") return null;
  return el("a", { href: url.href, target: "_blank", rel: "noopener noreferrer", title: url.href }, children);
}

function emphasis(text, at, { depth, linked, endless }) {
  for (const [mark, tag] of MARKS) {
    if (!text.startsWith(mark, at) || endless.has(mark)) continue;
    const start = at + mark.length;
    if (/\s/.test(text[start] ?? " ") || (mark[0] === "_" && /\w/.test(text[at - 1] ?? ""))) continue;
    const end = closing(text, mark, start + 1);
    if (end < 0) {
      endless.add(mark);
      continue;
    }
    return [el(tag, {}, inline(text.slice(start, end), depth + 1, linked)), end + mark.length - at];
  }
  return null;
}

function closing(text, mark, from) {
  for (let end = text.indexOf(mark, from); end >= 0; end = text.indexOf(mark, end + 1)) {
    if (/[\s\\]/.test(text[end - 1])) continue;
    if (mark[0] === "_" && /\w/.test(text[end + mark.length] ?? "")) continue;
    if (mark.length === 1 && text[end + 1] === mark) {
      end += 1; // a double mark is another's
      continue;
    }
    while (mark.length === 2 && text[end + 2] === mark[0]) end += 1; // ***both***
    return end;
  }
  return -1;
}

function match(pattern, text, at) {
  pattern.lastIndex = at;
  return pattern.exec(text);
}
