// SPDX-License-Identifier: Apache-2.0
// Shows the data that stands in this page. No library, nothing from outside.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const methods = data.rows.filter(row => row.method !== "base");
const colourOf = Object.fromEntries(methods.map((row, i) => [row.method, data.colours[i % data.colours.length]]));
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

function rateText(value) {
  return value.toExponential().replace("e-", "e\u2212");
}

function showHead() {
  const s = data.settings;
  document.getElementById("settings").textContent =
    `${s.model} on ${s.data}: ${number(s.train_rows, 0)} training rows, ${s.validation_rows} validation rows, ` +
    `${s.test_rows} test rows; ${s.steps} steps of ${s.batch_size} rows of at most ${s.max_length} tokens; ` +
    `adapters with as many parameters as LoRA of rank ${s.rank}; base in ${s.dtype}; general text: ${s.general_texts} ` +
    `of ${s.general_text}. The split is this program's own: losses are not comparable with published scores.`;
  const notes = [...data.sentences];
  if (s.quick) notes.push("A quick run: few steps and rows. It shows that all works, and not which method is better.");
  const edge = data.choices.filter(choice => choice.at_edge).map(choice => choice.method);
  if (edge.length) {
    notes.push(`Best learning rate at the edge of those tried, so that one beyond may be better: ${edge.join(", ")}.`);
  }
  const cpuOf = run => `${run.machine.cpu} (${run.versions.cpu_capability})`;  // one name may stand for several kinds
  const placeOf = run => [cpuOf(run), run.machine.gpu, `${run.threads} threads`].filter(Boolean).join(", ");
  const commitOf = run => (run.git.commit || "unknown").slice(0, 7) + (run.git.dirty ? " with changes" : "");
  const [places, commits] = [placeOf, commitOf].map(of => [...new Set(data.runs.map(of))]);
  const versions = data.made.versions;
  notes.push(`Made on ${places.join(" and ")}; torch ${versions.torch}, PEFT ${versions.peft}, ` +
    `transformers ${versions.transformers}; commit ${commits.join(", ")}.`);
  if (data.busy) {
    notes.push("In some runs threads had to wait for a core, as when other programs use the machine: " +
      "their speeds are too low, and not comparable.");
  }
  if (commits.length > 1) notes.push("The runs are of several commits: what changed between them may change a loss.");
  if (places.length > 1) notes.push("Processor or threads differ between runs: speeds and memory are not comparable.");
  if (data.made.machine.gpu && !(versions.cuda_archs || []).length) {
    notes.push("gralora_ext was built without CUDA kernels: GraLoRA's layers ran as plain torch operations.");
  }
  if (s.dtype !== "fp32" && data.rows.some(row => row.method === "full")) {
    notes.push(`Full fine-tuning had its weights in ${s.dtype}, which rounds away steps that adapters in fp32 make.`);
  }
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
    const name = element("th", {"data-method": row.method, scope: "row"});
    if (colourOf[row.method]) name.append(element("span", {class: "key", style: `background:${colourOf[row.method]}`}));
    name.append(row.label + (row.diverged ? ` (${row.diverged} diverged)` : ""));
    return name;
  }
  if (!column.metric) {
    const value = row[column.key];
    return element("td", {"data-key": column.key}, value === null ? "" : column.key === "rate" ? rateText(value) : String(value));
  }
  const found = row.metrics[column.key];
  if (!found) return element("td", {"data-key": column.key}, row.diverged ? "diverged" : "");
  const {mean, deviation} = found;
  const made = element("td", {"data-key": column.key, "data-mean": mean, "data-deviation": deviation ?? ""});
  made.append(number(mean, column.digits));
  if (deviation !== null) made.append(element("span", {class: "spread"}, ` ± ${number(deviation, column.digits)}`));
  if (found.mark) made.className = found.mark;
  return made;
}

function showTable() {
  const column = columns.find(c => c.key === order.key);
  const sorted = [...data.rows].sort((a, b) => {
    const [x, y] = [column.sort(a), column.sort(b)];
    if (x === null || y === null) return (x === null) - (y === null);  // no value: last, whatever the order
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
    const attributes = {"data-key": c.key, "aria-sort": sort, scope: "col"};
    head.append(element("th", attributes, button, element("small", {}, c.unit)));
  }
  document.querySelector("#table thead").replaceChildren(head);
  document.querySelector("#table tbody").replaceChildren(
    ...sorted.map(row => element("tr", {"data-method": row.method}, ...columns.map(c => cell(row, c)))));
}

function showRates() {
  const most = Math.max(0, ...data.choices.map(choice => choice.tried.length));
  const heads = ["method", ...Array(most).fill("rate: loss")].map(text => element("th", {scope: "col"}, text));
  document.querySelector("#rates thead").append(element("tr", {}, ...heads));
  for (const choice of data.choices) {
    const label = data.rows.find(row => row.method === choice.method)?.label || choice.method;
    const row = element("tr", {}, element("th", {scope: "row"}, label));
    for (const tried of choice.tried) {
      const text = `${rateText(tried.rate)}: ${tried.loss === null ? "diverged" : number(tried.loss, 4)}`;
      row.append(element("td", tried.rate === choice.rate ? {class: "best"} : {}, text));
    }
    if (!choice.tried.length) row.append(element("td", {class: "best"}, `${rateText(choice.rate)}: given`));
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

showHead();
showTable();
showAxes();
showPareto();
showLegend();
showCurves();
showRates();
showRuns();
