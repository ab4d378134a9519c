// The sequences of one task, token by token. Sends "token" with the place of the token that is pointed at, or null,
// and "answer" with the id of the answer that it is part of, or null.

import { element, withProperty } from "./dom.js";

const STEP = 70; // milliseconds a token while playing

export class Sequences extends EventTarget {
  constructor(root, line) {
    super();
    this.root = root;
    this.line = line;
    this.tokens = []; // those that are shown, in order: { node, token, sequence, part, position }
    this.timer = null;
    for (const name of ["pointerover", "focusin"]) root.addEventListener(name, (event) => this.enter(event.target));
    for (const name of ["pointerleave", "focusout"]) root.addEventListener(name, () => this.point(null));
  }

  // Shows sequences as /predict returns them, with the names of their answers by id.
  show(sequences, { answers, numBins, withIds }) {
    this.stop();
    this.numBins = numBins;
    this.tokens = [];
    this.root.replaceChildren(...sequences.map((sequence) => this.section(sequence, answers, withIds)));
    this.byNode = new Map(this.tokens.map((shown) => [shown.node, shown]));
    this.point(null);
  }

  section(sequence, answers, withIds) {
    const ids = new Set(sequence.parts.map((part) => answerId(part)).filter(Boolean));
    const single = ids.size === 1 ? [...ids][0] : null;
    const name = answers.get(single)?.name;
    const about = name ? `${name}: ` : "";
    const samples = sequence.num_samples > 1 ? `, the first of ${sequence.num_samples} samples` : "";
    const title = `${about}${sequence.response.length} tokens after a prompt of ${sequence.prompt.length}${samples}`;
    const node = element("section", { class: "sequence" }, element("h3", {}, title));
    const row = (tokens, first, part, look) => {
      const id = answerId(part);
      const known = answers.get(id);
      const line = element("div", { class: `part ${look}`, "data-answer": id, "data-score": known?.score });
      withProperty(line, "--color", known?.color);
      tokens.forEach((token, i) => line.append(this.chip(token, sequence, part, first + i, withIds)));
      if (known?.name && sequence.parts.length > 1) line.append(element("small", {}, known.name));
      node.append(line);
    };
    const { prompt, response } = sequence;
    row(prompt, -prompt.length, { start: -prompt.length, stop: 0, answer: toAnswer(single) }, "prompt");
    let next = 0;
    for (const part of sequence.parts) {
      if (part.start > next) row(response.slice(next, part.start), next, { start: next, stop: part.start }, "");
      row(response.slice(part.start, part.stop), part.start, part, "");
      next = part.stop;
    }
    if (next < response.length) row(response.slice(next), next, { start: next, stop: response.length }, "");
    return node;
  }

  chip(token, sequence, part, position, withIds) {
    const node = element("span", { class: `token ${token.kind}${token.axis ? ` axis-${token.axis}` : ""}`, tabindex: 0 });
    const text = token.axis ? Math.round(token.pixel) : token.text;
    if (token.axis && !withIds) node.append(element("i", {}, token.axis));
    node.append(String(withIds ? token.id : text));
    this.tokens.push({ node, token, sequence, part, position });
    return node;
  }

  enter(target) {
    const shown = this.byNode?.get(target.closest(".token"));
    if (shown) this.stop();
    if (shown) this.point(shown);
  }

  // Marks a token, describes it, and tells where it lies.
  point(shown) {
    for (const node of this.root.querySelectorAll(".now, .mate")) node.classList.remove("now", "mate");
    this.line.replaceChildren(shown ? this.describe(shown) : "Point at a token.");
    shown?.node.classList.add("now");
    this.send("answer", shown ? answerId(shown.part) : null);
    this.send("token", shown ? this.place(shown) : null);
  }

  describe({ token, sequence, position }) {
    const { prompt, response } = sequence;
    const where = position < 0 ? `prompt ${position + prompt.length + 1} of ${prompt.length}` : `token ${position + 1} of ${response.length}`;
    let meaning = token.kind === token.text ? token.kind : `${token.kind} ${token.text}`;
    if (token.kind === "text") meaning = `text "${token.text}"`;
    if (token.axis) meaning = `${token.axis} = ${token.pixel.toFixed(1)} px, bin ${token.text} of ${this.numBins}`;
    const parts = [where, `id ${token.id}`, meaning];
    if (token.probability !== undefined) parts.push(`probability ${token.probability.toFixed(3)}`);
    if (token.best && (token.probability === undefined || token.best.text !== token.text)) parts.push(`best answer ${token.best.text} ${token.best.probability.toFixed(3)}`);
    return parts.join(" · ");
  }

  // Returns the lines of the pair that a coordinate belongs to, its point, and the points of its part so far.
  place(shown) {
    const { token, sequence, part } = shown;
    const all = this.tokens.filter((other) => other.sequence === sequence && other.part === part);
    const at = all.indexOf(shown);
    const path = [];
    for (let i = 0; i + 1 <= at; i++) {
      if (all[i].token.axis === "y" && all[i + 1].token.axis === "x") path.push(point(all[i], all[i + 1]));
      else if (all[i].token.kind === "separator") path.length = 0; // a mask's next ring
    }
    const place = { frame: sequence.frame, path, lines: [], point: null };
    if (!token.axis) return { ...place, path: path.length > 2 ? path : [] };
    const mate = all[token.axis === "y" ? at + 1 : at - 1];
    place.lines.push([token.axis, token.pixel, ""]);
    if (mate?.token.axis && mate.token.axis !== token.axis) {
      mate.node.classList.add("mate");
      place.lines.push([mate.token.axis, mate.token.pixel, "other"]);
      place.point = token.axis === "y" ? point(shown, mate) : point(mate, shown);
    }
    return place;
  }

  // Goes through all tokens in the order in which the model said them.
  play(done) {
    this.stop();
    let next = 0;
    this.done = done;
    this.timer = setInterval(() => {
      while (next < this.tokens.length && !this.tokens[next].node.checkVisibility()) next++;
      if (next >= this.tokens.length) return this.stop();
      this.tokens[next].node.scrollIntoView({ block: "nearest" });
      this.point(this.tokens[next++]);
    }, STEP);
  }

  stop() {
    if (this.timer === null) return;
    clearInterval(this.timer);
    this.timer = null;
    this.done?.();
    this.point(null);
  }

  // Marks the tokens of an answer; `scroll` brings the first of them into view.
  focus(id, { scroll }) {
    let first = null;
    for (const line of this.root.querySelectorAll(".part")) {
      const hot = id !== null && line.dataset.answer === id;
      line.classList.toggle("hot", hot);
      if (hot) first ??= line;
    }
    if (scroll) first?.scrollIntoView({ block: "nearest" });
  }

  setThreshold(threshold) {
    for (const line of this.root.querySelectorAll(".part")) {
      line.classList.toggle("weak", line.dataset.score !== undefined && Number(line.dataset.score) < threshold);
    }
  }

  send(name, detail) {
    this.dispatchEvent(new CustomEvent(name, { detail }));
  }
}

function answerId(part) {
  return part?.answer ? `${part.answer.key}/${part.answer.index}` : null;
}

function toAnswer(id) {
  if (id === null) return null;
  const [key, index] = id.split("/");
  return { key, index: Number(index) };
}

function point(y, x) {
  return [x.token.pixel, y.token.pixel];
}
