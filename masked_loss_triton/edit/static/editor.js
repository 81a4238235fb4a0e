// One picture or clip: tools, pointer and keys, undo, frames, saving.

import { Refused, ask, choose, post, say } from "./api.js";
import { History } from "./history.js";
import { Preview } from "./preview.js";
import { around, fill, line, polygon, rectangle } from "./raster.js";
import { Surface } from "./surface.js";

const element = (id) => document.getElementById(id);
const TOOL_KEYS = { b: "brush", e: "eraser", g: "fill", r: "rectangle", p: "polygon", c: "click", m: "move" };
const BUTTON_TOOLS = ["brush", "eraser"];

export class Editor {
  /** `facts` returns what is known of a picture; `go` opens the one before or after, `leave` the list. */
  constructor({ facts, go, leave }) {
    Object.assign(this, { facts, go, leave, tool: "brush", pointers: new Map() });
    this.surface = new Surface(element("canvas"));
    this.preview = new Preview(
      () => ({ number: this.number, pixels: this.mask, address: (more) => this.address("preview", this.size + more) }),
      (found) => {
        this.surface.crop = found.cut > 0 || found.crop[0] > 0.5 || found.crop[1] > 0.5 ? found.crop : null;
        this.surface.draw();
      },
    );
    this.listen();
  }

  get radius() {
    return Number(element("size").value) / 2;
  }

  get value() {
    return Number(element("value").value);
  }

  /** The address of something of the mask that is open: what, and further parameters. */
  address(what, more = "", number = this.number, frame = this.frame) {
    const label = encodeURIComponent(element("label").value);
    return `api/${what}/${number}?frame=${frame}${label && `&label=${label}`}${more}`;
  }

  /** `&width=...&height=...` of the mask, for requests that carry it. */
  get size() {
    return `&width=${this.width}&height=${this.height}`;
  }

  /** Lets the user choose whose mask is edited; without labels there is nothing to choose. */
  setLabels(labels) {
    element("label-choice").hidden = !labels.length;
    element("label").replaceChildren(...["", ...labels].map((label) => new Option(label || "everything", label)));
  }

  /** Opens a picture, or a frame of a clip (`keep`: without moving the view; `again`: unless it was edited meanwhile). */
  async open(number, frame = 0, keep = false, again = false) {
    const opening = (this.opening = { number, frame });
    const label = element("label").value;
    const [picture, mask] = await Promise.all([
      ask(this.address("picture", "", number, frame)),
      ask(this.address("mask", "", number, frame)),
    ]);
    const pixels = new Uint8Array(await mask.arrayBuffer());
    const image = await createImageBitmap(await picture.blob(), { imageOrientation: "none" });
    if (this.opening !== opening || (again && this.history?.changed)) return;
    const [width, height] = mask.headers.get("X-Size").split("x").map(Number);
    const frames = Number(picture.headers.get("X-Frames"));
    Object.assign(this, { number, frame, frames, width, height, mask: pixels, version: mask.headers.get("X-Version") });
    Object.assign(this, { history: new History(), shape: null, said: { clicks: [], box: null }, point: null });
    this.surface.open(image, pixels, width, height, keep);
    element("clip").hidden = frames < 2;
    element("frame").max = frames - 1;
    element("frame").value = frame;
    element("carry-to").max = frames - 1;
    element("frame-shown").value = `${frame} of 0 to ${frames - 1}`;
    this.refresh();
    this.preview.ask();
    await this.skin();
    document.body.dataset.opened = `${number}:${frame}${label && `:${label}`}`;
  }

  /** Shows what a task has written: of the picture that the user is going to, and never over edits. */
  async reload() {
    const { number, frame } = this.opening;
    if (!this.history?.changed) await this.attempt(() => this.open(number, frame, number === this.number, true));
  }

  /** Buttons and texts that follow from the state. */
  refresh() {
    const facts = this.facts(this.number);
    element("name").textContent = facts.name + (this.history.changed ? " *" : "");
    element("undo").disabled = !this.history.past.length;
    element("redo").disabled = !this.history.future.length;
    element("mark-ok").setAttribute("aria-pressed", String(facts.reviewed === "ok"));
    element("mark-fix").setAttribute("aria-pressed", String(facts.reviewed === "fix"));
    element("problems").replaceChildren(
      ...facts.problems.map((text) => Object.assign(document.createElement("li"), { textContent: text })),
    );
    for (const button of document.querySelectorAll("[data-tool]")) {
      button.setAttribute("aria-pressed", String(button.dataset.tool === this.tool));
    }
    element("size-shown").value = element("size").value;
    element("value-shown").value = element("value").value;
  }

  listen() {
    const canvas = this.surface.canvas;
    canvas.addEventListener("pointerdown", (event) => this.down(event));
    canvas.addEventListener("pointermove", (event) => this.moved(event));
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, (event) => this.up(event));
    canvas.addEventListener("pointerleave", () => this.cursor(null));
    canvas.addEventListener("contextmenu", (event) => event.preventDefault());
    canvas.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
    canvas.addEventListener("keydown", (event) => this.canvasKey(event));
    document.addEventListener("keydown", (event) => this.key(event));
    document.addEventListener("keyup", (event) => event.key === " " && (this.spaceMoves = false));
    for (const button of document.querySelectorAll("[data-tool]")) {
      button.addEventListener("click", () => this.use(button.dataset.tool));
    }
    const actions = {
      undo: () => this.undo(), redo: () => this.redo(), save: () => this.save(), revert: () => this.revert(),
      fit: () => this.surface.fit(), back: () => this.close(), next: () => this.step(1), previous: () => this.step(-1),
      "mark-ok": () => this.review("ok"), "mark-fix": () => this.review("fix"), carry: () => this.carry(),
      "frame-back": () => this.toFrame(this.frame - 1), "frame-on": () => this.toFrame(this.frame + 1),
    };
    for (const [id, action] of Object.entries(actions)) element(id).addEventListener("click", action);
    element("frame").addEventListener("change", () => this.toFrame(Number(element("frame").value)));
    element("label").addEventListener("focus", () => (this.label = element("label").value));
    element("label").addEventListener("change", () => this.toLabel());
    element("onion").addEventListener("change", () => this.skin());
    element("shade").addEventListener("change", () => this.surface.setMode(element("shade").value));
    for (const id of ["size", "value"]) element(id).addEventListener("input", () => this.refresh());
    window.addEventListener("beforeunload", (event) => this.history?.changed && event.preventDefault());
  }

  use(tool) {
    this.tool = tool;
    this.cancelShape();
    this.refresh();
  }

  // Pointer

  down(event) {
    this.surface.canvas.setPointerCapture(event.pointerId);
    this.surface.canvas.focus({ preventScroll: true });
    this.pointers.set(event.pointerId, { x: event.clientX, y: event.clientY });
    if (this.pointers.size === 2) return this.pinch();
    if (event.button === 1 || this.tool === "move" || this.spaceMoves) {
      this.panning = true;
      return;
    }
    this.begin(this.surface.place(event), event.button === 2);
  }

  moved(event) {
    const before = this.pointers.get(event.pointerId);
    if (before) this.pointers.set(event.pointerId, { x: event.clientX, y: event.clientY });
    if (this.pinching) return this.pinch();
    if (this.panning && before) return this.surface.pan(event.clientX - before.x, event.clientY - before.y);
    const events = event.getCoalescedEvents?.() ?? [];
    for (const one of events.length ? events : [event]) this.drawTo(this.surface.place(one));
    this.cursor(this.surface.place(event));
  }

  up(event) {
    this.pointers.delete(event.pointerId);
    this.panning = false;
    if (this.pinching) {
      if (!this.pointers.size) this.pinching = null;
      return;
    }
    this.end(this.surface.place(event), event.type === "pointercancel");
  }

  /** Two fingers: what one finger drew goes, and both move and enlarge the picture. */
  pinch() {
    if (this.stroke) this.takeBack();
    const [a, b] = [...this.pointers.values()];
    const now = { x: (a.x + b.x) / 2, y: (a.y + b.y) / 2, span: Math.hypot(a.x - b.x, a.y - b.y) };
    if (this.pinching) {
      const box = this.surface.canvas.getBoundingClientRect();
      this.surface.pan(now.x - this.pinching.x, now.y - this.pinching.y);
      this.surface.zoom(now.span / (this.pinching.span || 1), now.x - box.left, now.y - box.top);
    }
    this.pinching = now;
  }

  wheel(event) {
    event.preventDefault();
    const box = this.surface.canvas.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top];
    if (event.ctrlKey || event.metaKey || !BUTTON_TOOLS.includes(this.tool)) {
      this.surface.zoom(Math.exp(-event.deltaY / 300), x, y);
    } else {
      this.resize(event.deltaY < 0 ? 1.15 : 1 / 1.15);
    }
    this.cursor(this.surface.place(event));
  }

  resize(factor) {
    const size = Number(element("size").value);
    const wanted = factor > 1 ? Math.max(size + 1, size * factor) : Math.min(size - 1, size * factor);
    element("size").value = Math.round(wanted);
    this.refresh();
    if (this.surface.cursor) this.cursor(this.surface.cursor);
  }

  cursor(place) {
    const radius = BUTTON_TOOLS.includes(this.tool) ? this.radius : 0;
    this.surface.cursor = place && { x: place.x, y: place.y, radius };
    this.surface.draw();
  }

  // Drawing

  begin({ x, y }, right) {
    if (!this.mask) return;
    if (this.tool === "polygon") {
      if (right) return this.cancelShape();
      (this.shape ??= []).push([x, y]);
      this.surface.outline = this.shape;
      return this.surface.draw();
    }
    const value = right !== (this.tool === "eraser") ? 0 : this.value;
    this.stroke = { tool: this.tool, before: this.mask.slice(), x, y, x0: x, y0: y, value, right, area: null };
    if (BUTTON_TOOLS.includes(this.tool)) this.drawTo({ x, y });
  }

  drawTo({ x, y }) {
    const stroke = this.stroke;
    if (!stroke) return;
    if (BUTTON_TOOLS.includes(stroke.tool)) {
      const area = line(this.mask, this.width, this.height, stroke.x, stroke.y, x, y, this.radius, stroke.value);
      stroke.area = around(stroke.area, area);
      this.surface.changed(area);
    } else if (stroke.tool === "rectangle" || stroke.tool === "click") {
      const { x0, y0 } = stroke;
      this.surface.outline = [[x0, y0], [x, y0], [x, y], [x0, y], [x0, y0]];
      this.surface.draw();
    }
    Object.assign(stroke, { x, y });
  }

  end({ x, y }, cancelled) {
    const stroke = this.stroke;
    if (!stroke) return;
    if (cancelled) return this.takeBack();
    this.stroke = null;
    if (stroke.tool === "rectangle") {
      stroke.area = rectangle(this.mask, this.width, this.height, stroke.x0, stroke.y0, x, y, stroke.value);
    } else if (stroke.tool === "fill") {
      stroke.area = fill(this.mask, this.width, this.height, x, y, stroke.value);
    } else if (stroke.tool === "click") {
      return this.select(stroke, x, y);
    }
    this.surface.outline = null;
    this.edited(stroke.before, stroke.area);
  }

  takeBack() {
    this.mask.set(this.stroke.before);
    this.stroke = null;
    this.surface.changed({ left: 0, top: 0, right: this.width, bottom: this.height });
  }

  closePolygon() {
    const points = this.shape;
    this.cancelShape();
    if (!points || points.length < 3) return;
    const before = this.mask.slice();
    this.edited(before, polygon(this.mask, this.width, this.height, points, this.value));
  }

  cancelShape() {
    this.shape = null;
    this.surface.outline = null;
    this.surface.draw();
  }

  /** An edit is finished: it can be undone, and the loss is asked what it makes of it. */
  edited(before, area) {
    if (!area) return;
    this.surface.changed(area);
    if (this.history.add(before, this.mask, this.width, area)) this.preview.ask();
    this.refresh();
  }

  undo() {
    this.travel(this.history.undo(this.mask, this.width));
  }

  redo() {
    this.travel(this.history.redo(this.mask, this.width));
  }

  travel(area) {
    if (!area) return;
    Object.assign(this, { said: { clicks: [], box: null } });
    this.surface.clicks = [];
    this.surface.changed(area);
    this.preview.ask();
    this.refresh();
  }

  /** One click, or a box that was dragged: the server cuts out; painting goes on meanwhile, and wins. */
  async select(stroke, x, y) {
    const dragged = Math.hypot(x - stroke.x0, y - stroke.y0) * this.surface.view.scale > 6;
    if (dragged) this.said.box = [Math.min(x, stroke.x0), Math.min(y, stroke.y0), Math.max(x, stroke.x0), Math.max(y, stroke.y0)];
    else this.said.clicks.push([x, y, !stroke.right]);
    this.surface.outline = null;
    this.surface.clicks = this.said.clicks;
    this.surface.draw();
    const { history } = this;
    const edits = history.past.length;
    document.body.dataset.selecting = "yes";
    try {
      const said = encodeURIComponent(JSON.stringify(this.said));
      const answer = await ask(this.address("select", `${this.size}&said=${said}`), { method: "POST", body: stroke.before });
      const found = new Uint8Array(await answer.arrayBuffer());
      if (this.history !== history || this.history.past.length !== edits) return say("the mask was changed meanwhile: click again");
      const before = this.mask.slice();
      for (let i = 0; i < found.length; i++) this.mask[i] = found[i] ? this.value : 0;
      this.edited(before, { left: 0, top: 0, right: this.width, bottom: this.height });
      const why = answer.headers.get("X-Why");
      say(`cut out by ${answer.headers.get("X-Maker")}${why && !this.told ? `; better models are not here: ${why}` : ""}`);
      this.told = true;
    } catch (error) {
      say(error.message);
    } finally {
      delete document.body.dataset.selecting;
    }
  }

  // Keys

  key(event) {
    if (element("edit-view").hidden || document.querySelector("dialog[open]")) return;
    const typing = event.target.matches("input[type=number], input[type=search], textarea, select");
    const command = event.ctrlKey || event.metaKey;
    const key = event.key.toLowerCase();
    if (command && key === "z") event.shiftKey ? this.redo() : this.undo();
    else if (command && key === "y") this.redo();
    else if (command && key === "s") this.save();
    else if (command || event.altKey || typing) return;
    else if (key in TOOL_KEYS) this.use(TOOL_KEYS[key]);
    else if (key === "escape") this.shape || this.stroke ? this.cancelShape() : this.close();
    else if (key === "enter" && this.shape) this.closePolygon();
    else if (key === "[" || key === "]") this.resize(key === "]" ? 1.15 : 1 / 1.15);
    else if (key === "pagedown" || key === "pageup") this.step(key === "pagedown" ? 1 : -1);
    else if (key === "," || key === ".") this.toFrame(this.frame + (key === "." ? 1 : -1));
    else if (key === "o" || key === "f") this.review(key === "o" ? "ok" : "fix");
    else if (key === "v") this.nextShade();
    else if (key === "0") this.surface.fit();
    else if (key === "+" || key === "-") this.zoomMiddle(key === "+" ? 1.25 : 0.8);
    else return;
    event.preventDefault();
  }

  /** Drawing without a pointer: arrows move a point, Space draws there (or sets a corner), D keeps the pen down. */
  canvasKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const key = event.key;
    this.point ??= { x: this.width / 2, y: this.height / 2 };
    if (key in moves) {
      const step = event.shiftKey ? 1 : Math.max(1, this.radius / 2);
      this.point.x = Math.min(this.width, Math.max(0, this.point.x + moves[key][0] * step));
      this.point.y = Math.min(this.height, Math.max(0, this.point.y + moves[key][1] * step));
      this.drawTo(this.point);
    } else if (key === " ") {
      const corner = this.tool === "rectangle";
      if (this.pointers.size) this.spaceMoves = true;
      else if (this.stroke) this.end(this.point, false);
      else this.begin({ ...this.point }, event.shiftKey);
      if (!corner && this.stroke && this.tool !== "polygon") this.end(this.point, false);
    } else if (key.toLowerCase() === "d") {
      if (this.stroke) this.end(this.point, false);
      else this.begin({ ...this.point }, event.shiftKey);
    } else {
      return;
    }
    this.cursor(this.point);
    event.preventDefault();
    event.stopPropagation();
  }

  zoomMiddle(factor) {
    const { width, height } = this.surface.canvas.getBoundingClientRect();
    this.surface.zoom(factor, width / 2, height / 2);
  }

  nextShade() {
    const choice = element("shade");
    choice.selectedIndex = (choice.selectedIndex + 1) % choice.options.length;
    this.surface.setMode(choice.value);
  }

  // Files

  /** Saves; resolves to whether the mask on the disk is the one on the screen. */
  async save() {
    const { number, frame } = this;
    const label = element("label").value;
    const sent = this.mask.slice();
    const place = this.history.past.length;
    const store = (over) =>
      post(this.address("mask", `${this.size}&version=${this.version}${over ? "&over=1" : ""}`), sent);
    try {
      let saved;
      try {
        saved = await store(false);
      } catch (error) {
        if (error.status !== 409) throw error;
        const answer = await choose(`${error.message}. What shall stay?`, ["mine", "the other one", "cancel"]);
        if (answer === "the other one") await this.open(number, frame, true);
        if (answer !== "mine") return answer === "the other one";
        saved = await store(true);
      }
      if (this.number !== number || this.frame !== frame || element("label").value !== label) return true;
      this.version = saved.version;
      if (this.history.past.length === place) this.history.markSaved();
      document.body.dataset.saves = String(Number(document.body.dataset.saves ?? 0) + 1);
      say("saved");
      this.refresh();
      return true;
    } catch (error) {
      say(`not saved: ${error.message}`);
      return false;
    }
  }

  /** Asks about unsaved edits; resolves to whether the picture may be left. */
  async mayLeave() {
    if (!this.history?.changed) return true;
    const answer = await choose("The mask has changes that are not saved.", ["save", "throw away", "stay"]);
    return answer === "save" ? this.save() : answer === "throw away";
  }

  async close() {
    if (await this.mayLeave()) this.leave(this.number);
  }

  async step(direction) {
    if (await this.mayLeave()) this.go(this.number, direction);
  }

  async toFrame(frame) {
    const wanted = Math.min(this.frames - 1, Math.max(0, frame));
    element("frame").value = this.frame;
    if (wanted !== this.frame && (await this.mayLeave())) await this.attempt(() => this.open(this.number, wanted, true));
  }

  /** Another label was chosen: its mask is opened, or the choice goes back where unsaved edits are to stay. */
  async toLabel() {
    const wanted = element("label").value;
    element("label").value = this.label ?? "";
    if (!(await this.mayLeave())) return;
    element("label").value = this.label = wanted;
    await this.attempt(() => this.open(this.number, this.frame, true));
  }

  async skin() {
    const around = element("onion").checked ? [[this.frame - 1, [255, 120, 0]], [this.frame + 1, [0, 200, 120]]] : [];
    const masks = await Promise.all(
      around.filter(([frame]) => frame >= 0 && frame < this.frames).map(async ([frame, colour]) => {
        const answer = await ask(this.address("mask", "", this.number, frame));
        return [new Uint8Array(await answer.arrayBuffer()), colour];
      }),
    );
    this.surface.setOnion(masks);
  }

  async carry() {
    if (this.history.changed && !(await this.save())) return;
    await this.attempt(() => post(this.address("carry", `&last=${Number(element("carry-to").value)}`)));
  }

  async revert() {
    if ((await choose("Bring back the mask as it was before this session?", ["bring back", "cancel"])) !== "bring back") return;
    await this.attempt(async () => {
      await post(this.address("revert"));
      await this.open(this.number, this.frame, true);
      say("the mask is as it was before this session");
    });
  }

  async review(mark) {
    const now = this.facts(this.number).reviewed === mark ? "" : mark;
    await this.attempt(() => post(`api/review/${this.number}?mark=${now}`));
  }

  async attempt(action) {
    try {
      await action();
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      say(error.message);
    }
  }
}
