// Requests to the server. Addresses are relative, so that the token in the page's own address goes along.

export class Refused extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export async function ask(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Refused("the server does not answer: is masked-loss edit still running?", 0);
  }
  if (!answer.ok) {
    const found = await answer.json().catch(() => ({}));
    throw new Refused(found.error ?? `error ${answer.status}`, answer.status);
  }
  return answer;
}

export const get = async (path) => (await ask(path)).json();
export const post = async (path, body) => (await ask(path, { method: "POST", body })).json();

/** base64 to an array of numbers; `kind` is a typed array. */
export function decode(text, kind) {
  const raw = atob(text);
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return new kind(bytes.buffer);
}

let clearing;
/** Tells the user something, for a few seconds; screen readers hear it. */
export function say(text) {
  const place = document.getElementById("say");
  place.textContent = text;
  clearTimeout(clearing);
  clearing = setTimeout(() => (place.textContent = ""), 6000);
}

/** Asks a question with a few answers; resolves to the chosen one, or to "" when the dialog is closed. */
export function choose(text, answers) {
  const dialog = document.getElementById("question");
  dialog.querySelector("p").textContent = text;
  const form = dialog.querySelector("form");
  form.replaceChildren(
    ...answers.map((answer) => {
      const button = document.createElement("button");
      button.value = button.textContent = answer;
      return button;
    }),
  );
  dialog.showModal();
  return new Promise((resolve) => {
    form.onsubmit = (event) => resolve(event.submitter.value);
    // The event comes late: it may be that of the question before, with this one open already.
    dialog.onclose = () => dialog.open || resolve("");
  });
}
