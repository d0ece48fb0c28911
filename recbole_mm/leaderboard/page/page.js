// Sections of the page, its filters, and its start.
// ------------------------------------------------ sections

const WIDE = ["slices", "curves"];  // panels that draw the chosen rows
const PANELS = [["cost", "Metric and cost", costPanel], ["knockouts", "Knock-outs", knockoutPanel], ["slices", "Slices", slicePanel], ["curves", "Learning curves", curvePanel]];

function panelOf(table, name, title, build, openAtFirst) {
  const key = `panel|${table.id}|${name}`;
  const body = el("div");
  const box = el("details", { class: WIDE.includes(name) ? "panel wide" : "panel", "data-panel": name }, el("summary", null, title), body);
  const render = () => {
    const width = Math.max(240, Math.floor(box.clientWidth - parseFloat(getComputedStyle(box).paddingLeft) * 2));
    body.replaceChildren();
    build(table, body, width);
  };
  box.open = opened.get(key) ?? openAtFirst;
  box.addEventListener("toggle", () => {
    opened.set(key, box.open);
    if (box.open && !body.childElementCount) render();
  });
  box.render = () => { if (box.open) render(); };
  return box;
}

function factsOf(table) {
  const facts = [["Test rows", table.n_test && table.n_test.toLocaleString("en")],
    ["Candidate items", table.n_items && table.n_items.toLocaleString("en")],
    ["Selected on", selectedBy(table) && `validation ${metricName(selectedBy(table))}`], ["Baseline", table.baseline],
    ["Data hash", table.data_fingerprint], ["Test hash", table.test_fingerprint]];
  return el("dl", { class: "facts" }, facts.filter(([, value]) => value).map(([name, value]) => el("div", null, el("dt", null, name), el("dd", null, value))));
}

function failedOf(table) {
  const failed = table.failed ?? [];
  if (!failed.length) return null;
  const key = `failed|${table.id}`;
  const box = el("details", { class: "panel wide failed" }, el("summary", null, amount(failed.length, "failed run")));
  box.open = opened.get(key) ?? false;
  const render = () => {
    if (!box.open || box.childElementCount > 1) return;
    const rows = failed.slice(0, 500).map((run) => el("tr", null, el("th", { scope: "row" }, [run.model, run.knockout].filter(Boolean).join(" − ")), el("td", null, String(run.seed ?? "")),
      el("td", { class: "error" }, run.error || "no reason was recorded"), el("td", null, settingsText(run.settings_given)), el("td", null, el("code", null, run.run_id ?? ""))));
    box.append(el("div", { class: "inner", tabindex: "0", role: "region", "aria-label": "Failed runs" }, el("table", null,
      el("thead", null, el("tr", null, ["Model", "Seed", "Reason", "Settings given", "Run"].map((text) => el("th", { scope: "col" }, text)))), el("tbody", null, rows))));
    if (failed.length > 500) box.append(el("p", { class: "muted" }, `${amount(failed.length - 500, "more failed run")} in the file of runs.`));
  };
  box.addEventListener("toggle", () => { opened.set(key, box.open); render(); });
  render();
  return box;
}

// What papers say of models that nobody ran here.
function reportedOf(table) {
  const reported = table.reported ?? [];
  if (!reported.length) return null;
  const metrics = [...new Set(reported.flatMap(({ metrics: values }) => Object.keys(values ?? {})))];
  const head = ["Model", ...metrics.map(metricName), "Source"].map((text) => el("th", { scope: "col" }, text));
  const rows = reported.map((entry) => el("tr", null, el("th", { scope: "row" }, entry.name),
    metrics.map((name) => el("td", { class: "paper" }, score(entry.metrics?.[name]))),
    el("td", { class: "muted source" }, [entry.source, entry.note].filter(Boolean).join(": "))));
  return el("details", { class: "panel wide reported" }, el("summary", null, "Reported in papers, not comparable"),
    el("div", { class: "inner", tabindex: "0", role: "region", "aria-label": "Values of papers" },
      el("table", null, el("thead", null, el("tr", null, head)), el("tbody", null, rows))));
}

function sectionOf(table, number) {
  const titleId = newId();
  const twins = board.tables.filter((other) => other.dataset === table.dataset && other.protocol === table.protocol).length > 1;
  const section = el("section", { class: "board", "data-table": table.id, "aria-labelledby": titleId });
  section.append(el("div", { class: "title" }, el("h2", { id: titleId }, table.dataset), el("span", { class: "tag" }, table.protocol || "unknown protocol"),
    table.protocol_note && el("span", { class: "tag leak" }, table.protocol_note)), factsOf(table));
  if (twins) section.append(el("p", { class: "small muted" }, "Other tables of this dataset and protocol have other data or other test rows; see the hashes."));
  if (table.sentences?.length) section.append(el("p", { class: "sentences" }, table.sentences.join(" ")));
  for (const note of table.notes ?? []) section.append(el("p", { class: "notice small" }, note));
  if (rowsShown(table).length) {
    section.append(el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `Table of ${table.dataset}, ${table.protocol}` }, tableOf(table)));
    if (state.all === "" && metricsShown(table).length < table.metrics.length) {
      section.append(el("p", { class: "small muted" }, `${amount(table.metrics.length - metricsShown(table).length, "more metric")}: tick “all metrics” above.`));
    }
  } else {
    section.append(empty(table.rows.length ? "No row of this table matches the filters." : "No finished run yet; the failed ones are below, with their reasons."));
  }
  const panels = table.rows.length ? PANELS.map(([name, title, build]) => panelOf(table, name, title, build, number === 0)) : [];
  if (panels.length) panels.splice(PANELS.length - WIDE.length, 0, chips(table));
  section.append(el("div", { class: "panels" }, panels, reportedOf(table), failedOf(table)));
  return section;
}

// ------------------------------------------------ the page

function options(select, values, first, current, text = String) {
  select.replaceChildren(el("option", { value: "" }, first), ...values.map((value) => el("option", { value }, text(value))));
  select.value = current;
}

function showFilters() {
  const unique = (key, tables) => [...new Set(tables.map((table) => table[key]).filter(Boolean))].sort();
  options(byId("dataset"), unique("dataset", board.tables), "all", state.dataset);
  options(byId("protocol"), unique("protocol", board.tables), "all", state.protocol);
  const metrics = [...new Set(board.tables.flatMap((table) => table.metrics))];
  if (!metrics.includes(state.metric)) state.metric = "";
  options(byId("metric"), metrics, "that selected", state.metric, metricName);
  if (byId("model").value.trim() !== state.model) byId("model").value = state.model;
  byId("floors").checked = !hides("floors");
  byId("knockouts").checked = !hides("knockouts");
  byId("all").checked = state.all === "1";
}

function showProblems() {
  const box = byId("problems");
  box.replaceChildren();
  if (!board.problems.length) return;
  const list = (some) => el("ul", null, some.map((text) => el("li", null, text)));
  const notice = el("div", { class: "notice error" }, el("b", null, `${amount(board.problems.length, "problem")} in the file of runs`), list(board.problems.slice(0, 5)));
  if (board.problems.length > 5) notice.append(el("details", null, el("summary", null, `${board.problems.length - 5} more`), list(board.problems.slice(5))));
  box.append(notice);
}

function showTables(tables) {
  const nav = byId("tables");
  nav.replaceChildren();
  if (tables.length < 2 || tables.length > 40) return;
  tables.forEach((table, number) => nav.append(el("button", { type: "button", class: "button", onclick: () => {
    if (number >= nTables) { nTables = number + 1; show(); }
    document.querySelectorAll(".board")[number].scrollIntoView({ block: "start" });
  } }, [table.dataset, table.protocol].filter(Boolean).join(" · "))));
}

function show() {
  const focused = document.activeElement?.closest?.("#main");
  const attribute = focused && ["data-sort", "data-open", "data-choice"].find((name) => document.activeElement.hasAttribute(name));
  const wanted = attribute && [document.activeElement.closest(".board")?.dataset.table, document.activeElement.getAttribute(attribute)];
  const scrolled = new Map([...document.querySelectorAll(".board")].map((section) => [section.dataset.table, section.querySelector(".scroll")?.scrollLeft ?? 0]));
  showFilters();
  const tables = tablesShown(), main = byId("main");
  showTables(tables);
  main.replaceChildren(...tables.slice(0, nTables).map(sectionOf));
  if (tables.length > nTables) {
    main.append(el("p", null, el("button", { type: "button", class: "button", onclick: () => { nTables += MOST_TABLES; show(); } }, `Show ${Math.min(MOST_TABLES, tables.length - nTables)} more of ${amount(tables.length, "table")}`)));
  }
  if (!board.tables.length) main.append(noRuns());
  else if (!tables.length) main.append(empty("No table has this dataset and this protocol together; choose others, or press Clear."));
  const rows = tables.reduce((sum, table) => sum + rowsShown(table).length, 0), all = board.tables.reduce((sum, table) => sum + table.rows.length, 0);
  byId("count").textContent = `${tables.length} of ${amount(board.tables.length, "table")}, ${rows.toLocaleString("en")} of ${amount(all, "row")}`;
  document.title = [state.dataset, state.protocol, "Leaderboard"].filter(Boolean).join(" · ");
  for (const panel of document.querySelectorAll(".panel[data-panel]")) panel.render();
  for (const section of document.querySelectorAll(".board")) {
    const box = section.querySelector(".scroll");
    if (box) box.scrollLeft = scrolled.get(section.dataset.table) ?? 0;
    if (wanted && section.dataset.table === wanted[0]) {
      [...section.querySelectorAll(`[${attribute}]`)].find((element) => element.getAttribute(attribute) === wanted[1])?.focus({ preventScroll: true });
    }
  }
}

function noRuns() {
  return el("div", { class: "empty" }, el("p", null, "No finished run yet. Train a model on a dataset that makes itself, and write this page again:"),
    commandBox("python run_recbole_mm.py --model=MSM4SR --dataset=demo\npython -m recbole_mm.leaderboard"));
}

function start() {
  byId("about").textContent = [board.generated && `written ${when(board.generated)}`, board.version && `recbole_mm ${board.version}`, amount(board.n_runs, "run")].filter(Boolean).join(" · ");
  readAddress();
  showProblems();
  for (const key of ["dataset", "protocol", "metric"]) byId(key).addEventListener("change", () => change({ [key]: byId(key).value }));
  let waiting;
  byId("model").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(() => change({ model: byId("model").value.trim() }), 150); });
  for (const key of ["floors", "knockouts"]) {
    byId(key).addEventListener("change", () => change({ hide: ["floors", "knockouts"].filter((name) => !byId(name).checked).join(",") }));
  }
  byId("all").addEventListener("change", () => change({ all: byId("all").checked ? "1" : "" }));
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("clear").addEventListener("click", (event) => { event.preventDefault(); chosen.clear(); change({ ...DEFAULTS }); });
  addEventListener("hashchange", () => { readAddress(); show(); });
  show();
  if (state.run) document.querySelector(`[data-run="${CSS.escape(state.run)}"]`)?.scrollIntoView({ block: "center" });
  let width = innerWidth, later;
  addEventListener("resize", () => {
    if (innerWidth === width) return;  // a phone's address bar changes the height only
    width = innerWidth;
    clearTimeout(later);
    later = setTimeout(() => { for (const panel of document.querySelectorAll(".panel[data-panel]")) panel.render(); }, 120);
  });
}
start();
