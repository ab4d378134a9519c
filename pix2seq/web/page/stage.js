// The image with the layers of its answers, and the cue of one token. Coordinates are pixels of the image.
//
// Every shape of an answer carries `data-answer`, such as "instances/3", the key and the index of its entry in the JSON.

import { shape } from "./dom.js";
import { rounded } from "./masks.js";

const LAYERS = ["masks", "boxes", "keypoints", "labels", "hits", "cue"];
const JOINT = 3.5; // radius in pixels of the screen

export class Stage {
  constructor(root) {
    this.root = root;
    this.image = root.querySelector("img");
    this.svg = root.querySelector("svg");
    this.layers = Object.fromEntries(LAYERS.map((name) => [name, shape("g", { "data-layer": name })]));
    this.svg.append(...Object.values(this.layers));
    this.size = [1, 1];
    new ResizeObserver(() => this.resize()).observe(root);
  }

  // Shows an image file without answers.
  async open(blob) {
    URL.revokeObjectURL(this.image.src);
    this.clear();
    this.root.classList.remove("empty");
    this.image.src = URL.createObjectURL(blob);
    this.image.hidden = false;
    try {
      await this.image.decode();
      this.setSize(this.image.naturalWidth, this.image.naturalHeight);
    } catch {
      this.image.hidden = true; // a format that this browser cannot show; answers have the size
    }
  }

  clear() {
    for (const layer of Object.values(this.layers)) layer.replaceChildren();
  }

  setSize(width, height) {
    this.size = [width, height];
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.root.style.aspectRatio = `${width} / ${height}`;
    this.root.style.maxWidth = `${(78 * width) / height}vh`;
    this.resize();
  }

  // Returns the place [x, y] of a pointer, in pixels of the image and inside it.
  at({ clientX, clientY }) {
    const { x, y } = new DOMPoint(clientX, clientY).matrixTransform(this.svg.getScreenCTM().inverse());
    return [x, y].map((value, axis) => rounded(Math.min(Math.max(value, 0), this.size[axis])));
  }

  // Keeps text and points at the same size on the screen.
  resize() {
    const unit = this.size[0] / (this.root.clientWidth || 1);
    this.svg.style.setProperty("--unit", unit);
    for (const joint of this.svg.querySelectorAll("[data-radius]")) joint.setAttribute("r", joint.dataset.radius * unit);
  }

  // Draws every entry that has a box, a mask or keypoints; large objects lie below small ones.
  draw(answer, categories) {
    this.clear();
    this.setSize(answer.width, answer.height);
    const objects = [];
    for (const [key, entries] of Object.entries(answer)) {
      if (!Array.isArray(entries)) continue;
      entries.forEach((entry, index) => {
        if (entry?.bbox) objects.push({ entry, id: `${key}/${index}`, category: categories.get(entry.category_id) });
      });
    }
    objects.sort((a, b) => b.entry.bbox[2] * b.entry.bbox[3] - a.entry.bbox[2] * a.entry.bbox[3]);
    for (const object of objects) this.drawObject(object);
    this.resize();
  }

  drawObject({ entry, id, category }) {
    const color = category?.color ?? "#ff2d87";
    const [x, y, width, height] = entry.bbox;
    const answer = { "data-answer": id, "data-score": entry.score };
    const rings = (entry.segmentation ?? []).map((ring) => `M${ring.join(" ")}Z`).join("");
    if (rings) this.layers.masks.append(shape("path", { class: "mask", d: rings, fill: color, stroke: color, ...answer }));
    this.layers.boxes.append(shape("rect", { class: "box", x, y, width, height, stroke: color, ...answer }));
    if (entry.keypoints?.length) this.drawSkeleton(entry.keypoints, category, color, answer);
    const text = entry.score === undefined ? entry.category : `${entry.category} ${entry.score.toFixed(2)}`;
    const label = shape("text", { class: isLight(color) ? "name dark" : "name", stroke: color, ...answer }, text);
    label.setAttribute("x", x);
    label.setAttribute("y", y < this.size[1] / 25 ? y + this.size[1] / 25 : y);
    label.setAttribute("dy", "-0.35em");
    this.layers.labels.append(label);
    this.layers.hits.append(shape("rect", { x, y, width, height, ...answer }));
  }

  drawSkeleton(numbers, category, color, answer) {
    const points = [];
    for (let i = 0; i < numbers.length; i += 3) points.push(numbers.slice(i, i + 3));
    const seen = (point) => point?.[2] > 0;
    for (const [a, b] of category?.skeleton ?? []) {
      if (!seen(points[a]) || !seen(points[b])) continue;
      const [x1, y1] = points[a];
      const [x2, y2] = points[b];
      this.layers.keypoints.append(shape("line", { class: "bone", x1, y1, x2, y2, stroke: color, ...answer }));
    }
    for (const point of points.filter(seen)) {
      const [cx, cy, visibility] = point;
      const look = { class: "joint", stroke: color, fill: visibility < 2 ? color : "#fff" }; // filled: hidden
      this.layers.keypoints.append(shape("circle", { cx, cy, "data-radius": JOINT, ...look, ...answer }));
    }
  }

  show(layer, visible) {
    this.layers[layer]?.classList.toggle("off", !visible);
  }

  setThreshold(threshold) {
    for (const node of this.svg.querySelectorAll("[data-score]")) {
      node.classList.toggle("off", Number(node.dataset.score) < threshold);
    }
  }

  // Dims all answers but one; null shows all of them.
  focus(id) {
    const shown = id !== null && this.svg.querySelector(`[data-answer="${CSS.escape(id)}"]`) !== null;
    this.svg.classList.toggle("focused", shown);
    for (const node of this.svg.querySelectorAll("[data-answer]")) {
      node.classList.toggle("hot", shown && node.dataset.answer === id);
    }
  }

  // Shows where a token lies: its line, its point, the points before it, and the frame that it is relative to.
  cue(place) {
    this.layers.cue.replaceChildren();
    if (!place) return;
    const [width, height] = this.size;
    const [x0, y0, x1, y1] = place.frame;
    const [left, top, right, bottom] = [Math.max(x0, 0), Math.max(y0, 0), Math.min(x1, width), Math.min(y1, height)];
    if (left > 0 || top > 0 || right < width || bottom < height) {
      this.drawTwice("rect", { x: left, y: top, width: right - left, height: bottom - top }, "frame");
    }
    if (place.path.length > 2) this.drawTwice("polyline", { points: place.path.join(" ") }, "path");
    for (const [axis, pixel, role] of place.lines) {
      const ends = axis === "y" ? { x1: left, x2: right, y1: pixel, y2: pixel } : { x1: pixel, x2: pixel, y1: top, y2: bottom };
      this.drawTwice("line", ends, `axis-${axis} ${role}`);
      if (role === "other") continue;
      const at = axis === "y" ? { x: left, y: pixel, dx: ".4em", dy: "-.35em" } : { x: pixel, y: bottom, dx: ".4em", dy: "-.5em" };
      const text = shape("text", { class: "cue value", ...at }, `${axis} = ${pixel.toFixed(1)} px`);
      if (axis === "x" && pixel > width * 0.75) text.setAttribute("text-anchor", "end");
      if (axis === "y" && pixel < height / 20) text.setAttribute("dy", "1.1em");
      this.layers.cue.append(text);
    }
    if (place.point) {
      const [cx, cy] = place.point;
      this.layers.cue.append(shape("circle", { class: "cue point", cx, cy, "data-radius": JOINT + 1.5 }));
    }
    this.resize();
  }

  // A light shape over a dark one can be seen on any image.
  drawTwice(name, attributes, look) {
    this.layers.cue.append(shape(name, { class: "cue shade", ...attributes }));
    this.layers.cue.append(shape(name, { class: `cue ${look}`, ...attributes }));
  }
}

function isLight(color) {
  const [red, green, blue] = [1, 3, 5].map((start) => parseInt(color.slice(start, start + 2), 16));
  return 0.299 * red + 0.587 * green + 0.114 * blue > 140;
}
