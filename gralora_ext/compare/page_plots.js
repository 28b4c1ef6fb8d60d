// SPDX-License-Identifier: Apache-2.0
// The plots of the page: one metric against another, and the losses of training.

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

function axisName(key) {
  const metric = metricOf[key];
  return `${metric.label} (${metric.unit}; ${metric.less_is_better ? "less" : "more"} is better)`;
}

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
  const xs = points.flatMap(p => [p.x - p.dx, p.x + p.dx]), ys = points.flatMap(p => [p.y - p.dy, p.y + p.dy]);
  const {x, y, box} = frame(svg, 1100, 470, xs, ys, axisName(xKey), axisName(yKey));
  const line = front(points, xKey, yKey);
  drawn(svg, "polyline", {class: "front", points: line.map(p => `${x.at(p.x)},${y.at(p.y)}`).join(" ")});
  const labels = [];
  for (const p of points) {
    const colour = colourOf[p.row.method], [cx, cy] = [x.at(p.x), y.at(p.y)];
    drawn(svg, "line", {stroke: colour, x1: x.at(p.x - p.dx), x2: x.at(p.x + p.dx), y1: cy, y2: cy});
    drawn(svg, "line", {stroke: colour, x1: cx, x2: cx, y1: y.at(p.y - p.dy), y2: y.at(p.y + p.dy)});
    const dot = drawn(svg, "circle", {cx, cy, r: 5.5, fill: colour});
    Object.assign(dot.dataset, {method: p.row.method, x: p.x, y: p.y});
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
      const isApart = l => left + width < l.left || l.left + l.width < left || Math.abs(bottom - l.bottom) >= height;
      const isFree = labels.every(isApart);
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
    const near = values.slice(Math.max(0, i - reach), i + reach + 1);
    return near.reduce((a, b) => a + b, 0) / near.length;
  });
}

// The mean over seeds of each step, and the least and the greatest. It ends with the shortest run:
// after a divergence the others' mean would be of fewer seeds.
function curveOf(method) {
  const finite = losses => losses.includes(null) ? losses.slice(0, losses.indexOf(null)) : losses;
  const runs = data.runs.filter(run => run.run.method === method)
    .map(run => finite(run.losses.map(entry => entry.loss)));
  const steps = runs.length ? Math.min(...runs.map(losses => losses.length)) : 0;
  const over = of => smoothed(Array.from({length: steps}, (_, i) => of(runs.map(losses => losses[i]))));
  return {
    mean: over(losses => losses.reduce((a, b) => a + b, 0) / losses.length),
    least: over(losses => Math.min(...losses)),
    greatest: over(losses => Math.max(...losses)),
  };
}

const hidden = new Set();

function showCurves() {
  const shown = methods.filter(row => !hidden.has(row.method)).map(row => ({row, ...curveOf(row.method)}))
    .filter(curve => curve.mean.length);
  const svg = document.getElementById("curves");
  if (!shown.length) return svg.replaceChildren();
  const all = shown.flatMap(curve => [...curve.least, ...curve.greatest]);
  const longest = Math.max(...shown.map(curve => curve.mean.length));
  const {x, y} = frame(svg, 1100, 400, [1, longest], all, "optimizer step", "training loss (nats per answer token)");
  const points = losses => losses.map((loss, i) => `${x.at(i + 1)},${y.at(loss)}`);
  for (const {row, mean, least, greatest} of shown) {
    const [colour, spread] = [colourOf[row.method], [...points(least), ...points(greatest).reverse()]];
    drawn(svg, "polygon", {fill: colour, "fill-opacity": 0.12, points: spread.join(" ")});
    drawn(svg, "polyline", {fill: "none", stroke: colour, "stroke-width": 1.7, "data-method": row.method,
      points: points(mean).join(" ")});
  }
}

function showLegend() {
  document.getElementById("legend").append(...methods.map(row => {
    const box = element("input", {type: "checkbox", checked: ""});
    box.addEventListener("change", () => {
      box.checked ? hidden.delete(row.method) : hidden.add(row.method);
      showCurves();
    });
    const key = element("span", {class: "key", style: `background:${colourOf[row.method]}`});
    return element("label", {}, box, key, row.label);
  }));
}

function showAxes() {
  for (const [id, chosen] of [["x-axis", "forgetting"], ["y-axis", "loss"]]) {
    const select = document.getElementById(id);
    select.append(...data.metrics.map(metric => element("option", {value: metric.key}, metric.label)));
    select.value = chosen;
    select.addEventListener("change", showPareto);
  }
}
