// Elements without markup: every text becomes a text node, so nothing that a model or a user wrote is ever interpreted.

/** An element. props: `class`, `text`, `on` ({event: listener}), `data` ({name: value}), and attributes; true is an
 * attribute without a value, null and false leave it out. children: nodes, texts, lists of them, null. */
export function h(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "class") element.className = value;
    else if (name === "text") element.textContent = value;
    else if (name === "on") for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    else if (name === "data") Object.assign(element.dataset, value);
    else if (name === "value") element.value = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  append(element, children);
  return element;
}

function append(element, children) {
  for (const child of children) {
    if (Array.isArray(child)) append(element, child);
    else if (child !== null && child !== undefined && child !== false) element.append(child);
  }
}

/** A button of words. */
export const button = (text, click, props = {}) => h("button", { type: "button", text, on: { click }, ...props });

let count = 0;
/** A name that no other element has. */
export const newId = (stem) => `${stem}-${++count}`;

/** A labelled field: [label, field]. hint: a sentence below it. */
export function labelled(label, field, hint = null) {
  field.id ||= newId("field");
  const told = hint && h("small", { class: "hint", id: `${field.id}-hint`, text: hint });
  if (told) field.setAttribute("aria-describedby", told.id);
  return h("div", { class: "field" }, h("label", { for: field.id, text: label }), field, told);
}

/** Tell who listens to a screen. */
export function say(text) {
  document.getElementById("said").textContent = text;
}

/** To the clipboard, also where the page came over plain HTTP. */
export async function copyText(text) {
  if (navigator.clipboard && window.isSecureContext) return navigator.clipboard.writeText(text);
  const area = h("textarea", { class: "unseen", "aria-hidden": "true", value: text });
  document.body.append(area);
  area.select();
  const isDone = document.execCommand("copy");
  area.remove();
  if (!isDone) throw new Error("copy");
}

/** Have a text saved as a file. */
export function saveFile(name, text, type = "application/json") {
  const url = URL.createObjectURL(new Blob([text], { type }));
  const link = h("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

/** Storage of the browser, which may be switched off. kind: "localStorage" or "sessionStorage". */
export function kept(kind) {
  try {
    const store = window[kind];
    store.getItem("mooli");
    return store;
  } catch {
    const values = new Map();
    return {
      getItem: (name) => values.get(name) ?? null,
      setItem: (name, value) => values.set(name, value),
      removeItem: (name) => values.delete(name),
    };
  }
}
