// The page: a list of pictures, and the editor of one of them. The address after # says which is open.

import { get, post, say } from "./api.js";
import { Editor } from "./editor.js";
import { List, watch } from "./list.js";

const element = (id) => document.getElementById(id);

const list = new List((number) => (location.hash = `#${number}`));
const editor = new Editor({
  facts: (number) => {
    const item = list.items[number];
    return { name: item.name, reviewed: item.facts?.reviewed ?? "", problems: item.facts ? [...item.facts.problems, ...item.facts.marks] : [] };
  },
  go: (number, step) => {
    const next = list.neighbour(number, step);
    if (next === undefined) say(step > 0 ? "this is the last one" : "this is the first one");
    else location.hash = `#${next}`;
  },
  leave: (number) => {
    location.hash = "";
    list.show(number);
  },
});

async function route() {
  const number = /^#\d+$/.test(location.hash) ? Number(location.hash.slice(1)) : null;
  const editing = number !== null && number < list.items.length;
  if (editing && element("edit-view").hidden) list.hold();
  element("list-view").hidden = editing;
  element("edit-view").hidden = !editing;
  if (!editing) {
    list.draw();
    list.grid.focus();
    return;
  }
  try {
    await editor.open(number);
    editor.surface.canvas.focus({ preventScroll: true });
  } catch (error) {
    say(error.message);
    location.hash = "";
  }
}

let running = false;
function showTask(task) {
  const place = element("task");
  if (task.running || running) {
    place.hidden = false;
    const bar = place.querySelector("progress");
    bar.hidden = !task.running;
    if (task.total) Object.assign(bar, { max: task.total, value: task.done });
    else bar.removeAttribute("value");
    place.querySelector("span").textContent = task.running ? task.name : `${task.name}: ${task.text}`;
    if (running && !task.running) {
      setTimeout(() => (place.hidden = true), 15000);
      if (editor.number !== undefined && !element("edit-view").hidden) editor.reload();
    }
  }
  running = task.running;
  document.body.dataset.task = task.running ? "running" : task.failed ? "failed" : "idle";
}

element("write-caches").addEventListener("click", async () => {
  try {
    await post("api/cache");
  } catch (error) {
    say(error.message);
  }
});
window.addEventListener("hashchange", route);

const started = performance.now();
const { items, labels, problems, can_cache } = await get("api/items");
list.start(items);
editor.setLabels(labels);
document.body.dataset.listMs = String(performance.now() - started);
element("write-caches").hidden = !can_cache;
if (problems.length) say(problems.join("; "));
await route();
watch((news) => {
  list.learn(news.facts);
  document.body.dataset.looked = `${news.looked}/${news.total}`;
  showTask(news.task);
  if (!element("edit-view").hidden && editor.history && String(editor.number) in news.facts) editor.refresh();
});
document.body.dataset.ready = "yes";
