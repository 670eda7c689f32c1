// Learning curves: small multiples, one grid a stage, whose panels share a cursor.

const WIDTH = 360, HEIGHT = 176, LEFT = 48, RIGHT = 10, TOP = 10, BOTTOM = 24;
const COLOURS = 8;
const DOTS_UP_TO = 40;

function drawCharts(root, stages, smoothing) {
  const charts = stages.map((stage) => new StageCharts(root, stage));
  const smooth = () => charts.forEach((chart) => chart.smooth(Number(smoothing.value)));
  smoothing.addEventListener("input", smooth);
  if (Number(smoothing.value)) smooth();
  return charts;
}

class StageCharts {
  constructor(root, stage) {
    const steps = stage.panels.flatMap((panel) => panel.series.flatMap((series) => [series.steps[0], series.steps.at(-1)]));
    this.range = [steps.reduce((a, b) => Math.min(a, b)), steps.reduce((a, b) => Math.max(a, b))];
    this.panels = stage.panels.filter(varies).map((panel) => new Panel(panel, this));
    this.shown = null;
    const rest = stage.panels.filter((panel) => !varies(panel)).map(numbers);
    const grid = element("div", { class: "panels" }, ...this.panels.map((panel) => panel.figure), ...rest);
    root.append(element("h3", {}, stage.label), grid);
  }

  /** Show the values at a step in all panels, or the last ones for null. */
  point(step) {
    this.shown = step;
    this.panels.forEach((panel) => panel.point(step));
  }

  smooth(weight) {
    this.panels.forEach((panel) => panel.draw(weight));
  }
}

class Panel {
  constructor(data, owner) {
    this.data = data;
    this.owner = owner;
    this.many = data.series.length > COLOURS;
    this.y = data.log ? logScale(data.series) : linearScale(data.series);
    const [first, last] = owner.range;
    this.x = (step) => (last === first ? (LEFT + WIDTH - RIGHT) / 2 : LEFT + ((step - first) / (last - first)) * (WIDTH - LEFT - RIGHT));
    this.steps = [...new Set(data.series.flatMap((series) => series.steps))].sort((a, b) => a - b);

    this.lines = shape("g");
    this.cursor = shape("line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM });
    const title = `${data.title}, ${data.series.length === 1 ? "one line" : `${data.series.length} lines`} over steps ${first} to ${last}`;
    this.svg = shape("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", tabindex: "0", "aria-label": title }, ...this.axes(), this.lines, this.cursor);
    this.where = element("span");
    this.values = data.series.map(() => element("b"));
    this.nearest = element("li");
    const names = data.series.map((series, i) => element("li", {}, element("i", { class: `swatch c${i % COLOURS}` }), `${series.name} `, this.values[i]));
    const scale = data.log ? "log scale, " : "";
    this.scale = scale;
    this.figure = element("figure", { class: "panel" },
      element("figcaption", {}, titleOf(data), this.where), this.svg,
      element("ul", { class: "legend" }, ...(this.many ? [this.nearest] : names)));
    this.listen();
    this.draw(0);
    this.point(null);
  }

  axes() {
    const marks = this.y.ticks.map((value) => {
      const y = this.y.at(value);
      return [shape("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y, y2: y }),
        shape("text", { x: LEFT - 6, y: y + 4, "text-anchor": "end" }, brief(value))];
    });
    const steps = niceTicks(...this.owner.range, 4).filter(Number.isInteger).map((step) =>
      shape("text", { x: this.x(step), y: HEIGHT - 7, "text-anchor": "middle" }, brief(step)));
    return [...marks.flat(), ...steps];
  }

  draw(weight) {
    this.lines.replaceChildren();
    this.paths = this.data.series.map((series, i) => {
      const colour = `c${i % COLOURS}`;
      const smooth = weight > 0 && series.steps.length > 2;
      if (smooth && !this.many) this.lines.append(shape("path", { class: `line raw ${colour}`, d: this.path(series.steps, series.values) }));
      const values = smooth ? average(series.values, weight) : series.values;
      const path = shape("path", { class: `line ${colour}${this.many ? " many" : ""}`, d: this.path(series.steps, values) });
      this.lines.append(path);
      if (series.steps.length <= DOTS_UP_TO && !this.many && !smooth) this.lines.append(...this.dots(series, colour));
      return path;
    });
  }

  path(steps, values) {
    let pen = "M";
    return steps.map((step, i) => {
      const y = this.y.at(values[i]);
      if (y === null) { pen = "M"; return ""; }
      const move = `${pen}${this.x(step).toFixed(1)} ${y.toFixed(1)}`;
      pen = "L";
      return move;
    }).join("");
  }

  dots(series, colour) {
    const radius = series.steps.length > 15 ? 1.6 : 2.4;
    return series.steps.map((step, i) => [step, this.y.at(series.values[i])]).filter(([, y]) => y !== null)
      .map(([step, y]) => shape("circle", { class: `dot ${colour}`, cx: this.x(step), cy: y, r: radius }));
  }

  listen() {
    const read = (event) => {
      const box = this.svg.getBoundingClientRect();
      this.height = ((event.clientY - box.top) / box.height) * HEIGHT;
      this.owner.point(this.closest(((event.clientX - box.left) / box.width) * WIDTH));
    };
    for (const kind of ["pointerdown", "pointermove"]) this.svg.addEventListener(kind, read);
    // A finger that is lifted leaves the values to be read.
    this.svg.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") this.owner.point(null); });
    this.svg.addEventListener("blur", () => this.owner.point(null));
    this.svg.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!move) return;
      event.preventDefault();
      const at = this.shown === null ? this.steps.length - 1 : this.steps.findIndex((step) => step >= this.shown);
      this.owner.point(this.steps[Math.min(Math.max(at + move, 0), this.steps.length - 1)]);
    });
  }

  closest(x) {
    return this.steps.reduce((best, step) => (Math.abs(this.x(step) - x) < Math.abs(this.x(best) - x) ? step : best), this.steps[0]);
  }

  /** Show the values at a step, or the last ones for null. */
  point(step) {
    this.shown = step;
    this.cursor.style.visibility = step === null ? "hidden" : "visible";
    if (step !== null) fill(this.cursor, { x1: this.x(step), x2: this.x(step) }, []);
    this.where.textContent = this.scale + (step === null ? "last" : `step ${step}`);
    const values = this.data.series.map((series) => valueAt(series, step));
    if (this.many) this.pointNearest(values, step);
    else values.forEach((value, i) => { this.values[i].textContent = brief(value); });
  }

  pointNearest(values, step) {
    this.paths.forEach((path) => path.classList.remove("near"));
    if (step === null) {
      const known = values.filter((value) => value !== null);
      this.nearest.textContent = `${this.data.series.length} lines, ${brief(Math.min(...known))} to ${brief(Math.max(...known))}; point at one`;
      return;
    }
    const far = (value) => { const y = this.y.at(value); return y === null ? Infinity : Math.abs(y - (this.height ?? 0)); };
    const i = values.reduce((best, value, at) => (far(value) < far(values[best]) ? at : best), 0);
    this.paths[i].classList.add("near");
    this.nearest.replaceChildren(`${this.data.series[i].name} `, element("b", {}, brief(values[i])));
  }
}

/** Whether a chart would show more than a number: some metric has two values. */
function varies(panel) {
  return panel.series.some(({ values }) => new Set(values.filter((value) => value !== null)).size > 1);
}

/** A panel of metrics with one value each. */
function numbers(panel) {
  const steps = panel.series.flatMap((series) => series.steps);
  const [first, last] = [steps.reduce((a, b) => Math.min(a, b)), steps.reduce((a, b) => Math.max(a, b))];
  const where = first === last ? `step ${first}` : `steps ${first} to ${last}`;
  const values = panel.series.map((series) => element("li", {}, `${series.name} `, element("b", {}, brief(valueAt(series, null)))));
  return element("figure", { class: "panel" },
    element("figcaption", {}, titleOf(panel), element("span", {}, where)), element("ul", { class: "legend" }, ...values));
}

function titleOf(panel) {
  return panel.title + (panel.unit ? ` (${panel.unit})` : "");
}

/** The value at the last step up to `step`; for null, the last value. */
function valueAt(series, step) {
  let low = 0, high = series.steps.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (step === null || series.steps[middle] <= step) low = middle + 1;
    else high = middle;
  }
  let at = low - 1;
  while (step === null && at > 0 && series.values[at] === null) at -= 1;
  return at < 0 ? null : series.values[at];
}

/** Exponential moving average without bias to the start; gaps stay gaps. */
function average(values, weight) {
  let sum = 0, total = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = weight * sum + (1 - weight) * value;
    total = weight * total + (1 - weight);
    return sum / total;
  });
}

function extent(series, keep) {
  let low = Infinity, high = -Infinity;
  for (const { values } of series) {
    for (const value of values) {
      if (value === null || !keep(value)) continue;
      low = Math.min(low, value);
      high = Math.max(high, value);
    }
  }
  return low > high ? [0, 1] : [low, high];
}

function linearScale(series) {
  let [low, high] = extent(series, () => true);
  const margin = (high - low) * 0.05 || Math.abs(high) * 0.1 || 0.5;
  const bottom = low >= 0 && low - margin < 0 ? 0 : low - margin;
  [low, high] = [bottom, high + margin];
  const at = (value) => (value === null ? null : TOP + ((high - value) / (high - low)) * (HEIGHT - TOP - BOTTOM));
  return { at, ticks: niceTicks(low, high, 4) };
}

function logScale(series) {
  const [least, most] = extent(series, (value) => value > 0);
  let [low, high] = least > 0 ? [Math.floor(Math.log10(least)), Math.ceil(Math.log10(most))] : [0, 1];
  if (low === high) high += 1;
  const at = (value) => (value === null || value <= 0 ? null : TOP + ((high - Math.log10(value)) / (high - low)) * (HEIGHT - TOP - BOTTOM));
  const skip = Math.ceil((high - low) / 5);
  const ticks = [];
  for (let power = low; power <= high; power += skip) ticks.push(10 ** power);
  return { at, ticks };
}

/** About `count` round numbers between low and high. */
function niceTicks(low, high, count) {
  if (high <= low) return [low];
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const width = [1, 2, 5, 10].map((factor) => factor * power).find((step) => step >= rough);
  const ticks = [];
  for (let i = Math.ceil(low / width); i * width <= high * (1 + 1e-12); i += 1) ticks.push(Number((i * width).toPrecision(12)));
  return ticks;
}
