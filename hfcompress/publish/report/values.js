"use strict";
// What the page computes without being a page: numbers as text, sorting, points, and what two recipes differ in.
const NOT = "not measured";

// JSON knows no infinity; a perplexity that overflows is written as an object.
const revived = (key, value) => (value !== null && value.infinite === true ? Infinity : value);

function format(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return NOT;
  if (!Number.isFinite(value)) return value < 0 ? "-infinite" : "infinite";
  const size = Math.abs(value);
  const digits = Number.isInteger(value) || size >= 1000 ? 0 : size >= 100 ? 1 : size >= 10 ? 2 : 4;
  return value.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

const signed = (value) => (value > 0 ? "+" : "") + format(value);

// What was not measured comes last, whichever way the rest is sorted.
function sortRows(rows, key, descending) {
  return [...rows].sort((a, b) => {
    const [x, y] = [a[key] ?? null, b[key] ?? null];
    if (x === null || y === null) return (x === null) - (y === null);
    return (descending ? -1 : 1) * (typeof x === "string" ? x.localeCompare(y) : (x > y) - (x < y));
  });
}

function stageRows(data) {
  return data.runs.flatMap((run) => run.stages.map((stage) => ({ run: run.name, stage: stage.name, ...stage.values })));
}

// A run's stages that have both numbers; `last` is the run's result, which was measured after reloading.
function pointsOf(run, x, y) {
  return run.stages
    .map((stage, at) => ({ stage: stage.name, summary: stage.summary, last: at === run.stages.length - 1,
      x: stage.values[x] ?? null, y: stage.values[y] ?? null }))
    .filter((one) => Number.isFinite(one.x) && Number.isFinite(one.y));
}

// A recipe as lines "path: value", in the order of its file.
function flatten(value, path = "") {
  if (value === null || typeof value !== "object") return [`${path}: ${JSON.stringify(value)}`];
  const entries = Object.entries(value);
  if (!entries.length) return path ? [`${path}: ${Array.isArray(value) ? "[]" : "{}"}`] : [];
  return entries.flatMap(([key, one]) =>
    flatten(one, Array.isArray(value) ? `${path}[${key}]` : path ? `${path}.${key}` : key));
}

// Two lists of lines as [" ", "-" or "+", line], by their longest common subsequence.
function diffLines(left, right) {
  const common = Array.from({ length: left.length + 1 }, () => new Array(right.length + 1).fill(0));
  for (let i = left.length - 1; i >= 0; i--)
    for (let j = right.length - 1; j >= 0; j--)
      common[i][j] = left[i] === right[j] ? common[i + 1][j + 1] + 1 : Math.max(common[i + 1][j], common[i][j + 1]);
  const found = [];
  let [i, j] = [0, 0];
  while (i < left.length || j < right.length) {
    if (i < left.length && j < right.length && left[i] === right[j]) { found.push([" ", left[i]]); i++; j++; }
    else if (j === right.length || (i < left.length && common[i + 1][j] >= common[i][j + 1])) found.push(["-", left[i++]]);
    else found.push(["+", right[j++]]);
  }
  return found;
}

// Round numbers inside [low, high]: on a logarithmic scale 1, 2 and 5 times the powers of ten.
function ticks(low, high, logarithmic, wanted = 5) {
  const found = [];
  if (logarithmic) {
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
      for (const one of [1, 2, 5]) {
        const value = Number((one * 10 ** power).toPrecision(6));
        if (value >= low && value <= high) found.push(value);
      }
    if (found.length > 1) return found;
    found.length = 0;
  }
  const raw = (high - low || Math.abs(high) || 1) / wanted, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((one) => one * power).find((one) => one >= raw * 0.999);
  for (let at = Math.ceil(low / step - 1e-9); at * step <= high + step * 1e-9; at++)
    found.push(Number((at * step).toPrecision(12)));
  return found;
}
