// Undo and redo without limit: of each edit only the rectangle that it changed is kept, before and after.

export class History {
  constructor() {
    this.past = [];
    this.future = [];
    this.saved = 0;
  }

  /** Notes an edit of `mask` that has `before` as it was, inside `area`; an edit that changed nothing is none. */
  add(before, mask, width, area) {
    const old = cut(before, width, area);
    const now = cut(mask, width, area);
    if (old.every((value, index) => value === now[index])) return false;
    this.past.push({ area, old, now });
    this.future = [];
    if (this.saved >= this.past.length) this.saved = -1; // what was saved cannot be reached any more
    return true;
  }

  /** Takes the last edit back; returns its area, or null where there is none. */
  undo(mask, width) {
    const edit = this.past.pop();
    if (!edit) return null;
    this.future.push(edit);
    paste(mask, width, edit.area, edit.old);
    return edit.area;
  }

  redo(mask, width) {
    const edit = this.future.pop();
    if (!edit) return null;
    this.past.push(edit);
    paste(mask, width, edit.area, edit.now);
    return edit.area;
  }

  get changed() {
    return this.saved !== this.past.length;
  }

  markSaved() {
    this.saved = this.past.length;
  }
}

function cut(mask, width, { left, top, right, bottom }) {
  const part = new Uint8Array((right - left) * (bottom - top));
  for (let y = top; y < bottom; y++) {
    part.set(mask.subarray(y * width + left, y * width + right), (y - top) * (right - left));
  }
  return part;
}

function paste(mask, width, { left, top, right, bottom }, part) {
  for (let y = top; y < bottom; y++) {
    mask.set(part.subarray((y - top) * (right - left), (y - top + 1) * (right - left)), y * width + left);
  }
}
