// The second view: what the model is, what this machine should do with it, and what it does.

import { ApiError, getJson } from "./api.js";
import { chart } from "./chart.js";
import { counters, facts } from "./facts.js";
import { $, bytes, count, el, icon, isNumber, rate, seconds } from "./dom.js";

const EVERY = 2000; // ms between looks at the server's counters
let polling = 0;
let asked = "";

export async function show(model) {
  $("profile").hidden = false;
  startPolling();
  if (!model || asked === model) return;
  asked = model;
  const box = $("profile-body");
  box.setAttribute("aria-busy", "true");
  try {
    const found = await getJson(`rlkit/profile/${encodeURIComponent(model)}`);
    if (asked === model) box.replaceChildren(...sections(facts(found)));
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    if (asked === model) box.replaceChildren(failure(error, () => refresh(model)));
  } finally {
    box.setAttribute("aria-busy", "false");
  }
}

// Measured speeds change with every reply, so the next look asks again.
export function hide() {
  $("profile").hidden = true;
  clearTimeout(polling);
  polling = 0;
  asked = "";
}

export function refresh(model) {
  asked = "";
  return show(model);
}

function failure(error, retry) {
  return el("div", { class: "failure", role: "alert" }, icon("alert"), el("span", {}, error.message),
    el("button", { type: "button", class: "plain", onclick: retry }, icon("again"), "Try again"));
}

function startPolling() {
  clearTimeout(polling);
  const look = async () => {
    const mine = polling;
    const more = document.hidden || (await poll());
    if (more && mine === polling) polling = setTimeout(look, EVERY); // else hidden, or begun anew, meanwhile
  };
  polling = setTimeout(look, 0);
}

// False where the server wants a key that the user does not give: it is not asked for again and again.
async function poll() {
  try {
    $("stats").replaceChildren(...tiles(counters(await getJson("rlkit/stats"))));
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    $("stats").replaceChildren(el("p", { class: "note" }, error.message));
    return error.status !== 401;
  }
  return true;
}

function tiles({ active, waiting, failed, tokens, prompt_tokens, reused_tokens }) {
  const share = prompt_tokens ? `${Math.round((100 * reused_tokens) / prompt_tokens)} %` : "–";
  return [
    tile("active", count(active), "replies right now"),
    tile("waiting", count(waiting), "in the queue"),
    tile("written", count(tokens), "tokens since the start"),
    tile("read", count(prompt_tokens), "prompt tokens"),
    tile("reused", share, "of them, from the cache"),
    tile("failed", count(failed), "requests"),
  ];
}

function tile(name, value, note) {
  return el("div", { class: "tile" }, el("dt", {}, name), el("dd", {}, value), note && el("dd", { class: "note" }, note));
}

function sections(about) {
  return [model(about), accuracy(about.divergence), speed(about)];
}

function section(title, note, ...children) {
  return el("section", { class: "card" }, el("h2", {}, title), note && el("p", { class: "note" }, note), children);
}

function model({ name, rows, kinds: found }) {
  const shown = [
    ["recipe", rows.recipe],
    ["parameters", isNumber(rows.parameters) && large(rows.parameters)],
    ["size", isNumber(rows.nbytes) && bytes(rows.nbytes)],
    ["bits per weight", isNumber(rows.bits) && rows.bits.toFixed(2)],
    ["context", isNumber(rows.context) && `${count(rows.context)} tokens`],
    ["target", rows.target],
    ["made of", rows.source],
    ["made on", rows.created],
  ].filter(([, value]) => value);
  const list = el("dl", { class: "facts" }, shown.map(([label, value]) => el("div", {}, el("dt", {}, label), el("dd", {}, String(value)))));
  return section(name, shown.length ? null : "The bundle has no rlkit.json, so nothing is known about it.", list, found.length > 0 && kinds(found));
}

function large(value) {
  return value >= 1e9 ? `${(value / 1e9).toPrecision(3)} billion` : `${(value / 1e6).toPrecision(3)} million`;
}

// One bar for all bytes, a row for each kind of tensor.
function kinds(sorted) {
  const whole = sorted.reduce((sum, kind) => sum + kind.nbytes, 0) || 1;
  const part = (kind, place) => {
    const piece = el("span", { class: `piece hue-${place % 8}`, title: `${kind.kind}: ${bytes(kind.nbytes)}` });
    piece.style.flexGrow = String(kind.nbytes / whole);
    return piece;
  };
  const rows = sorted.map((kind, place) => {
    const share = (100 * kind.nbytes) / whole;
    const cells = [`${[...kind.widths].sort((a, b) => a - b).join(", ")} bit`, bytes(kind.nbytes), `${share < 10 ? share.toFixed(1) : Math.round(share)} %`];
    const named = el("th", { scope: "row" }, el("span", { class: `dot hue-${place % 8}` }), String(kind.kind).replaceAll("_", " "));
    return el("tr", {}, named, cells.map((cell) => el("td", {}, cell)));
  });
  return el("div", {}, el("h3", {}, "Where the bytes are"), el("div", { class: "pieces", "aria-hidden": "true" }, sorted.map(part)),
    el("div", { class: "scroll" }, el("table", { class: "kinds" }, el("tbody", {}, rows))));
}

function accuracy(divergence) {
  if (!divergence) return section("Accuracy", "How far this file is from the original has not been measured.");
  const { kl_mean, kl_stderr, top1_agreement, perplexity_original, perplexity_other, tokens, reference } = divergence;
  const shown = [
    isNumber(top1_agreement) && tile("same likeliest token", `${(100 * top1_agreement).toFixed(1)} %`, "of the positions compared"),
    isNumber(kl_mean) && tile("KL divergence", kl_mean.toFixed(4), `nats per token${isNumber(kl_stderr) ? `, ± ${kl_stderr.toFixed(4)}` : ""}`),
    isNumber(perplexity_original) && tile("perplexity before", perplexity_original.toFixed(2), "of the model it was made of"),
    isNumber(perplexity_other) && tile("perplexity now", perplexity_other.toFixed(2), "of this file"),
  ].filter(Boolean);
  const against = reference?.kind === "checkpoint" ? "the checkpoint it was made from, not the original" : "the original model";
  return section("Accuracy", `Against ${against}${isNumber(tokens) ? `, over ${count(tokens)} tokens` : ""}.`, el("dl", { class: "tiles" }, shown));
}

function speed({ forecast, missing, measured }) {
  const promised = forecast ? `Forecast for ${[forecast.place, forecast.label].filter(Boolean).join(", ")}.` : `There is no forecast: ${missing}.`;
  const known = measured ? ` Measured by this server in its newest ${measured.replies === 1 ? "reply" : `${measured.replies} replies`}.` : "";
  const last = measured?.last ? comparison(measured.last, forecast) : el("p", { class: "hint" }, "Nothing is measured yet: chat with the model, then look again.");
  const of = (points, name, at) => (points ?? []).filter((point) => point[at] > 0 && point[name] > 0).map((point) => [point[at], point[name]]);
  const both = (name, at = "context") =>
    [
      { name: "forecast", kind: "line", points: of(forecast?.points, name, "context") },
      { name: "measured here", kind: "dots", points: of(measured?.points, name, at) },
    ].filter(({ points }) => points.length);
  const charts = [
    { title: "Tokens per second", series: both("tokens_per_s"), format: rate },
    { title: "Time per token", series: both("tpot_seconds"), format: seconds },
    { title: "Time to the first token", series: both("ttft_seconds", "prompt"), format: seconds, log: true },
  ].filter(({ series }) => series.length);
  return section("Speed", promised + known, last, charts.length > 0 && el("div", { class: "charts" }, charts.map(chart)));
}

// The newest reply beside the forecast at the nearest context.
function comparison(last, forecast) {
  const distance = ({ context }) => Math.abs(context - last.prompt_tokens);
  const nearest = [...(forecast?.points ?? [])].sort((a, b) => distance(a) - distance(b))[0];
  const cell = (name, value, format, promised) => {
    if (!isNumber(value)) return null;
    return tile(name, format(value), isNumber(promised) && `forecast ${format(promised)} at ${count(nearest.context)}`);
  };
  const read = last.reused_tokens ? `${count(last.reused_tokens)} of them reused` : "";
  return el("dl", { class: "tiles", "aria-label": "The newest reply" }, [
    cell("tokens/s", last.tokens_per_s, rate, nearest?.tokens_per_s),
    cell("per token", last.tokens_per_s > 0 ? 1 / last.tokens_per_s : null, seconds, nearest?.tpot_seconds),
    cell("first token", last.first_token_seconds, seconds, last.reused_tokens ? null : nearest?.ttft_seconds), // of whole prompts
    tile("prompt", `${count(last.prompt_tokens)} tokens`, read),
  ]);
}
