// The list: thousands of pictures, of which only those on the screen are in the page.

import { get } from "./api.js";

const element = (id) => document.getElementById(id);
const EXTRA = 2; // rows above and below the screen

export class List {
  /** `open` is called with the number of a picture. */
  constructor(open) {
    this.open = open;
    this.items = [];
    this.order = [];
    this.held = [];
    this.chosen = 0; // place in `order`
    this.nodes = new Map();
    this.grid = element("grid");
    this.space = element("space");
    this.grid.addEventListener("scroll", () => this.draw());
    new ResizeObserver(() => this.draw()).observe(this.grid);
    for (const id of ["filter", "sort", "find"]) element(id).addEventListener("input", () => this.arrange());
    this.grid.addEventListener("keydown", (event) => this.key(event));
    this.space.addEventListener("click", (event) => {
      const node = event.target.closest(".item");
      if (node) this.open(Number(node.dataset.number));
    });
  }

  /** Shows the items of the data set: {name, clip}; their facts come later. */
  start(items) {
    this.items = items.map((item, number) => ({ ...item, number, facts: null }));
    this.arrange();
  }

  /** Takes in facts by number, as the server finds them out. */
  learn(facts) {
    for (const [number, found] of Object.entries(facts)) {
      const item = this.items[number];
      item.version = (item.version ?? 0) + (item.facts ? 1 : 0);
      item.facts = found;
      this.nodes.get(Number(number))?.remove();
      this.nodes.delete(Number(number));
    }
    if (Object.keys(facts).length) this.arrange(true);
  }

  /** Filters and sorts. While facts come in (`quietly`) the chosen picture stays chosen. */
  arrange(quietly = false) {
    const kept = this.order[this.chosen];
    const [filter, sort, text] = [element("filter").value, element("sort").value, element("find").value.toLowerCase()];
    const passes = {
      all: () => true,
      doubtful: (facts) => facts && facts.badness >= 2,
      missing: (facts) => facts?.state === "missing",
      unseen: (facts) => !facts?.reviewed,
      ok: (facts) => facts?.reviewed === "ok",
      fix: (facts) => facts?.reviewed === "fix",
      drawn: (facts) => facts?.state === "drawn",
    }[filter];
    const found = this.items.filter((item) => passes(item.facts) && item.name.toLowerCase().includes(text));
    if (sort === "worst") found.sort((a, b) => (b.facts?.badness ?? 0) - (a.facts?.badness ?? 0) || a.number - b.number);
    if (sort === "coverage") found.sort((a, b) => (a.facts?.coverage ?? -1) - (b.facts?.coverage ?? -1) || a.number - b.number);
    this.order = found.map((item) => item.number);
    this.chosen = Math.max(0, quietly ? this.order.indexOf(kept) : 0);
    const reviewed = this.items.filter((item) => item.facts?.reviewed).length;
    element("count").value = `${found.length} of ${this.items.length}, ${reviewed} reviewed`;
    this.draw();
  }

  /** Keeps the order for `neighbour`: a picture that is mended sorts elsewhere, and the way through the list goes on. */
  hold() {
    this.held = this.order;
  }

  /** The number of the picture after (1) or before (-1) another one, in the order that is held. */
  neighbour(number, step) {
    const place = this.held.indexOf(number);
    return this.held[place < 0 ? 0 : place + step];
  }

  get columns() {
    return Math.max(1, Math.floor(this.grid.clientWidth / this.cell.width));
  }

  get cell() {
    return window.matchMedia("(max-width: 800px)").matches ? { width: 172, height: 230 } : { width: 212, height: 230 };
  }

  draw() {
    const { width, height } = this.cell;
    const columns = this.columns;
    this.space.style.height = `${Math.ceil(this.order.length / columns) * height}px`;
    const first = Math.max(0, Math.floor(this.grid.scrollTop / height) - EXTRA) * columns;
    const last = (Math.ceil((this.grid.scrollTop + this.grid.clientHeight) / height) + EXTRA) * columns;
    const wanted = new Set(this.order.slice(first, last));
    for (const [number, node] of this.nodes) {
      if (!wanted.has(number)) {
        node.remove();
        this.nodes.delete(number);
      }
    }
    this.order.slice(first, last).forEach((number, index) => {
      const place = first + index;
      const node = this.nodes.get(number) ?? this.make(this.items[number]);
      node.style.transform = `translate(${(place % columns) * width}px, ${Math.floor(place / columns) * height}px)`;
      node.setAttribute("aria-selected", String(place === this.chosen));
      node.setAttribute("aria-posinset", String(place + 1));
      node.setAttribute("aria-setsize", String(this.order.length));
    });
    this.grid.setAttribute("aria-activedescendant", `item-${this.order[this.chosen]}`);
  }

  make({ number, name, clip, facts, version }) {
    const node = document.createElement("div");
    Object.assign(node, { className: "item", id: `item-${number}` });
    node.dataset.number = number;
    node.setAttribute("role", "option");
    const image = document.createElement("img");
    Object.assign(image, { alt: "", loading: "lazy", src: `api/thumb/${number}?v=${version ?? 0}` });
    const title = document.createElement("b");
    title.textContent = name + (clip ? " (clip)" : "");
    const coverage = document.createElement("span");
    const states = { missing: "no mask", unreadable: "cannot be read", drawn: "drawn, ", mask: "" };
    const share = facts?.coverage == null ? "" : `${(facts.coverage * 100).toFixed(1)}% covered`;
    coverage.textContent = facts ? states[facts.state] + share + (facts.reviewed ? `, ${facts.reviewed}` : "") : " ";
    if (facts?.reviewed === "ok") coverage.className = "ok";
    const problem = document.createElement("span");
    problem.className = "bad";
    const said = facts ? [...facts.problems, ...facts.marks] : [];
    problem.textContent = said[0] ?? "";
    problem.title = said.join("\n");
    node.append(image, title, coverage, problem);
    this.space.append(node);
    this.nodes.set(number, node);
    return node;
  }

  key(event) {
    const columns = this.columns;
    const page = columns * Math.max(1, Math.floor(this.grid.clientHeight / this.cell.height));
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns, PageDown: page, PageUp: -page };
    if (event.key === "Enter" && this.order.length) {
      this.open(this.order[this.chosen]);
    } else if (event.key in steps || event.key === "Home" || event.key === "End") {
      const target = { Home: 0, End: Infinity }[event.key] ?? this.chosen + steps[event.key];
      this.choose(Math.min(this.order.length - 1, Math.max(0, target)));
    } else {
      return;
    }
    event.preventDefault();
  }

  choose(place) {
    this.chosen = place;
    const { height } = this.cell;
    const top = Math.floor(place / this.columns) * height;
    if (top < this.grid.scrollTop) this.grid.scrollTop = top;
    else if (top + height > this.grid.scrollTop + this.grid.clientHeight) this.grid.scrollTop = top + height - this.grid.clientHeight;
    this.draw();
  }

  /** Chooses a picture by its number, after it was edited. */
  show(number) {
    const place = this.order.indexOf(number);
    if (place >= 0) this.choose(place);
  }
}

/** Asks the server for what is new, again and again; `learn` gets it. */
export function watch(learn) {
  let position = 0;
  const step = async () => {
    let wait = 1500;
    try {
      const news = await get(`api/news?since=${position}`);
      position = news.position;
      learn(news);
      if (news.task.running || news.looked < news.total) wait = 300;
    } catch {
      wait = 5000;
    }
    setTimeout(step, wait);
  };
  step();
}
