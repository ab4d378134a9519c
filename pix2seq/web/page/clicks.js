// Clicks on objects of any class: each asks the server for masks. Masks can be edited, kept and exported.
//
// A state is never changed: every action pushes a new one, and undo goes back to the one before. The server keeps
// nothing of it but the encoded image.

import { element, find, shape, withProperty } from "./dom.js";
import { askAbout, KeptImage } from "./kept.js";
import { deletePoint, insertPoint, movePoint, ringsOf, toCoco } from "./masks.js";
import { describeError } from "./server.js";

const UNASKED = { points: [], labels: [], candidates: [], chosen: 0 };
const START = { ...UNASKED, objects: [] };
const [POINT, MIDPOINT, CLICK] = [4.5, 3, 6]; // radii in pixels of the screen
const COLOR = "#ff2d87"; // of the mask that is being clicked; kept ones have others

export class Clicks {
  constructor(stage, task, say) {
    Object.assign(this, { stage, task, say, active: false, numOpen: 0 });
    this.layer = shape("g", { "data-layer": "clicks" });
    stage.svg.append(this.layer);
    this.open(null, "");
    this.listen();
  }

  // Starts anew on an image file.
  open(blob, name) {
    Object.assign(this, { blob, name, kept: new KeptImage(blob, name), states: [START], pending: [], drag: null, editing: false });
    this.queue = Promise.resolve();
    this.show();
  }

  get now() {
    return this.states.at(-1);
  }

  get mask() {
    return this.now.candidates[this.now.chosen] ?? null;
  }

  // All masks that are exported: those that are kept, and the one that is being clicked.
  get masks() {
    return this.mask ? [...this.now.objects, this.mask] : this.now.objects;
  }

  // Actions, one after another: a click builds on the answer to the one before.

  act(action) {
    const { blob } = this;
    if (!blob) return;
    this.setBusy(+1);
    this.queue = this.queue.then(async () => {
      if (blob !== this.blob) return; // another image was opened
      const started = performance.now();
      try {
        const changes = await action(this.now);
        if (blob !== this.blob || !changes) return;
        this.states.push({ ...this.now, ...changes });
        this.say(`${this.name}, ${this.stage.size.join(" x ")} pixels, ${Math.round(performance.now() - started)} ms`);
      } catch (error) {
        if (blob === this.blob) this.say(describeError(error), true);
      }
    });
    this.queue = this.queue.then(() => {
      this.setBusy(-1);
      if (blob === this.blob) this.show();
    });
  }

  setBusy(change) {
    this.numOpen += change;
    find("#clicks").setAttribute("aria-busy", this.numOpen > 0);
  }

  add(point, positive) {
    const { pending } = this;
    pending.push([point, positive]);
    this.draw();
    this.act(async ({ points, labels }) => {
      const asked = { points: [...points, point], labels: [...labels, positive] };
      try {
        const candidates = await this.ask({ ...asked, previous: this.mask?.segmentation ?? [] });
        return { ...asked, candidates, chosen: 0 };
      } finally {
        pending.shift();
      }
    });
  }

  everything() {
    this.say("Looking for all objects …");
    this.act(async () => ({ ...UNASKED, objects: await this.ask({}) }));
  }

  choose(number) {
    this.act(({ candidates }) => candidates[number] && { chosen: number });
  }

  // Keeps the mask, and begins another object.
  keep() {
    this.act(() => this.mask && { ...UNASKED, objects: this.masks });
  }

  // Goes on with a kept mask; the one that was being clicked is kept.
  take(number) {
    this.act(({ objects }) => ({ ...UNASKED, candidates: [objects[number]], objects: this.masks.toSpliced(number, 1) }));
  }

  replace(mask) {
    this.act(({ candidates, chosen }) => ({ candidates: candidates.with(chosen, mask) }));
  }

  deletePoint(place) {
    const left = deletePoint(this.mask, place);
    if (left) this.replace(left);
    else this.reset();
  }

  reset() {
    this.act(() => (this.now.points.length || this.mask) && UNASKED);
  }

  undo() {
    this.act(() => void (this.states.length > 1 && this.states.pop()));
  }

  async ask(question) {
    const { kept } = this;
    const { masks } = await askAbout("/clicks", [kept], (image) => ({ image, task: this.task, ...question }));
    if (kept === this.kept) this.stage.setSize(...kept.size); // of an image that this browser cannot show
    return masks;
  }

  // Showing

  setActive(active) {
    this.active = active;
    this.show();
  }

  setEditing(editing) {
    this.editing = editing;
    this.show();
  }

  show() {
    this.draw();
    const { candidates, chosen, objects, points } = this.now;
    const item = (mask, color, press, name) => {
      const score = mask.score === undefined ? "edited" : mask.score.toFixed(2);
      const button = withProperty(element("button", { type: "button" }, `${name} `, element("small", {}, score)), "--color", color);
      button.addEventListener("click", press);
      return button;
    };
    find("#candidates").replaceChildren(
      ...candidates.map((mask, i) => {
        const button = item(mask, COLOR, () => this.choose(i), String(i + 1));
        button.setAttribute("aria-pressed", i === chosen);
        for (const name of ["pointerenter", "focus"]) button.addEventListener(name, () => this.draw({ shown: mask }));
        for (const name of ["pointerleave", "blur"]) button.addEventListener(name, () => this.draw());
        return button;
      }),
    );
    find("#kept").replaceChildren(...objects.map((mask, i) => item(mask, colorOf(i), () => this.take(i), `object ${i + 1}`)));
    find("#undo").disabled = this.states.length === 1;
    find("#reset").disabled = !points.length && !this.mask;
    find("#keep").disabled = find("#edit").disabled = !this.mask;
    find("#edit").setAttribute("aria-pressed", this.editing);
    find("#everything").disabled = !this.blob;
    this.offer("#save-json", ".json", () => {
      const [width, height] = this.stage.size;
      return { image: this.name, width, height, [this.task]: this.masks };
    });
    this.offer("#save-coco", ".coco.json", () => {
      const [width, height] = this.stage.size;
      return toCoco(this.masks, { name: this.name, width, height });
    });
  }

  // Makes a link a download of the masks.
  offer(selector, suffix, content) {
    const link = find(selector);
    URL.revokeObjectURL(link.href);
    link.hidden = !this.masks.length;
    if (link.hidden) return;
    link.href = URL.createObjectURL(new Blob([JSON.stringify(content(), null, 2)], { type: "application/json" }));
    link.download = this.name.replace(/\.[^.]*$/, "") + suffix;
  }

  // Draws all masks and clicks; `shown` in place of the mask that is being clicked.
  draw({ shown = this.drag?.mask ?? this.mask } = {}) {
    const outline = (mask, color, name) => {
      const d = ringsOf(mask).map((ring) => `M${ring.flat().join(" ")}Z`).join("");
      return shape("path", { class: `mask ${name}`, d, fill: color, stroke: color });
    };
    const { points, labels, objects } = this.now;
    const clicks = [...points.map((point, i) => [point, labels[i]]), ...this.pending];
    this.layer.replaceChildren(
      ...objects.map((mask, i) => outline(mask, colorOf(i), "object")),
      ...(shown ? [outline(shown, COLOR, "chosen")] : []),
      ...clicks.flatMap(([[cx, cy], positive]) => {
        const sign = positive ? "positive" : "negative";
        return [
          shape("circle", { class: `click ${sign}`, cx, cy, "data-radius": CLICK }),
          shape("text", { class: "sign", x: cx, y: cy }, positive ? "+" : "−"),
        ];
      }),
      ...(shown && this.editing ? handles(shown) : []),
    );
    this.layer.classList.toggle("off", !this.active);
    this.stage.svg.classList.toggle("editing", this.editing);
    this.stage.resize();
  }

  // Listening

  listen() {
    const { svg } = this.stage;
    svg.addEventListener("pointerdown", (event) => this.grab(event));
    svg.addEventListener("pointermove", (event) => this.drag && this.pull(event));
    svg.addEventListener("pointerup", () => this.drop());
    svg.addEventListener("pointercancel", () => this.drop({ cancelled: true }));
    svg.addEventListener("click", (event) => this.press(event, !event.altKey));
    svg.addEventListener("contextmenu", (event) => this.press(event, false));
    svg.addEventListener("dblclick", ({ target }) => this.active && this.editing && isPoint(target) && this.deletePoint(placeOf(target)));
    document.addEventListener("keydown", (event) => this.key(event));
    const buttons = { undo: "undo", reset: "reset", everything: "everything", keep: "keep" };
    for (const [id, action] of Object.entries(buttons)) find(`#${id}`).addEventListener("click", () => this[action]());
    find("#edit").addEventListener("click", () => this.setEditing(!this.editing));
  }

  // A click on the image, or while editing on a point that is to go.
  press(event, positive) {
    if (!this.active || !this.blob) return;
    event.preventDefault();
    if (!this.editing) this.add(this.stage.at(event), positive);
    else if (!positive && isPoint(event.target)) this.deletePoint(placeOf(event.target));
  }

  grab(event) {
    const isHandle = event.target.matches(".handle");
    if (!this.active || !this.editing || !this.mask || !isHandle || event.button || event.altKey) return;
    event.preventDefault();
    const place = placeOf(event.target);
    const inserts = !isPoint(event.target);
    this.drag = { inserts, place, before: this.mask, mask: this.mask, moved: false };
  }

  pull(event) {
    const { before, inserts, moved, place } = this.drag;
    if (!moved) this.stage.svg.setPointerCapture(event.pointerId); // not before, or a double click would miss the point
    this.drag.mask = (inserts ? insertPoint : movePoint)(before, place, this.stage.at(event));
    this.drag.moved = true;
    this.draw();
  }

  drop({ cancelled = false } = {}) {
    const { drag } = this;
    this.drag = null;
    if (drag?.moved && !cancelled) this.replace(drag.mask);
  }

  key(event) {
    if (!this.active || event.target.matches("input[type=text]")) return;
    const isControl = event.target.matches("button, a, input");
    if (event.key.toLowerCase() === "z") this.undo();
    else if (event.ctrlKey || event.metaKey || event.altKey) return;
    else if (event.key === "Escape") this.reset();
    else if (/^[1-9]$/.test(event.key)) this.choose(Number(event.key) - 1);
    else if (event.key === "e") this.setEditing(!this.editing);
    else if (event.key === "Enter" && !isControl) this.keep();
    else return;
    event.preventDefault();
  }
}

// Returns a handle on each point of a mask, and one between each two for a new point.
function handles(mask) {
  return ringsOf(mask).flatMap((points, ring) => {
    const handle = (name, index, [cx, cy], radius) =>
      shape("circle", { class: `handle ${name}`, cx, cy, "data-radius": radius, "data-ring": ring, "data-index": index });
    const between = points.map(([x, y], i) => {
      const [nextX, nextY] = points[(i + 1) % points.length];
      return handle("between", i, [(x + nextX) / 2, (y + nextY) / 2], MIDPOINT);
    });
    return [...between, ...points.map((point, i) => handle("point", i, point, POINT))];
  });
}

function isPoint(node) {
  return node.matches(".handle.point");
}

function placeOf(node) {
  return { ring: Number(node.dataset.ring), index: Number(node.dataset.index) };
}

function colorOf(number) {
  const angle = (number * 137.5 + 110) % 360; // the golden angle, so that neighbours differ
  return `hsl(${angle * 0.78} 85% 58%)`; // no pink, which is `COLOR`
}
