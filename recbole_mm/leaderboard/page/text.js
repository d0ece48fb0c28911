// Numbers and elements. Data reach the page as text only: nothing here writes markup.
// ------------------------------------------------ text

function metricName(metric) { return board.metric_names?.[metric] ?? metric; }
function isNumber(value) { return typeof value === "number" && Number.isFinite(value); }
function plain(value) {
  if (!isNumber(value)) return "";
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(3)));
}
function count(value) {
  if (!isNumber(value)) return "";
  for (const [size, unit] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (Math.abs(value) >= size) return `${Number((value / size).toPrecision(3))} ${unit}`;
  }
  return plain(value);
}
function bytes(value) {
  if (!isNumber(value)) return "";
  for (const [power, unit] of [[30, "GiB"], [20, "MiB"], [10, "KiB"]]) {
    if (value >= 2 ** power) return `${Number((value / 2 ** power).toPrecision(3))} ${unit}`;
  }
  return `${value} B`;
}
function seconds(value) {
  if (!isNumber(value)) return "";
  if (value < 100) return `${Number(value.toPrecision(3))} s`;
  const minutes = value / 60;
  if (minutes < 100) return `${minutes.toFixed(minutes < 10 ? 1 : 0)} min`;
  return `${(value / 3600).toFixed(1)} h`;
}
function score(value) {
  if (!isNumber(value)) return "";
  return Math.abs(value) < 1000 ? value.toFixed(4) : plain(value);
}
function signed(value) { return isNumber(value) ? (value < 0 ? "−" : "+") + score(Math.abs(value)) : ""; }
function probability(value) { return !isNumber(value) ? "" : value < 0.001 ? "< 0.001" : value.toFixed(3); }
function interval(part) { return isNumber(part.low) && isNumber(part.high) ? `[${signed(part.low)}, ${signed(part.high)}]` : ""; }
function amount(n, one, many = `${one}s`) { return `${n.toLocaleString("en")} ${n === 1 ? one : many}`; }
function when(text) { return String(text).replace(/^(\d{4}-\d\d-\d\d)T(\d\d:\d\d).*$/, "$1 $2"); }
function jsonText(value) { return typeof value === "string" ? value : JSON.stringify(value); }
function shortened(text, length) { return text.length > length ? `${text.slice(0, length - 1)}…` : text; }

// ------------------------------------------------ elements

function fill(element, properties, children) {
  for (const [key, value] of Object.entries(properties ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else element.setAttribute(key, value === true ? "" : String(value));
  }
  for (const child of children.flat(Infinity)) {
    if (child !== null && child !== undefined && child !== false) element.append(child);
  }
  return element;
}
function el(name, properties, ...children) { return fill(document.createElement(name), properties, children); }
function draw(name, properties, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", name), properties, children);
}
const pen = document.createElement("canvas").getContext("2d");
function widthOf(text) {  // in a plot
  pen.font = `11.5px ${getComputedStyle(document.body).fontFamily}`;
  return pen.measureText(text).width + 4;
}
let lastId = 0;
function newId() { lastId += 1; return `n${lastId}`; }
