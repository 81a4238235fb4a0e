// "What the loss sees": sends the mask as it is now and shows the weights that come back, drawn on the grid of the latents.

import { ask, decode, say } from "./api.js";

const SETTINGS = ["gamma", "min_weight", "floor", "blur_kernel_size", "binarize", "invert", "prior", "prior_threshold"];
const element = (id) => document.getElementById(id);

export class Preview {
  /** `mask` returns {number, pixels, address}: the mask, and the address for a preview of it; `shown` gets what came back. */
  constructor(mask, shown) {
    this.mask = mask;
    this.shown = shown;
    for (const name of SETTINGS) element(name).addEventListener("input", () => this.ask());
    element("copy").addEventListener("click", async () => {
      element("flags").select();
      try {
        await navigator.clipboard.writeText(element("flags").value);
        say("the flags are copied");
      } catch {
        say("the flags are selected: copy them with Ctrl+C");
      }
    });
    this.outputs();
  }

  settings() {
    const number = (name) => Number(element(name).value);
    const blur = number("blur_kernel_size");
    const found = {
      gamma: number("gamma"),
      min_weight: number("min_weight"),
      floor: element("floor").value,
      blur_kernel_size: blur && blur % 2 === 0 ? blur + 1 : blur,
      invert: element("invert").checked,
      prior: element("prior").checked,
    };
    if (number("binarize") >= 0) found.binarize = number("binarize");
    if (found.prior && number("prior_threshold") >= 0) found.prior_threshold = number("prior_threshold");
    return found;
  }

  outputs() {
    for (const output of document.querySelectorAll("#side output")) {
      const value = Number(element(output.htmlFor[0]).value);
      output.value = value < 0 ? "off" : String(value);
    }
  }

  /** Asks for the weights; while one answer is under way, only the last of the further requests is made. */
  async ask() {
    this.outputs();
    if (this.busy) {
      this.again = true;
      return;
    }
    this.busy = true;
    try {
      do {
        this.again = false;
        await this.fetch();
      } while (this.again);
    } finally {
      this.busy = false;
    }
  }

  async fetch() {
    const { number, pixels, address } = this.mask();
    if (!pixels) return;
    const settings = encodeURIComponent(JSON.stringify(this.settings()));
    const started = performance.now();
    try {
      const found = await (await ask(address(`&settings=${settings}`), { method: "POST", body: pixels })).json();
      if (this.mask().number !== number) return;
      this.show(found);
      document.body.dataset.previewMs = String(performance.now() - started);
      document.body.dataset.previews = String(Number(document.body.dataset.previews ?? 0) + 1);
    } catch (error) {
      say(error.message);
    }
  }

  show(found) {
    this.found = found;
    const weights = decode(found.weights, Float32Array);
    const prior = decode(found.prior, Float32Array);
    const canvas = element("weights");
    canvas.width = found.width;
    canvas.height = found.height;
    const image = new ImageData(found.width, found.height);
    for (let i = 0; i < weights.length; i++) {
      const grey = Math.round(weights[i] * 255);
      image.data.set([grey, grey, Math.max(grey, Math.round(prior[i] * 255)), 255], 4 * i);
    }
    canvas.getContext("2d").putImageData(image, 0, 0);
    const facts = [
      ["latents", `${found.width} x ${found.height}`],
      ["bucket", `${found.bucket[0]} x ${found.bucket[1]} pixels`],
      ["mean weight", found.mean.toFixed(4)],
      ["cut by the crop", `${(found.cut * 100).toFixed(1)}% of the mask`],
    ];
    element("facts").replaceChildren(
      ...facts.flatMap(([term, text]) => {
        const [dt, dd] = [document.createElement("dt"), document.createElement("dd")];
        dt.textContent = term;
        dd.textContent = text;
        return [dt, dd];
      }),
    );
    element("weights").setAttribute("aria-label", `Weights on the grid of the latents: ${facts.map((fact) => fact.join(" ")).join(", ")}`);
    this.bars(found.histogram);
    element("flags").value = found.flags;
    this.shown(found);
  }

  bars(counts) {
    const canvas = element("histogram");
    const to = canvas.getContext("2d");
    to.clearRect(0, 0, canvas.width, canvas.height);
    to.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--mark");
    const most = Math.log1p(Math.max(...counts)) || 1;
    const wide = canvas.width / counts.length;
    counts.forEach((count, index) => {
      const high = (Math.log1p(count) / most) * canvas.height;
      to.fillRect(index * wide, canvas.height - high, wide - 1, high);
    });
  }
}
