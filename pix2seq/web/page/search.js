// Searching the folder of the server: a grid of images, of which a click opens one.

import { element, find } from "./dom.js";
import { describeError, getJson } from "./server.js";

export class Search {
  // `open` shows an image file by its name, `shown` returns the image that is shown.
  constructor({ folder, num_images }, { open, shown }) {
    Object.assign(this, { open, shown, request: null });
    const input = find("#search input");
    input.placeholder = `Search ${num_images} images of ${folder}`;
    find("#search").hidden = false;
    find("#search").addEventListener("submit", (event) => {
      event.preventDefault();
      if (input.value.trim()) this.ask({ text: input.value });
    });
    find("#alike").addEventListener("click", () => {
      const { image, name } = this.shown();
      if (image) this.ask({ image }, name);
    });
  }

  // Asks for images; an earlier request that is still open is given up.
  async ask(fields, name) {
    this.request?.abort();
    const request = new AbortController();
    this.request = request;
    const form = new FormData();
    if (fields.text) form.append("text", fields.text);
    else form.append("image", fields.image, name);
    this.say("Searching …");
    const started = performance.now();
    try {
      const { results } = await getJson("/search", { method: "POST", body: form, signal: request.signal });
      this.show(results);
      this.say(`${results.length} images, best first, in ${((performance.now() - started) / 1000).toFixed(1)} s`);
    } catch (error) {
      if (error.name !== "AbortError") this.say(describeError(error), true);
    }
  }

  show(results) {
    find("#results").hidden = !results.length;
    find("#results ol").replaceChildren(
      ...results.map(({ file, score, match, url, thumbnail }) => {
        const image = thumbnail ? element("img", { src: thumbnail, alt: "" }) : element("div", { class: "missing" });
        const text = match === undefined ? score.toFixed(3) : `${match.toFixed(2)} · ${score.toFixed(3)}`;
        const button = element("button", { type: "button", title: file }, image, element("span", {}, file), element("small", {}, text));
        button.addEventListener("click", () => this.take(url, file));
        return element("li", {}, button);
      }),
    );
  }

  async take(url, file) {
    try {
      const response = await fetch(url);
      if (!response.ok) throw new Error((await response.json()).error);
      await this.open(await response.blob(), file.split("/").at(-1));
    } catch (error) {
      this.say(describeError(error), true);
    }
  }

  say(text, isError = false) {
    const line = find("#search p");
    line.textContent = text;
    line.classList.toggle("error", isError);
  }
}
