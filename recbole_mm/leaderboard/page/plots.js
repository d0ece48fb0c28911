// Plots, drawn as SVG.
// ------------------------------------------------ scales and axes

function niceTicks(low, high, wanted) {
  const rough = (high - low) / Math.max(1, wanted);
  const power = 10 ** Math.floor(Math.log10(rough));
  const off = (size) => Math.abs(Math.log(size / rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).reduce((best, size) => (off(size) < off(best) ? size : best));
  const ticks = [];
  for (let number = Math.ceil(low / step - 1e-9); number * step <= high + step * 1e-9; number += 1) ticks.push(number * step);
  return { ticks, step };
}
function logTicks(low, high, wanted) {
  if (high / low < 4) return niceTicks(low, high, wanted).ticks;
  const ticks = [];
  const decades = Math.log10(high / low);
  const factors = decades > wanted / 2 ? [1] : [1, 2, 5];
  const every = Math.max(1, Math.ceil(decades / wanted));
  for (let power = Math.floor(Math.log10(low)); 10 ** power <= high; power += 1) {
    if (power % every !== 0) continue;
    for (const factor of factors) {
      const tick = factor * 10 ** power;
      if (tick >= low * 0.999 && tick <= high * 1.001) ticks.push(tick);
    }
  }
  const step = Math.ceil(ticks.length / Math.max(2, wanted));
  return ticks.filter((_, position) => position % step === 0);
}
function tickText(step) {
  const decimals = Math.min(8, Math.max(0, -Math.floor(Math.log10(step) + 1e-9)));
  return (value) => (Math.abs(value) < step * 1e-6 ? "0" : value.toFixed(decimals).replace("-", "−"));
}
function linear(low, high, from, to) {
  const size = high - low || 1;
  return (value) => from + ((value - low) / size) * (to - from);
}
function logarithmic(low, high, from, to) {
  const place = linear(Math.log10(low), Math.log10(high), from, to);
  return (value) => place(Math.log10(value));
}
function rangeOf(values, padding = 0.06) {
  let low = Infinity, high = -Infinity;
  for (const value of values) { low = Math.min(low, value); high = Math.max(high, value); }
  const space = (high - low || Math.abs(high) || 1) * padding;
  return [low >= 0 ? Math.max(0, low - space) : low - space, high + space];
}

function plot(width, height, title, description) {
  const [titleId, descriptionId] = [newId(), newId()];
  return draw("svg", { class: "plot", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-labelledby": `${titleId} ${descriptionId}` },
    draw("title", { id: titleId }, title), draw("desc", { id: descriptionId }, description));
}
function yAxis(svg, area, low, high, label) {
  const { ticks, step } = niceTicks(low, high, Math.max(2, Math.floor((area.bottom - area.top) / 42)));
  const place = linear(low, high, area.bottom, area.top), text = tickText(step);
  for (const tick of ticks) {
    svg.append(draw("line", { class: "grid", x1: area.left, x2: area.right, y1: place(tick), y2: place(tick) }),
      draw("text", { x: area.left - 6, y: place(tick) + 4, "text-anchor": "end" }, text(tick)));
  }
  svg.append(draw("text", { class: "strong", x: 2, y: 12 }, label));
  return place;
}
function xAxis(svg, area, ticks, place, text, label) {
  svg.append(draw("line", { class: "axis", x1: area.left, x2: area.right, y1: area.bottom, y2: area.bottom }));
  let end = -Infinity;
  for (const tick of ticks) {
    const x = place(tick), words = text(tick), half = widthOf(words) / 2;
    svg.append(draw("line", { class: "axis", x1: x, x2: x, y1: area.bottom, y2: area.bottom + 4 }));
    if (x - half < end + 6) continue;
    end = x + half;
    svg.append(draw("text", { x, y: area.bottom + 17, "text-anchor": "middle" }, words));
  }
  svg.append(draw("text", { class: "strong", x: (area.left + area.right) / 2, y: area.bottom + 34, "text-anchor": "middle" }, label));
}
function marker(kind, x, y, size = 5) {
  if (kind === "floor") return draw("path", { d: `M${x},${y - size * 1.2}L${x + size * 1.15},${y + size}L${x - size * 1.15},${y + size}Z` });
  if (kind === "knockout") return draw("rect", { x: x - size * 0.85, y: y - size * 0.85, width: size * 1.7, height: size * 1.7 });
  return draw("circle", { cx: x, cy: y, r: size });
}
function classed(element, classes, ...children) {
  element.setAttribute("class", classes);
  element.append(...children);
  return element;
}
function tip(text) { return draw("title", null, text); }
const KIND_SERIES = { model: 0, floor: 4, knockout: 3 };
const KIND_NAMES = { model: "model", floor: "floor", knockout: "knock-out" };

function empty(text) { return el("p", { class: "empty" }, text); }

// ------------------------------------------------ metric against cost

function costPanel(table, body, width) {
  const metric = metricOf(table), rows = rowsShown(table).map(({ row }) => row);
  const available = Object.keys(COSTS).filter((key) => rows.some((row) => isNumber(row.cost?.[key])));
  if (!available.length) {
    body.append(empty("No cost was recorded for these rows. Runs of this version record parameters, time, memory and latency; run them again."));
    return;
  }
  const cost = available.includes(state.cost) ? state.cost : available.includes("train_seconds") ? "train_seconds" : available[0];
  const select = el("select", { "data-choice": "cost", onchange: () => change({ cost: select.value }) },
    available.map((key) => el("option", { value: key, selected: key === cost }, COSTS[key][0])));
  const straight = opened.get("linear") === true;
  const box = el("input", { type: "checkbox", "data-choice": "log", checked: !straight, onchange: () => { opened.set("linear", !box.checked); show(); } });
  body.append(el("div", { class: "choices" }, el("label", null, "Cost", select), el("label", null, box, "logarithmic axis")));

  const points = rows.map((row) => ({ row, x: row.cost?.[cost], y: row.test?.[metric]?.mean, sd: row.test?.[metric]?.sd }))
    .filter(({ x, y }) => isNumber(x) && isNumber(y) && x >= 0);
  if (!points.length) { body.append(empty(`No row has both ${metricName(metric)} and this cost; choose another cost.`)); return; }
  body.append(costPlot(points, { metric, cost, straight, width }));
  const kinds = [...new Set(points.map(({ row }) => row.kind))];
  body.append(el("div", { class: "legend" }, kinds.map((kind) => el("span", null,
    draw("svg", { width: 14, height: 14, "aria-hidden": "true" }, classed(marker(kind, 7, 7), `mark s${KIND_SERIES[kind] ?? 0}`)), KIND_NAMES[kind] ?? kind)),
    el("span", null, draw("svg", { width: 22, height: 10, "aria-hidden": "true" }, draw("line", { class: "front", x1: 0, x2: 22, y1: 5, y2: 5 })), "best for that cost or less")));
  const missing = rows.length - points.length;
  if (missing) body.append(el("p", { class: "small muted" }, `${amount(missing, "row")} without this cost or metric not drawn.`));
}

function costPlot(points, { metric, cost, straight, width }) {
  const [name, text] = COSTS[cost], [unit, unitName] = AXES[cost] ?? [1, ""];
  const title = unitName ? `${name} [${unitName}]` : name;
  points = points.map((point) => ({ ...point, x: point.x / unit }));
  const height = Math.round(Math.min(380, Math.max(260, width * 0.6)));
  const svg = plot(width, height, `${metricName(metric)} against ${title}`, `${amount(points.length, "row")}; the values are in the table above.`);
  const area = { left: 52, right: width - 14, top: 24, bottom: height - 42 };
  const zeros = !straight && points.some(({ x }) => x === 0);
  const positive = points.filter(({ x }) => x > 0).map(({ x }) => x);
  const logarithm = !straight && positive.length > 0;
  const y = yAxis(svg, area, ...rangeOf(points.flatMap(({ y: mean, sd }) => isNumber(sd) ? [mean - sd, mean + sd] : [mean]), 0.08), metricName(metric));
  const from = area.left + (zeros ? 44 : 10), wanted = Math.max(2, Math.floor((area.right - from) / 75));
  let place, ticks;
  if (logarithm) {
    const low = Math.min(...positive), high = Math.max(...positive), space = high / low > 1.05 ? (high / low) ** 0.06 : 1.5;
    place = logarithmic(low / space, high * space, from, area.right - 6);
    ticks = logTicks(low / space, high * space, wanted);
  } else {
    const [low, high] = rangeOf(points.map(({ x }) => x));
    place = linear(low, high, from, area.right - 6);
    ({ ticks } = niceTicks(low, high, wanted));
  }
  const x = (value) => (zeros && value === 0 ? area.left + 16 : place(value));
  xAxis(svg, area, zeros ? [0, ...ticks] : ticks, x, cost === "parameters" ? count : plain, title + (logarithm ? ", logarithmic" : ""));
  if (zeros) svg.append(draw("line", { class: "grid", x1: area.left + 32, x2: area.left + 32, y1: area.top, y2: area.bottom }));

  const front = frontOf(points.filter(({ row }) => row.kind !== "knockout"));
  let path = "";
  front.forEach((point, position) => { path += position === 0 ? `M${x(point.x)},${y(point.y)}` : `H${x(point.x)}V${y(point.y)}`; });
  if (front.length) svg.append(draw("path", { class: "front", d: `${path}H${area.right}` }));

  const taken = points.map((point) => [x(point.x) - 6, y(point.y) - 6, x(point.x) + 6, y(point.y) + 6]);
  const order = { model: 0, floor: 1, knockout: 2 };
  const drawn = [...points].sort((a, b) => (order[a.row.kind] ?? 0) - (order[b.row.kind] ?? 0) || b.y - a.y);
  const dense = points.length > 200;
  for (const { row, x: size, y: mean, sd } of [...drawn].reverse()) {
    const paint = `s${KIND_SERIES[row.kind] ?? 0}`;
    if (isNumber(sd) && sd > 0 && !dense) svg.append(draw("line", { class: `spread ${paint}`, x1: x(size), x2: x(size), y1: y(mean - sd), y2: y(mean + sd) }));
    svg.append(classed(marker(row.kind, x(size), y(mean), dense ? 3 : 5), `mark ${paint}${dense ? " dense" : ""}`,
      tip(`${row.name}: ${metricName(metric)} ${score(mean)}${isNumber(sd) ? ` ± ${score(sd)}` : ""}, ${name} ${text(size * unit)}`)));
  }
  for (const { row, x: size, y: mean } of drawn.slice(0, 40)) {
    const label = shortened(row.name, 26), length = widthOf(label), [left, middle] = [x(size), y(mean)];
    const spots = [[left + 9, middle + 4, "start"], [left - 9, middle + 4, "end"], [left, middle - 10, "middle"], [left, middle + 19, "middle"]];
    for (const [at, base, anchor] of spots) {
      const start = anchor === "start" ? at : anchor === "end" ? at - length : at - length / 2;
      const rectangle = [start, base - 11, start + length, base + 3];
      const inside = rectangle[0] >= area.left + 2 && rectangle[2] <= width && rectangle[1] >= area.top - 8 && rectangle[3] <= area.bottom;
      if (!inside || taken.some((other) => overlap(rectangle, other))) continue;
      taken.push(rectangle);
      svg.append(draw("text", { x: at, y: base, "text-anchor": anchor, class: row.kind === "model" ? "strong" : null }, label));
      break;
    }
  }
  return el("figure", null, svg);
}
function overlap(a, b) { return a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3]; }
function frontOf(points) {
  const front = [];
  for (const point of [...points].sort((a, b) => a.x - b.x || b.y - a.y)) {
    if (!front.length || point.y > front.at(-1).y) front.push(point);
  }
  return front;
}

// ------------------------------------------------ knock-outs

function knockoutPanel(table, body, width) {
  const metric = metricOf(table);
  const all = table.rows.filter((row) => row.kind === "knockout");
  const words = state.model.toLowerCase().split(/\s+/).filter(Boolean);
  const rows = all.filter((row) => isNumber(row.gap?.[metric]?.mean) && words.every((word) => row.name.toLowerCase().includes(word)));
  if (!rows.length) {
    body.append(empty(!all.length
      ? "No knock-outs in this table. Add --knockouts=auto to the command of the runs: each multimodal model is trained again with each modality made meaningless."
      : words.length ? "No knock-out matches the filter of models." : `No gap in ${metricName(metric)}: the full model and its knock-out need the same seeds and values of single test rows.`));
    return;
  }
  rows.sort((a, b) => String(a.of).localeCompare(String(b.of)) || b.gap[metric].mean - a.gap[metric].mean);
  const some = rows.slice(0, longer.has(`gaps|${table.id}`) ? Infinity : 40);
  body.append(el("p", { class: "small muted" }, `How much ${metricName(metric)} falls when a modality is made meaningless, with its 95 % interval. Full marks: the interval leaves out zero.`));
  body.append(knockoutPlot(some, metric, width));
  if (some.length < rows.length) {
    body.append(el("button", { type: "button", class: "button", onclick: () => { longer.add(`gaps|${table.id}`); show(); } }, `Show all ${amount(rows.length, "knock-out")}`));
  }
  body.append(valuesTable(["Knock-out", "Gap", "95 % interval", "p"], some.map((row) => [row.name, signed(row.gap[metric].mean), interval(row.gap[metric]), probability(row.gap[metric].p_holm ?? row.gap[metric].p)])));
}

function knockoutPlot(rows, metric, width) {
  const line = 40, height = rows.length * line + 62;
  const svg = plot(width, height, `Knock-outs: gap in ${metricName(metric)}`, rows.map((row) => `${row.name}: ${signed(row.gap[metric].mean)} ${interval(row.gap[metric])}`).join("; "));
  const area = { left: 10, right: width - 14, top: 10, bottom: height - 46 };
  const parts = rows.map((row) => row.gap[metric]);
  const [low, high] = rangeOf([0, ...parts.flatMap(({ mean, low: from, high: to }) => [mean, from, to].filter(isNumber))]);
  const start = Math.min(low, 0) - (high - low) * 0.03;
  const place = linear(start, high, area.left, area.right);
  const { ticks, step } = niceTicks(start, high, Math.max(2, Math.floor(width / 90)));
  for (const tick of ticks) svg.append(draw("line", { class: "grid", x1: place(tick), x2: place(tick), y1: area.top, y2: area.bottom }));
  xAxis(svg, area, ticks, place, tickText(step), `gap in ${metricName(metric)}: full model minus knock-out`);
  svg.append(draw("line", { class: "zero", x1: place(0), x2: place(0), y1: area.top, y2: area.bottom }));
  rows.forEach((row, position) => {
    const part = row.gap[metric], y = area.top + position * line + 27;
    const sure = isNumber(part.low) && isNumber(part.high) && (part.low > 0 || part.high < 0);
    const label = shortened(row.name, Math.floor((width - 90) / 6.6));
    svg.append(draw("text", { class: "strong", x: area.left, y: y - 12 }, label),
      draw("text", { x: area.right, y: y - 12, "text-anchor": "end" }, signed(part.mean)));
    if (isNumber(part.low) && isNumber(part.high)) {
      svg.append(draw("line", { class: "spread s3", x1: place(part.low), x2: place(part.high), y1: y, y2: y }));
    }
    svg.append(classed(marker("knockout", place(part.mean), y), `mark s3${sure ? "" : " hollow"}`, tip(`${row.name}: ${signed(part.mean)} ${interval(part)}`)));
  });
  return el("figure", null, svg);
}

function valuesTable(titles, rows) {
  return el("details", { class: "small" }, el("summary", { class: "muted" }, "The values"),
    el("div", { class: "inner", tabindex: "0", role: "region", "aria-label": "Values of the plot" }, el("table", null,
      el("thead", null, el("tr", null, titles.map((title) => el("th", { scope: "col" }, title)))),
      el("tbody", null, rows.map(([name, ...cells]) => el("tr", null, el("th", { scope: "row" }, name), cells.map((cell) => el("td", null, cell))))))));
}

// ------------------------------------------------ rows that are compared in slices and curves

function chosenRows(table) {
  const shown = rowsShown(table), metric = metricOf(table);
  const value = ({ row }) => row.test?.[metric]?.mean ?? -Infinity;
  let positions = chosen.get(table.id);
  if (!positions) {
    const best = [...shown].sort((a, b) => value(b) - value(a));
    const models = best.filter(({ row }) => row.kind === "model").slice(0, 3);
    const floor = best.filter(({ row }) => row.kind === "floor").slice(0, 1);
    const some = [...models, ...floor];
    positions = (some.length ? some : best.slice(0, 3)).map(({ position }) => position);
  }
  return positions;
}
function swatch(series) {
  return draw("svg", { width: 26, height: 10, "aria-hidden": "true" }, draw("line", { class: `line s${series} d${series}`, x1: 0, x2: 26, y1: 5, y2: 5 }));
}
function chips(table) {
  const positions = chosenRows(table);
  const set = (next) => { chosen.set(table.id, next); show(); };
  const box = el("div", { class: "chips" }, el("span", { class: "muted" }, "Slices and curves of"));
  positions.forEach((position, series) => {
    const { name } = table.rows[position];
    box.append(el("span", { class: "chip" }, swatch(series), name,
      el("button", { type: "button", "aria-label": `leave out ${name}`, onclick: () => set(positions.filter((other) => other !== position)) }, "×")));
  });
  const others = rowsShown(table).filter(({ position }) => !positions.includes(position));
  if (others.length && positions.length < MOST_SERIES) {
    const add = el("select", { "aria-label": "Add a row to slices and curves", "data-choice": "add", class: "button", onchange: () => set([...positions, Number(add.value)]) },
      el("option", { value: "" }, "add a row …"), others.slice(0, 500).map(({ row, position }) => el("option", { value: position }, row.name)));
    box.append(add);
    if (others.length > 500) box.append(el("span", { class: "muted" }, "the first 500; filter models for others"));
  }
  return box;
}

// ------------------------------------------------ slices

function bandOrder(bands) {
  const rank = (band) => { const at = BANDS.indexOf(band); return at < 0 ? BANDS.length : at; };
  const price = bands.includes("low") || bands.includes("high");
  const of = (band) => (price && band === "mid" ? rank("low") + 0.5 : rank(band));
  return [...bands].sort((a, b) => of(a) - of(b));
}

function slicePanel(table, body, width) {
  const metric = metricOf(table);
  const rows = chosenRows(table).map((position, series) => ({ row: table.rows[position], series }));
  const names = [...new Set(table.rows.flatMap((row) => Object.keys(row.slices ?? {})))];
  if (!names.length) {
    body.append(empty("No slices were recorded. Runs of this version record them for every test; run them again."));
    return;
  }
  const slice = names.includes(state.slice) ? state.slice : names[0];
  const select = el("select", { "data-choice": "slice", onchange: () => change({ slice: select.value }) },
    names.map((name) => el("option", { value: name, selected: name === slice }, SLICES[name] ?? name)));
  body.append(el("div", { class: "choices" }, el("label", null, "By", select)));
  const bands = bandOrder([...new Set(rows.flatMap(({ row }) => Object.keys(row.slices?.[slice] ?? {})))]);
  const value = (row, band) => row.slices?.[slice]?.[band]?.[metric];
  if (!bands.length || !rows.some(({ row }) => bands.some((band) => isNumber(value(row, band))))) {
    body.append(empty(rows.length ? `These rows have no ${metricName(metric)} by ${SLICES[slice] ?? slice}; choose another metric, slice or row.` : "Choose rows above: “add a row”."));
    return;
  }
  const sizes = bands.map((band) => Math.max(...rows.map(({ row }) => row.slices?.[slice]?.[band]?.n ?? 0)));
  body.append(slicePlot(rows, bands, sizes, value, metric, SLICES[slice] ?? slice, width));
  const few = bands.filter((_, position) => sizes[position] < FEW);
  if (few.length) body.append(el("p", { class: "small warn" }, `Fewer than ${FEW} test rows in ${few.join(", ")}: values there say little.`));
  body.append(valuesTable(["Row", ...bands.map((band, position) => `${band} (n ${sizes[position]})`)], rows.map(({ row }) => [row.name, ...bands.map((band) => score(value(row, band)))])));
}

function slicePlot(rows, bands, sizes, value, metric, title, width) {
  const height = Math.round(Math.min(340, Math.max(240, width * 0.5)));
  const svg = plot(width, height, `${metricName(metric)} by ${title}`, `Bars of ${rows.map(({ row }) => row.name).join(", ")}; the values follow as a table.`);
  const area = { left: 52, right: width - 8, top: 24, bottom: height - 36 };
  const values = rows.flatMap(({ row }) => bands.map((band) => value(row, band))).filter(isNumber);
  const low = Math.min(0, ...values), high = Math.max(...values) * 1.06 || 1;
  const y = yAxis(svg, area, low, high, metricName(metric));
  const group = (area.right - area.left) / bands.length, bar = Math.min(34, (group * 0.82) / rows.length);
  bands.forEach((band, position) => {
    const middle = area.left + group * (position + 0.5);
    rows.forEach(({ row, series }, number) => {
      const size = value(row, band);
      if (!isNumber(size)) return;
      const left = middle + (number - rows.length / 2) * bar;
      svg.append(draw("rect", { class: `mark s${series}`, x: left, width: Math.max(1, bar - 1), y: Math.min(y(size), y(0)), height: Math.max(0.5, Math.abs(y(0) - y(size))) },
        tip(`${row.name}, ${band}: ${metricName(metric)} ${score(size)} (${amount(sizes[position], "test row")})`)));
    });
    svg.append(draw("text", { class: "strong", x: middle, y: area.bottom + 15, "text-anchor": "middle" }, band),
      draw("text", { x: middle, y: area.bottom + 30, "text-anchor": "middle" }, `${group > 60 ? "n " : ""}${sizes[position].toLocaleString("en")}`));
  });
  svg.append(draw("line", { class: "axis", x1: area.left, x2: area.right, y1: y(0), y2: y(0) }));
  return el("figure", null, svg);
}

// ------------------------------------------------ learning curves

function curvePanel(table, body, width) {
  const metric = metricName(selectedBy(table));
  const rows = chosenRows(table).map((position, series) => ({ row: table.rows[position], series }));
  if (!rows.length) { body.append(empty("Choose rows above: “add a row”.")); return; }
  const stages = new Map();  // name -> lines
  const without = [];
  for (const { row, series } of rows) {
    let found = false;
    if (board.models.includes(row.model)) {
      for (const id of (row.run_ids ?? []).slice(0, 10)) {
        for (const stage of runOf(id)?.stages ?? []) {
          if ((stage.recorded ?? 0) < 2) continue;
          found = true;
          if (!stages.has(stage.stage)) stages.set(stage.stage, []);
          stages.get(stage.stage).push({ row, series, stage, seed: runOf(id).seed });
        }
      }
    }
    if (!found) without.push(row.name);
  }
  if (!stages.size) {
    body.append(empty("No learning curves of these rows: floors are not trained, and runs of older versions recorded none. Add a trained row above."));
    return;
  }
  const order = ["pretrain", "finetune", "train"];
  const names = [...stages.keys()].sort((a, b) => (order.indexOf(a) + 9) % 9 - (order.indexOf(b) + 9) % 9);
  for (const name of names) {
    const lines = stages.get(name);
    const pair = el("div", { class: "pair" });
    const half = width >= 600 ? (width - 16) / 2 : width;
    for (const [key, label] of [["train_loss", "training loss"], ["valid", `validation ${metric}`]]) {
      const drawn = lines.map((line) => ({ ...line, points: pointsOf(line.stage.curve, key) })).filter(({ points }) => points.length > 0);
      if (drawn.length) pair.append(curvePlot(drawn, STAGES[name] ?? name, label, key === "valid", half));
    }
    body.append(el("h3", null, STAGES[name] ?? name), pair);
  }
  const cut = [...stages.values()].flat().some(({ stage }) => stage.recorded > stage.curve.epoch.length);
  const notes = ["One line per seed; rings mark the epoch that was selected."];
  if (new Set(rows.map(({ row }) => row.model)).size > 1) notes.push("Losses of different models are different things; compare their validation.");
  if (cut) notes.push(`Of long curves, ${board.n_points} epochs are drawn: first, last, best, and others in even steps.`);
  if (rows.some(({ row }) => (row.run_ids ?? []).length > 10)) notes.push("Of rows with more than 10 runs, the first 10.");
  if (without.length) notes.push(`No curve of ${without.join(", ")}.`);
  body.append(el("p", { class: "small muted" }, notes.join(" ")));
}
function pointsOf(curve, key) {
  const values = curve[key] ?? [];
  return values.map((value, position) => [curve.epoch?.[position] ?? position, value]).filter(([, value]) => isNumber(value));
}
function curvePlot(lines, stage, label, rings, width) {
  const height = Math.round(Math.min(300, Math.max(210, width * 0.55)));
  const svg = plot(width, height, `${stage}: ${label} by epoch`, `${amount(lines.length, "line")} of ${[...new Set(lines.map(({ row }) => row.name))].join(", ")}.`);
  const area = { left: 52, right: width - 12, top: 24, bottom: height - 42 };
  const all = lines.flatMap(({ points }) => points);
  const y = yAxis(svg, area, ...rangeOf(all.map(([, value]) => value)), label);
  const last = all.reduce((most, [epoch]) => Math.max(most, epoch), 1), first = all.reduce((least, [epoch]) => Math.min(least, epoch), last);
  const place = linear(first, Math.max(last, first + 1), area.left + 4, area.right - 4);
  const { ticks } = niceTicks(first, Math.max(last, first + 1), Math.max(2, Math.floor(width / 70)));
  xAxis(svg, area, ticks.filter(Number.isInteger), place, (tick) => String(tick), "epoch");
  for (const { row, series, stage: { best_epoch: best }, seed, points } of lines) {
    const path = points.map(([epoch, value], position) => `${position ? "L" : "M"}${place(epoch).toFixed(1)},${y(value).toFixed(1)}`).join("");
    svg.append(draw("path", { class: `line s${series} d${series}`, d: path, "data-line": row.name }, tip(`${row.name}, seed ${seed}`)));
    const ring = points.find(([epoch]) => epoch === best);
    if (rings && ring) svg.append(draw("circle", { class: `best s${series}`, cx: place(best), cy: y(ring[1]), r: 3.6 }, tip(`${row.name}, seed ${seed}: epoch ${best}, ${score(ring[1])}`)));
  }
  return el("figure", null, svg);
}
