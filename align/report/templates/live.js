// Follows a run that goes on: asks for the page again and again, takes over what has changed, and loads samples on demand.

const PAUSE_MS = 2000;
// Of the time that an answer took, so that a large run is not read all the time.
const PAUSE_FACTOR = 5;
const LATEST = "latest";

class LivePage {
  constructor() {
    this.status = document.getElementById("live");
    this.written = new Map([...partsOfPage(document)].map((part) => [part.id, part.innerHTML]));
    this.samples = new LiveSamples(document.getElementById("browser"));
    this.tag = null;
    this.charts = [];
    const data = dataOf(document);
    this.draw(data);
    this.samples.renew(data.samples.sources);
    this.say(this.status.dataset.state);
  }

  async follow() {
    for (;;) {
      const asked = performance.now();
      if (!document.hidden) await this.ask();
      const pause = Math.max(PAUSE_MS, PAUSE_FACTOR * (performance.now() - asked));
      await new Promise((done) => { setTimeout(done, pause); });
    }
  }

  async ask() {
    try {
      const answer = await fetch(location.pathname, { cache: "no-store", headers: this.tag ? { "If-None-Match": this.tag } : {} });
      if (answer.status === 304) {
        this.say(this.told);
        return;
      }
      const text = await answer.text();
      if (!answer.ok) throw new Error(text);
      // The first answer is mostly the page that is there.
      const change = this.tag ? ` Last change: ${new Date().toLocaleTimeString()}.` : "";
      this.tag = answer.headers.get("ETag");
      this.take(new DOMParser().parseFromString(text, "text/html"));
      this.say(this.status.dataset.state + change);
    } catch (error) {
      // Of a server that is gone, browsers say it each in their own way.
      const why = error instanceof TypeError ? "no answer: the command that serves this page has ended, or cannot be reached" : error.message;
      this.status.textContent = `Not up to date: ${why}`;
      this.status.classList.add("lost");
    }
  }

  say(text) {
    this.told = text;
    if (this.status.textContent !== text) this.status.textContent = text;
    this.status.classList.remove("lost");
  }

  /** Take over the parts of a fresh page that differ from the last one's. */
  take(fresh) {
    this.status.dataset.state = fresh.getElementById("live").dataset.state;
    const data = dataOf(fresh);
    const redraw = JSON.stringify(data.stages) !== this.drawn;
    // Before they are taken away, which makes them forget it.
    const pointed = this.charts.map((chart) => chart.shown);
    const focus = chartPanels().indexOf(document.activeElement);
    let before = null;
    for (const part of [...partsOfPage(fresh)]) {
      const mine = document.getElementById(part.id);
      const changed = this.written.get(part.id) !== part.innerHTML || (part.id === "curves" && redraw);
      this.written.set(part.id, part.innerHTML);
      if (!mine) before.after(document.adoptNode(part));
      else if (changed && part.id !== "samples") mine.replaceChildren(...part.childNodes);
      before = mine ?? part;
    }
    if (redraw) {
      this.draw(data);
      this.charts.forEach((chart, i) => chart.point(pointed[i] ?? null));
      chartPanels()[focus]?.focus({ preventScroll: true });
    }
    this.samples.renew(data.samples.sources);
  }

  draw(data) {
    this.drawn = JSON.stringify(data.stages);
    const charts = document.getElementById("charts");
    if (!charts) return;
    const smoothing = document.getElementById("smoothing");
    smoothing.value = this.smoothing ?? smoothing.value;
    smoothing.addEventListener("input", () => { this.smoothing = smoothing.value; });
    this.charts = drawCharts(charts, data.stages, smoothing);
  }
}

/** Samples of one step or one evaluation at a time, loaded when they are chosen. */
class LiveSamples {
  constructor(root) {
    this.root = root;
    this.choice = element("select", { id: "samples-source" });
    this.back = element("button", { id: "samples-back", type: "button" }, "‹ before");
    this.on = element("button", { id: "samples-on", type: "button" }, "next ›");
    this.place = element("span", { class: "note", id: "samples-place", role: "status" });
    this.list = element("div");
    this.sources = [];
    this.fields = {};
    root.append(element("div", { class: "controls" }, element("label", {}, "samples of", this.choice), this.back, this.on, this.place), this.list);
    tokenTips(this.list);
    this.choice.addEventListener("input", () => this.load(0));
    this.back.addEventListener("click", () => this.load(this.starts.at(-2) ?? 0));
    this.on.addEventListener("click", () => this.load(this.next));
    this.list.addEventListener("pointerleave", () => this.catchUp());
    this.show(null);
  }

  /** The sources that there are by now, in the order of the run. */
  renew(sources) {
    if (JSON.stringify(sources) === JSON.stringify(this.sources)) return;
    this.sources = sources;
    const chosen = this.choice.value;
    const options = sources.map((source, i) => element("option", { value: nameOf(source), "data-place": i }, nameOf(source))).reverse();
    this.choice.replaceChildren(element("option", { value: LATEST }, "the latest step"), ...options);
    this.choice.value = chosen || LATEST;
    this.catchUp();
  }

  /** Show the latest step where that was chosen, but not under the eyes of somebody who reads. */
  catchUp() {
    const source = this.chosen();
    if (!source || this.choice.value !== LATEST || nameOf(source) === this.shown) return;
    if (this.list.matches(":hover")) this.place.textContent = `${nameOf(source)} is there, and is shown when the pointer leaves the samples`;
    else this.load(0);
  }

  chosen() {
    if (this.choice.value !== LATEST) return this.sources[this.choice.selectedOptions[0]?.dataset.place];
    return this.sources.findLast((source) => source.evaluation === null) ?? this.sources.at(-1);
  }

  async load(start) {
    const source = this.chosen();
    if (!source) return;
    this.shown = nameOf(source);
    const asked = this.asked = (this.asked ?? 0) + 1;
    const given = Object.entries({ ...source, start }).filter(([, value]) => value !== null);
    try {
      const answer = await fetch(`samples?${new URLSearchParams(given)}`, { cache: "no-store" });
      if (!answer.ok) throw new Error(await answer.text());
      const data = await answer.json();
      if (asked === this.asked) this.show(data);
    } catch (error) {
      this.shown = undefined;
      this.place.textContent = `${nameOf(source)} could not be loaded: ${error.message}`;
    }
  }

  show(data) {
    const [source] = data?.sources ?? [];
    const start = data?.start ?? 0;
    this.starts = start ? [...this.starts.filter((earlier) => earlier < start), start] : [0];
    this.next = start + (source?.shown ?? 0);
    this.back.hidden = !start;
    this.on.hidden = !source || this.next >= source.total;
    this.place.textContent = !source ? "This run holds no samples yet."
      : `${nameOf(source)}: ${start + 1} to ${this.next} of ${plural(source.total, "sample")}${source.shown < source.total ? ", those most worth a look first" : ""}`;
    if (data) this.fields = browseSamples(this.list, data, this.fields);
  }
}

function nameOf({ stage, step, evaluation }) {
  return evaluation === null ? `${stage}, step ${step}` : `${stage}, ${evaluation}`;
}

function dataOf(page) {
  return JSON.parse(page.getElementById("data").textContent);
}

function partsOfPage(page) {
  return page.querySelectorAll("#tiles, #contents, main > section");
}

function chartPanels() {
  return [...document.querySelectorAll("#charts svg")];
}

const live = new LivePage();
live.follow();
