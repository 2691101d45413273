"use strict";
// The page: what its controls show.
const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId("data").textContent, revived);
const hidden = new Set();
const titleOf = (key) => (data.columns[key] ?? data.metrics[key])?.title ?? key;
const colourOf = (name) => COLOURS[data.runs.findIndex((run) => run.name === name) % COLOURS.length];
const runOf = (id) => data.runs.find((run) => run.name === byId(id).value);

function fill(select, options, chosen) {
  select.replaceChildren(...options.map(([value, text]) => element("option", { value }, text)));
  select.value = chosen ?? options[0][0];
}

function showRuns() {
  byId("runs").replaceChildren(...data.runs.map((run) => {
    const button = element("button", { type: "button", "aria-pressed": "true", title: "Show or hide it in the chart" },
      element("i", { style: `background: ${colourOf(run.name)}` }), run.name);
    button.addEventListener("click", () => {
      if (!hidden.delete(run.name)) hidden.add(run.name);
      button.setAttribute("aria-pressed", String(!hidden.has(run.name)));
      showTradeOff();
    });
    return element("li", {}, button, ` ${run.task}, from ${run.base}`);
  }));
}

function tell(run, point) {
  byId("tip").textContent = `${run.name}, ${point.stage}: ${titleOf(byId("x").value)} ${format(point.x)}, `
    + `${titleOf(byId("y").value)} ${format(point.y)}. ${point.summary ?? ""}`;
  for (const row of byId("stages").tBodies[0].rows)
    row.classList.toggle("on", row.dataset.run === run.name && row.dataset.stage === point.stage);
}

function showTradeOff() {
  const [x, y] = [byId("x").value, byId("y").value];
  const shown = data.runs.filter((run) => !hidden.has(run.name));
  const runs = shown.map((run) => ({ name: run.name, colour: colourOf(run.name), points: pointsOf(run, x, y) }));
  const known = runs.filter((run) => run.points.length), unknown = runs.filter((run) => !run.points.length);
  byId("missing").textContent = unknown.length ? `Not measured, so not in the chart: ${unknown.map((run) => run.name).join(", ")}.` : "";
  byId("tip").textContent = "Point at a stage, or click it, to read its numbers.";
  if (!known.length) { byId("chart").replaceChildren(); return; }
  const better = (data.metrics[y] ?? data.columns[y]).less ? "less is better" : "more is better";
  drawTradeOff(byId("chart"), known, [titleOf(x), `${titleOf(y)} (${better})`], byId("log").checked, tell);
}

function showStages(key = null, descending = false) {
  const measured = (one) => data.runs.some((run) => run.stages.some((stage) => (stage.values[one] ?? null) !== null));
  const keys = ["run", "stage", ...[...Object.keys(data.metrics), ...Object.keys(data.columns)].filter(measured)];
  const head = keys.map((one) => {
    const button = element("button", { type: "button", "data-key": one }, titleOf(one));
    button.addEventListener("click", () => showStages(one, key === one && !descending));
    const sorted = key === one ? (descending ? "descending" : "ascending") : null;
    return element("th", { "aria-sort": sorted, class: one === "run" || one === "stage" ? "text" : null }, button);
  });
  const rows = key ? sortRows(stageRows(data), key, descending) : stageRows(data);
  byId("stages").tHead.replaceChildren(element("tr", {}, ...head));
  byId("stages").tBodies[0].replaceChildren(...rows.map((row) => element("tr", { "data-run": row.run, "data-stage": row.stage },
    ...keys.map((one) => typeof row[one] === "string" ? element("td", { class: "text" }, row[one])
      : element("td", { class: (row[one] ?? null) === null ? "quiet" : null }, format(row[one]))))));
}

function showChanges() {
  const head = ["run", "metric", "before", "after", "difference", "95% interval of the difference"];
  const rows = data.runs.flatMap((run) => run.changes.map((one) => {
    const known = one.before !== null && one.after !== null;
    return [run.name, one.metric, format(one.before), format(one.after), known ? signed(one.after - one.before) : NOT,
      one.interval ? one.interval.map(signed).join(" to ") : NOT];
  }));
  const cell = (kind) => (text, at) => element(kind, { class: at < 2 ? "text" : text === NOT ? "quiet" : null }, text);
  byId("changes").replaceChildren(element("thead", {}, element("tr", {}, ...head.map(cell("th")))),
    element("tbody", {}, ...rows.map((row) => element("tr", {}, ...row.map(cell("td"))))));
}

function showLayers() {
  const run = runOf("run"), place = byId("layers");
  place.replaceChildren();
  if (Object.keys(run.kept).length) drawKept(place, run.kept);
  for (const [title, values] of Object.entries(run.layers)) drawLayerValues(place, title, values);
  if (!place.children.length) place.append(element("p", { class: "note" }, `Layers: ${NOT}.`));
}

function showDiff() {
  const lines = diffLines(...["left", "right"].map((id) => flatten(runOf(id).recipe)));
  const shown = byId("only").checked ? lines.filter(([sign]) => sign !== " ") : lines;
  const kind = { "+": "add", "-": "del", " ": "same" };
  byId("diff").replaceChildren(...(shown.length ? shown.map(([sign, line]) => element("span", { class: kind[sign] }, `${sign} ${line}`))
    : ["No differences."]));
}

function start() {
  const [metrics, columns] = [data.metrics, data.columns].map((all) => Object.keys(all).map((key) => [key, titleOf(key)]));
  const names = data.runs.map((run) => [run.name, run.name]);
  fill(byId("x"), [...columns, ...metrics], "bytes_on_disk");
  fill(byId("y"), [...metrics, ...columns]);
  for (const id of ["run", "left", "right"]) fill(byId(id), names);
  byId("right").value = names[Math.min(1, names.length - 1)][0];
  for (const [ids, show] of [[["x", "y", "log"], showTradeOff], [["run"], showLayers], [["left", "right", "only"], showDiff]])
    for (const id of ids) byId(id).addEventListener("change", show);
  const sized = () => { showTradeOff(); showLayers(); };
  let width = innerWidth;
  addEventListener("resize", () => { if (width !== innerWidth) { width = innerWidth; sized(); } });
  showRuns();
  showStages();
  showChanges();
  showDiff();
  sized();
}
start();
