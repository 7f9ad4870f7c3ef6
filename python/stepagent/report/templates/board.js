"use strict";
// The table of episodes: sorted, filtered, and each episode unfolding into its steps. All text of
// environments and models goes into the page as text nodes, never as HTML.

const PAGE = 100; // rows drawn at a time
const PREVIEW = 260; // characters of an observation before it is folded

const $ = (selector) => document.querySelector(selector);
const index = JSON.parse($("#index").textContent);
const count = index.run.length;

// ---------------------------------------------------------------------------------------- writing

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

/** Control characters as their pictures, what turns or hides text by its number: nothing in a text
    stays unseen. */
function visible(text) {
  return text.replace(/[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g, (c) => {
    const code = c.charCodeAt(0);
    if (code >= 0x80) return `\u27e8U+${code.toString(16).toUpperCase().padStart(4, "0")}\u27e9`;
    return code === 0x7f ? "\u2421" : String.fromCharCode(0x2400 + code);
  });
}

const minus = (text) => text.replace("-", "−");
const percent = (x) => `${(100 * x).toFixed(0)}%`;
const signed = (x) => minus((x > 0 ? "+" : "") + x.toFixed(2));
const decimal = (x) => minus(Number.isInteger(x) ? String(x) : x.toFixed(2));
const outcome = (i) =>
  index.crashed[i] !== null ? "crashed" : index.success[i] ? "success" : "failure";

// ---------------------------------------------------------------------------------------- columns

const text = (name) => ({ value: (i) => index[name][i], show: visible });
const measure = (name, show) => ({ value: (i) => index[name][i], show, number: true });
const columns = [
  { key: "run", title: "Run", value: (i) => index.runs[index.run[i]], show: visible },
  { key: "environment", title: "Environment", ...text("environment") },
  { key: "task", title: "Task", ...text("task") },
  { key: "difficulty", title: "Difficulty", ...text("difficulty") },
  { key: "split", title: "Split", ...text("split") },
  { key: "seed", title: "Seed", ...measure("seed", String) },
  { key: "outcome", title: "Outcome", value: outcome, show: String },
  { key: "reward", title: "Reward", ...measure("reward", decimal) },
  { key: "progress", title: "Progress", ...measure("progress_rate", percent) },
  { key: "grounding", title: "Valid", ...measure("grounding_accuracy", percent) },
  { key: "steps", title: "Steps", ...measure("steps", String) },
  { key: "first_divergence", title: "Differs at", ...measure("first_divergence", (t) => (t < 0 ? "never" : String(t + 1))) },
  { key: "tokens", title: "Tokens", ...measure("tokens", String) },
  { key: "ended", title: "Ended", ...text("ended") },
].filter(({ key, value, number }) => { // without those that tell nothing, or the same everywhere
  const values = new Set(Array.from({ length: count }, (_, i) => value(i)));
  return key === "run" || key === "outcome" || (number ? !(values.size === 1 && values.has(null)) : values.size > 1);
});

// ----------------------------------------------------------------------------------------- blocks

const starts = index.blocks.map((_, b) => index.blocks.slice(0, b).reduce((a, n) => a + n, 0));
const blockOf = (i) => starts.findLastIndex((start) => start <= i);
const unpacked = new Map();

function block(b) {
  if (!unpacked.has(b)) unpacked.set(b, unpack(document.getElementById(`block-${b}`).textContent));
  return unpacked.get(b);
}

async function unpack(base64) {
  const bytes = Uint8Array.fromBase64?.(base64) ?? Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

/** The episode's steps, with its texts in place of their numbers. */
async function stepsOf(i) {
  const b = blockOf(i);
  const { texts, episodes } = await block(b);
  const packed = episodes[i - starts[b]];
  const read = (name) => (packed[name] ?? []).map((place) => (place === null ? null : texts[place]));
  return {
    ...packed,
    last: packed.last === undefined ? null : texts[packed.last],
    ...Object.fromEntries(
      ["observations", "actions", "experts", "invalid", "course"].map((name) => [name, read(name)])),
  };
}

/** Which episodes hold the words, in their steps or in the columns of the table. */
async function search(words) {
  const found = new Set();
  for (let i = 0; i < count; i++) {
    const shown = columns.map(({ value }) => value(i)).join("\n").toLowerCase();
    if (shown.includes(words)) found.add(i);
  }
  for (let b = 0; b < starts.length; b++) {
    const held = await block(b);
    held.lower ??= held.texts.map((t) => t.toLowerCase());
    const hits = held.lower.map((t) => t.includes(words));
    held.episodes.forEach(({ observations, actions, last }, n) => {
      const places = [...observations, ...actions, ...(last === undefined ? [] : [last])];
      if (places.some((place) => hits[place])) found.add(starts[b] + n);
    });
  }
  return found;
}

// ------------------------------------------------------------------------------------------ table

const view = { sort: null, descending: false, found: null, shown: PAGE };
const opened = new Map(); // episode -> its row of steps
const body = $("#episodes tbody");
const more = $("#more");

function chosen() {
  const [run, wanted] = [$("#run").value, $("#outcome").value];
  const kept = [];
  for (let i = 0; i < count; i++) {
    if (run !== "" && index.run[i] !== Number(run)) continue;
    if (wanted !== "" && outcome(i) !== wanted) continue;
    if (view.found !== null && !view.found.has(i)) continue;
    kept.push(i);
  }
  return view.sort === null ? kept : kept.sort(compare(view.sort, view.descending ? -1 : 1));
}

/** By the column's value; what is not told comes last, either way. */
function compare({ value, number }, direction) {
  return (i, j) => {
    const [a, b] = [value(i), value(j)];
    if (a === null || b === null) return (a === null) - (b === null);
    return direction * (number ? Number(a) - Number(b) : a.localeCompare(b));
  };
}

function draw() {
  const episodes = chosen();
  const drawn = episodes.slice(0, view.shown);
  body.replaceChildren(...drawn.flatMap((i) => (opened.has(i) ? [row(i), opened.get(i)] : [row(i)])));
  more.hidden = drawn.length === episodes.length;
  $("#status").textContent =
    `${episodes.length.toLocaleString("en")} of ${count.toLocaleString("en")} episodes` +
    (more.hidden ? "" : `, the first ${drawn.length} shown`);
}

function row(i) {
  const open = opened.has(i);
  const cells = columns.map((column, n) => {
    const value = column.value(i);
    const shown = value === null ? "n/a" : column.show(value);
    if (n === 0) return toggle(i, shown, open);
    const mark = column.key === "outcome" && element("span", { class: `outcome ${shown}`, "aria-hidden": "true" });
    const cell = element("td", { role: "cell", "data-label": column.title }, mark || "", shown);
    if (column.number) cell.className = "number";
    return cell;
  });
  return element("tr", { role: "row", class: "episode", "data-episode": i }, ...cells);
}

function toggle(i, name, open) {
  const label = `${name}, seed ${index.seed[i]}: steps`;
  const button = element("button", {
    type: "button", class: `toggle run-${index.run[i] % 8}`, "aria-expanded": String(open),
    "aria-controls": `steps-${i}`, "aria-label": label,
  }, name);
  return element("th", { role: "rowheader", scope: "row" }, button);
}

async function unfold(tr) {
  const i = Number(tr.dataset.episode);
  const button = tr.querySelector(".toggle");
  if (opened.has(i)) {
    opened.get(i).remove();
    opened.delete(i);
    button.setAttribute("aria-expanded", "false");
    return;
  }
  const cell = element("td", { role: "cell", colspan: columns.length }, "…");
  const below = element("tr", { role: "row", class: "unfolded", id: `steps-${i}` }, cell);
  opened.set(i, below);
  button.setAttribute("aria-expanded", "true");
  tr.after(below);
  try {
    cell.replaceChildren(...episode(i, await stepsOf(i)));
  } catch (error) {
    cell.replaceChildren(`The steps cannot be read: ${error.message}`);
    throw error;
  }
}

// ----------------------------------------------------------------------------- an episode's steps

function episode(i, steps) {
  const notes = [`${visible(index.environment[i] ?? "")}, seed ${index.seed[i]}.`];
  if (index.crashed[i] !== null) notes.push(`Crashed: ${visible(index.crashed[i])}.`);
  else if (index.ended[i] !== null) notes.push(`Ended: ${visible(index.ended[i])}.`);
  const differs = index.first_divergence[i];
  if (differs === -1) notes.push("The expert acts alike throughout.");
  if (differs !== null && differs >= 0) notes.push(`First differs from the expert at step ${differs + 1}.`);
  const link = element("a", { href: `#${anchors[i]}` }, "Link to this episode");
  const made = [element("p", { class: "quiet" }, notes.join(" "), " ", link)];
  const table = stepTable(i, steps);
  const strip = stepStrip(steps);
  if (strip !== null) made.push(strip);
  made.push(table);
  if (steps.last !== null) {
    made.push(element("p", { class: "quiet" }, "After the last action:"),
      steps.phases?.length > steps.actions.length ? phase(steps.phases.at(-1)) : "", observation(steps.last));
  }
  if (steps.course.length > 0) {
    const course = steps.course.flatMap((a) => [element("span", { class: "action" }, visible(a)), " → "]);
    const actions = steps.course.length === 1 ? "1 action" : `${steps.course.length} actions`;
    made.push(element("p", { class: "course" }, `The expert’s own episode, ${actions}: `, ...course.slice(0, -1)));
  }
  return made;
}

/** One cell a step, coloured by its reward: the episode at a glance. */
function stepStrip(steps) {
  const [values, scale] = steps.stepRewards?.some((x) => x !== null)
    ? [steps.stepRewards, index.scales.stepRewards] : [steps.rewards ?? [], index.scales.rewards];
  if (!values.some((x) => x)) return null; // no colour in it
  return element("div", { class: "strip", "aria-hidden": "true" }, ...values.map((x) => coloured("i", x, scale)));
}

function coloured(tag, value, scale, ...children) {
  const made = element(tag, { class: `reward ${value < 0 ? "negative" : "positive"}` }, ...children);
  made.style.setProperty("--share", Math.min(1, Math.abs(value ?? 0) / (scale ?? 1)).toFixed(3));
  return made;
}

function stepTable(i, steps) {
  const answered = steps.experts.length > 0;
  const differs = index.first_divergence[i];
  const cells = [
    steps.phases && ["Phase", (t) => phase(steps.phases[t])],
    ["Observation", (t) => observation(steps.observations[t])],
    ["Action", (t) => action(steps, t)],
    (answered || steps.course.length > 0) && ["Expert", (t) => (answered ? answer(steps, t) : aligned(steps, t))],
    steps.rewards && ["Reward", (t) => reward(steps.rewards[t], index.scales.rewards)],
    steps.stepRewards && ["Step reward", (t) => reward(steps.stepRewards[t], index.scales.stepRewards)],
    steps.progress && ["Progress", (t) => percent(steps.progress[t])],
    steps.logps && ["Log-prob", (t) => likelihood(steps.logps[t])],
  ].filter(Boolean);
  const numbers = new Set(["Reward", "Step reward", "Progress", "Log-prob"]);
  const kind = (title) => (numbers.has(title) ? "number" : title === "Observation" ? "observation" : null);
  const head = ["Step", ...cells.map(([title]) => title)].map((title) =>
    element("th", { role: "columnheader", scope: "col", class: kind(title) }, title));
  const rows = steps.actions.map((_, t) => element("tr", { role: "row" },
    element("th", { role: "rowheader", scope: "row" }, String(t + 1)),
    ...cells.map(([title, cell]) =>
      element("td", { role: "cell", class: kind(title), "data-label": title }, cell(t)))));
  if (differs !== null && differs >= 0) {
    const said = element("td", { role: "cell", colspan: head.length }, divergence(steps, differs));
    rows.splice(differs, 0, element("tr", { role: "row", class: "divergence" }, said));
  }
  return element("table", { role: "table", class: "steps cards" },
    element("caption", { class: "unseen" }, "Steps of the episode"),
    element("thead", { role: "rowgroup" }, element("tr", { role: "row" }, ...head)),
    element("tbody", { role: "rowgroup" }, ...rows));
}

/** Of a state, by its number and colour, and by the name that its phase has. */
function phase(p) {
  return element("span", { class: `phase run-${p % 8}`, title: visible(index.phases[p]) }, String(p + 1));
}

function observation(text) {
  const shown = visible(text);
  if (shown.length <= PREVIEW) return element("div", { class: "text" }, shown);
  const start = element("span", { class: "start" }, `${shown.slice(0, PREVIEW)} …`);
  return element("details", { class: "text" }, element("summary", {}, start, element("span", { class: "fold" })), shown);
}

function action(steps, t) {
  const made = element("span", {}, element("span", { class: "action" }, visible(steps.actions[t])));
  if (steps.valid?.[t] === 0) {
    made.append(element("span", { class: "invalid" }, visible(steps.invalid[t] ?? "invalid")));
  }
  if (steps.cut?.[t] === 1) made.append(element("span", { class: "invalid" }, "cut at the token limit"));
  return made;
}

/** Of an action, at temperature 1, summed over its tokens. */
function likelihood(logp) {
  if (logp === null) return "n/a";
  const tokens = logp[1] === 1 ? "1 token" : `${logp[1]} tokens`;
  return element("span", {}, decimal(logp[0]), element("small", {}, tokens));
}

/** The answer that the expert gave at the agent's own state. */
function answer(steps, t) {
  if (steps.experts[t] === null) return "n/a";
  return marked(steps.experts[t], steps.experts[t] === steps.actions[t]);
}

/** The step of the expert's own episode that aligns with this one. */
function aligned(steps, t) {
  const pair = (steps.pairs ?? []).find(([, agent]) => agent === t);
  if (pair === undefined) return "–";
  const made = marked(steps.course[pair[0]], steps.course[pair[0]] === steps.actions[t]);
  if (pair[0] !== t) made.append(element("span", { class: "quiet" }, ` its step ${pair[0] + 1}`));
  return made;
}

function marked(text, same) {
  return element("span", {},
    element("span", { class: `action ${same ? "same" : "other"}` }, visible(text)),
    element("span", { class: "mark", "aria-hidden": "true" }, same ? " ✓" : " ✗"),
    element("span", { class: "unseen" }, same ? ", same as the agent" : ", not the agent’s"));
}

function reward(value, scale) {
  return value === null ? "n/a" : coloured("span", value, scale, signed(value));
}

function divergence(steps, t) {
  if (t >= steps.actions.length) return "The agent’s episode ended here; the expert’s went on.";
  const expert = steps.course.length > 0 ? steps.course[t] : steps.experts[t];
  if (expert === undefined) return "The expert’s episode was over here.";
  return element("span", {}, "Here the two part: the expert does ", element("span", { class: "action" }, visible(expert)));
}

// --------------------------------------------------------------------------------- links, exports

/** Each episode's place in the address: its run, environment, split and seed, and which of several. */
const anchors = (() => {
  const times = new Map();
  return Array.from({ length: count }, (_, i) => {
    const parts = [index.runs[index.run[i]], index.environment[i], index.split[i] ?? "", index.seed[i]];
    const place = `episode/${parts.map((part) => encodeURIComponent(part)).join("/")}`;
    times.set(place, (times.get(place) ?? 0) + 1);
    return times.get(place) === 1 ? place : `${place}/${times.get(place)}`;
  });
})();

/** Unfold the episode that the address names, with all filters off. */
async function follow() {
  const i = anchors.indexOf(location.hash.slice(1));
  if (i === -1) return;
  for (const id of ["#words", "#outcome", "#run"]) $(id).value = "";
  view.found = null;
  view.shown = Math.max(PAGE, chosen().indexOf(i) + 1);
  draw();
  const tr = body.querySelector(`[data-episode="${i}"]`);
  if (!opened.has(i)) await unfold(tr);
  tr.scrollIntoView();
  tr.querySelector(".toggle").focus({ preventScroll: true });
}

/** The table as it is filtered and sorted, all its rows, as a file. */
function save(kind) {
  const rows = chosen().map((i) => columns.map(({ value }) => value(i)));
  const text = kind === "json"
    ? JSON.stringify(rows.map((row) => Object.fromEntries(row.map((x, n) => [columns[n].key, x]))), null, 1)
    : [columns.map(({ key }) => key), ...rows].map((row) => row.map(field).join(",")).join("\r\n") + "\r\n";
  const address = URL.createObjectURL(new Blob([text], { type: kind === "json" ? "application/json" : "text/csv" }));
  element("a", { href: address, download: `episodes.${kind}` }).click();
  setTimeout(() => URL.revokeObjectURL(address), 60_000);
}

/** A field of CSV (RFC 4180). What a spreadsheet would take for a formula becomes text. */
function field(value) {
  if (value === null) return "";
  const text = typeof value === "string" && /^[=+\-@\t\r]/.test(value) ? `'${value}` : String(value);
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

// ------------------------------------------------------------------------------------- what moves

function sortBy(column, button) {
  view.descending = view.sort === column && !view.descending;
  view.sort = column;
  for (const th of document.querySelectorAll("#episodes thead th")) th.removeAttribute("aria-sort");
  button.parentElement.setAttribute("aria-sort", view.descending ? "descending" : "ascending");
  restart();
}

function restart() {
  view.shown = PAGE;
  draw();
}

let latest = 0;
async function find() {
  const words = $("#words").value.trim().toLowerCase();
  const mine = ++latest;
  if (words !== "") $("#status").textContent = "Searching …";
  const found = words === "" ? null : await search(words);
  if (mine !== latest) return; // typed on meanwhile
  view.found = found;
  restart();
}

function start() {
  $("#episodes thead tr").append(...columns.map((column) => {
    const button = element("button", { type: "button" }, column.title);
    button.addEventListener("click", () => sortBy(column, button));
    return element("th", { role: "columnheader", scope: "col", class: column.number ? "number" : null }, button);
  }));
  $("#run").append(...index.runs.map((name, n) => element("option", { value: n }, visible(name))));
  $("#run").addEventListener("change", restart);
  $("#outcome").addEventListener("change", restart);
  let pause;
  $("#words").addEventListener("input", () => {
    clearTimeout(pause);
    pause = setTimeout(find, 150);
  });
  more.addEventListener("click", () => {
    view.shown += PAGE;
    draw();
  });
  body.addEventListener("click", (event) => {
    const tr = event.target.closest("tr.episode");
    if (tr !== null && String(getSelection()) === "") unfold(tr);
  });
  for (const kind of ["csv", "json"]) $(`#${kind}`).addEventListener("click", () => save(kind));
  addEventListener("hashchange", follow);
  draw();
  follow();
}

start();
