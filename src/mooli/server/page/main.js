// The page at /: which view is shown, by the fragment of the address.

import { setAsker } from "./api.js";
import { Chat } from "./chat.js";
import { askForKey, drawTop } from "./shell.js";

const VIEWS = ["chat", "tree", "now"];
const main = document.getElementById("main");
let shown = null;
const chat = new Chat();

const nameOf = (hash) => (VIEWS.includes(hash.slice(1).split("/")[0]) ? hash.slice(1).split("/")[0] : "chat");

async function viewOf(name) {
  if (name === "chat") return chat;
  if (name === "tree") return new (await import("./tree.js")).Tree();
  return new (await import("./now.js")).Now();
}

async function show() {
  const name = nameOf(location.hash);
  const tabs = VIEWS.map((view) => ({ href: `#${view}`, word: view, isHere: view === name }));
  drawTop([...tabs, { href: "docs", word: "api", isHere: false }], show);
  shown?.leave();
  shown = null;
  const view = await viewOf(name);
  if (nameOf(location.hash) !== name) return; // another one was chosen meanwhile
  shown?.leave();
  shown = view;
  main.className = name;
  main.replaceChildren();
  view.enter(main, location.hash.slice(1).split("/").slice(1).join("/"));
}

setAsker(askForKey);
window.addEventListener("hashchange", show);
window.addEventListener("pagehide", () => shown?.leave());
show();
