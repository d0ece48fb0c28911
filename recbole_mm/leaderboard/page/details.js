// What opens below a row: comparisons, runs, commands.
// ------------------------------------------------ details of a row and of a run

function rowDetails(table, row) {
  const box = el("div", { class: "detail-box" });
  for (const warning of row.warnings ?? []) box.append(el("p", { class: "notice" }, warning));
  const comparisons = [["difference", `Row minus ${table.baseline}`], ["gap", `${row.of} minus this row`]];
  for (const [part, title] of comparisons) {
    const names = table.metrics.filter((name) => isNumber(row[part]?.[name]?.mean));
    if (names.length) box.append(comparisonTable(title, names, row[part]));
  }
  const papers = Object.entries(row.paper ?? {});
  if (papers.length) {
    box.append(el("p", { class: "small muted" }, "Paper: ",
      papers.map(([name, { value, source, note }]) => `${metricName(name)} ${score(value)} (${[source, note].filter(Boolean).join("; ")})`).join("; ")));
  }
  if (Object.keys(row.budget ?? {}).length) {
    box.append(el("p", { class: "small muted" }, "Budget of the search: ",
      Object.entries(row.budget).map(([key, value]) => `${key} ${jsonText(value)}`).join(", ")));
  }
  const ids = row.run_ids ?? [];
  box.append(el("h3", null, amount(ids.length, "run")));
  const key = `runs|${table.id}|${row.name}`;
  const list = el("div");
  const add = (some) => list.replaceChildren(...some.map((id) => runDetails(id, table)));
  add(longer.has(key) ? ids : ids.slice(0, MOST_RUNS));
  box.append(list);
  if (ids.length > MOST_RUNS && !longer.has(key)) {
    const more = el("button", { type: "button", class: "button" }, `Show all ${amount(ids.length, "run")}`);
    more.addEventListener("click", () => { longer.add(key); add(ids); more.remove(); });
    box.append(more);
  }
  return box;
}

function comparisonTable(title, names, parts) {
  const rows = names.map((name) => el("tr", null, el("th", { scope: "row" }, metricName(name)), el("td", { class: verdict(parts[name]) }, signed(parts[name].mean)),
    el("td", null, interval(parts[name])), el("td", null, probability(parts[name].p)), el("td", null, probability(parts[name].p_holm))));
  const head = el("tr", null, ["Metric", "Mean", "95 % interval", "p", "p (Holm)"].map((text) => el("th", { scope: "col" }, text)));
  return el("div", null, el("h3", null, title),
    el("div", { class: "inner", tabindex: "0", role: "region", "aria-label": title }, el("table", null, el("thead", null, head), el("tbody", null, rows))));
}

function runDetails(id, table) {
  const run = runOf(id);
  if (run === null) return el("p", { class: "muted" }, `Run ${id}: no details in this page.`);
  const metric = metricOf(table);
  const time = Object.values(run.seconds ?? {}).filter(isNumber).reduce((sum, part) => sum + part, 0);
  const summary = [`seed ${run.seed}`, id, run.status === "failed" ? "failed" : `${metricName(metric)} ${score(run.test.get(metric))}`, seconds(time)];
  const box = el("details", { class: "run", "data-run": id }, el("summary", null, summary.filter(Boolean).join(" · ")));
  box.addEventListener("toggle", () => {
    if (box.open && box.childElementCount === 1) box.append(runBody(run, id));
  });
  if (state.run === id) box.open = true;
  return box;
}

function runBody(run, id) {
  const facts = [];
  const add = (name, value) => { if (value !== undefined && value !== null && value !== "") facts.push(el("dt", null, name), el("dd", null, value)); };
  const listed = (part, text = jsonText) => Object.entries(part ?? {}).map(([key, value]) => `${key} ${text(value)}`).join(", ");
  add("Settings given", settingsText(run.settings_given));
  add("Knock-out", run.knockout);
  add("Protocol", run.protocol);
  add("Started", run.started && when(run.started));
  add("Error", run.error && el("span", { class: "bad" }, run.error));
  add("Time", listed(run.seconds, seconds));
  add("Peak memory", listed(run.peak_memory, bytes));
  add("Parameters", isNumber(run.n_parameters) ? run.n_parameters.toLocaleString("en") : "");
  add("Latency", Object.entries(run.latency ?? {}).map(([key, value]) => `${LATENCIES[key] ?? key} ${plain(value)}`).join(", "));
  for (const stage of run.stages ?? []) {
    add(STAGES[stage.stage] ?? stage.stage, [amount(stage.epochs ?? 0, "epoch"), `best ${stage.best_epoch}`, seconds(stage.seconds)].join(", "));
  }
  const metrics = (part) => [...part].map(([name, value]) => `${metricName(name)} ${score(value)}`).join(", ");
  add("Validation", metrics(run.valid));
  add("Test", metrics(run.test));
  add("Budget", listed(run.budget));
  add("Data hash", run.data_fingerprint && el("code", null, run.data_fingerprint));
  add("Settings hash", run.settings_hash && el("code", null, run.settings_hash));
  add("Feature hashes", Object.keys(run.features ?? {}).length
    ? Object.entries(run.features).map(([name, hash]) => el("div", null, `${name} `, el("code", null, hash))) : "");
  add("Versions", listed(run.versions));
  const warnings = (run.warnings ?? []).map((text) => el("p", { class: "notice" }, text));
  const body = el("div", null, warnings, el("dl", null, facts));
  if (run.command) body.append(el("h3", null, "Repeat it"), commandBox(run.command));
  if (run.status !== "failed") body.append(el("h3", null, "Check that it repeats"), commandBox(`python -m recbole_mm.verify ${id}`));
  const link = el("button", { type: "button", class: "button" }, "Link to this run");
  link.addEventListener("click", () => {
    state.run = id;
    writeAddress();
    copy(location.href, link);
  });
  body.append(link);
  return body;
}

function settingsText(settings) {
  const given = Object.entries(settings ?? {});
  if (!given.length) return "none: all defaults";
  return given.map(([key, value]) => el("div", null, el("code", null, `${key}: ${jsonText(value)}`)));
}

function commandBox(command) {
  const button = el("button", { type: "button", class: "button copy" }, "Copy");
  const text = el("pre", { tabindex: "0" }, command);
  button.addEventListener("click", () => copy(command, button, text));
  return el("div", { class: "command" }, text, button);
}

async function copy(text, button, element = null) {
  const label = button.textContent;
  let done = false;
  try {
    await navigator.clipboard.writeText(text);
    done = true;
  } catch {  // not allowed for this page: select it, so that a key press copies it
    if (element !== null) getSelection().selectAllChildren(element);
  }
  button.textContent = done ? "Copied" : element !== null ? "Selected, press Ctrl+C" : "See the address";
  setTimeout(() => { button.textContent = label; }, 2500);
}
