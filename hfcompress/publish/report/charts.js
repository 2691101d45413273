"use strict";
// Drawings, as SVG at the width that the page gives them.
const COLOURS = ["#3b76b0", "#d1495b", "#3d8f5f", "#b7791f", "#8a63b8", "#2a8c9c", "#a3557a", "#6b7785"];
const SVG = new Set(["svg", "circle", "line", "polyline", "text", "rect", "title"]);

function element(name, attributes = {}, ...children) {
  const made = SVG.has(name) ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) if (value !== null) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function drawing(place, height, label) {
  const width = Math.max(280, place.clientWidth);
  return [element("svg", { width, height, role: "img", "aria-label": label }), width];
}

// A scale from numbers to pixels, with room at both ends.
function scale(values, from, to, logarithmic) {
  const way = logarithmic ? Math.log10 : (value) => value, back = logarithmic ? (value) => 10 ** value : (value) => value;
  const [low, high] = [way(Math.min(...values)), way(Math.max(...values))];
  const pad = 0.1 * (high - low || Math.abs(high) || 1);
  const [first, last] = [low - pad, high + pad];
  const wanted = Math.max(3, Math.abs(to - from) / 90);
  return { at: (value) => from + ((way(value) - first) / (last - first)) * (to - from),
    ticks: ticks(back(first), back(last), logarithmic, wanted) };
}

// The first place beside a point where a text covers nothing that was drawn before; null where there is none.
function freePlace(x, y, text, taken, width) {
  const long = 6.3 * text.length, high = 13;
  const free = [[x + 11, y - 7], [x - 11 - long, y - 7], [x - long / 2, y - 24], [x - long / 2, y + 11]].find(([left, top]) =>
    left > 60 && left + long < width && !taken.some(([l, t, w, h]) => left < l + w && l < left + long && top < t + h && t < top + high));
  if (!free) return null;
  taken.push([...free, long, high]);
  return { x: free[0], y: free[1] + 11 };
}

function drawAxes(svg, across, up, box, titles) {
  for (const tick of across.ticks) svg.append(
    element("line", { class: "axis", x1: across.at(tick), x2: across.at(tick), y1: box.top, y2: box.bottom }),
    element("text", { class: "quiet", x: across.at(tick), y: box.bottom + 18, "text-anchor": "middle" }, tick.toLocaleString("en-US")));
  for (const tick of up.ticks) svg.append(
    element("line", { class: "axis", x1: box.left, x2: box.right, y1: up.at(tick), y2: up.at(tick) }),
    element("text", { class: "quiet", x: box.left - 8, y: up.at(tick) + 4, "text-anchor": "end" }, tick.toLocaleString("en-US", { maximumFractionDigits: 6 })));
  svg.append(element("text", { x: box.right, y: box.bottom + 38, "text-anchor": "end" }, titles[0]),
    element("text", { x: 0, y: 14 }, titles[1]));
}

// The trade-off: a line for each run, a dot for each stage. told(run, point) is called for the dot that is looked at.
function drawTradeOff(place, runs, titles, logarithmic, told) {
  const [svg, width] = drawing(place, 430, titles.join(" against "));
  place.replaceChildren(svg);
  const flat = runs.flatMap((run) => run.points), box = { left: 58, right: width - 26, top: 26, bottom: 380 };
  const log = logarithmic && flat.every((point) => point.y > 0);
  const across = scale(flat.map((point) => point.x), box.left, box.right, false);
  const up = scale(flat.map((point) => point.y), box.bottom, box.top, log);
  drawAxes(svg, across, up, box, titles);
  const dots = runs.flatMap((run) => run.points.map((point) => ({ run, point, x: across.at(point.x), y: up.at(point.y) })));
  for (const run of runs) svg.append(element("polyline", { class: "way", fill: "none", stroke: run.colour,
    points: dots.filter((dot) => dot.run === run).map((dot) => `${dot.x},${dot.y}`).join(" ") }));
  const taken = dots.map((dot) => [dot.x - 8, dot.y - 8, 16, 16]);
  for (const { run, point, x, y } of dots) {
    const circle = element("circle", { cx: x, cy: y, r: point.last ? 8 : 5, fill: run.colour, tabindex: 0, "data-stage": point.stage, "data-run": run.name });
    for (const event of ["mouseenter", "focus", "click"]) circle.addEventListener(event, () => told(run, point));
    svg.append(circle);
    const free = freePlace(x, y, point.stage, taken, width);
    if (free) svg.append(element("text", { ...free, class: "stage" }, point.stage));
  }
}

// Values of layers: bars, or dots where a layer has several.
function drawLayerValues(place, title, values) {
  const [svg, width] = drawing(place, 130, title), left = 58;
  const count = Math.max(...values.map(([at]) => at)) + 1, high = Math.max(...values.map(([, value]) => value)) || 1;
  const each = (width - left) / count, single = new Set(values.map(([at]) => at)).size === values.length;
  svg.append(element("text", { class: "quiet", x: left - 8, y: 22, "text-anchor": "end" }, format(high)),
    element("text", { class: "quiet", x: left - 8, y: 104, "text-anchor": "end" }, "0"),
    element("line", { class: "axis", x1: left, x2: width, y1: 100, y2: 100 }));
  for (const [at, value] of values) {
    const height = (82 * value) / high, x = left + at * each;
    const shape = single ? element("rect", { x: x + 0.15 * each, width: 0.7 * each, y: 100 - height, height, fill: COLOURS[0] })
      : element("circle", { cx: x + each / 2, cy: 100 - height, r: 3, fill: COLOURS[1], opacity: 0.75 });
    shape.append(element("title", {}, `layer ${at}: ${format(value)}`));
    svg.append(shape);
  }
  for (let at = 0; at < count; at += Math.ceil((24 * count) / (width - left)))
    svg.append(element("text", { class: "quiet", x: left + (at + 0.5) * each, y: 118, "text-anchor": "middle" }, String(at)));
  place.append(element("h3", {}, title), svg);
}

// What each layer kept, as a table whose cells are the darker the more is there.
function drawKept(place, kept) {
  const layers = [...new Set(Object.values(kept).flatMap((cells) => Object.keys(cells).map(Number)))].sort((a, b) => a - b);
  const head = element("tr", {}, element("th", { class: "text" }, "kept, by layer"), ...layers.map((at) => element("th", {}, String(at))));
  const rows = Object.entries(kept).map(([label, cells]) => element("tr", {}, element("th", { class: "text" }, label),
    ...layers.map((at) => {
      if (!cells[at]) return element("td", { class: "none" }, "\u2013");
      const [before, after] = cells[at], share = before ? after / before : 0;
      return element("td", { style: `background: hsl(205 65% ${94 - 44 * share}%)`, title: `layer ${at}: ${after} of ${before}` }, format(after));
    })));
  place.append(element("div", { class: "wide" }, element("table", { class: "heat" }, head, ...rows)));
}
