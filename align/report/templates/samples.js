// The browser of samples: filter, sort, and the tokens coloured by how likely the sampler held them.

const A_PAGE = 25;
// Upper bounds of the log-probability for each colour, from the likely to the unlikely.
const BINS = [-0.1, -0.7, -1.6, -3, -5];

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

function browseSamples(root, data) {
  const controls = sampleControls(data);
  const list = element("div", { id: "samples-list" });
  const count = element("p", { class: "note", id: "samples-count", role: "status" });
  const more = element("button", { id: "more", type: "button" }, "show more");
  let found = [], shown = 0;

  function extend() {
    list.append(...found.slice(shown, shown + A_PAGE).map((row) => sampleCard(row, data)));
    shown = Math.min(shown + A_PAGE, found.length);
    more.hidden = shown >= found.length;
    count.textContent = `${found.length.toLocaleString("en")} of ${plural(data.rows.length, "sample")} match; ${shown} shown`;
  }
  function renew() {
    found = selectSamples(data, controls.values());
    shown = 0;
    list.replaceChildren();
    extend();
  }
  controls.node.addEventListener("input", renew);
  more.addEventListener("click", extend);
  root.append(controls.node, count, list, more);
  tokenTips(list);
  renew();
}

function sampleControls(data) {
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
  };
  for (const [name, field] of Object.entries(fields)) field.id = `samples-${name}`;
  const node = element("form", { class: "controls" },
    element("label", {}, "from", fields.from),
    domains.size > 1 ? element("label", {}, "domain", fields.domain) : null,
    element("label", {}, "verdict", fields.verdict),
    element("label", {}, "steps", element("span", { class: "pair" }, fields.first_step, fields.last_step)),
    element("label", {}, "reward", element("span", { class: "pair" }, fields.low, fields.high)),
    element("label", {}, "sort by", fields.order),
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
  return { node, values };
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
      && (!wanted.text || [data.texts[row.prompt], row.completion, row.id, row.ground_truth, row.detail]
        .some((text) => text !== undefined && String(text).toLowerCase().includes(wanted.text)));
  });
  const [, key, sign] = ORDERS[wanted.order];
  // What lacks the number stands last, whichever way the others are sorted.
  const rank = (row) => (Number.isFinite(row[key]) ? sign * row[key] : Infinity);
  return found.sort((a, b) => (rank(a) === rank(b) ? 0 : rank(a) < rank(b) ? -1 : 1));
}

function sampleCard(row, data) {
  const source = data.sources[row.source];
  const known = ["pass", "wrong", "no_answer"].includes(row.verdict) ? row.verdict : "other";
  const value = (name, number) => (number === null || number === undefined ? null : element("span", {}, `${name} `, element("b", {}, brief(number))));
  const place = source.evaluation === null ? `${source.stage}, step ${source.step}` : `${source.stage}, ${source.evaluation}`;
  const how = source.evaluation === null ? null : element("span", {}, row.greedy ? "greedy" : "sampled");
  const components = Object.entries(row.components ?? {}).map(([name, number]) => `${name} ${brief(number)}`);
  const told = [row.ground_truth === undefined ? null : `ground truth: ${row.ground_truth}`, ...components, row.detail].filter(Boolean);
  return element("article", { class: "sample" },
    element("header", {}, element("span", { class: `badge v-${known}` }, row.verdict ?? "?"),
      row.masked ? element("span", { class: "badge masked" }, "masked") : null,
      value("reward", row.reward), value("advantage", row.advantage), value("tokens", row.tokens), how,
      row.finish_reason === undefined ? null : element("span", {}, `ended by ${row.finish_reason}`),
      element("span", {}, place), element("span", {}, `${row.id ?? ""} #${row.index ?? 0}`)),
    element("div", { class: "text prompt" }, data.texts[row.prompt]),
    element("div", { class: "text completion" }, ...(row.pieces ? tokens(row, data.pieces) : [row.completion])),
    told.length ? element("footer", {}, told.join(" · ")) : null);
}

function tokens(row, pieces) {
  const special = new Set(row.special);
  const given = new Set(row.given);
  const spans = row.pieces.map((piece, i) => {
    const log_prob = row.log_probs[i];
    const colour = given.has(i) ? "given" : `p${log_prob === null ? 5 : BINS.filter((bound) => log_prob < bound).length}`;
    const span = element("span", { class: `token ${colour}${special.has(i) ? " special" : ""}` }, pieces[piece]);
    span.dataset.place = `${i + 1}`;
    span.dataset.logProb = given.has(i) ? "none, not sampled" : log_prob === null ? "−∞" : String(log_prob);
    return span;
  });
  const rest = row.tokens - spans.length;
  return rest > 0 ? [...spans, element("span", { class: "soft" }, ` […${plural(rest, "more token")}]`)] : spans;
}

/** A note beside the token under the pointer, or that was tapped. */
function tokenTips(list) {
  const tip = element("div", { id: "tip", role: "tooltip" });
  document.body.append(tip);
  const show = (event) => {
    const token = event.target.closest(".token");
    tip.style.visibility = token ? "visible" : "hidden";
    if (!token) return;
    const log_prob = Number(token.dataset.logProb);
    const chance = Number.isFinite(log_prob) ? `, probability ${brief(Math.exp(log_prob))}` : "";
    tip.textContent = `${JSON.stringify(token.textContent)}\ntoken ${token.dataset.place}: log-probability ${token.dataset.logProb}${chance}`;
    const box = token.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(box.left, innerWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${box.top > tip.offsetHeight + 8 ? box.top - tip.offsetHeight - 6 : box.bottom + 6}px`;
  };
  list.addEventListener("pointerover", show);
  list.addEventListener("click", show);
  list.addEventListener("pointerleave", () => { tip.style.visibility = "hidden"; });
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
