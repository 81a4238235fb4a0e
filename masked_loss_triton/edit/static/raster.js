// Draws into masks: Uint8Array of width x height, one byte a pixel. No anti-aliasing: a pixel belongs to a shape when its
// centre does, so that a saved mask is exactly what was drawn. Each function returns the rectangle that it touched.

/** A round brush along the line from (x0, y0) to (x1, y1), radius in pixels. */
export function line(mask, width, height, x0, y0, x1, y1, radius, value) {
  const left = Math.max(0, Math.floor(Math.min(x0, x1) - radius));
  const right = Math.min(width, Math.ceil(Math.max(x0, x1) + radius) + 1);
  const top = Math.max(0, Math.floor(Math.min(y0, y1) - radius));
  const bottom = Math.min(height, Math.ceil(Math.max(y0, y1) + radius) + 1);
  const dx = x1 - x0;
  const dy = y1 - y0;
  const length = dx * dx + dy * dy;
  for (let y = top; y < bottom; y++) {
    for (let x = left; x < right; x++) {
      const px = x + 0.5 - x0;
      const py = y + 0.5 - y0;
      const t = length ? Math.min(1, Math.max(0, (px * dx + py * dy) / length)) : 0;
      const ex = px - t * dx;
      const ey = py - t * dy;
      if (ex * ex + ey * ey <= radius * radius) mask[y * width + x] = value;
    }
  }
  return rectangleOf(left, top, right, bottom);
}

/** All pixels whose centres lie between two corners. */
export function rectangle(mask, width, height, x0, y0, x1, y1, value) {
  const left = Math.max(0, Math.ceil(Math.min(x0, x1) - 0.5));
  const right = Math.min(width, Math.floor(Math.max(x0, x1) - 0.5) + 1);
  const top = Math.max(0, Math.ceil(Math.min(y0, y1) - 0.5));
  const bottom = Math.min(height, Math.floor(Math.max(y0, y1) - 0.5) + 1);
  for (let y = top; y < bottom; y++) mask.fill(value, y * width + left, y * width + Math.max(left, right));
  return rectangleOf(left, top, right, bottom);
}

/** The inside of a polygon, by the even-odd rule; `points` are [x, y]. */
export function polygon(mask, width, height, points, value) {
  const xs = points.map((point) => point[0]);
  const ys = points.map((point) => point[1]);
  const top = Math.max(0, Math.floor(Math.min(...ys)));
  const bottom = Math.min(height, Math.ceil(Math.max(...ys)));
  for (let y = top; y < bottom; y++) {
    const centre = y + 0.5;
    const crossings = [];
    for (let i = 0; i < points.length; i++) {
      const [x0, y0] = points[i];
      const [x1, y1] = points[(i + 1) % points.length];
      if (y0 <= centre !== y1 <= centre) crossings.push(x0 + ((centre - y0) / (y1 - y0)) * (x1 - x0));
    }
    crossings.sort((a, b) => a - b);
    for (let i = 0; i + 1 < crossings.length; i += 2) {
      const from = Math.max(0, Math.ceil(crossings[i] - 0.5));
      const to = Math.min(width, Math.ceil(crossings[i + 1] - 0.5));
      if (to > from) mask.fill(value, y * width + from, y * width + to);
    }
  }
  return rectangleOf(Math.max(0, Math.floor(Math.min(...xs))), top, Math.min(width, Math.ceil(Math.max(...xs))), bottom);
}

/** The connected area (four neighbours) of pixels of the value at (x, y). */
export function fill(mask, width, height, x, y, value) {
  const column = Math.floor(x);
  const row = Math.floor(y);
  if (column < 0 || row < 0 || column >= width || row >= height) return rectangleOf(0, 0, 0, 0);
  const old = mask[row * width + column];
  let [left, top, right, bottom] = [column, row, column + 1, row + 1];
  if (old === value) return rectangleOf(0, 0, 0, 0);
  const waiting = [row * width + column];
  while (waiting.length) {
    const place = waiting.pop();
    if (mask[place] !== old) continue;
    const start = place - (place % width);
    let from = place;
    let to = place + 1;
    while (from > start && mask[from - 1] === old) from--;
    while (to < start + width && mask[to] === old) to++;
    mask.fill(value, from, to);
    for (let at = from; at < to; at++) {
      if (at >= width && mask[at - width] === old) waiting.push(at - width);
      if (at + width < mask.length && mask[at + width] === old) waiting.push(at + width);
    }
    left = Math.min(left, from - start);
    right = Math.max(right, to - start);
    top = Math.min(top, start / width);
    bottom = Math.max(bottom, start / width + 1);
  }
  return rectangleOf(left, top, right, bottom);
}

export function rectangleOf(left, top, right, bottom) {
  return { left, top, right: Math.max(left, right), bottom: Math.max(top, bottom) };
}

/** The smallest rectangle around two; null is nothing. */
export function around(first, second) {
  if (!first) return second;
  return rectangleOf(
    Math.min(first.left, second.left),
    Math.min(first.top, second.top),
    Math.max(first.right, second.right),
    Math.max(first.bottom, second.bottom),
  );
}
