// One picture or clip: tools, undo, frames, saving.

import { Refused, ask, choose, post, say } from "./api.js";
import { History } from "./history.js";
import { Input } from "./input.js";
import { Preview } from "./preview.js";
import { around, fill, line, polygon, rectangle } from "./raster.js";
import { Surface } from "./surface.js";

const element = (id) => document.getElementById(id);
const BUTTON_TOOLS = ["brush", "eraser"];

export class Editor {
  /** `facts` returns what is known of a picture; `go` opens the one before or after, `leave` the list. */
  constructor({ facts, go, leave }) {
    Object.assign(this, { facts, go, leave, tool: "brush" });
    this.surface = new Surface(element("canvas"));
    this.preview = new Preview(
      () => ({ number: this.number, pixels: this.mask, address: (more) => this.address("preview", this.size + more) }),
      (found) => {
        this.surface.crop = found.cut > 0 || found.crop[0] > 0.5 || found.crop[1] > 0.5 ? found.crop : null;
        this.surface.draw();
      },
    );
    new Input(this);
  }

  get radius() {
    return Number(element("size").value) / 2;
  }

  /** Whether the tool draws wherever the pointer goes. */
  get paints() {
    return BUTTON_TOOLS.includes(this.tool);
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
    element("frame").max = element("carry-to").max = frames - 1;
    element("frame").value = frame;
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

  use(tool) {
    this.tool = tool;
    this.cancelShape();
    this.refresh();
  }

  resize(factor) {
    const size = Number(element("size").value);
    const wanted = factor > 1 ? Math.max(size + 1, size * factor) : Math.min(size - 1, size * factor);
    element("size").value = Math.round(wanted);
    this.refresh();
    if (this.surface.cursor) this.cursor(this.surface.cursor);
  }

  cursor(place) {
    const radius = this.paints ? this.radius : 0;
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
    if (this.paints) this.drawTo({ x, y });
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
