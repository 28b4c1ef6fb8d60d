// SPDX-License-Identifier: Apache-2.0
// Shows the data that stands in this page. No library, nothing from outside.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const colours = ["#0b6e99", "#d9730d", "#448361", "#9065b0", "#c14c8a", "#9f6b53", "#787774", "#cb912f", "#337ea9",
  "#d44c47", "#5a8f29", "#6f5bd0"];
const methods = data.rows.filter(row => row.method !== "base");
const colourOf = Object.fromEntries(methods.map((row, i) => [row.method, colours[i % colours.length]]));
const metricOf = Object.fromEntries(data.metrics.map(metric => [metric.key, metric]));
const valueOf = (row, key) => row.metrics[key] ? row.metrics[key].mean : null;

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function drawn(parent, name, attributes = {}, text = null) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== null) made.textContent = text;
  parent.append(made);
  return made;
}

function number(value, digits) {
  return value.toLocaleString("en-US", {minimumFractionDigits: digits, maximumFractionDigits: digits});
}

// Whether runs of a method differ in it at all: parameters and sizes are what they are.
const isMeasured = key => methods.some(row => row.metrics[key] && row.metrics[key].deviation > 0);

// What a method's spread does not tell apart from the best: the difference is at most both deviations together.
function isNear(one, best) {
  return Math.abs(one.mean - best.mean) <= Math.hypot(one.deviation || 0, best.deviation || 0);
}

function bestOf(key) {
  const sign = metricOf[key].less_is_better ? 1 : -1;
  return methods.map(row => row.metrics[key]).filter(Boolean).sort((a, b) => sign * (a.mean - b.mean))[0];
}

function showHead() {
  const s = data.settings;
  document.getElementById("settings").textContent =
    `${s.model} on ${s.data}: ${number(s.train_rows, 0)} training rows, ${s.validation_rows} validation rows, ` +
    `${s.test_rows} test rows; ${s.steps} steps of ${s.batch_size} rows of at most ${s.max_length} tokens; adapters with as many ` +
    `parameters as LoRA of rank ${s.rank}; base in ${s.dtype}; general text: ${s.general_texts} of ${s.general_text}. The split is ` +
    "this program's own: losses are not comparable with published scores.";
  const notes = [];
  if (s.seeds < data.least_seeds) {
    notes.push(`${s.seeds} seed${s.seeds > 1 ? "s" : ""}: too few for any claim, which takes ${data.least_seeds}.`);
  }
  if (s.quick) notes.push("A quick run: few steps and rows. It shows that all works, and not which method is better.");
  const edge = data.choices.filter(choice => choice.at_edge).map(choice => choice.method);
  if (edge.length) notes.push(`Best learning rate at the edge of those tried, so that one beyond may be better: ${edge.join(", ")}.`);
  const machines = new Set(data.runs.map(run => `${run.machine.cpu}, ${run.threads} threads, torch ${run.versions.torch}`));
  const commits = new Set(data.runs.map(run => (run.git.commit || "unknown").slice(0, 7) + (run.git.dirty ? " with changes" : "")));
  notes.push(`Made on ${[...machines].join(" and ")}; commit ${[...commits].join(", ")}.`);
  if (machines.size > 1) notes.push("Runs of several machines stand side by side: their speeds and memory are not comparable.");
  document.getElementById("notes").textContent = notes.join("\n");
}

// The table: columns know how a row is sorted, and how its cell is shown.
const columns = [
  {key: "method", label: "method", unit: "", sort: row => row.label, text: true},
  {key: "rate", label: "learning rate", unit: "chosen", sort: row => row.rate},
  {key: "seeds", label: "seeds", unit: "", sort: row => row.seeds},
  ...data.metrics.map(metric => ({...metric, sort: row => valueOf(row, metric.key), metric: true})),
];
let order = {key: "loss", down: false};

function cell(row, column) {
  if (column.key === "method") {
    const name = element("td", {"data-method": row.method});
    if (colourOf[row.method]) name.append(element("span", {class: "key", style: `background:${colourOf[row.method]}`}));
    name.append(row.label + (row.diverged ? ` (${row.diverged} diverged)` : ""));
    return name;
  }
  if (!column.metric) {
    const value = row[column.key];
    return element("td", {}, value === null ? "" : column.key === "rate" ? value.toExponential().replace("e-", "e−") : String(value));
  }
  const found = row.metrics[column.key];
  if (!found) return element("td", {"data-key": column.key}, row.diverged ? "diverged" : "");
  const made = element("td", {"data-key": column.key, "data-mean": found.mean, "data-deviation": found.deviation ?? ""});
  made.append(number(found.mean, column.digits));
  if (found.deviation !== null) made.append(element("span", {class: "spread"}, ` ± ${number(found.deviation, column.digits)}`));
  const best = bestOf(column.key);
  if (row.method !== "base" && best && isMeasured(column.key)) {
    if (found === best) made.className = "best";
    else if (isNear(found, best)) made.className = "near";
  }
  return made;
}

function showTable() {
  const column = columns.find(c => c.key === order.key);
  const sorted = [...data.rows].sort((a, b) => {
    const [x, y] = [column.sort(a), column.sort(b)];
    if (x === null || y === null) return (x === null) - (y === null);  // what has no value comes last, whatever the order
    const compared = column.text ? x.localeCompare(y) : x - y;
    return order.down ? -compared : compared;
  });
  const head = element("tr");
  for (const c of columns) {
    const sort = c.key !== order.key ? "none" : order.down ? "descending" : "ascending";
    const button = element("button", {type: "button"}, c.label);
    button.addEventListener("click", () => {
      order = {key: c.key, down: order.key === c.key ? !order.down : Boolean(c.metric && !c.less_is_better)};
      showTable();
      document.querySelector(`#table th[data-key="${c.key}"] button`).focus();
    });
    head.append(element("th", {"data-key": c.key, "aria-sort": sort, scope: "col"}, button, element("small", {}, c.unit)));
  }
  document.querySelector("#table thead").replaceChildren(head);
  document.querySelector("#table tbody").replaceChildren(
    ...sorted.map(row => element("tr", {"data-method": row.method}, ...columns.map(c => cell(row, c)))));
}

// A plot's frame: scales, grid, ticks and the names of the axes.
function frame(svg, width, height, xs, ys, xName, yName) {
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.replaceChildren();
  const box = {left: 78, right: width - 24, top: 14, bottom: height - 52};
  const scale = (values, from, to) => {
    let [low, high] = [Math.min(...values), Math.max(...values)];
    if (low === high) [low, high] = [low - Math.abs(low || 1) * 0.05, high + Math.abs(high || 1) * 0.05];
    const room = (high - low) * 0.09;
    [low, high] = [low - room, high + room];
    return {at: value => from + (value - low) / (high - low) * (to - from), low, high};
  };
  const x = scale(xs, box.left, box.right), y = scale(ys, box.bottom, box.top);
  for (const tick of ticks(x)) {
    drawn(svg, "line", {class: "grid", x1: x.at(tick), x2: x.at(tick), y1: box.top, y2: box.bottom});
    drawn(svg, "text", {class: "soft", x: x.at(tick), y: box.bottom + 18, "text-anchor": "middle"}, short(tick));
  }
  for (const tick of ticks(y)) {
    drawn(svg, "line", {class: "grid", x1: box.left, x2: box.right, y1: y.at(tick), y2: y.at(tick)});
    drawn(svg, "text", {class: "soft", x: box.left - 8, y: y.at(tick) + 4, "text-anchor": "end"}, short(tick));
  }
  drawn(svg, "text", {x: (box.left + box.right) / 2, y: height - 10, "text-anchor": "middle", class: "x-name"}, xName);
  drawn(svg, "text", {x: 0, y: 0, "text-anchor": "middle", class: "y-name",
    transform: `translate(16 ${(box.top + box.bottom) / 2}) rotate(-90)`}, yName);
  return {x, y, box};
}

function ticks(scale) {
  const span = scale.high - scale.low, rough = span / 6, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(m => m * power).find(s => span / s <= 7);
  const found = [];
  for (let i = Math.ceil(scale.low / step); i * step <= scale.high; i++) found.push(i * step);
  return found;
}

function short(value) {
  return Number(value.toPrecision(6)).toLocaleString("en-US", {maximumFractionDigits: 6});
}

const axisName = key => `${metricOf[key].label} (${metricOf[key].unit}; ${metricOf[key].less_is_better ? "less" : "more"} is better)`;

// Those that no other one beats on both axes, from left to right.
function front(points, xKey, yKey) {
  const signs = [xKey, yKey].map(key => metricOf[key].less_is_better ? 1 : -1);
  const beats = (a, b) => signs[0] * (a.x - b.x) <= 0 && signs[1] * (a.y - b.y) <= 0 && (a.x !== b.x || a.y !== b.y);
  return points.filter(p => !points.some(other => beats(other, p))).sort((a, b) => a.x - b.x || a.y - b.y);
}

function showPareto() {
  const svg = document.getElementById("pareto");
  const [xKey, yKey] = ["x-axis", "y-axis"].map(id => document.getElementById(id).value);
  const points = methods.filter(row => row.metrics[xKey] && row.metrics[yKey]).map(row => ({
    row, x: valueOf(row, xKey), y: valueOf(row, yKey),
    dx: row.metrics[xKey].deviation || 0, dy: row.metrics[yKey].deviation || 0,
  }));
  if (!points.length) return svg.replaceChildren();
  const reach = (p, a, d) => [p[a] - p[d], p[a] + p[d]];
  const {x, y, box} = frame(svg, 1100, 470, points.flatMap(p => reach(p, "x", "dx")), points.flatMap(p => reach(p, "y", "dy")),
    axisName(xKey), axisName(yKey));
  const line = front(points, xKey, yKey);
  drawn(svg, "polyline", {class: "front", points: line.map(p => `${x.at(p.x)},${y.at(p.y)}`).join(" ")});
  const labels = [];
  for (const p of points) {
    const colour = colourOf[p.row.method], [cx, cy] = [x.at(p.x), y.at(p.y)];
    drawn(svg, "line", {stroke: colour, x1: x.at(p.x - p.dx), x2: x.at(p.x + p.dx), y1: cy, y2: cy});
    drawn(svg, "line", {stroke: colour, x1: cx, x2: cx, y1: y.at(p.y - p.dy), y2: y.at(p.y + p.dy)});
    const dot = drawn(svg, "circle", {cx, cy, r: 5.5, fill: colour, "data-method": p.row.method, "data-x": p.x, "data-y": p.y});
    drawn(dot, "title", {}, `${p.row.label}: ${p.row.metrics[xKey].text}; ${p.row.metrics[yKey].text}`);
    const place = placed(labels, p.row.label, cx, cy, box);
    drawn(svg, "text", {x: place.left, y: place.bottom - 3}, p.row.label);
  }
}

// Where the label of a point meets no other one: beside it, else ever farther above or below.
function placed(labels, text, cx, cy, box) {
  const width = 6.5 * text.length, height = 15;
  for (let away = 0; ; away++) {
    for (const [left, up] of [[cx + 10, -1], [cx - 10 - width, -1], [cx + 10, 1], [cx - 10 - width, 1]]) {
      const bottom = cy + (up < 0 ? -3 : 17) + up * away * 8;
      const isFree = labels.every(l => left + width < l.left || l.left + l.width < left || Math.abs(bottom - l.bottom) >= height);
      if (away > 60 || (isFree && left >= box.left && left + width <= box.right)) {
        labels.push({left, width, bottom});
        return {left, bottom};
      }
    }
  }
}

function smoothed(values) {
  const reach = Math.floor(values.length / 24);
  return values.map((_, i) => {
    const near = values.slice(Math.max(0, i - reach), i + reach + 1).filter(v => v !== null);
    return near.length ? near.reduce((a, b) => a + b, 0) / near.length : null;
  });
}

function curveOf(method) {
  const runs = data.runs.filter(run => run.run.method === method).map(run => run.losses.map(entry => entry.loss));
  const steps = Math.max(0, ...runs.map(losses => losses.length));
  return smoothed(Array.from({length: steps}, (_, i) => {
    const here = runs.map(losses => losses[i]).filter(v => v !== null && v !== undefined);
    return here.length ? here.reduce((a, b) => a + b, 0) / here.length : null;
  }));
}

const hidden = new Set();

function showCurves() {
  const shown = methods.filter(row => !hidden.has(row.method)).map(row => ({row, losses: curveOf(row.method)}))
    .filter(curve => curve.losses.some(loss => loss !== null));
  const svg = document.getElementById("curves");
  if (!shown.length) return svg.replaceChildren();
  const all = shown.flatMap(curve => curve.losses).filter(loss => loss !== null);
  const longest = Math.max(...shown.map(curve => curve.losses.length));
  const {x, y} = frame(svg, 1100, 400, [1, longest], all, "optimizer step", "training loss (nats per answer token)");
  for (const {row, losses} of shown) {
    const points = losses.map((loss, i) => loss === null ? null : `${x.at(i + 1)},${y.at(loss)}`).filter(Boolean);
    drawn(svg, "polyline", {fill: "none", stroke: colourOf[row.method], "stroke-width": 1.7, "data-method": row.method,
      points: points.join(" ")});
  }
}

function showLegend() {
  document.getElementById("legend").append(...methods.map(row => {
    const box = element("input", {type: "checkbox", checked: ""});
    box.addEventListener("change", () => {
      box.checked ? hidden.delete(row.method) : hidden.add(row.method);
      showCurves();
    });
    return element("label", {}, box, element("span", {class: "key", style: `background:${colourOf[row.method]}`}), row.label);
  }));
}

function showRates() {
  const most = Math.max(0, ...data.choices.map(choice => choice.tried.length));
  const head = element("tr", {}, element("th", {}, "method"), ...Array.from({length: most}, () => element("th", {}, "rate: loss")));
  document.querySelector("#rates thead").append(head);
  for (const choice of data.choices) {
    const label = data.rows.find(row => row.method === choice.method)?.label || choice.method;
    const row = element("tr", {}, element("td", {}, label));
    for (const tried of choice.tried) {
      const text = `${tried.rate.toExponential().replace("e-", "e−")}: ${tried.loss === null ? "diverged" : number(tried.loss, 4)}`;
      row.append(element("td", tried.rate === choice.rate ? {class: "best"} : {}, text));
    }
    if (!choice.tried.length) row.append(element("td", {class: "best"}, `${choice.rate.toExponential()}: given`));
    while (row.children.length <= most) row.append(element("td"));
    document.querySelector("#rates tbody").append(row);
  }
}

function showRuns() {
  for (const run of data.runs) {
    const loss = run.results.loss === null ? "diverged" : `held-out loss ${number(run.results.loss, 4)}`;
    const {losses, ...rest} = run;
    document.getElementById("runs").append(element("details", {"data-run": run.name},
      element("summary", {}, `${run.name}: ${loss}`), element("pre", {}, JSON.stringify(rest, null, 2))));
  }
}

function showAxes() {
  for (const [id, chosen] of [["x-axis", "forgetting"], ["y-axis", "loss"]]) {
    const select = document.getElementById(id);
    select.append(...data.metrics.map(metric => element("option", {value: metric.key}, metric.label)));
    select.value = chosen;
    select.addEventListener("change", showPareto);
  }
}

showHead();
showTable();
showAxes();
showPareto();
showLegend();
showCurves();
showRates();
showRuns();
