// Small multiples: one uPlot for each number, over steps or time, with moves of `live` as vertical lines.

import { el, moment, number, percent, say } from "./dom.js";

/* global uPlot */

const HEIGHT = 132;
const MOST = 5000; // points of a chart
const LINES = new Set(["publish", "promote", "rollback", "reset"]);
const LEVELS = ["refused", "waits", "accepted"];
const COUNTS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000];
const APART = 1e-3; // what stands in one place is drawn beside each other: uPlot wants places to increase

export const LEARNING = [
  { key: "reward", title: "Reward" },
  { key: "majority", title: "Vote share", show: percent, low: 0, high: 1 },
  { key: "entropy", title: "Entropy", unit: "nats", low: 0 },
  { key: "kl", title: "KL to base", unit: "nats", low: 0 },
  { key: "valid", title: "Valid answers", show: percent, low: 0, high: 1 },
  { key: "zero_signal", title: "Zero-signal groups", counts: true },
  { key: "prequential", title: "Agreement before learning", show: percent, low: 0, high: 1 },
];

const GATE = { key: "gate", title: "Gate", levels: true };
const PROBES = { key: "probes", title: "Right on probes", show: percent, low: 0, high: 1 };
const SERVED = { key: "served", title: "Version served", counts: true, stepped: true, show: version };

export const SERVING = [
  { key: "per_s", title: "Answers per second", low: 0 },
  { key: "p95", second: "p50", title: "Latency, p95 and p50", unit: "ms", low: 0 },
  { key: "kept", title: "Queries in the buffer", counts: true },
];

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** 7 is shown as v0007. */
function version(value) {
  return Number.isFinite(value) ? `v${String(Math.round(value)).padStart(4, "0")}` : "–";
}

/** What uPlot is told of every axis. */
function axes(time, { levels, counts, show }) {
  const common = { stroke: color("--faint"), grid: { stroke: color("--line"), width: 1 }, ticks: { show: false }, font: "11px system-ui, sans-serif" };
  const x = { ...common, size: 22, space: time ? 70 : 44, grid: { show: false } };
  const y = { ...common, size: levels ? 58 : 46, space: 28, gap: 4, ...(counts ? { incrs: COUNTS } : {}) };
  if (levels) return [x, { ...y, splits: () => [0, 1, 2], values: () => LEVELS }];
  return [x, { ...y, values: (_, splits) => splits.map((value) => (value === null ? "" : (show ?? number)(value))) }];
}

/** A figure with a caption that names the number, its last value, and the one under the pointer. */
class Chart {
  constructor(parent, spec, markers) {
    this.spec = spec;
    this.markers = markers;
    this.value = el("output", {});
    this.canvas = el("div", { className: "canvas", role: "img" });
    this.figure = el("figure", { "data-chart": spec.key },
      el("figcaption", {}, el("span", {}, spec.title, spec.unit ? el("small", {}, ` ${spec.unit}`) : null), this.value),
      this.canvas);
    parent.append(this.figure);
  }

  draw(data, time) {
    this.figure.hidden = !data.slice(1).some((column) => column.some((value) => value !== null));
    if (this.figure.hidden) return;
    if (this.plot && this.time === time) this.plot.setData(data);
    else this.make(data, time);
    this.caption();
  }

  make(data, time) {
    this.plot?.destroy();
    this.time = time;
    const { low, high, levels, counts, stepped } = this.spec;
    const ink = [color("--accent"), color("--soft")];
    const few = data[0].length < 40;
    const steps = stepped ? { paths: uPlot.paths.stepped({ align: 1 }) } : {};
    const line = (stroke) => ({ stroke, width: 1.5, spanGaps: true, points: { show: few, size: 4, fill: stroke }, ...steps });
    const dots = (name) => ({ stroke: color(name), paths: () => null, points: { show: true, size: 7, fill: color(name), stroke: color(name) } });
    this.plot = new uPlot({
      width: Math.max(160, this.canvas.clientWidth || 240),
      height: HEIGHT,
      padding: [6, 6, 0, 0],
      legend: { show: false },
      cursor: { sync: { key: this.spec.group }, points: { size: 6 }, y: false },
      scales: {
        x: { time },
        y: { range: (_, min, max) => (levels ? [-0.4, 2.4] : counts ? [0, Math.max(1, 1.08 * max)] : bounds(min, max, low, high)) },
      },
      axes: axes(time, this.spec),
      series: [{}, ...data.slice(1).map((_, index) => (levels ? dots(["--bad", "--warn", "--good"][index]) : line(ink[index])))],
      hooks: { draw: [(plot) => this.mark(plot)], setCursor: [() => this.caption()] },
    }, data, this.canvas);
  }

  caption() {
    const columns = this.plot.data;
    const at = this.plot.cursor.idx ?? columns[0].length - 1;
    const show = this.spec.show ?? number;
    const values = columns.slice(1).map((column) => before(column, at));
    const text = this.spec.levels ? LEVELS[latest(values)] ?? "–" : values.map(([value]) => show(value)).join(" · ");
    say(this.value, text);
    this.canvas.setAttribute("aria-label", `${this.spec.title}: ${text} at the last of ${columns[0].length} points`);
  }

  mark(plot) {
    const { ctx, bbox } = plot;
    ctx.save();
    ctx.strokeStyle = color("--mark");
    ctx.lineWidth = devicePixelRatio;
    ctx.setLineDash([3 * devicePixelRatio, 3 * devicePixelRatio]);
    for (const place of this.markers(this.time)) {
      const x = Math.round(plot.valToPos(place, "x", true));
      if (x < bbox.left || x > bbox.left + bbox.width) continue;
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
    }
    ctx.restore();
  }

  fit() {
    const width = this.canvas.clientWidth;
    if (this.plot && width && width !== this.plot.width) this.plot.setSize({ width, height: HEIGHT });
  }

  forget() {
    this.plot?.destroy();
    this.plot = undefined;
  }
}

/** The last value that is one, up to a place, and where it is. */
function before(column, place) {
  for (let at = place; at >= 0; at -= 1) if (column[at] !== null) return [column[at], at];
  return [null, -1];
}

/** Which of some values is the last. */
function latest(values) {
  const places = values.map(([, at]) => at);
  const last = Math.max(...places);
  return last < 0 ? -1 : places.indexOf(last);
}

/** Places that increase. */
function apart(places) {
  const found = [];
  for (const place of places) found.push(found.length ? Math.max(place, found.at(-1) + APART) : place);
  return found;
}

/** Where an axis begins and ends: room around what is shown, and never less than there is. */
function bounds(min, max, low, high) {
  if (min === null) return [low ?? 0, high ?? 1];
  const room = Math.max((max - min) * 0.08, Math.abs(max) * 0.02, 1e-6);
  const from = low === undefined ? min - room : Math.min(low, min);
  return [from, high === undefined ? max + room : Math.max(high, max) + 0.02];
}

/** The charts of one group, drawn at most once a frame. */
class Group {
  constructor(parent, specs, name, markers) {
    this.charts = specs.map((spec) => new Chart(parent, { ...spec, group: name }, markers));
    this.pending = false;
    new ResizeObserver(() => this.charts.forEach((chart) => chart.fit())).observe(parent);
  }

  soon() {
    if (this.pending) return;
    this.pending = true;
    requestAnimationFrame(() => {
      this.pending = false;
      this.draw();
    });
  }

  forget() {
    this.charts.forEach((chart) => chart.forget());
    this.soon();
  }
}

/** What the learner told: steps as rows, verdicts between them. */
export class LearningCharts extends Group {
  constructor(parent, axis) {
    super(parent, [...LEARNING, GATE, PROBES, SERVED], "learning", (time) => this.places(time));
    this.axis = axis;
    this.clear();
  }

  clear() {
    this.columns = Object.fromEntries(["time", "step", ...LEARNING.map(({ key }) => key)].map((key) => [key, []]));
    this.counted = 0; // steps of the worker that runs, and of those before it
    this.earlier = 0;
    this.verdicts = [];
    this.served = [];
    this.lines = [];
    this.soon();
  }

  /** Steps as `/series` has them. */
  load(columns) {
    for (let row = 0; row < columns.time.length; row += 1) {
      this.step(Object.fromEntries(Object.entries(columns).map(([name, column]) => [name, column[row]])), columns.time[row]);
    }
  }

  step(numbers, time) {
    if (numbers.step < this.counted) this.earlier += this.counted; // another worker counts from the beginning
    this.counted = numbers.step;
    const row = { ...numbers, time, step: this.earlier + numbers.step };
    // A step on what is remembered is about no group.
    row.zero_signal = numbers.groups ? Math.max(0, numbers.groups - (numbers.informative ?? 0)) : null;
    for (const [key, column] of Object.entries(this.columns)) {
      column.push(row[key] ?? null);
      if (column.length > MOST) column.shift();
    }
    this.soon();
  }

  /** Anything else than a step, in its place among them. */
  event({ kind, time, data }) {
    const after = this.before(time);
    if (kind === "verdict") this.verdicts.push({ time, step: after, level: data.accepted ? 2 : data.early ? 1 : 0, probes: data.metrics?.probe_accuracy ?? null });
    else if (LINES.has(kind)) this.lines.push({ time, step: after });
    else if (kind === "swap" && !data.refused) {
      const [now, previous] = [data.version, data.previous].map((name) => Number(name.slice(1)));
      this.served.push({ time, step: after, version: now, previous });
    }
    this.soon();
  }

  /** The last step before a moment. */
  before(time) {
    const { time: times, step } = this.columns;
    const at = times.findLastIndex((each) => each <= time);
    return step[Math.max(0, at)] ?? 0;
  }

  get empty() {
    return this.columns.time.length === 0;
  }

  places(time) {
    return this.lines.map((line) => (time ? line.time : line.step));
  }

  draw() {
    const time = this.axis() === "time";
    const x = apart(time ? this.columns.time : this.columns.step);
    const data = { gate: this.gate(x, time), probes: this.probes(time), served: this.versions(x, time) };
    for (const chart of this.charts) chart.draw(data[chart.spec.key] ?? [x, this.columns[chart.spec.key]], time);
  }

  /** Verdicts, one column for each kind, over the same stretch as the steps. */
  gate(x, time) {
    if (!x.length) return [[], ...LEVELS.map(() => [])];
    const places = this.verdicts.map((each) => (time ? each.time : each.step));
    const column = (level) => this.verdicts.map((each) => (each.level === level ? level : null));
    return [apart([Math.min(x[0], ...places), ...places, x.at(-1)]), ...LEVELS.map((_, level) => [null, ...column(level), null])];
  }

  /** What share of the operator's probes candidates answered rightly, at their verdicts. */
  probes(time) {
    const tried = this.verdicts.filter((each) => each.probes !== null);
    return [apart(tried.map((each) => (time ? each.time : each.step))), tried.map((each) => each.probes)];
  }

  /** What was served, up to the last step. */
  versions(x, time) {
    if (!this.served.length) return [[], []];
    const places = this.served.map((each) => (time ? each.time : each.step));
    const numbers = this.served.map((each) => each.version);
    const [first, last] = [Math.min(places[0], x[0] ?? places[0]), Math.max(places.at(-1), x.at(-1) ?? 0)];
    return [apart([first, ...places, last]), [this.served[0].previous, ...numbers, numbers.at(-1)]];
  }

  /** The last steps as rows of a table: its head, then newest first. */
  table(rows) {
    const shown = LEARNING.filter(({ key }) => this.columns[key].some((value) => value !== null));
    const head = ["Time", ...shown.map(({ title, unit }) => (unit ? `${title}, ${unit}` : title))];
    const last = this.columns.time.length;
    const body = [];
    for (let row = last - 1; row >= Math.max(0, last - rows); row -= 1) {
      body.push([moment(this.columns.time[row]), ...shown.map(({ key, show }) => (show ?? number)(this.columns[key][row]))]);
    }
    return [head, body];
  }
}

/** How the server fares, since the page was opened. */
export class ServingCharts extends Group {
  constructor(parent) {
    super(parent, SERVING, "serving", () => []);
    this.rows = [];
  }

  add(time, { requests, buffer }) {
    const ms = (seconds) => (seconds === null ? null : 1000 * seconds);
    this.rows.push({
      time, per_s: requests.per_s, p50: ms(requests.p50_s), p95: ms(requests.p95_s),
      kept: buffer.connected ? buffer.waiting + buffer.pending : null,
    });
    if (this.rows.length > MOST) this.rows.shift();
    this.soon();
  }

  draw() {
    const column = (key) => this.rows.map((row) => row[key]);
    for (const chart of this.charts) {
      const { key, second } = chart.spec;
      chart.draw([column("time"), column(key), ...(second ? [column(second)] : [])], true);
    }
  }
}
