// What the server says about a model, in the form that the profile shows; what it leaves out is left out here too.

import { isNumber } from "./dom.js";

export function facts(found) {
  const bundle = found.bundle ?? {};
  const tensors = bundle.plan?.tensors ?? [];
  const parameters = found.parameters ?? bundle.source?.parameters;
  const nbytes = bundle.nbytes ?? bundle.plan?.nbytes;
  return {
    name: found.model,
    rows: {
      recipe: bundle.recipe?.name,
      parameters,
      nbytes: found.nbytes ?? nbytes,
      bits: found.bits_per_weight ?? bitsPerWeight(tensors, parameters),
      context: found.context_length,
      target: bundle.target,
      source: named(bundle.source),
      created: bundle.created,
    },
    kinds: kinds(tensors),
    divergence: bundle.divergence ?? null,
    forecast: forecast(found.forecast),
    missing: found.forecast_missing ?? "the server made none",
    measured: measured(found.measured),
  };
}

// Kinds of tensors with their widths and bytes, the largest first.
function kinds(tensors) {
  const made = new Map();
  for (const { kind, bits, nbytes } of tensors) {
    const one = made.get(kind) ?? { kind, widths: new Set(), nbytes: 0 };
    one.widths.add(bits);
    one.nbytes += nbytes;
    made.set(kind, one);
  }
  return [...made.values()].sort((a, b) => b.nbytes - a.nbytes);
}

function bitsPerWeight(tensors, parameters) {
  if (!parameters || !tensors.length) return null;
  return (8 * tensors.reduce((sum, { kind, nbytes }) => sum + (kind === "other" ? 0 : nbytes), 0)) / parameters;
}

// A model's own name, not the folders of the machine it was made on.
function named(source) {
  return (typeof source === "string" ? source : source?.reference)?.split(/[\\/]/).at(-1);
}

function forecast(made) {
  if (!made) return null;
  const one = {
    context: made.workload?.prompt_tokens,
    ttft_seconds: made.roofline?.ttft_seconds,
    tpot_seconds: made.roofline?.tpot_seconds,
    tokens_per_s: made.tokens_per_s,
  };
  const points = (made.points ?? [one]).filter(({ context, tokens_per_s }) => isNumber(context) && isNumber(tokens_per_s));
  return { place: made.decode?.place, label: made.label, basis: made.expected?.basis, points };
}

function measured(made) {
  if (!made) return null;
  const newest = (made.newest ?? [made.last]).filter(Boolean);
  const points = newest.map((timing) => ({
    context: timing.prompt_tokens + timing.new_tokens / 2, // where half of its tokens were made
    ttft_seconds: timing.reused_tokens ? null : timing.first_token_seconds, // else it read less than its prompt
    prompt: timing.prompt_tokens,
    tokens_per_s: timing.tokens_per_s,
    tpot_seconds: timing.tokens_per_s ? 1 / timing.tokens_per_s : null,
  }));
  return { replies: made.replies ?? newest.length, last: newest.at(-1) ?? null, points };
}

// The counters of all engines together.
export function counters(stats) {
  const all = (stats.models ?? []).map(({ engine }) => engine ?? {});
  const sum = (name) => all.reduce((total, one) => total + (one[name] ?? 0), 0);
  const names = ["active", "waiting", "failed", "tokens", "prompt_tokens", "reused_tokens"];
  return Object.fromEntries(names.map((name) => [name, sum(name)]));
}
