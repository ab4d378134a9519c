// The page: asks the server about an image, and joins the image, the list of objects and the tokens.

import { Clicks } from "./clicks.js";
import { element, find, withProperty } from "./dom.js";
import { Finder } from "./find.js";
import { Search } from "./search.js";
import { Sequences } from "./sequences.js";
import { describeError, getJson } from "./server.js";
import { Stage } from "./stage.js";

const stage = new Stage(find("#stage"));
const sequences = new Sequences(find("#tokens"), find("#token"));
const threshold = find("#threshold input");
const about = find("#about input");

const model = await getJson("/tasks");
const categories = new Map(model.categories.map((category) => [category.id, category]));
const askable = model.tasks.filter((task) => !task.takes_clicks); // others have their own way
const clicked = model.tasks.find((task) => task.takes_clicks);
const clicks = clicked && new Clicks(stage, clicked.name, say);
const finder = (model.finds.like || model.finds.words) && new Finder(stage, model.finds, say);
const modes = { tasks: askable.length > 0, clicks: Boolean(clicked), find: Boolean(finder) };
const state = { image: null, name: "", answer: null, task: null, request: null };

// Asking

async function open(blob, name) {
  Object.assign(state, { image: blob, name, answer: null });
  showAnswer();
  say("");
  await stage.open(blob);
  clicks?.open(blob, name);
  if (finder) finder.open(blob, name);
  if (mode() === "tasks") await ask();
}

function mode() {
  return document.body.dataset.mode;
}

// Shows the answers of tasks, or what clicks, examples or words find.
function setMode(name) {
  document.body.dataset.mode = name;
  clicks?.setActive(name === "clicks");
  state.request?.abort();
  find("#stage").classList.remove("asking");
  stage.clear();
  if (finder) finder.setActive(name === "find");
  if (name !== "tasks") return;
  if (state.answer) showAnswer();
  else ask();
}

// Asks the chosen tasks about the image; an earlier request that is still open is given up.
async function ask() {
  state.request?.abort();
  const tasks = chosenTasks();
  if (!state.image) return;
  if (!tasks.length) {
    state.answer = null;
    find("#stage").classList.remove("asking");
    say("Choose a task.");
    return showAnswer();
  }
  const form = new FormData();
  form.append("image", state.image, state.name);
  form.append("tasks", tasks.join(","));
  form.append("sequences", "true");
  form.append("drawings", "true");
  if (about.value.trim() && !find("#about").hidden) form.append("about", about.value);
  const request = new AbortController();
  state.request = request;
  find("#stage").classList.add("asking");
  say(`Asking ${tasks.join(", ")} …`);
  const started = performance.now();
  try {
    state.answer = await getJson("/predict", { method: "POST", body: form, signal: request.signal });
    say(`${state.name}, ${state.answer.width} x ${state.answer.height} pixels, answered in ${seconds(started)} s`);
  } catch (error) {
    if (error.name === "AbortError") return;
    state.answer = null;
    say(describeError(error), true);
  }
  find("#stage").classList.remove("asking");
  showAnswer();
}

function seconds(started) {
  return ((performance.now() - started) / 1000).toFixed(1);
}

function say(text, isError = false) {
  find("#status").textContent = text;
  find("#status").classList.toggle("error", isError);
}

function chosenTasks() {
  return [...find("#tasks").querySelectorAll("input:checked")].map((input) => input.name);
}

// Showing

function showAnswer() {
  const { answer } = state;
  const answers = namedAnswers(answer);
  stage.clear();
  if (answer) stage.draw(answer, categories);
  find("#captions").replaceChildren(...entriesWith(answer, "text").map(([id, entry]) => element("li", { "data-answer": id }, entry.text)));
  find("#objects").replaceChildren(
    ...[...answers].filter(([, each]) => each.isObject).map(([id, each]) => {
      const score = each.score === undefined ? "" : each.score.toFixed(2);
      const item = element("li", { "data-answer": id, "data-score": each.score, tabindex: 0 }, `${each.category} `, element("small", {}, score));
      return withProperty(item, "--color", each.color);
    }),
  );
  showOthers(answer);
  showTabs(answer, answers);
  applyThreshold();
  showDownload(answer);
}

// Returns the entries of an answer that have a key, as [id, entry].
function entriesWith(answer, key) {
  const lists = Object.entries(answer ?? {}).filter(([name, value]) => name !== "sequences" && Array.isArray(value));
  return lists.flatMap(([name, entries]) => entries.map((entry, i) => [`${name}/${i}`, entry])).filter(([, entry]) => entry?.[key] !== undefined);
}

// Returns what is shown of each answer by id: its name, score and colour.
function namedAnswers(answer) {
  const objects = entriesWith(answer, "bbox").map(([id, { category, category_id, score }]) => {
    const color = categories.get(category_id)?.color;
    return [id, { name: `${category} ${score?.toFixed(2) ?? ""}`.trim(), category, score, color, isObject: true }];
  });
  return new Map([...objects, ...entriesWith(answer, "text").map(([id]) => [id, { name: "" }])]);
}

// Shows answers that are neither objects nor sentences as their task draws them, and as JSON.
function showOthers(answer) {
  const known = new Set([...entriesWith(answer, "bbox"), ...entriesWith(answer, "text")].map(([id]) => id.split("/")[0]));
  const others = Object.entries(answer ?? {}).filter(
    ([name, value]) => Array.isArray(value) && value.length && name !== "sequences" && !known.has(name),
  );
  find("#others").replaceChildren(
    ...others.map(([name, value]) => {
      const drawing = answer.drawings?.[name];
      const image = drawing ? [element("img", { src: drawing, alt: `answers of ${name}` })] : [];
      return element("details", { open: true }, element("summary", {}, name), ...image, element("pre", {}, JSON.stringify(value, null, 1)));
    }),
  );
}

function showTabs(answer, answers) {
  const said = new Set((answer?.sequences ?? []).map((sequence) => sequence.task));
  const tasks = model.tasks.map((task) => task.name).filter((name) => said.has(name));
  if (!tasks.includes(state.task)) state.task = tasks[0] ?? null;
  const choose = (task) => {
    state.task = task;
    for (const tab of find("#tabs").children) tab.setAttribute("aria-selected", tab.textContent === task);
    const shown = (answer?.sequences ?? []).filter((sequence) => sequence.task === task);
    sequences.show(shown, { answers, numBins: model.num_bins, withIds: find("#ids").checked });
    sequences.setThreshold(Number(threshold.value));
  };
  find("#tabs").replaceChildren(
    ...tasks.map((task) => {
      const tab = element("button", { type: "button", role: "tab" }, task);
      tab.addEventListener("click", () => choose(task));
      return tab;
    }),
  );
  find("#ids").onchange = () => choose(state.task);
  find("#play").disabled = !tasks.length;
  choose(state.task);
}

function applyThreshold() {
  const least = Number(threshold.value);
  find("#threshold output").textContent = least.toFixed(2);
  stage.setThreshold(least);
  sequences.setThreshold(least);
  const items = [...find("#objects").children];
  for (const item of items) item.classList.toggle("off", Number(item.dataset.score) < least);
  const shown = items.filter((item) => !item.classList.contains("off")).length;
  find("#count").textContent = state.answer ? `${shown} of ${items.length} objects` : "";
}

function showDownload(answer) {
  const link = find("#download");
  URL.revokeObjectURL(link.href);
  link.hidden = !answer;
  if (!answer) return;
  const { sequences: _, drawings: __, ...content } = answer;
  link.href = URL.createObjectURL(new Blob([JSON.stringify(content, null, 2)], { type: "application/json" }));
  link.download = `${state.name.replace(/\.[^.]*$/, "")}.json`;
}

// Pointing at an answer, wherever it is shown, marks it everywhere.
function focus(id, { scroll = false } = {}) {
  stage.focus(id);
  sequences.focus(id, { scroll });
  for (const item of document.querySelectorAll("#objects li, #captions li")) {
    item.classList.toggle("hot", id !== null && item.dataset.answer === id);
  }
}

sequences.addEventListener("answer", ({ detail }) => focus(detail));
sequences.addEventListener("token", ({ detail }) => stage.cue(detail));
for (const place of ["#stage", "#objects", "#captions"].map(find)) {
  for (const name of ["pointerover", "focusin"]) {
    place.addEventListener(name, ({ target }) => focus(target.closest("[data-answer]")?.dataset.answer ?? null, { scroll: true }));
  }
  for (const name of ["pointerleave", "focusout"]) place.addEventListener(name, () => focus(null));
}

// Controls

function addTasks() {
  for (const task of askable) {
    const input = element("input", { type: "checkbox", name: task.name, checked: !task.needs_about });
    find("#tasks").append(element("label", {}, input, ` ${task.name}`));
  }
  const showAbout = () => {
    const asked = model.tasks.find((task) => task.about_format && chosenTasks().includes(task.name));
    find("#about").hidden = !asked;
    find("#about small").textContent = asked ? asked.about_format : "";
  };
  find("#tasks").addEventListener("change", () => (showAbout(), ask()));
  showAbout();
}

async function addExamples() {
  for (const { name, url } of await getJson("/examples")) {
    const button = element("button", { type: "button", title: name }, element("img", { src: url, alt: name }));
    button.addEventListener("click", async () => {
      press(button);
      open(await (await fetch(url)).blob(), `${name}.jpg`);
    });
    find("#examples").append(button);
  }
  find("#examples button")?.click();
}

function press(button) {
  for (const each of find("#examples").children) each.setAttribute("aria-pressed", each === button);
}

function openFile(file) {
  if (file) openNamed(file, file.name || "image");
}

function openNamed(blob, name) {
  press(null);
  return open(blob, name);
}

find("#controls").addEventListener("submit", (event) => event.preventDefault());
find("#file").addEventListener("change", ({ target }) => openFile(target.files[0]));
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => (event.preventDefault(), openFile(event.dataTransfer.files[0])));
document.addEventListener("paste", (event) => openFile(event.clipboardData.files[0]));
about.addEventListener("change", ask);
threshold.addEventListener("input", applyThreshold);
find("#layers").addEventListener("change", ({ target }) => {
  stage.show(target.name, target.checked);
  if (target.name === "captions") find("#captions").classList.toggle("off", !target.checked);
});
find("#play").addEventListener("click", ({ target }) => {
  if (target.textContent === "Stop") return sequences.stop();
  target.textContent = "Stop";
  sequences.play(() => (target.textContent = "Play"));
});

addTasks();
if (model.index) new Search(model.index, { open: openNamed, shown: () => state });
const possible = Object.keys(modes).filter((name) => modes[name]);
find("#mode").hidden = possible.length < 2;
for (const input of find("#mode").querySelectorAll("input")) {
  input.parentElement.hidden = !modes[input.value];
  input.checked = input.value === (possible[0] ?? "tasks");
}
find("#mode").addEventListener("change", ({ target }) => setMode(target.value));
setMode(possible[0] ?? "tasks");
await addExamples();
document.body.dataset.ready = "";
