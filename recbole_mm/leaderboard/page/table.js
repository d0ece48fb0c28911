// The sortable table.
// ------------------------------------------------ columns

function columnsOf(table) {
  const metric = metricOf(table), rows = table.rows;
  const columns = [{ key: "name", title: "Model", of: (row) => row.name.toLowerCase(), first: "ascending" }];
  metricsShown(table).forEach((name, position) => columns.push({
    key: `test:${name}`, title: metricName(name), group: position === 0 ? "Test" : null, of: (row) => row.test?.[name]?.mean,
    cell: (row) => metricCell(row, name),
  }));
  if (rows.some((row) => isNumber(comparisonOf(row, metric)?.mean))) {
    columns.push({ key: "difference", title: "Difference", group: table.baseline ? `${metricName(metric)} against ${table.baseline}` : `${metricName(metric)}, compared`,
      of: (row) => comparisonOf(row, metric)?.mean, cell: (row) => differenceCell(row, table, metric) });
    columns.push({ key: "p", title: "p (Holm)", group: null, first: "ascending", of: (row) => comparisonOf(row, metric)?.p_holm,
      cell: (row) => pCell(row, metric) });
  }
  let group = "Cost";
  for (const [key, [hint, text, title]] of Object.entries(COSTS)) {
    if (!rows.some((row) => isNumber(row.cost?.[key]))) continue;
    columns.push({ key: `cost:${key}`, title, hint, group, first: "ascending", of: (row) => row.cost?.[key],
      cell: (row) => el("td", { class: group === "Cost" ? "apart" : null }, text(row.cost?.[key])) });
    group = null;
  }
  columns.push({ key: "seeds", title: "Seeds", group: "Runs", of: (row) => row.seeds?.length ?? 0, cell: seedsCell });
  columns.push({ key: "tried", title: "Tried", group: null, of: (row) => triedOf(row), cell: triedCell });
  columns.push({ key: `valid:${metric}`, title: metricName(metric), group: "Validation", of: (row) => row.valid?.[metric]?.mean,
    cell: (row) => validCell(row, metric) });
  const papers = metricsShown(table).filter((name) => rows.some((row) => isNumber(row.paper?.[name]?.value)));
  papers.forEach((name, position) => columns.push({
    key: `paper:${name}`, title: metricName(name), group: position === 0 ? "Paper, other protocol" : null, paper: true,
    of: (row) => row.paper?.[name]?.value, cell: (row) => paperCell(row, name),
  }));
  return columns;
}

function seedsCell(row) {
  const seeds = row.seeds ?? [];
  return el("td", { title: `seeds ${seeds.join(", ")}` }, String(seeds.length));
}
function metricCell(row, name) {
  const value = row.test?.[name];
  if (!isNumber(value?.mean)) return el("td", { class: "muted", title: "not measured" }, "–");
  const mean = score(value.mean);
  const difference = row.difference?.[name];
  const title = isNumber(difference?.mean)
    ? `difference ${signed(difference.mean)} ${interval(difference)}, p ${probability(difference.p_holm ?? difference.p)}` : null;
  return el("td", { title }, value.bold ? el("strong", null, mean) : mean,
    isNumber(value.sd) && el("span", { class: "sd" }, ` ± ${score(value.sd)}`));
}
function verdict(part) {
  const p = part?.p_holm ?? part?.p;
  if (!isNumber(part?.mean) || !isNumber(p) || p >= 0.05 || part.mean === 0) return "";
  return part.mean > 0 ? "good" : "bad";
}
// Of a knock-out, the gap to its full model: that is what it is for.
function comparisonOf(row, metric) {
  return row.kind === "knockout" && isNumber(row.gap?.[metric]?.mean) ? row.gap[metric] : row.difference?.[metric];
}
function differenceCell(row, table, metric) {
  if (row.name === table.baseline) return el("td", { class: "muted apart" }, "baseline");
  const part = comparisonOf(row, metric);
  if (!isNumber(part?.mean)) return el("td", { class: "muted apart" }, "–");
  if (part === row.gap?.[metric]) {
    return el("td", { class: "apart", title: `${row.of} minus this row` }, el("span", { class: "sd" }, "gap "), signed(part.mean),
      el("span", { class: "interval" }, interval(part)));
  }
  const sign = { good: " ▲", bad: " ▼", "": "" }[verdict(part)];
  return el("td", { class: "apart" }, el("span", { class: verdict(part) }, signed(part.mean) + sign),
    el("span", { class: "interval" }, interval(part)));
}
function pCell(row, metric) {
  const part = comparisonOf(row, metric);
  return el("td", { title: isNumber(part?.p) ? `not corrected: ${probability(part.p)}` : null }, probability(part?.p_holm ?? part?.p));
}
function validCell(row, metric) {
  const value = row.valid?.[metric];
  return el("td", { class: "muted apart" }, score(value?.mean));
}
function paperCell(row, name) {
  const part = row.paper?.[name];
  if (!isNumber(part?.value)) return el("td", { class: "paper apart" });
  return el("td", { class: "paper apart", title: [part.source, part.note].filter(Boolean).join(": ") }, score(part.value));
}
function triedOf(row) { return row.budget?.trials ?? row.n_settings; }
function triedCell(row) {
  const { trials, seconds: time } = row.budget ?? {};
  if (!isNumber(trials)) return el("td", null, isNumber(row.n_settings) ? amount(row.n_settings, "setting") : "");
  return el("td", null, amount(trials, "trial"), isNumber(time) && el("span", { class: "interval" }, seconds(time)));
}

// ------------------------------------------------ the table

function sorted(table, rows, columns) {
  const metric = metricOf(table);
  const column = columns.find(({ key }) => key === state.sort) ?? columns.find(({ key }) => key === `test:${metric}`);
  const direction = state.dir || column.first || "descending";
  const sign = direction === "ascending" ? 1 : -1;
  const missing = (value) => value === null || value === undefined || value === "";
  const compare = (left, right) => {
    const a = column.of(left.row), b = column.of(right.row);
    if (missing(a) || missing(b)) return missing(a) - missing(b) || left.position - right.position;
    const order = typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b;
    return sign * order || left.position - right.position;
  };
  return { rows: [...rows].sort(compare), column, direction };
}

function headOf(columns, sortedBy, direction) {
  const groups = el("tr", { class: "groups" });
  let last = null;
  for (const column of columns) {
    if (column.group === null && last !== null) last.colSpan += 1;
    else groups.append(last = column.key === "name" ? el("td", { class: "name" })
      : el(column.group ? "th" : "td", { scope: column.group ? "colgroup" : null, class: column.group ? "apart" : null }, column.group));
  }
  const titles = columns.map((column) => {
    const active = column.key === sortedBy.key;
    const click = () => {
      const first = column.first ?? "descending";
      const other = first === "ascending" ? "descending" : "ascending";
      change({ sort: column.key, dir: active && direction === first ? other : first });
    };
    const classes = [column.key === "name" && "name", column.group && "apart", column.paper && "paper"].filter(Boolean).join(" ");
    return el("th", { scope: "col", class: classes || null, "aria-sort": active ? direction : "none" },
      el("button", { type: "button", title: column.hint, "data-sort": column.key, onclick: click }, column.title));
  });
  return el("thead", null, groups, el("tr", null, titles));
}

function tableOf(table) {
  const shown = rowsShown(table);
  const columns = columnsOf(table);
  const { rows, column, direction } = sorted(table, shown, columns);
  const bodies = [];
  for (const [kind, title] of KINDS) {
    const all = rows.filter(({ row }) => (KINDS.some(([known]) => known === row.kind) ? row.kind : "model") === kind);
    if (!all.length) continue;
    const key = `${table.id}|${kind}`;
    const some = longer.has(key) ? all : all.slice(0, MOST_ROWS);
    const body = el("tbody", { class: kind });
    if (kind !== "model" || rows.some(({ row }) => row.kind !== "model")) {
      body.append(el("tr", { class: "kind" }, el("th", { scope: "rowgroup", class: "name" }, title.split(",")[0]),
        el("td", { colspan: columns.length - 1 }, title.includes(",") ? title.split(",")[1].trim() : "")));
    }
    for (const { row, position } of some) body.append(...rowOf(table, row, position, columns));
    if (some.length < all.length) {
      const more = el("button", { type: "button", class: "button", onclick: () => { longer.add(key); show(); } },
        `Show all ${amount(all.length, "row")}`);
      body.append(el("tr", null, el("td", { colspan: columns.length, class: "name" }, more)));
    }
    bodies.push(body);
  }
  const caption = el("caption", { class: "hidden" }, `${table.dataset}, ${table.protocol}: ${amount(rows.length, "row")}, sorted by ${column.title}, ${direction}`);
  return el("table", null, caption, headOf(columns, column, direction), bodies);
}

function rowOf(table, row, position, columns) {
  const key = `row|${table.id}|${position}`;
  const id = newId();
  const warnings = row.warnings?.length ?? 0;
  const tr = el("tr", { "data-row": row.name });
  const button = el("button", { type: "button", "aria-expanded": "false", "aria-controls": id, "data-open": key }, row.name);
  tr.append(el("th", { scope: "row", class: "name" }, button,
    warnings > 0 && el("span", { class: "tag leak", title: row.warnings.join("\n") }, amount(warnings, "warning"))));
  for (const column of columns.slice(1)) {
    const cell = column.cell(row);
    if (column.group && !cell.classList.contains("apart")) cell.classList.add("apart");
    if (column.group === null && column.paper) cell.classList.remove("apart");
    tr.append(cell);
  }
  const detail = el("tr", { class: "detail", id, hidden: true }, el("td", { colspan: columns.length }));
  const toggle = (open) => {
    opened.set(key, open);
    button.setAttribute("aria-expanded", String(open));
    detail.hidden = !open;
    detail.firstChild.replaceChildren(...(open ? [rowDetails(table, row)] : []));
  };
  button.addEventListener("click", () => toggle(detail.hidden));
  const linked = state.run && row.run_ids?.includes(state.run);
  if (opened.get(key) ?? linked) toggle(true);
  return [tr, detail];
}
