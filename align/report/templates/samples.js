// The browser of samples: filter, sort, each as the conversation that it is, its sampled tokens coloured by what one chooses.

const A_PAGE = 25;
// Upper bounds of the log-probability for each colour, from the likely to the unlikely, and what the legend says of them.
const BINS = [-0.1, -0.7, -1.6, -3, -5];
const CHANCES = ["above 0.9", "0.5 to 0.9", "0.2 to 0.5", "0.05 to 0.2", "0.007 to 0.05", "below 0.007"];
const DIFFERENCES = [0.01, 0.1, 0.5];
const ADVANTAGES = [0.05, 0.5, 1.5];

// What tokens can be coloured by: the name shown, what the legend says, and of token i of a row whether that is known, and the colour.
const COLOURINGS = {
  log_prob: {
    name: "log-probability", title: "the probability that the sampler gave them",
    known: (row) => row.log_probs !== undefined,
    colour: (row, i) => `p${row.log_probs[i] === null ? 5 : BINS.filter((bound) => row.log_probs[i] < bound).length}`,
    legend: () => CHANCES.map((text, n) => [`p${n}`, text]),
  },
  difference: {
    name: "learner − sampler", title: "the learner's log-probability less the sampler's, in nats",
    known: (row) => row.differences !== undefined,
    colour: (row, i) => signed(row.differences[i], DIFFERENCES),
    legend: () => signedLegend(DIFFERENCES),
  },
  advantage: {
    name: "advantage", title: "the advantage of their sample",
    known: (row) => Number.isFinite(row.advantage),
    colour: (row) => signed(row.advantage, ADVANTAGES),
    legend: () => signedLegend(ADVANTAGES),
  },
  version: {
    name: "weight version", title: "the version of the weights that drew them",
    known: (row) => (row.versions ?? []).length > 0,
    colour: (row, i, versions) => `w${versions.indexOf(versionAt(row, i)) % 6}`,
    legend: (versions) => versions.map((version, n) => [`w${n % 6}`, `${version}`]),
  },
};

// Parts of what an assistant says: what it is, how it begins and how it ends.
const PARTS = [
  ["thought", "<think>", "</think>"],
  ["tool call", "<tool_call>", "</tool_call>"],
  ["tool result", "<tool_response>", "</tool_response>"],
  ["tool call", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"],
  ["tool result", "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>"],
];
const SHOWN_MESSAGES = 6;
// What a token under the pointer is: [row, its place].
const TOKENS = new WeakMap();

// What to sort by: the name shown, the number of a sample, and 1 for rising or -1 for falling.
const ORDERS = {
  run: ["order of the run", "source", 1],
  reward_high: ["highest reward", "reward", -1],
  reward_low: ["lowest reward", "reward", 1],
  advantage_high: ["highest advantage", "advantage", -1],
  advantage_low: ["lowest advantage", "advantage", 1],
  longest: ["longest", "tokens", -1],
  shortest: ["shortest", "tokens", 1],
  unlikely: ["least likely a token", "mean_log_prob", 1],
};

/** Put the browser of these samples into `root`; `entered` are values of the controls of an earlier one. Returns the controls. */
function browseSamples(root, data, entered = {}) {
  const controls = sampleControls(data);
  enter(controls.fields, entered);
  const versions = [...new Set(data.rows.flatMap((row) => (row.versions ?? []).map(([, version]) => version)))].sort((a, b) => a - b);
  const legend = element("p", { class: "note scale", id: "samples-legend" });
  const list = element("div", { id: "samples-list" });
  const count = element("p", { class: "note", id: "samples-count", role: "status" });
  const more = element("button", { id: "more", type: "button" }, "show more");
  let found = [], shown = 0;

  function extend() {
    const colouring = { ...COLOURINGS[controls.fields.colour.value], versions };
    list.append(...found.slice(shown, shown + A_PAGE).map((row) => sampleCard(row, data, colouring)));
    shown = Math.min(shown + A_PAGE, found.length);
    more.hidden = shown >= found.length;
    count.textContent = `${found.length.toLocaleString("en")} of ${plural(data.rows.length, "sample")} match; ${shown} shown`;
  }
  function renew() {
    found = selectSamples(data, controls.values());
    shown = 0;
    list.replaceChildren();
    const { title, legend: entries } = COLOURINGS[controls.fields.colour.value];
    legend.replaceChildren(`Sampled tokens by ${title}: `, ...entries(versions).map(([colour, text]) => element("span", { class: colour }, text)));
    legend.hidden = !data.rows.some((row) => row.pieces);
    extend();
  }
  controls.node.addEventListener("input", renew);
  more.addEventListener("click", extend);
  root.replaceChildren(controls.node, legend, count, list, more);
  renew();
  return controls.fields;
}

/** Give fields the values that those of the same name had, as far as they still can be chosen. */
function enter(fields, entered) {
  for (const [name, field] of Object.entries(fields)) {
    const earlier = entered[name];
    if (!earlier) continue;
    field.checked = earlier.checked;
    if (field.tagName !== "SELECT" || [...field.options].some((option) => option.value === earlier.value)) field.value = earlier.value;
  }
}

function sampleControls(data) {
  const colourings = Object.entries(COLOURINGS).filter(([, { known }]) => data.rows.some((row) => row.pieces && known(row)));
  const verdicts = tally(data.rows.map((row) => row.verdict));
  const domains = tally(data.rows.map((row) => row.domain));
  const origins = tally(data.rows.map((row) => origin(data.sources[row.source])));
  const fields = {
    from: select([["", "everything"], ...[...origins].map(([name, count]) => [name, `${name} (${count})`])]),
    domain: select([["", "any"], ...[...domains].map(([name, count]) => [name, `${name} (${count})`])]),
    verdict: select([["", "any"], ...[...verdicts].map(([name, count]) => [name, `${name} (${count})`])]),
    first_step: element("input", { type: "number", min: "0", placeholder: "from", "aria-label": "first step" }),
    last_step: element("input", { type: "number", min: "0", placeholder: "to", "aria-label": "last step" }),
    low: element("input", { type: "number", step: "any", placeholder: "from", "aria-label": "lowest reward" }),
    high: element("input", { type: "number", step: "any", placeholder: "to", "aria-label": "highest reward" }),
    text: element("input", { type: "search", placeholder: "text, id or detail" }),
    masked: element("input", { type: "checkbox" }),
    order: select(Object.entries(ORDERS).map(([key, [name]]) => [key, name])),
    colour: select((colourings.length ? colourings : [["log_prob", COLOURINGS.log_prob]]).map(([key, { name }]) => [key, name])),
  };
  for (const [name, field] of Object.entries(fields)) field.id = `samples-${name}`;
  const node = element("form", { class: "controls" },
    data.sources.length > 1 ? element("label", {}, "from", fields.from) : null,
    domains.size > 1 ? element("label", {}, "domain", fields.domain) : null,
    element("label", {}, "verdict", fields.verdict),
    data.sources.length > 1 ? element("label", {}, "steps", element("span", { class: "pair" }, fields.first_step, fields.last_step)) : null,
    element("label", {}, "reward", element("span", { class: "pair" }, fields.low, fields.high)),
    element("label", {}, "sort by", fields.order),
    colourings.length ? element("label", {}, "colour by", fields.colour) : null,
    element("label", { class: "grow" }, "search", fields.text),
    element("label", { class: "inline" }, fields.masked, "masked only"));
  node.addEventListener("submit", (event) => event.preventDefault());
  const bound = (field, none) => (field.value === "" ? none : Number(field.value));
  const values = () => ({
    from: fields.from.value, verdict: fields.verdict.value, domain: fields.domain.value, order: fields.order.value, masked: fields.masked.checked,
    text: fields.text.value.trim().toLowerCase(),
    steps: [bound(fields.first_step, -Infinity), bound(fields.last_step, Infinity)],
    rewards: [bound(fields.low, -Infinity), bound(fields.high, Infinity)],
    by_step: fields.first_step.value !== "" || fields.last_step.value !== "",
    by_reward: fields.low.value !== "" || fields.high.value !== "",
  });
  return { node, values, fields };
}

function selectSamples(data, wanted) {
  const within = (value, [low, high]) => value !== null && value !== undefined && value >= low && value <= high;
  const found = data.rows.filter((row) => {
    const source = data.sources[row.source];
    return (!wanted.from || origin(source) === wanted.from)
      && (!wanted.domain || row.domain === wanted.domain)
      && (!wanted.verdict || row.verdict === wanted.verdict)
      && (!wanted.by_step || within(source.step, wanted.steps))
      && (!wanted.by_reward || within(row.reward, wanted.rewards))
      && (!wanted.masked || row.masked)
      && (!wanted.text || [...data.prompts[row.prompt].map((message) => message.content), row.completion, row.id, row.ground_truth, row.detail]
        .some((text) => text !== undefined && String(text).toLowerCase().includes(wanted.text)));
  });
  const [, key, sign] = ORDERS[wanted.order];
  // What lacks the number stands last, whichever way the others are sorted.
  const rank = (row) => (Number.isFinite(row[key]) ? sign * row[key] : Infinity);
  return found.sort((a, b) => (rank(a) === rank(b) ? 0 : rank(a) < rank(b) ? -1 : 1));
}

function sampleCard(row, data, colouring) {
  const source = data.sources[row.source];
  const known = ["pass", "wrong", "no_answer"].includes(row.verdict) ? row.verdict : "other";
  const value = (name, number) => (number === null || number === undefined ? null : element("span", {}, `${name} `, element("b", {}, brief(number))));
  const place = source.evaluation === null ? `${source.stage}, step ${source.step}` : `${source.stage}, ${source.evaluation}`;
  const how = source.evaluation === null || row.greedy === undefined ? null : element("span", {}, row.greedy ? "greedy" : "sampled");
  const components = Object.entries(row.components ?? {}).map(([name, number]) => `${name} ${brief(number)}`);
  const told = [row.ground_truth === undefined ? null : `ground truth: ${row.ground_truth}`, ...components, row.detail].filter(Boolean);
  return element("article", { class: "sample" },
    element("header", {}, element("span", { class: `badge v-${known}` }, row.verdict ?? "?"),
      row.masked ? element("span", { class: "badge masked" }, "masked") : null,
      value("reward", row.reward), value("advantage", row.advantage), value("tokens", row.tokens), how,
      row.finish_reason === undefined ? null : element("span", {}, `ended by ${row.finish_reason}`),
      element("span", {}, place), element("span", {}, `${row.id ?? ""} #${row.index ?? 0}`)),
    ...promptTurns(data.prompts[row.prompt]),
    ...(row.pieces ? trajectoryTurns(row, data.pieces, colouring) : [turn("assistant", "completion", ...inParts(row.completion))]),
    told.length ? element("footer", {}, told.join(" · ")) : null);
}

/** One turn of a conversation: who speaks, and what is said. */
function turn(who, kind, ...said) {
  return element("div", { class: "turn" }, element("div", { class: "who" }, who), element("div", { class: `text ${kind}` }, ...said));
}

/** The messages that were answered; of many, those in the middle are folded away. */
function promptTurns(messages) {
  const turns = messages.map(({ role, name, content, calls }) =>
    turn(name ? `${role} (${name})` : role, "prompt", ...(role === "assistant" ? inParts(content) : [content]),
      ...(calls ?? []).map((call) => element("span", { class: "part", "data-kind": "tool call" }, call))));
  const folded = turns.slice(1, turns.length - SHOWN_MESSAGES + 1);
  if (!folded.length) return turns;
  return [turns[0], element("details", {}, element("summary", {}, plural(folded.length, "more message")), ...folded), ...turns.slice(1 + folded.length)];
}

/** The turns of the policy, and what an environment wrote between them, token by token. */
function trajectoryTurns(row, pieces, colouring) {
  const special = new Set(row.special), given = new Set(row.given), count = row.pieces.length;
  const known = colouring.known(row);
  const spans = row.pieces.map((piece, i) => {
    const colour = given.has(i) || !known ? "given" : colouring.colour(row, i, colouring.versions);
    const span = element("span", { class: `token ${colour}${special.has(i) ? " special" : ""}` }, pieces[piece]);
    TOKENS.set(span, [row, i, given.has(i)]);
    return span;
  });
  const blocks = [];
  let at = 0;
  row.turns.forEach(([start, end], n) => {
    if (start > at) blocks.push(["environment", "completion environment", at, start]);
    blocks.push([row.turns.length > 1 ? `assistant, turn ${n + 1} of ${row.turns.length}` : "assistant", "completion", start, end]);
    at = end;
  });
  if (at < count) blocks.push(["environment", "completion environment", at, count]);
  const turns = blocks.filter(([, , start, end]) => start < Math.min(end, count)).map(([who, kind, start, end]) =>
    turn(who, kind, ...grouped(spans.slice(start, end))));
  const rest = row.tokens - count;
  if (rest > 0) turns.push(element("p", { class: "note" }, `[…${plural(rest, "more token")}]`));
  return turns.length ? turns : [turn("assistant", "completion")];
}

/** Tokens of a turn, those of a thought, a call or a result together. */
function grouped(spans) {
  const parts = partsOf(spans.map((span) => span.textContent).join(""));
  const groups = parts.map(([kind]) => (kind ? element("span", { class: "part", "data-kind": kind }) : element("span")));
  let at = 0, n = 0;
  for (const span of spans) {
    while (n < parts.length - 1 && at >= parts[n][2]) n += 1;
    groups[n]?.append(span);
    at += span.textContent.length;
  }
  return groups;
}

/** A text without tokens, in its parts. */
function inParts(text) {
  return partsOf(text).map(([kind, start, end]) => element("span", kind ? { class: "part", "data-kind": kind } : {}, text.slice(start, end)));
}

/** The parts of a text as [what it is, start, end], one after the other; what is plain text is "". */
function partsOf(text) {
  const parts = [];
  let at = 0;
  const add = (kind, end) => { if (end > at) parts.push([kind, at, end]); at = Math.max(at, end); };
  // A thought that only ends here was opened by the prompt.
  const [, open, close] = PARTS[0];
  const end = text.indexOf(close), start = text.indexOf(open);
  if (end >= 0 && (start < 0 || start > end)) add("thought", end + close.length);
  for (;;) {
    const [next] = PARTS.map(([kind, first, last]) => ({ kind, first, last, place: text.indexOf(first, at) }))
      .filter(({ place }) => place >= 0).sort((a, b) => a.place - b.place);
    if (!next) break;
    add("", next.place);
    const stop = text.indexOf(next.last, next.place + next.first.length);
    add(next.kind, stop < 0 ? text.length : stop + next.last.length);
  }
  add("", text.length);
  return parts.length ? parts : [["", 0, 0]];
}

/** The version of the weights that drew token i. */
function versionAt(row, i) {
  return row.versions.findLast(([start]) => start <= i)?.[1];
}

/** The colour of a number by its sign and size: below zero, about zero, above it. */
function signed(value, bounds) {
  if (value === null) return "given";
  const size = bounds.filter((bound) => Math.abs(value) >= bound).length;
  return size ? `${value < 0 ? "less" : "more"}${size}` : "p0";
}

function signedLegend([small, middle, large]) {
  const above = [["more1", `${small} to ${middle}`], ["more2", `${middle} to ${large}`], ["more3", `above ${large}`]];
  const below = [["less3", `below −${large}`], ["less2", `−${large} to −${middle}`], ["less1", `−${middle} to −${small}`]];
  return [...below, ["p0", `within ${small}`], ...above];
}

/** What is known of a token. */
function tokenFacts(row, i, given) {
  if (given) return `token ${i + 1}: not sampled`;
  const log_prob = row.log_probs[i], difference = row.differences?.[i] ?? null, version = versionAt(row, i);
  const lines = [log_prob === null ? "log-probability −∞" : `log-probability ${log_prob}, probability ${brief(Math.exp(log_prob))}`];
  if (difference !== null) lines.push(`learner − sampler: ${brief(difference)} nats`);
  if (Number.isFinite(row.advantage)) lines.push(`advantage ${brief(row.advantage)}`);
  if (version !== undefined) lines.push(`weight version ${version}`);
  return `token ${i + 1}: ${lines.join("\n")}`;
}

/** A note beside the token under the pointer, or that was tapped. */
function tokenTips(root) {
  const tip = element("div", { id: "tip", role: "tooltip" });
  document.body.append(tip);
  const show = (event) => {
    const token = event.target.closest(".token");
    tip.style.visibility = token ? "visible" : "hidden";
    if (!token) return;
    tip.textContent = `${JSON.stringify(token.textContent)}\n${tokenFacts(...TOKENS.get(token))}`;
    const box = token.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(box.left, innerWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${box.top > tip.offsetHeight + 8 ? box.top - tip.offsetHeight - 6 : box.bottom + 6}px`;
  };
  root.addEventListener("pointerover", show);
  root.addEventListener("click", show);
  root.addEventListener("pointerleave", () => { tip.style.visibility = "hidden"; });
  addEventListener("scroll", () => { tip.style.visibility = "hidden"; }, { passive: true });
}

function origin(source) {
  return source.evaluation === null ? `training (${source.stage})` : `${source.evaluation} (${source.stage})`;
}

function tally(values) {
  const counts = new Map();
  for (const value of values) if (value !== undefined) counts.set(value, (counts.get(value) ?? 0) + 1);
  return counts;
}

function select(options) {
  return element("select", {}, ...options.map(([value, text]) => element("option", { value }, text)));
}
