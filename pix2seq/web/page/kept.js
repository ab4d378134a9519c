// An image file that the server keeps encoded, for questions that name it by its id.

import { getJson } from "./server.js";

export class KeptImage {
  constructor(blob, name) {
    Object.assign(this, { blob, name, id: null });
  }

  // Sends the file, unless the server has it; returns its id.
  async send() {
    if (this.id) return this.id;
    const form = new FormData();
    form.append("image", this.blob, this.name);
    const { id, width, height } = await getJson("/images", { method: "POST", body: form });
    return Object.assign(this, { id, size: [width, height] }).id;
  }
}

// Asks a question, which `make` makes of the ids of the images. The server may have dropped one of them since.
export async function askAbout(url, images, make) {
  const post = async () => {
    const ids = [];
    for (const image of images) ids.push(await image.send());
    const body = JSON.stringify(make(...ids));
    return getJson(url, { method: "POST", headers: { "Content-Type": "application/json" }, body });
  };
  try {
    return await post();
  } catch (error) {
    if (error.status !== 410) throw error;
    for (const image of images) image.id = null;
    return post();
  }
}
