// Colours for code, by what most languages share: comments, strings, numbers, words that they reserve.

import { el } from "./dom.js";

const MOST_CHARACTERS = 30000;
const HASH = /^(py|python|sh|bash|zsh|shell|console|rb|ruby|r|yaml|yml|toml|perl|make|makefile|dockerfile|ini|conf|elixir|julia)$/i;
const DASHES = /^(sql|lua|haskell|hs|ada|vhdl)$/i;
const PLAIN = /^(|text|txt|plain|plaintext|markdown|md|output|log|diff|csv)$/i;
const WORDS = new Set(
  (
    "and as assert async await auto begin bool boolean break by byte case catch char class const continue create def default del " +
    "delete do done double echo elif else elseif end enum esac except export extends extern false False fi final finally float fn for " +
    "foreach from func function global go goto group if impl import in include inline insert instanceof int interface into is join " +
    "lambda let limit local long loop match mod module mut namespace new nil None nonlocal not null nullptr of on or order override " +
    "package pass private protected pub public raise ref require return select self set short signed sizeof static std str string " +
    "struct super switch table template then this throw trait true True try type typedef typeof undefined union unsigned update use " +
    "using values var virtual void where while with yield"
  ).split(" "),
);
const STRING = String.raw`"""[^]*?(?:"""|$)|'''[^]*?(?:'''|$)|"(?:\\.|[^"\\\n])*"?|'(?:\\.|[^'\\\n])*'|${"`"}(?:\\[^]|[^${"`"}\\])*${"`"}?`;
const NUMBER = String.raw`\b(?:0[xXbBoO][\da-fA-F_]+|\d[\d_]*(?:\.\d+)?(?:[eE][+-]?\d+)?)\b`;
const WORD = String.raw`[A-Za-z_$][\w$]*`;

// Text to nodes: strings, and spans with a class.
export function highlighted(text, language) {
  if (PLAIN.test(language) || text.length > MOST_CHARACTERS) return [text];
  const upper = /^sql$/i.test(language);
  const pattern = new RegExp(`(${comment(language)})|(${STRING})|(${NUMBER})|(${WORD})(\\s*\\()?`, "g");
  const nodes = [];
  let from = 0;
  const put = (name, at, shown) => {
    if (at > from) nodes.push(text.slice(from, at));
    nodes.push(el("span", { class: name }, shown));
    from = at + shown.length;
  };
  for (const found of text.matchAll(pattern)) {
    const [, remark, quoted, number, word, called] = found;
    if (remark) put("remark", found.index, remark);
    else if (quoted) put("quoted", found.index, quoted);
    else if (number) put("number", found.index, number);
    else if (WORDS.has(upper ? word.toLowerCase() : word)) put("word", found.index, word);
    else if (called) put("called", found.index, word);
  }
  if (from < text.length) nodes.push(text.slice(from));
  return nodes;
}

function comment(language) {
  if (HASH.test(language)) return "#[^\\n]*";
  if (DASHES.test(language)) return "--[^\\n]*";
  if (/^(html|xml|svg)$/i.test(language)) return "<!--[^]*?(?:-->|$)";
  if (/^css$/i.test(language)) return "/\\*[^]*?(?:\\*/|$)";
  return "//[^\\n]*|/\\*[^]*?(?:\\*/|$)";
}
