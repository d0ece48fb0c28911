// Data of the page, what is looked at, and the address that keeps it.
const byId = (id) => document.getElementById(id);
const board = JSON.parse(byId("board").textContent);
board.tables ??= [];
board.problems ??= [];

const MOST_TABLES = 10, MOST_ROWS = 200, MOST_RUNS = 30, MOST_SERIES = 6;  // shown before somebody asks for more
const FEW = 30;  // test rows; a band with fewer says little
const KINDS = [["model", "Models"], ["floor", "Floors, need no training"], ["knockout", "Knock-outs, one modality made meaningless"]];
const COSTS = {  // what it is called, as text, header of its column
  parameters: ["Parameters", count, "Params"], seconds_per_epoch: ["Seconds per epoch", plain, "s / epoch"],
  train_seconds: ["Training time", seconds, "Training"], epochs: ["Epochs", plain, "Epochs"],
  peak_memory: ["Peak memory", bytes, "Memory"], peak_memory_gpu: ["Peak memory of the GPU", bytes, "GPU memory"],
  latency_ms: ["Latency per user in a batch [ms]", plain, "ms / user"],
  latency_single_ms: ["Latency of one user alone [ms]", plain, "ms alone"],
};
const STAGES = { pretrain: "Pre-training", finetune: "Fine-tuning", train: "Training" };
const AXES = { train_seconds: [1, "s"], peak_memory: [2 ** 20, "MiB"], peak_memory_gpu: [2 ** 20, "MiB"] };  // size and name of the unit
const LATENCIES = { batch_ms_per_user: "per user in a batch [ms]", single_ms: "one user alone [ms]" };
const SLICES = {
  popularity: "popularity of the target", history: "length of the history", price: "price of the target",
  coverage: "content known of the target",
};
const BANDS = ["head", "mid", "tail", "cold", "1-2", "3-5", "6-10", "11-20", "21+", "low", "high", "unknown", "all", "some", "none"];

// ------------------------------------------------ runs: read when the first is looked at

let allRuns = null;
const unpacked = new Map();
function runOf(id) {
  if (unpacked.has(id)) return unpacked.get(id);
  allRuns ??= JSON.parse(byId("runs").textContent);
  const run = Object.hasOwn(allRuns.runs, id) ? { ...allRuns.runs[id] } : null;
  if (run !== null) {
    const { shared } = allRuns;
    for (const key of ["versions", "features", "settings_given", "budget", "warnings"]) {
      if (isNumber(run[key])) run[key] = shared[run[key]];
    }
    for (const key of ["valid", "test"]) {
      const [names, values] = run[key];
      run[key] = new Map(shared[names].map((name, position) => [name, values[position]]));
    }
  }
  unpacked.set(id, run);
  return run;
}

// ------------------------------------------------ the view, kept in the address

const DEFAULTS = { dataset: "", protocol: "", metric: "", model: "", hide: "", all: "", sort: "", dir: "", cost: "", slice: "", run: "" };
let state = { ...DEFAULTS };
const opened = new Map();    // panel or row -> whether somebody opened or closed it
const chosen = new Map();    // table -> rows in the plots
const longer = new Set();    // lists of which all is shown
let nTables = MOST_TABLES;

function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  state = { ...DEFAULTS };
  for (const key of Object.keys(DEFAULTS)) if (given.has(key)) state[key] = given.get(key);
  if (!board.tables.some((table) => table.dataset === state.dataset)) state.dataset = "";
  if (!board.tables.some((table) => table.protocol === state.protocol)) state.protocol = "";
}
function writeAddress() {
  const given = new URLSearchParams();
  for (const [key, value] of Object.entries(state)) if (value !== DEFAULTS[key]) given.set(key, value);
  const hash = given.toString().replaceAll("%40", "@").replaceAll("%3A", ":");
  if (location.hash.slice(1) === hash) return;
  history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search);
}
function change(part) {
  Object.assign(state, part);
  writeAddress();
  show();
}
const hides = (what) => state.hide.split(",").includes(what);

function metricOf(table) { return table.metrics.includes(state.metric) ? state.metric : mainMetric(table); }
function mainMetric(table) {
  const wanted = String(table.main_metric ?? "").toLowerCase();
  return table.metrics.find((name) => name.toLowerCase() === wanted) ?? table.metrics[0] ?? "";
}
function selectedBy(table) { return table.selected_by || mainMetric(table); }
function metricsShown(table) {
  if (state.all) return table.metrics;
  const focus = metricOf(table), cutoff = focus.split("@")[1];
  const same = table.metrics.filter((name) => name.split("@")[1] === cutoff);
  return [focus, ...same.filter((name) => name !== focus)].slice(0, 5);
}

function tablesShown() {
  return board.tables.filter((table) => (!state.dataset || table.dataset === state.dataset)
    && (!state.protocol || table.protocol === state.protocol));
}
function rowsShown(table) {
  const words = state.model.toLowerCase().split(/\s+/).filter(Boolean);
  return table.rows.map((row, position) => ({ row, position })).filter(({ row }) => {
    if (row.kind === "floor" && hides("floors")) return false;
    if (row.kind === "knockout" && hides("knockouts")) return false;
    const name = `${row.name} ${row.model}`.toLowerCase();
    return words.every((word) => name.includes(word));
  });
}
