// The page of a steering server: sliders, a conversation, and what the answers were worth.
//
// Whatever the server or a model says becomes a text node, never markup.

const LETTERS = ["A", "B"];
const PRESETS_KEY = "steerlm2.presets";
const API_KEY = "steerlm2.api_key";
const KEY_VARIABLE = "STEERLM2_API_KEY";
const EXAMPLES = [
  "Why is the sky blue?",
  "How do I get better at chess?",
  "Write a toast for a friend's wedding.",
];
const MOST_DOTS = 12; // steps of a slider that still show as dots

let model; // data[0] of /v1/models
let lanes = []; // {index, values, inputs, ...}: the settings A, and B where two are compared
let turns = []; // {question, answers: [of A, of B], node}
let editing = false;
let running = new Set(); // AbortControllers of the answers that are being written

// --- small helpers

const $ = (id) => document.getElementById(id);

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

const button = (text, click, attributes = {}) =>
  element("button", { type: "button", click, ...attributes }, text);

const say = (text) => ($("status").textContent = text);
const clip = (value, { min, max }) => Math.min(max, Math.max(min, value));
const share = (value, { min, max }) => (clip(value, { min, max }) - min) / (max - min);
const comparing = () => document.body.classList.contains("comparing");
const activeLanes = () => (comparing() ? lanes : lanes.slice(0, 1));
const labelOf = (values) =>
  Object.entries(values)
    .map(([name, value]) => `${name} ${value}`)
    .join(" · ");

const unkept = new Map(); // what the browser doesn't keep, by key: it lasts as long as the page

function readStored(storage, key) {
  try {
    return unkept.get(key) ?? storage().getItem(key); // asking for the storage fails if forbidden
  } catch {
    return null;
  }
}

/** Whether the browser keeps it. */
function store(storage, key, value) {
  try {
    storage().setItem(key, value);
    return unkept.delete(key) || true;
  } catch {
    unkept.set(key, value);
    return false;
  }
}

const session = () => sessionStorage;
const local = () => localStorage;

// --- the server

async function request(path, init = {}) {
  for (;;) {
    const key = readStored(session, API_KEY);
    const headers = { ...init.headers, ...(key && { Authorization: `Bearer ${key}` }) };
    let response;
    try {
      response = await fetch(path, { ...init, headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Error("The server can't be reached.");
    }
    if (response.ok) return response;
    const message = await errorMessage(response);
    if (response.status !== 401) throw new Error(message);
    // Another answer may have asked meanwhile: then its key is tried first.
    if (readStored(session, API_KEY) === key && !(await askForKey(message))) {
      throw new Error(message);
    }
  }
}

async function errorMessage(response) {
  const text = await response.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return `${response.status} ${response.statusText}`.trim();
  }
}

let keyQuestion = null;

/** Whether a key was given; two answers that need one ask once. */
function askForKey(problem) {
  keyQuestion ??= new Promise((resolve) => {
    const dialog = $("key-dialog");
    let given = false;
    $("key-problem").textContent = problem;
    $("key").value = "";
    $("key-form").onsubmit = (event) => {
      event.preventDefault();
      given = true;
      store(session, API_KEY, $("key").value);
      dialog.close();
    };
    $("key-cancel").onclick = () => dialog.close();
    dialog.onclose = () => {
      keyQuestion = null;
      resolve(given);
    };
    dialog.showModal();
  });
  return keyQuestion;
}

/** The events of a stream, parsed, up to its [DONE]. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch(() => ({ done: true }));
    if (done) throw new Error("The answer broke off: the server closed the connection.");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

// --- settings: sliders and presets

/** A value of every attribute; without those that have none, which a request then leaves out. */
const valuesBy = (key) =>
  Object.fromEntries(
    model.attributes
      .filter((each) => Number.isFinite(each[key]))
      .map((each) => [each.name, each[key]]),
  );

function makeLane(index) {
  const lane = { index, values: valuesBy("default"), inputs: new Map() };
  const gist = element("span", { class: "gist" });
  const sliders = element("div", { class: "sliders" });
  const none = element("p", { class: "small" }, "This model was trained without attributes.");
  for (const attribute of model.attributes) sliders.append(slider(lane, attribute));
  lane.gist = gist;
  lane.presets = element("div", { class: "presets", role: "group", "aria-label": "Presets" });
  const heading = element("span", { class: "heading" }, "Attributes");
  if (index === 0) lane.heading = heading;
  else heading.textContent = LETTERS[index];
  lane.panel = element(
    "details",
    { class: `panel lane-${index}` },
    element("summary", {}, heading, " ", gist),
    element(
      "div",
      { class: "panel-body" },
      ...(model.attributes.length ? [lane.presets, sliders] : [none]),
    ),
  );
  $(`panel-${index}`).replaceChildren(lane.panel);
  showValues(lane);
  return lane;
}

function slider(lane, attribute) {
  const { name, min, max, step = 1 } = attribute;
  const id = `slider-${lane.index}-${model.attributes.indexOf(attribute)}`;
  const output = element("output", { for: id });
  const set = () => {
    lane.values[name] = Number(input.value);
    showValues(lane);
  };
  // Where a value isn't set, its lowest one is chosen without any input.
  const keyup = ({ key }) => /^(Arrow|Home|End|Page)/.test(key) && set();
  const input = element("input", {
    type: "range",
    id,
    min,
    max,
    step,
    input: set,
    click: set,
    keyup,
  });
  lane.inputs.set(name, { attribute, input, output });
  const track = element("div", { class: "slider", title: `${min} to ${max}` }, input);
  const steps = Math.round((max - min) / step);
  if (steps <= MOST_DOTS) {
    track.classList.add("dotted");
    track.style.setProperty("--steps", steps);
  }
  return element("div", { class: "attribute" }, element("label", { for: id }, name), track, output);
}

function showValues(lane) {
  for (const [name, { attribute, input, output }] of lane.inputs) {
    const value = lane.values[name] ?? attribute.min;
    input.value = value;
    input.style.setProperty("--share", share(value, attribute));
    input.classList.toggle("unset", !(name in lane.values));
    input.ariaValueText = name in lane.values ? null : "not set";
    output.textContent = lane.values[name] ?? "–";
  }
  const moved = model.attributes.filter(
    (each) => lane.values[each.name] !== (each.default ?? undefined),
  );
  lane.gist.textContent =
    moved.map(({ name }) => `${name} ${lane.values[name]}`).join(" · ") || "as usual";
  showPresets(lane);
}

function setValues(lane, values) {
  lane.values = {};
  for (const [name, { attribute }] of lane.inputs) {
    if (Number.isFinite(values[name])) lane.values[name] = clip(values[name], attribute);
  }
  showValues(lane);
}

function savedPresets() {
  try {
    const saved = JSON.parse(readStored(local, PRESETS_KEY) ?? "[]");
    return saved.filter(({ name, values }) => typeof name === "string" && values);
  } catch {
    return [];
  }
}

const BUILT_IN = { Usual: "default", High: "max", Low: "min" }; // which values each has

function presets() {
  const own = savedPresets().filter(({ values }) =>
    model.attributes.some(({ name }) => Number.isFinite(values[name])),
  );
  return [
    ...Object.entries(BUILT_IN).map(([name, key]) => ({ name, values: valuesBy(key) })),
    ...own.map((preset) => ({ ...preset, own: true })),
  ];
}

function showPresets(lane) {
  const saving = lane.presets.querySelector("form");
  const focused =
    lane.presets.contains(document.activeElement) && document.activeElement.dataset.name;
  const chips = presets().map(({ name, values, own }) => {
    const pressed = model.attributes.every((each) => values[each.name] === lane.values[each.name]);
    const chip = button(name, () => setValues(lane, values), {
      "aria-pressed": `${pressed}`,
      "data-name": name,
    });
    if (!own) return chip;
    const label = `Delete preset ${name}`;
    const remove = button("×", () => removePreset(name), { "aria-label": label });
    return element("span", { class: "own" }, chip, remove);
  });
  lane.presets.replaceChildren(...chips, saving ?? saveForm(lane));
  // The chips are new: whoever pressed one by keyboard stays on it.
  const buttons = [...lane.presets.querySelectorAll("[data-name]")];
  buttons.find((each) => each.dataset.name === focused)?.focus();
}

function saveForm(lane) {
  const name = element("input", {
    "aria-label": "Name of the preset",
    required: true,
    maxlength: 40,
    hidden: true,
    placeholder: "Name",
    input: () => name.setCustomValidity(""),
  });
  const save = element("button", { type: "submit", class: "quiet", formnovalidate: true }, "Save…");
  const done = () => {
    name.hidden = true;
    name.value = "";
    save.textContent = "Save…";
    save.focus();
  };
  const submit = (event) => {
    event.preventDefault();
    if (name.hidden) {
      name.hidden = false;
      save.textContent = "Save";
      name.focus();
    } else if (Object.hasOwn(BUILT_IN, name.value.trim())) {
      name.setCustomValidity("This preset is always there. Choose another name.");
      name.reportValidity();
    } else if (name.value.trim()) {
      savePreset(name.value.trim(), lane.values);
      done();
    }
  };
  const keydown = (event) => {
    if (event.key === "Escape" && !name.hidden) {
      event.stopPropagation();
      done();
    }
  };
  return element("form", { submit, keydown }, name, save);
}

function keepPresets(all, done) {
  const kept = store(local, PRESETS_KEY, JSON.stringify(all));
  lanes.forEach(showPresets);
  toast(kept ? `${done}.` : `${done} until this page is closed: the browser keeps nothing for it.`);
}

function savePreset(name, values) {
  const others = savedPresets().filter((each) => each.name !== name);
  keepPresets([...others, { name, values: { ...values } }], `Saved the preset ${name}`);
}

function removePreset(name) {
  keepPresets(
    savedPresets().filter((each) => each.name !== name),
    `Deleted the preset ${name}`,
  );
}

function compare(on) {
  document.body.classList.toggle("comparing", on);
  $("compare").setAttribute("aria-pressed", `${on}`);
  document.querySelector(".second").hidden = !on;
  lanes[0].heading.textContent = on ? LETTERS[0] : "Attributes";
  if (on && !lanes[1].used) setValues(lanes[1], lanes[0].values);
  lanes[1].used = true;
  for (const turn of turns) showTurn(turn);
}

// --- what is asked

/** The numbers of the request by their names in it; null where one of them is wrong. */
function sampling() {
  const found = {};
  for (const id of ["temperature", "top_p", "max_tokens", "seed", "best_of"]) {
    const input = $(id);
    if (!input.checkValidity()) {
      $("shared").open = true;
      input.reportValidity();
      return null;
    }
    if (input.value !== "") found[id] = Number(input.value);
  }
  if (!model.scores || found.best_of === 1) delete found.best_of;
  else found.n = found.best_of; // all of them are shown
  return found;
}

function showSampling() {
  $("shared-gist").textContent =
    `temperature ${$("temperature").value} · top-p ${$("top_p").value}`;
}

/** The conversation up to a turn as this lane has it: B goes on from A's answers before its own. */
function messagesFor(lane, turn) {
  const system = $("system").value;
  const messages = [{ role: "system", content: system }];
  for (const earlier of turns.slice(0, turns.indexOf(turn))) {
    const own = [earlier.answers[lane.index], earlier.answers[0]].find(textOf);
    if (!own) continue; // it failed: a question without an answer would only confuse
    messages.push({ role: "user", content: earlier.question });
    messages.push({ role: "assistant", content: textOf(own), attributes: own.asked });
  }
  return [...messages, { role: "user", content: turn.question }];
}

const textOf = (answer) => answer?.choices[answer.shown]?.text;

async function answer(turn, lane) {
  const numbers = sampling();
  if (!numbers) return;
  const body = {
    model: model.id,
    messages: messagesFor(lane, turn),
    attributes: { ...lane.values },
    ...numbers,
    ...(model.scores && { scores: true }),
  };
  const own = { lane, body, asked: body.attributes, choices: [], shown: 0, state: "running" };
  own.unsaid = "";
  const abort = new AbortController();
  turn.answers[lane.index] = own;
  running.add(abort);
  showTurn(turn);
  showRunning();
  try {
    const response = await request("v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ ...body, stream: true }),
      signal: abort.signal,
    });
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      if (event.attributes) own.asked = event.attributes;
      for (const choice of event.choices ?? []) take(own, choice);
    }
    own.state = "done";
  } catch (error) {
    own.state = abort.signal.aborted ? "stopped" : "failed";
    own.problem = error.message;
  } finally {
    running.delete(abort);
    abort.abort(); // after an error in the middle, what is left of the stream isn't wanted
  }
  read(own, /[^]+/);
  showAnswer(own);
  showRunning();
}

function take(own, { index = 0, delta, finish_reason, scores }) {
  const choice = (own.choices[index] ??= { text: "" });
  const added = delta?.content ?? "";
  choice.text += added;
  if (finish_reason) choice.finish = finish_reason;
  if (scores) choice.scores = scores;
  if (index === own.shown && added) {
    following(() => own.text.append(added));
    own.unsaid += added;
    // Of two answers each is read as a whole: their sentences would mix.
    if (!comparing()) read(own, /[^]*[.!?\n](?=\s)/);
  }
}

/** Has screen readers say what of the unsaid text matches: whole sentences, not every token. */
function read(own, pattern) {
  const text = own.unsaid.match(pattern)?.[0] ?? "";
  own.unsaid = own.unsaid.slice(text.length);
  if (!text.trim()) return;
  const whose = comparing() ? `${LETTERS[own.lane.index]}: ` : "";
  $("spoken").append(element("p", {}, whose + text));
}

// --- the conversation

/** Does something to the conversation, and keeps its end in sight where it was. */
function following(change) {
  const log = $("turns");
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  change();
  if (atEnd) log.scrollTop = log.scrollHeight;
}

function showTurn(turn) {
  const last = turn === turns.at(-1);
  const edit = button("Edit", startEditing, {
    class: "quiet edit",
    "aria-label": "Edit this question",
  });
  const question = element("div", { class: "question" }, element("h2", { class: "hidden" }, "You"));
  question.append(element("p", {}, turn.question));
  if (last) question.append(edit);
  const answers = element("div", { class: "answers" });
  for (const lane of activeLanes()) {
    const own = turn.answers[lane.index];
    if (own) {
      own.node ??= element("section", { class: `answer lane-${lane.index}` });
      answers.append(own.node);
    } else if (last && !running.size) {
      answers.append(
        element(
          "section",
          { class: `answer empty lane-${lane.index}` },
          button(`Answer with ${LETTERS[lane.index]}`, () => answer(turn, lane)),
        ),
      );
    }
  }
  turn.node ??= element("article", { class: "turn" });
  following(() => {
    turn.node.replaceChildren(question, answers);
    if (!turn.node.isConnected) $("turns").append(turn.node);
    for (const own of turn.answers) if (own) showAnswer(own);
  });
}

function showAnswer(own) {
  const { node, lane, state } = own;
  const choice = own.choices[own.shown];
  const letter = comparing() ? LETTERS[lane.index] : "Answer";
  const heading = element("h3", { class: comparing() ? "letter" : "hidden" }, letter);
  own.text = element("div", { class: "text" }, choice?.text ?? "");
  const parts = [heading, own.text];
  if (state === "running") parts.push(element("span", { class: "caret", "aria-hidden": "true" }));
  const note = noteOf(own, choice);
  if (note) parts.push(element("p", { class: "note" }, note));
  if (state === "failed")
    parts.push(element("p", { class: "problem", role: "alert" }, own.problem));
  if (state !== "running") {
    if (own.choices.length > 1) parts.push(pager(own));
    parts.push(choice?.scores ? scoreBars(own.asked, choice.scores) : askedLine(own.asked));
    parts.push(actions(own));
  }
  following(() => node.replaceChildren(...parts));
}

function noteOf({ state, body }, choice) {
  if (state === "running")
    return body.best_of ? `Writing ${body.best_of} answers, to show the nearest.` : "";
  if (state === "stopped") return "Stopped.";
  if (choice?.finish === "length") return "Cut off: it reached the most tokens that it may have.";
  if (state === "done" && !choice?.text) return "The answer is empty.";
  return "";
}

const askedLine = (asked) => element("p", { class: "asked-line" }, labelOf(asked));

/** Of best_of answers: which one is shown, and goes into the conversation. */
function pager(own) {
  const show = (step) => () => {
    own.shown = (own.shown + step + own.choices.length) % own.choices.length;
    showAnswer(own);
    own.node.querySelectorAll(".pager button")[step < 0 ? 0 : 1].focus();
  };
  return element(
    "div",
    { class: "pager", role: "group", "aria-label": "Candidates, the nearest to the request first" },
    button("‹", show(-1), { "aria-label": "Previous candidate" }),
    element("span", {}, `${own.shown + 1} of ${own.choices.length}`),
    button("›", show(1), { "aria-label": "Next candidate" }),
  );
}

function scoreBars(asked, obtained) {
  const list = element("ul", { class: "bars" });
  const distances = [];
  for (const [name, score] of Object.entries(obtained)) {
    const attribute = model.attributes.find((each) => each.name === name);
    list.append(bar(name, attribute, asked[name], score));
    if (attribute && name in asked)
      distances.push(Math.abs(score - asked[name]) * errorScale(attribute));
  }
  const off = distances.length ? ` ${mean(distances).toFixed(1)} off on average` : "";
  return element(
    "div",
    { class: "scores" },
    element("p", {}, element("strong", {}, "Obtained"), off),
    list,
  );
}

const mean = (numbers) => numbers.reduce((sum, each) => sum + each, 0) / numbers.length;

/** Errors weigh by their share of the range, as the server counts them for best_of. */
const errorScale = ({ min, max }) =>
  mean(model.attributes.map((each) => each.max - each.min)) / (max - min);

/** A score; without a track where the model has no such attribute, and its range isn't known. */
function bar(name, attribute, asked, obtained) {
  const track = element("span", { class: attribute ? "track" : "", "aria-hidden": "true" });
  if (attribute) {
    const fill = element("i", { class: "fill" });
    fill.style.width = `${100 * share(obtained, attribute)}%`;
    track.append(fill);
  }
  const value = element("span", { class: "value" }, element("b", {}, obtained.toFixed(1)));
  if (attribute && asked !== undefined) {
    const mark = element("i", { class: "mark" });
    mark.style.left = `${100 * share(asked, attribute)}%`;
    track.append(mark);
    value.append(element("small", {}, ` asked ${asked}`));
  }
  return element("li", {}, element("span", { class: "name" }, name), " ", track, value);
}

function actions(own) {
  const turn = turns.find((each) => each.answers.includes(own));
  const row = element("div", { class: "actions" });
  if (turn === turns.at(-1)) {
    row.append(
      button(own.state === "failed" ? "Try again" : "Regenerate", () => answer(turn, own.lane)),
    );
  }
  if (textOf(own)) row.append(button("Copy", () => copy(textOf(own), "the answer")));
  row.append(
    button("curl", () => copy(asCurl(own.body), "the request as curl"), {
      "aria-label": "Copy as curl",
    }),
  );
  row.append(
    button("Python", () => copy(asPython(own.body), "the request as Python"), {
      "aria-label": "Copy as Python",
    }),
  );
  return row;
}

function showRunning() {
  const busy = running.size > 0;
  $("send").hidden = busy;
  $("stop").hidden = !busy;
  document.body.classList.toggle("running", busy);
  if (!busy && turns.length) showTurn(turns.at(-1));
  // The button that was pressed may have gone: the answer is the next thing to reach.
  if (document.activeElement === document.body) $("turns").focus({ preventScroll: true });
}

function ask(question) {
  if (running.size || !question.trim() || !sampling()) return;
  if (editing) turns.pop().node.remove();
  stopEditing();
  $("welcome").hidden = true;
  const before = turns.at(-1);
  const turn = { question, answers: [] };
  turns.push(turn);
  $("spoken").replaceChildren();
  if (before) showTurn(before);
  for (const lane of activeLanes()) answer(turn, lane);
  $("turns").scrollTop = $("turns").scrollHeight;
}

function startEditing() {
  if (running.size || !turns.length) return;
  editing = true;
  $("editing").hidden = false;
  setQuestion(turns.at(-1).question);
  $("question").focus();
}

function stopEditing() {
  editing = false;
  $("editing").hidden = true;
  setQuestion("");
}

function setQuestion(text) {
  $("question").value = text;
  fit();
}

/** As many lines as the question has; the stylesheet says how many at most. */
function fit() {
  const box = $("question");
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight}px`;
}

function stop() {
  for (const abort of running) abort.abort();
}

function newChat() {
  stop();
  for (const turn of turns) turn.node.remove();
  turns = [];
  stopEditing();
  $("welcome").hidden = false;
  $("question").focus();
}

// --- the request for other tools

const baseUrl = () => new URL("v1", document.baseURI).href;
const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

function asCurl(body) {
  const lines = [
    `curl ${quoted(`${baseUrl()}/chat/completions`)}`,
    `-H 'Content-Type: application/json'`,
  ];
  if (readStored(session, API_KEY)) lines.push(`-H "Authorization: Bearer $${KEY_VARIABLE}"`);
  lines.push(`-d ${quoted(JSON.stringify(body, null, 2))}`);
  return `${lines.join(" \\\n  ")}\n`;
}

function python(value) {
  if (value === true) return "True";
  if (value === false) return "False";
  if (value === null) return "None";
  if (Array.isArray(value)) return `[${value.map(python).join(", ")}]`;
  if (typeof value !== "object") return JSON.stringify(value);
  const pairs = Object.entries(value).map(
    ([key, each]) => `${JSON.stringify(key)}: ${python(each)}`,
  );
  return `{${pairs.join(", ")}}`;
}

function asPython({ model: name, messages, attributes, scores, best_of, ...numbers }) {
  const extra = { attributes, ...(scores && { scores }), ...(best_of && { best_of }) };
  const key = readStored(session, API_KEY) ? `os.environ["${KEY_VARIABLE}"]` : `"none"`;
  return [
    ...(readStored(session, API_KEY) ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${python(baseUrl())}, api_key=${key})`,
    "answer = client.chat.completions.create(",
    `    model=${python(name)},`,
    "    messages=[",
    ...messages.map((message) => `        ${python(message)},`),
    "    ],",
    ...Object.entries(numbers).map(([key, value]) => `    ${key}=${python(value)},`),
    `    extra_body=${python(extra)},`,
    ")",
    "print(answer.choices[0].message.content)",
    ...(scores ? ["print(answer.choices[0].scores)"] : []),
    "",
  ].join("\n");
}

async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Pages that don't come by https, or from this machine, have no clipboard of their own.
    const focused = document.activeElement;
    const box = element("textarea", { class: "hidden" }, text);
    document.body.append(box);
    box.select();
    const copied = document.execCommand("copy");
    box.remove();
    focused?.focus();
    if (!copied) return say("This browser doesn't let the page copy.");
  }
  toast(`Copied ${what}.`);
}

let toastTimer;

function toast(text) {
  say(text);
  $("status").classList.add("toast");
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => {
    $("status").classList.remove("toast");
    say("");
  }, 2000);
}

// --- start

const wide = matchMedia("(min-width: 900px)");

/** Beside the conversation, or lines above it of which one at a time is open. */
function place() {
  const [first] = document.querySelectorAll(".side");
  if (wide.matches) first.append($("shared"));
  else document.querySelector("main").before($("shared"));
  for (const panel of document.querySelectorAll(".panel")) {
    panel.open = wide.matches;
    if (wide.matches) panel.removeAttribute("name");
    else panel.setAttribute("name", "panel");
  }
}

function listen() {
  wide.addEventListener("change", place);
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    ask($("question").value);
  });
  $("question").addEventListener("input", fit);
  $("question").addEventListener("keydown", (event) => {
    if (event.isComposing) return; // Enter then chooses a word of an input method
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      ask($("question").value);
    } else if (event.key === "ArrowUp" && !$("question").value) {
      event.preventDefault();
      startEditing();
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    if (running.size) stop();
    else if (editing) stopEditing();
  });
  $("stop").addEventListener("click", () => {
    stop();
    $("question").focus();
  });
  $("cancel-edit").addEventListener("click", () => {
    stopEditing();
    $("question").focus();
  });
  $("new-chat").addEventListener("click", newChat);
  $("compare").addEventListener("click", () => compare(!comparing()));
  for (const input of $("shared").querySelectorAll("input"))
    input.addEventListener("input", showSampling);
}

async function load() {
  const examples = $("examples");
  try {
    [model] = (await (await request("v1/models")).json()).data;
  } catch (error) {
    const again = button("Try again", load);
    examples.replaceChildren(
      element("p", { class: "problem", role: "alert" }, error.message),
      again,
    );
    return;
  }
  document.title = `${model.id} · steerlm2`;
  $("model").textContent = model.id;
  $("system").value = model.system ?? "";
  $("max_tokens").max = model.max_model_len;
  $("best-of-field").hidden = !model.scores;
  $("best_of").max = model.max_n;
  lanes = LETTERS.map((_, index) => makeLane(index));
  place();
  showSampling();
  examples.replaceChildren(...EXAMPLES.map((text) => button(text, () => ask(text))));
  for (const id of ["compare", "new-chat", "question", "send"]) $(id).disabled = false;
  if (wide.matches) $("question").focus(); // a phone's keyboard would cover half of the page
}

listen();
load();
