// Buttons, pointer and keys of the page: what they ask for becomes a call of the editor.

const element = (id) => document.getElementById(id);
const TOOL_KEYS = { b: "brush", e: "eraser", g: "fill", r: "rectangle", p: "polygon", c: "click", m: "move" };

export class Input {
  constructor(editor) {
    Object.assign(this, { editor, pointers: new Map() });
    this.listen();
  }

  listen() {
    const { editor } = this;
    const { surface } = editor;
    const { canvas } = surface;
    canvas.addEventListener("pointerdown", (event) => this.down(event));
    canvas.addEventListener("pointermove", (event) => this.moved(event));
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, (event) => this.up(event));
    canvas.addEventListener("pointerleave", () => editor.cursor(null));
    canvas.addEventListener("contextmenu", (event) => event.preventDefault());
    canvas.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
    canvas.addEventListener("keydown", (event) => this.canvasKey(event));
    document.addEventListener("keydown", (event) => this.key(event));
    document.addEventListener("keyup", (event) => event.key === " " && (this.spaceMoves = false));
    for (const button of document.querySelectorAll("[data-tool]")) {
      button.addEventListener("click", () => editor.use(button.dataset.tool));
    }
    const actions = {
      undo: () => editor.undo(), redo: () => editor.redo(), save: () => editor.save(), revert: () => editor.revert(),
      fit: () => surface.fit(), back: () => editor.close(), next: () => editor.step(1), previous: () => editor.step(-1),
      "mark-ok": () => editor.review("ok"), "mark-fix": () => editor.review("fix"), carry: () => editor.carry(),
      "frame-back": () => editor.toFrame(editor.frame - 1), "frame-on": () => editor.toFrame(editor.frame + 1),
    };
    for (const [id, action] of Object.entries(actions)) element(id).addEventListener("click", action);
    element("frame").addEventListener("change", () => editor.toFrame(Number(element("frame").value)));
    element("label").addEventListener("focus", () => (editor.label = element("label").value));
    element("label").addEventListener("change", () => editor.toLabel());
    element("onion").addEventListener("change", () => editor.skin());
    element("shade").addEventListener("change", () => surface.setMode(element("shade").value));
    for (const id of ["size", "value"]) element(id).addEventListener("input", () => editor.refresh());
    window.addEventListener("beforeunload", (event) => editor.history?.changed && event.preventDefault());
  }

  down(event) {
    const { editor } = this;
    const { surface } = editor;
    surface.canvas.setPointerCapture(event.pointerId);
    surface.canvas.focus({ preventScroll: true });
    this.pointers.set(event.pointerId, { x: event.clientX, y: event.clientY });
    if (this.pointers.size === 2) return this.pinch();
    if (event.button === 1 || editor.tool === "move" || this.spaceMoves) {
      this.panning = true;
      return;
    }
    editor.begin(surface.place(event), event.button === 2);
  }

  moved(event) {
    const { editor } = this;
    const { surface } = editor;
    const before = this.pointers.get(event.pointerId);
    if (before) this.pointers.set(event.pointerId, { x: event.clientX, y: event.clientY });
    if (this.pinching) return this.pinch();
    if (this.panning && before) return surface.pan(event.clientX - before.x, event.clientY - before.y);
    const events = event.getCoalescedEvents?.() ?? [];
    for (const one of events.length ? events : [event]) editor.drawTo(surface.place(one));
    editor.cursor(surface.place(event));
  }

  up(event) {
    const { editor } = this;
    const { surface } = editor;
    this.pointers.delete(event.pointerId);
    this.panning = false;
    if (this.pinching) {
      if (!this.pointers.size) this.pinching = null;
      return;
    }
    editor.end(surface.place(event), event.type === "pointercancel");
  }

  /** Two fingers: what one finger drew goes, and both move and enlarge the picture. */
  pinch() {
    const { editor } = this;
    const { surface } = editor;
    if (editor.stroke) editor.takeBack();
    const [a, b] = [...this.pointers.values()];
    const now = { x: (a.x + b.x) / 2, y: (a.y + b.y) / 2, span: Math.hypot(a.x - b.x, a.y - b.y) };
    if (this.pinching) {
      const box = surface.canvas.getBoundingClientRect();
      surface.pan(now.x - this.pinching.x, now.y - this.pinching.y);
      surface.zoom(now.span / (this.pinching.span || 1), now.x - box.left, now.y - box.top);
    }
    this.pinching = now;
  }

  wheel(event) {
    const { editor } = this;
    const { surface } = editor;
    event.preventDefault();
    const box = surface.canvas.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top];
    if (event.ctrlKey || event.metaKey || !editor.paints) {
      surface.zoom(Math.exp(-event.deltaY / 300), x, y);
    } else {
      editor.resize(event.deltaY < 0 ? 1.15 : 1 / 1.15);
    }
    editor.cursor(surface.place(event));
  }

  key(event) {
    const { editor } = this;
    const { surface } = editor;
    if (element("edit-view").hidden || document.querySelector("dialog[open]")) return;
    const typing = event.target.matches("input[type=number], input[type=search], textarea, select");
    const command = event.ctrlKey || event.metaKey;
    const key = event.key.toLowerCase();
    if (command && key === "z") event.shiftKey ? editor.redo() : editor.undo();
    else if (command && key === "y") editor.redo();
    else if (command && key === "s") editor.save();
    else if (command || event.altKey || typing) return;
    else if (key in TOOL_KEYS) editor.use(TOOL_KEYS[key]);
    else if (key === "escape") editor.shape || editor.stroke ? editor.cancelShape() : editor.close();
    else if (key === "enter" && editor.shape) editor.closePolygon();
    else if (key === "[" || key === "]") editor.resize(key === "]" ? 1.15 : 1 / 1.15);
    else if (key === "pagedown" || key === "pageup") editor.step(key === "pagedown" ? 1 : -1);
    else if (key === "," || key === ".") editor.toFrame(editor.frame + (key === "." ? 1 : -1));
    else if (key === "o" || key === "f") editor.review(key === "o" ? "ok" : "fix");
    else if (key === "v") this.nextShade();
    else if (key === "0") surface.fit();
    else if (key === "+" || key === "-") this.zoomMiddle(key === "+" ? 1.25 : 0.8);
    else return;
    event.preventDefault();
  }

  /** Drawing without a pointer: arrows move a point, Space draws there (or sets a corner), D keeps the pen down. */
  canvasKey(event) {
    const { editor } = this;
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const key = event.key;
    const point = (editor.point ??= { x: editor.width / 2, y: editor.height / 2 });
    if (key in moves) {
      const step = event.shiftKey ? 1 : Math.max(1, editor.radius / 2);
      point.x = Math.min(editor.width, Math.max(0, point.x + moves[key][0] * step));
      point.y = Math.min(editor.height, Math.max(0, point.y + moves[key][1] * step));
      editor.drawTo(point);
    } else if (key === " ") {
      const corner = editor.tool === "rectangle";
      if (this.pointers.size) this.spaceMoves = true;
      else if (editor.stroke) editor.end(point, false);
      else editor.begin({ ...point }, event.shiftKey);
      if (!corner && editor.stroke && editor.tool !== "polygon") editor.end(point, false);
    } else if (key.toLowerCase() === "d") {
      if (editor.stroke) editor.end(point, false);
      else editor.begin({ ...point }, event.shiftKey);
    } else {
      return;
    }
    editor.cursor(point);
    event.preventDefault();
    event.stopPropagation();
  }

  zoomMiddle(factor) {
    const { surface } = this.editor;
    const { width, height } = surface.canvas.getBoundingClientRect();
    surface.zoom(factor, width / 2, height / 2);
  }

  nextShade() {
    const { surface } = this.editor;
    const choice = element("shade");
    choice.selectedIndex = (choice.selectedIndex + 1) % choice.options.length;
    surface.setMode(choice.value);
  }
}
