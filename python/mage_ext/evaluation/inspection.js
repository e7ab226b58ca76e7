// The page of `mage inspect`: draws the text for one layer, KV head and forward; -1 is the mean over all of them.
// The state is in the address (#layer=3&head=0&step=2), so that a view can be kept and shared.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const [numSteps, numLayers, numHeads, length] = data.shape;
const masses = bytesOf(data.masses), lists = bytesOf(data.lists);
const listBytes = Math.ceil(data.units / 8);
const state = { layer: -1, head: -1, step: 0 };
const byId = (id) => document.getElementById(id);

function bytesOf(text) {
  return Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
}

// Mass of code c over the largest of its row, as `quantise` in inspection.py has it.
const share = Float64Array.from({ length: 256 }, (_, c) => (c ? 10 ** ((data.decades * (c - 255)) / 254) : 0));

function cellsOf(layer, head) {
  const cells = [];
  for (let l = 0; l < numLayers; l++) {
    for (let h = 0; h < numHeads; h++) if ((layer < 0 || l === layer) && (head < 0 || h === head)) cells.push([l, h]);
  }
  return cells;
}

const rowOf = (step, layer, head) => (step * numLayers + layer) * numHeads + head;

function isListed(layer, head, unit) {
  const index = data.layers[layer];
  if (index < 0) return false;
  const byte = lists[(index * numHeads + head) * listBytes + (unit >> 3)];
  return (byte >> (7 - (unit & 7))) % 2 === 1;
}

// Mass of every token, and the share of the lists that hold it, mean over layers and heads that are looked at.
function view() {
  const cells = cellsOf(state.layer, state.head);
  const mass = new Float64Array(length), listed = new Float64Array(length);
  const selecting = cells.filter(([layer]) => data.layers[layer] >= 0);
  for (const [layer, head] of cells) {
    const row = rowOf(state.step, layer, head);
    const scale = data.scales[row] / cells.length;
    for (let i = 0; i < length; i++) mass[i] += scale * share[masses[row * length + i]];
  }
  for (const [layer, head] of selecting) {
    for (let i = 0; i < data.tail; i++) {
      if (isListed(layer, head, Math.floor(i / data.g))) listed[i] += 1 / selecting.length;
    }
  }
  return { mass, listed, isDense: !selecting.length };
}

const meanOf = (values, step) => {
  const cells = cellsOf(state.layer, state.head);
  return cells.reduce((sum, [layer, head]) => sum + values[rowOf(step, layer, head)], 0) / cells.length;
};

// One element per token, once.
const spans = data.texts.map((text, i) => {
  const span = document.createElement("span");
  span.className = "t";
  span.dataset.i = i;
  byId(i < data.prefix ? "text" : "block").append(span);
  if (i < data.prefix) write(span, text);
  return span;
});

function write(span, text) {
  span.textContent = text || "\u22c5";
  span.classList.toggle("part", !text); // of a character that a later token completes
}

function drawText({ mass, listed, isDense }) {
  // The block's own tokens have so much that the text before it would stay white beside them.
  const sorted = mass.slice(0, data.prefix || length).sort();
  const top = sorted[Math.max(0, sorted.length - 1 - Math.ceil(sorted.length / 100))];
  spans.forEach((span, i) => {
    const strength = top > 0 ? Math.min(1, Math.sqrt(mass[i] / top)) : 0;
    span.style.backgroundColor = strength > 0.02 ? `rgba(31, 119, 180, ${(0.85 * strength).toFixed(3)})` : "";
    span.style.color = strength > 0.75 ? "#ffffff" : "";
    span.style.outlineColor = listed[i] > 0 ? `rgba(224, 123, 0, ${Math.max(0.15, listed[i]).toFixed(2)})` : "";
    span.classList.toggle("listed", listed[i] > 0);
    span.classList.toggle("tail", !isDense && i >= data.tail && i < data.prefix);
    let note = `token ${i}: ${(100 * mass[i]).toPrecision(3)} %`;
    if (i < data.tail && !isDense) note += `, in ${Math.round(100 * listed[i])} % of the lists`;
    if (i >= data.prefix) {
      const decided = data.decided[i - data.prefix];
      const isOpen = decided === null || decided > state.step;
      write(span, isOpen ? "\u2591" : data.texts[i]);
      span.classList.toggle("open", isOpen);
      span.classList.toggle("new", decided === state.step);
      if (decided === null) note += ", never decided";
      else note += decided < 0 ? ", known before" : `, decided in forward ${decided + 1}`;
    }
    span.title = note;
  });
}

function drawNumbers() {
  const { layer, head, step } = state;
  const selecting = cellsOf(layer, head).filter(([l]) => data.layers[l] >= 0);
  byId("layer-out").textContent = layer < 0 ? "all" : `${layer}${data.layers[layer] < 0 ? " dense" : ""}`;
  byId("head-out").textContent = head < 0 ? "all" : `${head}`;
  byId("step-out").textContent = `${step + 1} of ${numSteps} ${data.kinds[step]}`;
  let text = "Dense: everything is read.";
  if (selecting.length) {
    const units = selecting.reduce((sum, [l, h]) => sum + data.counts[data.layers[l]][h], 0) / selecting.length;
    const tokens = units * data.g + data.prefix - data.tail;
    const part = data.prefix ? ` (${((100 * tokens) / data.prefix).toFixed(2)} % of the prefix)` : "";
    text = `The lists keep ${(100 * meanOf(data.kept, step)).toFixed(2)} % of this forward's mass; the best lists of this `
      + `length would keep ${(100 * meanOf(data.best, step)).toFixed(2)} %. ${tokens.toFixed(0)} of ${data.prefix} tokens `
      + `before the block${part}.`;
  }
  byId("numbers").textContent = text;
}

function svg(id, width, height, parts) {
  const element = byId(id);
  element.setAttribute("width", width);
  element.setAttribute("height", height);
  element.replaceChildren(...parts.map(([name, attributes, text]) => {
    const part = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) part.setAttribute(key, value);
    if (text !== undefined) part.textContent = text;
    return part;
  }));
}

function drawCells() {
  const high = Math.max(3, Math.min(10, 300 / numLayers)), wide = Math.min(22, 220 / numHeads), parts = [];
  const lowest = Math.min(0.999, ...data.kept);
  for (const [layer, head] of cellsOf(-1, -1)) {
    const kept = data.kept[rowOf(state.step, layer, head)];
    const isAt = (state.layer < 0 || state.layer === layer) && (state.head < 0 || state.head === head);
    const isChosen = isAt && (state.layer >= 0 || state.head >= 0);
    const lost = (1 - kept) / (1 - lowest);
    const fill = data.layers[layer] < 0 ? "#dddddd" : `rgb(${Math.round(255 - 31 * lost)}, ${Math.round(245 - 122 * lost)}, `
      + `${Math.round(235 - 235 * lost)})`;
    parts.push(["rect", { x: 24 + head * wide, y: 4 + layer * high, width: wide - 2, height: high - 1, fill,
      class: `cell${isChosen ? " at" : ""}`, "data-layer": layer, "data-head": head }]);
  }
  for (let layer = 0; layer < numLayers; layer += 5) parts.push(["text", { x: 0, y: 4 + layer * high + high }, `${layer}`]);
  const bottom = 4 + numLayers * high;
  parts.push(["text", { x: 0, y: bottom + 14 }, `grey: dense; white: all kept; orange: ${(100 * lowest).toFixed(0)} %`]);
  svg("cells", Math.max(24 + numHeads * wide, 210), bottom + 20, parts);
}

function drawLine() {
  const wide = 250, high = 110, left = 40, parts = [];
  const kept = data.kinds.map((_, step) => meanOf(data.kept, step)), best = data.kinds.map((_, step) => meanOf(data.best, step));
  const low = Math.min(...kept, ...best, 0.99), x = (step) => left + ((wide - left - 10) * (step + 0.5)) / numSteps;
  const y = (value) => 8 + ((high - 30) * (1 - value)) / (1 - low);
  const points = (values) => values.map((value, step) => `${x(step).toFixed(1)},${y(value).toFixed(1)}`).join(" ");
  parts.push(["polyline", { points: points(best), fill: "none", stroke: "#9a9a9a", "stroke-width": 1.5 }]);
  parts.push(["polyline", { points: points(kept), fill: "none", stroke: "#e07b00", "stroke-width": 2 }]);
  kept.forEach((value, step) => parts.push(["circle", { cx: x(step), cy: y(value), r: step === state.step ? 5 : 2.5, fill: "#e07b00" }]));
  parts.push(["text", { x: 0, y: y(1) + 4 }, "100 %"], ["text", { x: 0, y: y(low) + 4 }, `${(100 * low).toFixed(1)} %`]);
  parts.push(["text", { x: x(0) - 3, y: high - 4 }, "1"], ["text", { x: x(numSteps - 1) - 3, y: high - 4 }, `${numSteps}`]);
  svg("line", wide, high, parts);
}

function drawDepth({ mass, listed }) {
  const wide = 250, high = 110, bins = Math.min(83, data.prefix), parts = [];
  const sums = new Float64Array(bins), kept = new Float64Array(bins);
  for (let i = 0; i < data.prefix; i++) {
    const bin = Math.floor((i * bins) / data.prefix);
    sums[bin] += mass[i];
    kept[bin] += (listed[i] * bins) / data.prefix;
  }
  const most = Math.max(...sums, 1e-12);
  for (let bin = 0; bin < bins; bin++) {
    const x = (bin * wide) / bins, width = wide / bins - 0.5, tall = 80 * Math.sqrt(sums[bin] / most);
    parts.push(["rect", { x, y: 84 - tall, width, height: tall, fill: "#1f77b4", "data-bin": bin }]);
    parts.push(["rect", { x, y: 88, width, height: 20 * Math.min(1, kept[bin]), fill: "#e07b00" }]);
    parts.push(["rect", { x, y: 0, width, height: 110, fill: "transparent", class: "cell", "data-token": Math.floor((bin * data.prefix) / bins) }]);
  }
  svg("depth", wide, high, parts);
}

function draw() {
  const seen = view();
  for (const name of ["layer", "head", "step"]) byId(name).value = state[name];
  drawText(seen);
  drawNumbers();
  drawCells();
  drawLine();
  drawDepth(seen);
  document.body.dataset.drawn = `${state.layer},${state.head},${state.step}`;
}

const limits = { layer: [-1, numLayers - 1], head: [-1, numHeads - 1], step: [0, numSteps - 1] };

function go(change) {
  for (const [name, value] of Object.entries(change)) {
    const [low, high] = limits[name];
    if (Number.isInteger(value)) state[name] = Math.min(high, Math.max(low, value));
  }
  history.replaceState(null, "", `#layer=${state.layer}&head=${state.head}&step=${state.step}`);
  draw();
}

function fromAddress() {
  const wanted = new URLSearchParams(location.hash.slice(1)), change = {};
  for (const name of Object.keys(limits)) if (wanted.has(name)) change[name] = Number.parseInt(wanted.get(name), 10);
  go(change);
}

for (const [name, [low, high]] of Object.entries(limits)) {
  byId(name).min = low;
  byId(name).max = high;
  byId(name).addEventListener("input", (event) => go({ [name]: Number.parseInt(event.target.value, 10) }));
}
byId("cells").addEventListener("click", ({ target }) => {
  if (target.dataset.layer) go({ layer: Number(target.dataset.layer), head: Number(target.dataset.head) });
});
byId("depth").addEventListener("click", ({ target }) => {
  if (target.dataset.token) spans[Number(target.dataset.token)].scrollIntoView({ block: "center" });
});
addEventListener("keydown", (event) => {
  if (event.target.tagName === "INPUT") return;
  const change = { ArrowLeft: { step: state.step - 1 }, ArrowRight: { step: state.step + 1 },
    ArrowUp: { layer: state.layer - 1 }, ArrowDown: { layer: state.layer + 1 } }[event.key];
  if (!change) return;
  event.preventDefault();
  go(change);
});
addEventListener("hashchange", fromAddress);
fromAddress();
