// A small line chart: forecasts as lines, measurements as dots, over a logarithmic axis of contexts.

import { count, el, svg } from "./dom.js";

const HEIGHT = 250;
const EDGE = { left: 52, right: 16, top: 16, bottom: 40 };

// `series`: [{name, kind: "line" or "dots", points: [[x, y], ...]}]; `format` writes a y; `log`: also of y.
export function chart({ title, series, format, log = false, xLabel = "tokens of context" }) {
  const holder = el("div", { class: "chart" });
  const drawn = () => holder.clientWidth && holder.replaceChildren(picture({ title, series, format, log, xLabel }, holder.clientWidth));
  new ResizeObserver(drawn).observe(holder);
  const legend = el("ul", { class: "legend" }, series.map(({ name, kind }) => el("li", { class: kind }, name)));
  return el("figure", {}, el("figcaption", {}, title, legend), holder, values(series, format, xLabel));
}

function picture({ title, series, format, log, xLabel }, width) {
  const points = series.flatMap((one) => one.points);
  const xs = scale(points.map(([x]) => x), [EDGE.left, width - EDGE.right], true, true);
  const ys = scale(points.map(([, y]) => y), [HEIGHT - EDGE.bottom, EDGE.top], log, false);
  const node = svg("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, height: HEIGHT, role: "img", "aria-label": `Chart: ${title}; the values are in the table below it` });
  for (const y of ys.ticks) {
    node.append(svg("line", { class: "grid", x1: EDGE.left, x2: width - EDGE.right, y1: ys(y), y2: ys(y) }));
    node.append(svg("text", { class: "y", x: EDGE.left - 8, y: ys(y) + 4 }, short(format(y))));
  }
  const step = Math.ceil(xs.ticks.length / Math.max(1, Math.floor(width / 70)));
  xs.ticks.forEach((x, place) => {
    if ((xs.ticks.length - 1 - place) % step === 0) node.append(svg("text", { class: "x", x: xs(x), y: HEIGHT - EDGE.bottom + 18 }, count(x)));
  });
  node.append(svg("text", { class: "x label", x: (EDGE.left + width - EDGE.right) / 2, y: HEIGHT - 4 }, xLabel));
  for (const { kind, points: own } of series) {
    if (kind === "line" && own.length > 1) node.append(svg("polyline", { points: own.map(([x, y]) => `${xs(x)},${ys(y)}`).join(" ") }));
    const radius = kind === "line" ? 3 : 4.5;
    const says = ([x, y]) => svg("title", {}, `${count(x)} ${xLabel}: ${format(y)}`);
    node.append(...own.map((point) => svg("circle", { class: kind, cx: xs(point[0]), cy: ys(point[1]), r: radius }, says(point))));
  }
  return node;
}

// Values to positions; its ticks are round numbers, powers of two where `binary`.
function scale(values, [from, to], log, binary) {
  let low = Math.min(...values);
  let high = Math.max(...values);
  const ticks = [];
  if (binary) {
    for (let at = 2 ** Math.floor(Math.log2(Math.max(low, 1))); at < 2 * high; at *= 2) ticks.push(at);
  } else if (log) {
    for (let at = 10 ** Math.floor(Math.log10(low)); at < 10 * high; at *= 10) ticks.push(at);
  } else {
    const step = round(high / 4 || 1);
    for (let at = 0; at < high + step; at += step) ticks.push(at);
  }
  low = ticks[0];
  high = ticks.at(-1);
  const of = log ? Math.log : (value) => value;
  const span = of(high) - of(low) || 1;
  return Object.assign((value) => from + ((of(value) - of(low)) / span) * (to - from), { ticks });
}

// "5.00 ms" to "5 ms"
const short = (text) => text.replace(/(\.\d*?)0+(?=\D|$)/, "$1").replace(/\.(?=\D|$)/, "");

function round(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].find((factor) => factor * power >= value) * power;
}

// The same in words, for whoever does not see the picture.
function values(series, format, xLabel) {
  const rows = series.flatMap(({ name, points }) => points.map(([x, y]) => el("tr", {}, [name, count(x), format(y)].map((cell) => el("td", {}, cell)))));
  const head = el("tr", {}, ["", xLabel, ""].map((cell) => el("th", {}, cell)));
  return el("details", {}, el("summary", {}, "Values"), el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Values of the chart" }, el("table", {}, el("thead", {}, head), el("tbody", {}, rows))));
}
