// Finding objects: those like the ones in boxes that are drawn in another image, or those that words name.
//
// The example image stays while other images are opened, so that one box finds its like in all of them.

import { element, find, shape } from "./dom.js";
import { askAbout, KeptImage } from "./kept.js";
import { describeError } from "./server.js";
import { Stage } from "./stage.js";

const SMALLEST = 3; // pixels of the screen; shorter drags draw no box
const NO_COLOURS = new Map(); // what is found has no class of the model

export class Finder {
  constructor(stage, can, say) {
    Object.assign(this, { stage, say, active: false, image: null, example: null, boxes: [], answer: null, turn: 0 });
    this.reference = new Stage(find("#reference"));
    this.layer = shape("g", { "data-layer": "examples" });
    this.reference.svg.append(this.layer);
    this.words = find("#by-words input");
    find("#by-words").hidden = !can.words;
    find("#by-boxes").hidden = !can.like;
    this.listen();
  }

  // Looks in another image. The first one is also the example.
  async open(blob, name) {
    this.image = new KeptImage(blob, name);
    this.answer = null;
    if (!this.example) await this.setExample(this.image);
    this.ask();
  }

  async setExample(image) {
    this.example = image;
    this.boxes = [];
    await this.reference.open(image.blob);
    this.draw();
  }

  setActive(active) {
    this.active = active;
    if (!active) return;
    if (this.answer) this.show();
    else this.ask();
  }

  // Asks for what is drawn or written; the answer to an earlier question that is still open is not shown.
  async ask() {
    const { image, example, boxes } = this;
    const words = this.words.value.trim();
    const turn = ++this.turn;
    this.answer = null;
    this.show();
    if (!this.active || !image || !(boxes.length || words)) return;
    const images = words ? [image] : [image, example];
    const make = (id, other) => ({ image: id, ...(words ? { words } : { like: boxes.map((box) => ({ image: other, box })) }) });
    this.say(`Looking in ${image.name} …`);
    const started = performance.now();
    try {
      const answer = await askAbout("/find", images, make);
      if (turn !== this.turn) return;
      this.answer = answer;
      const count = answer.instances.length;
      this.say(`${image.name}, ${count} ${count === 1 ? "object" : "objects"} found in ${Math.round(performance.now() - started)} ms`);
    } catch (error) {
      if (turn === this.turn) this.say(describeError(error), true);
    }
    if (turn === this.turn) this.show();
  }

  // Showing

  show() {
    if (!this.active) return;
    this.stage.clear();
    if (this.answer) this.stage.draw(this.answer, NO_COLOURS);
    const found = this.answer?.instances ?? [];
    find("#found").replaceChildren(
      ...found.map(({ category, score }, i) =>
        element("li", { "data-answer": `instances/${i}` }, `${category} `, element("small", {}, score.toFixed(2))),
      ),
    );
  }

  // Draws the boxes of the examples, and the one that is being drawn.
  draw(corners = null) {
    const boxes = corners ? [...this.boxes, toBox(corners)] : this.boxes;
    this.layer.replaceChildren(...boxes.map(([x, y, x1, y1]) => shape("rect", { x, y, width: x1 - x, height: y1 - y })));
  }

  // Listening

  listen() {
    const { svg } = this.reference;
    let drag = null;
    svg.addEventListener("pointerdown", (event) => {
      if (!this.example || event.button) return;
      event.preventDefault();
      svg.setPointerCapture(event.pointerId);
      drag = { start: this.reference.at(event), from: [event.clientX, event.clientY] };
    });
    svg.addEventListener("pointermove", (event) => drag && this.draw([drag.start, this.reference.at(event)]));
    svg.addEventListener("pointerup", (event) => {
      if (!drag) return;
      const { start, from } = drag;
      drag = null;
      const sides = [event.clientX - from[0], event.clientY - from[1]].map(Math.abs);
      if (Math.min(...sides) >= SMALLEST) this.add(toBox([start, this.reference.at(event)]), event.shiftKey);
      else this.draw();
    });
    svg.addEventListener("pointercancel", () => {
      drag = null;
      this.draw();
    });
    this.words.addEventListener("change", () => {
      if (this.words.value.trim()) this.setBoxes([]);
      this.ask();
    });
    find("#example-file").addEventListener("change", async ({ target }) => {
      const [file] = target.files;
      if (!file) return;
      await this.setExample(new KeptImage(file, file.name || "image"));
      this.ask();
    });
    find("#take-shown").addEventListener("click", async () => {
      if (!this.image) return;
      await this.setExample(this.image);
      this.ask();
    });
    find("#clear-boxes").addEventListener("click", () => {
      this.setBoxes([]);
      this.ask();
    });
  }

  add(box, keepsOthers) {
    this.words.value = "";
    this.setBoxes(keepsOthers ? [...this.boxes, box] : [box]);
    this.ask();
  }

  setBoxes(boxes) {
    this.boxes = boxes;
    this.draw();
  }
}

function toBox([[x, y], [otherX, otherY]]) {
  return [Math.min(x, otherX), Math.min(y, otherY), Math.max(x, otherX), Math.max(y, otherY)];
}
