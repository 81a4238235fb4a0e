// The canvas: the picture with its mask over it, moved and enlarged; from the pointer to the pixels of the picture.

const TINT = [40, 140, 255];

export class Surface {
  constructor(canvas) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.overlay = document.createElement("canvas");
    this.onion = [];
    this.mode = "shade";
    this.view = { scale: 1, x: 0, y: 0 };
    this.cursor = null; // {x, y, radius}
    this.outline = null; // points of a shape that is being drawn
    this.crop = null;
    this.clicks = [];
    new ResizeObserver(() => this.resized()).observe(canvas);
  }

  /** Shows another picture (an ImageBitmap) with its mask; `keep` leaves the view as it is. */
  open(picture, mask, width, height, keep = false) {
    Object.assign(this, { picture, mask, width, height, outline: null, clicks: [], onion: [] });
    this.overlay.width = width;
    this.overlay.height = height;
    this.changed({ left: 0, top: 0, right: width, bottom: height });
    if (!keep) this.fit();
  }

  resized() {
    const ratio = window.devicePixelRatio || 1;
    const { width, height } = this.canvas.getBoundingClientRect();
    if (!width || !height) return;
    this.canvas.width = Math.round(width * ratio);
    this.canvas.height = Math.round(height * ratio);
    if (this.picture && !this.touched) this.fit();
    this.draw();
  }

  /** The whole picture in the middle. */
  fit() {
    const { width, height } = this.canvas.getBoundingClientRect();
    if (!width || !this.width) return;
    const scale = Math.min(width / this.width, height / this.height) * 0.96;
    this.view = { scale, x: (width - this.width * scale) / 2, y: (height - this.height * scale) / 2 };
    this.touched = false;
    this.draw();
  }

  /** Enlarges by a factor around a place of the canvas, CSS pixels. */
  zoom(factor, x, y) {
    const scale = Math.min(64, Math.max(0.02, this.view.scale * factor));
    const real = scale / this.view.scale;
    this.view = { scale, x: x - (x - this.view.x) * real, y: y - (y - this.view.y) * real };
    this.touched = true;
    this.draw();
  }

  pan(dx, dy) {
    this.view.x += dx;
    this.view.y += dy;
    this.touched = true;
    this.draw();
  }

  /** The place of a pointer event in pixels of the picture. */
  place(event) {
    const box = this.canvas.getBoundingClientRect();
    return {
      x: (event.clientX - box.left - this.view.x) / this.view.scale,
      y: (event.clientY - box.top - this.view.y) / this.view.scale,
    };
  }

  /** The mask changed in a rectangle. */
  changed({ left, top, right, bottom }) {
    const width = right - left;
    const height = bottom - top;
    if (width <= 0 || height <= 0) return this.draw();
    const image = new ImageData(width, height);
    const data = new Uint32Array(image.data.buffer);
    const table = this.colours();
    for (let y = 0; y < height; y++) {
      const row = (top + y) * this.width + left;
      for (let x = 0; x < width; x++) data[y * width + x] = table[this.mask[row + x]];
    }
    this.overlay.getContext("2d").putImageData(image, left, top);
    this.draw();
  }

  /** The colour over the picture for each value of the mask, as little-endian RGBA. */
  colours() {
    const table = new Uint32Array(256);
    for (let value = 0; value < 256; value++) {
      let [red, green, blue, alpha] = [0, 0, 0, 0];
      if (this.mode === "shade") alpha = Math.round((255 - value) * 0.75);
      else if (this.mode === "tint") [red, green, blue, alpha] = [...TINT, Math.round(value * 0.55)];
      else if (this.mode === "mask") [red, green, blue, alpha] = [value, value, value, 255];
      table[value] = ((alpha << 24) | (blue << 16) | (green << 8) | red) >>> 0;
    }
    return table;
  }

  setMode(mode) {
    this.mode = mode;
    if (this.mask) this.changed({ left: 0, top: 0, right: this.width, bottom: this.height });
  }

  draw() {
    if (!this.waiting) {
      this.waiting = true;
      requestAnimationFrame(() => {
        this.waiting = false;
        if (this.picture) this.paint();
      });
    }
  }

  paint() {
    const { context: to, canvas, view } = this;
    const ratio = window.devicePixelRatio || 1;
    to.setTransform(1, 0, 0, 1, 0, 0);
    to.clearRect(0, 0, canvas.width, canvas.height);
    to.setTransform(view.scale * ratio, 0, 0, view.scale * ratio, view.x * ratio, view.y * ratio);
    to.imageSmoothingEnabled = view.scale < 2;
    to.drawImage(this.picture, 0, 0, this.width, this.height);
    to.drawImage(this.overlay, 0, 0);
    to.globalAlpha = 0.4;
    for (const neighbour of this.onion) to.drawImage(neighbour, 0, 0);
    to.globalAlpha = 1;
    const line = 1.5 / view.scale;
    if (this.crop) {
      const [left, top, right, bottom] = this.crop;
      this.twoLines(() => to.strokeRect(left, top, right - left, bottom - top), line, [6 * line, 4 * line]);
    }
    if (this.outline?.length) {
      this.twoLines(() => {
        to.beginPath();
        this.outline.forEach(([x, y], index) => (index ? to.lineTo(x, y) : to.moveTo(x, y)));
        to.stroke();
      }, line);
    }
    for (const [x, y, positive] of this.clicks) {
      to.fillStyle = positive ? "#18a558" : "#d93025";
      to.beginPath();
      to.arc(x, y, 5 / view.scale, 0, 2 * Math.PI);
      to.fill();
      this.twoLines(() => to.stroke(), line);
    }
    if (this.cursor) {
      const { x, y, radius } = this.cursor;
      this.twoLines(() => {
        to.beginPath();
        to.arc(x, y, Math.max(radius, 2 / view.scale), 0, 2 * Math.PI);
        to.stroke();
      }, line);
    }
    canvas.dataset.view = JSON.stringify(view);
  }

  /** A dark line with a light one in it: seen on every picture. */
  twoLines(stroke, width, dash = []) {
    for (const [colour, factor] of [["#000", 2], ["#fff", 1]]) {
      this.context.strokeStyle = colour;
      this.context.lineWidth = width * factor;
      this.context.setLineDash(factor === 1 ? dash : []);
      stroke();
    }
    this.context.setLineDash([]);
  }

  /** Masks of neighbouring frames, shown faintly: [mask, colour] pairs. */
  setOnion(neighbours) {
    this.onion = neighbours.map(([mask, [red, green, blue]]) => {
      const layer = document.createElement("canvas");
      layer.width = this.width;
      layer.height = this.height;
      const image = new ImageData(this.width, this.height);
      for (let i = 0; i < mask.length; i++) image.data.set([red, green, blue, mask[i]], 4 * i);
      layer.getContext("2d").putImageData(image, 0, 0);
      return layer;
    });
    this.draw();
  }
}
