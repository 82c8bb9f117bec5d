// The chat: conversations on the left, messages and what came of each prompt from the cache, settings on the right.

import { ApiError, json } from "./api.js";
import { cachedShares, missOf, newAnswer, readAnswer, sharedStart } from "./answer.js";
import { button, copyText, h, labelled, newId, saveFile, say } from "./dom.js";
import { GrowingMarkdown } from "./markdown.js";
import { problem } from "./shell.js";
import { openStore } from "./store.js";
import {
  addNode, bodyOf, endOf, FieldError, newConversation, pathTo, readFile, SAMPLING, siblingsOf, writeFile,
} from "./turns.js";
import { missWords, num, t } from "./words.js";

const MISS_PATIENCE_MS = 1500; // for the engine's word, after an answer
const MAX_READ_TOKENS = 100_000; // of a prompt that is shown as it was read
const NEAR_END_PX = 80;

export class Chat {
  #store = null;
  #conversations = new Map();
  #shown = null; // the conversation
  #models = [];
  #runs = new Map(); // by the id of the conversation
  #ids = new Map(); // of prompts and answers, by conversation and message; this visit's alone
  #reads = new Map(); // prompts as they were read: {before, behind}
  #view = null; // the elements, while the view is shown
  #saving = null;
  #draft = ""; // what is written and not sent

  // -- the view -----------------------------------------------------------------------------------------------------
  async enter(main) {
    const view = { main, turns: new Map() };
    this.#view = view;
    view.list = h("ul", { class: "list" });
    view.note = h("p", { class: "hint" });
    view.log = h("div", { class: "log", role: "log", "aria-live": "off", "aria-label": t("transcript"), tabindex: "0" });
    view.isAtEnd = true;
    view.log.addEventListener("scroll", () => {
      view.isAtEnd = view.log.scrollHeight - view.log.scrollTop - view.log.clientHeight < NEAR_END_PX;
    }, { passive: true });
    view.settings = h("aside", { class: "settings", id: newId("settings"), "aria-label": t("settings") });
    view.field = h("textarea", { rows: "1", placeholder: t("write_here"), title: t("write_keys"), "aria-label": t("message"), on: { keydown: this.#typed, input: fit } });
    view.send = h("button", { type: "submit", class: "main", text: t("send"), disabled: true });
    view.title = h("h1", { class: "title" });
    const side = h(
      "aside",
      { class: "side", id: newId("side"), "aria-label": t("conversations") },
      h("div", { class: "row" }, h("h2", { text: t("conversations") }), button(t("new_chat"), this.#new)),
      view.list,
      h(
        "div",
        { class: "row low" },
        button(t("export"), this.#export),
        button(t("import"), () => view.file.click()),
        button(t("delete_all"), this.#deleteAll),
      ),
      view.note,
    );
    view.file = h("input", { type: "file", accept: "application/json,.json", class: "unseen", tabindex: "-1", "aria-label": t("import"), on: { change: this.#import } });
    side.append(view.file);
    const form = h("form", { class: "composer", on: { submit: this.#submit } }, view.field, view.send);
    const head = h("div", { class: "head" }, this.#toggle("conversations", side), view.title, this.#toggle("settings", view.settings));
    main.append(side, h("section", { class: "talk", "aria-label": t("chat") }, head, view.log, form), view.settings);
    await this.#load();
    if (this.#view !== view) return;
    view.send.disabled = false;
    view.field.value = this.#draft;
    this.#drawAll();
    view.field.focus({ preventScroll: true });
  }

  leave() {
    if (!this.#view.send.disabled) this.#draft = this.#view.field.value;
    this.#view = null;
    this.#saveNow();
  }

  #toggle(word, panel) {
    const toggle = button(t(word), () => {
      const isOpen = panel.classList.toggle("open");
      toggle.setAttribute("aria-expanded", String(isOpen));
    }, { class: "toggle", "aria-controls": panel.id, "aria-expanded": "false" });
    return toggle;
  }

  async #load() {
    if (!this.#store) {
      this.#store = await openStore();
      for (const one of await this.#store.all()) this.#conversations.set(one.id, one);
      const newest = [...this.#conversations.values()].sort((a, b) => b.updated - a.updated)[0];
      this.#shown = newest ?? newConversation();
    }
    try {
      this.#models = (await json("/v1/models")).data.map((model) => model.id);
    } catch (error) {
      this.#view?.log.append(problem(error));
    }
  }

  #drawAll() {
    this.#drawList();
    this.#drawSettings();
    this.#drawLog();
  }

  #drawList() {
    const view = this.#view;
    if (!view) return;
    view.note.textContent = t(this.#store.isLasting ? "kept_here" : "not_lasting");
    const sorted = [...this.#conversations.values()].sort((a, b) => b.updated - a.updated);
    view.list.replaceChildren(...sorted.map((one) => {
      const title = one.title || t("untitled");
      return h(
        "li",
        {},
        button(title, () => this.#open(one), { class: "name", "aria-current": one === this.#shown ? "true" : null }),
        button("×", () => this.#delete(one), { class: "quiet", "aria-label": t("delete_named", title) }),
      );
    }));
    view.title.textContent = this.#shown.title || t("untitled");
  }

  #open(conversation) {
    this.#saveNow();
    this.#shown = conversation;
    this.#drawAll();
    this.#view.main.querySelectorAll(".open").forEach((panel) => panel.classList.remove("open"));
    this.#view.main.querySelectorAll(".toggle").forEach((toggle) => toggle.setAttribute("aria-expanded", "false"));
    this.#view.field.focus();
  }

  #new = () => {
    const model = this.#shown.settings.model;
    const made = newConversation();
    made.settings.model = model;
    this.#open(made);
  };

  async #delete(conversation) {
    this.#runs.get(conversation.id)?.controller.abort();
    this.#conversations.delete(conversation.id);
    await this.#store.remove(conversation.id);
    if (this.#shown === conversation) this.#shown = newConversation();
    if (this.#view) this.#drawAll();
  }

  #deleteAll = async () => {
    if (!this.#conversations.size || !window.confirm(t("delete_sure"))) return;
    for (const run of this.#runs.values()) run.controller.abort();
    this.#conversations.clear();
    await this.#store.clear();
    this.#shown = newConversation();
    if (this.#view) this.#drawAll();
  };

  #export = () => saveFile("mooli-conversations.json", writeFile([...this.#conversations.values()]));

  #import = async (event) => {
    const [file] = event.target.files;
    event.target.value = "";
    if (!file) return;
    try {
      const conversations = readFile(await file.text());
      for (const one of conversations) {
        this.#conversations.set(one.id, one);
        await this.#store.put(one);
      }
      if (conversations.length) this.#open(conversations[0]);
    } catch {
      this.#view?.log.append(problem(new ApiError(400, t("import_failed"))));
    }
  };

  // -- settings -----------------------------------------------------------------------------------------------------
  #drawSettings() {
    const view = this.#view;
    const { settings } = this.#shown;
    const set = (name) => (event) => {
      settings[name] = event.target.value;
      this.#save();
    };
    const area = (name, rows) => h("textarea", { rows, spellcheck: name === "system" ? null : "false", value: settings[name] ?? "", class: name === "system" ? null : "code", on: { input: set(name) } });
    const models = this.#models.length > 1
      ? labelled(t("model"), h("select", { on: { change: set("model") } }, this.#models.map((name) => h("option", { value: name, text: name, selected: name === this.#model() }))))
      : h("p", { class: "model", text: this.#models[0] ?? "" });
    const numbers = SAMPLING.map(({ name, min, max, step }) =>
      labelled(t(name), h("input", { type: "number", min, max, step: step < 1 ? "any" : step, placeholder: t("default"), value: settings[name] ?? "", on: { input: set(name) } })));
    view.settings.replaceChildren(
      h("h2", { text: t("settings") }),
      models,
      labelled(t("system"), area("system", "4")),
      h("div", { class: "numbers" }, numbers),
      labelled(t("schema"), area("schema", "3")),
      labelled(t("tools"), area("tools", "3")),
    );
  }

  #model() {
    const { model } = this.#shown.settings;
    return this.#models.includes(model) ? model : this.#models[0];
  }

  // -- messages -----------------------------------------------------------------------------------------------------
  #drawLog() {
    const view = this.#view;
    if (!view) return;
    const path = pathTo(this.#shown);
    view.turns.clear();
    const items = path.map((node) => this.#drawTurn(node));
    if (!path.length) items.push(h("div", { class: "welcome" }, h("p", { text: t("welcome") }), h("p", { class: "hint", text: t("welcome_hint") })));
    view.log.replaceChildren(...items);
    view.isAtEnd = true;
    this.#stayAtEnd();
    this.#drawSend();
    this.#shade();
  }

  #drawSend() {
    const isRunning = this.#runs.has(this.#shown.id);
    this.#view.send.textContent = t(isRunning ? "stop" : "send");
    this.#view.send.classList.toggle("stop", isRunning);
  }

  #drawTurn(node) {
    const view = this.#view;
    const run = this.#runs.get(this.#shown.id);
    const isRunning = run?.node === node;
    const who = { user: t("you"), assistant: node.model || t("model"), tool: t("tool") }[node.role];
    const turn = { node, body: h("div", { class: "body" }) };
    const foot = h("div", { class: "foot" });
    turn.element = h(
      "article",
      { class: `turn ${node.role}`, "aria-label": who, data: { node: node.id } },
      h("header", {}, h("span", { class: "who", text: who }), this.#branches(node)),
    );
    if (node.role === "assistant") {
      turn.reasoning = h("p", { class: "plain", text: node.reasoning });
      turn.thought = h("details", { class: "thought", open: isRunning }, h("summary", { text: t("thought") }), turn.reasoning);
      turn.thought.hidden = !node.reasoning;
      turn.markdown = new GrowingMarkdown(turn.body);
      if (node.content) turn.markdown.push(node.content);
      turn.calls = h("div", { class: "calls" });
      turn.stats = h("div", { class: "stats" });
      turn.read = h("div", {});
      turn.element.append(turn.thought, turn.body, turn.calls, turn.stats, turn.read);
      this.#drawCalls(turn);
      this.#drawStats(turn);
      this.#drawRead(turn);
      if (!isRunning) {
        foot.append(button(t("retry"), () => this.#retry(node), { class: "quiet" }), this.#copyButton(() => node.content));
      }
    } else {
      turn.body.classList.add("plain");
      turn.body.textContent = node.content;
      turn.element.append(turn.body);
      if (node.role === "user") {
        foot.append(button(t("edit"), () => this.#edit(turn), { class: "quiet" }), this.#copyButton(() => node.content));
      }
    }
    turn.element.append(foot);
    turn.foot = foot;
    view.turns.set(node.id, turn);
    return turn.element;
  }

  #copyButton(text) {
    const copy = button(t("copy"), async () => {
      try {
        await copyText(text());
        say(t("copied"));
        copy.textContent = t("copied");
      } catch {
        copy.textContent = t("copy_failed");
      }
    }, { class: "quiet" });
    return copy;
  }

  #branches(node) {
    const ids = siblingsOf(this.#shown, node.id);
    if (ids.length < 2) return null;
    const at = ids.indexOf(node.id);
    const go = (step) => () => {
      this.#shown.leaf = endOf(this.#shown, ids[at + step]);
      this.#save();
      this.#drawLog();
      this.#view.turns.get(ids[at + step])?.element.querySelector(`.branches button:nth-of-type(${step < 0 ? 1 : 2})`)?.focus();
    };
    return h(
      "span",
      { class: "branches", role: "group", "aria-label": t("branch", at + 1, ids.length) },
      button("‹", go(-1), { "aria-label": t("earlier_branch"), disabled: at === 0 }),
      h("span", { text: `${at + 1}/${ids.length}` }),
      button("›", go(1), { "aria-label": t("later_branch"), disabled: at === ids.length - 1 }),
    );
  }

  #drawCalls(turn) {
    const { node } = turn;
    const calls = (node.calls ?? []).filter(Boolean);
    const cards = calls.map((one) => h("div", { class: "call" }, h("span", { class: "who", text: t("calls", one.name) }), h("pre", { tabindex: "0", "aria-label": one.name }, h("code", { text: one.arguments }))));
    const isOpen = calls.length && node.id === this.#shown.leaf && !this.#runs.has(this.#shown.id) && !node.error;
    if (isOpen) {
      const fields = calls.map((one) => h("textarea", { rows: "2", class: "code" }));
      const form = h(
        "form",
        {
          on: {
            submit: (event) => {
              event.preventDefault();
              let parent = node.id;
              calls.forEach((one, i) => (parent = addNode(this.#shown, parent, { role: "tool", content: fields[i].value, call: one.id })));
              this.#run();
            },
          },
        },
        calls.map((one, i) => labelled(t("call_result", one.name), fields[i])),
        h("button", { type: "submit", text: t("send_results") }),
      );
      cards.push(form);
    }
    turn.calls.replaceChildren(...cards);
  }

  #drawStats(turn) {
    const { node } = turn;
    const { prompt, cached, firstS, perS, shared } = node.stats ?? {};
    const parts = [];
    if (prompt != null && cached != null) {
      const share = prompt ? Math.round((100 * cached) / prompt) : 0;
      const bar = h("span", { class: "bar", role: "img", "aria-label": t("cached_part", share) }, h("span"));
      bar.firstChild.style.setProperty("--share", `${share}%`);
      parts.push(bar, h("span", { class: "cached-count", text: t("from_cache", num(cached), num(prompt)) }));
    }
    if (firstS != null) parts.push(h("span", { text: t("first_token", num(firstS, 2)) }));
    if (perS != null) parts.push(h("span", { text: t("per_s", num(perS, 1)) }));
    if (shared) parts.push(h("span", { class: "shares", text: t("shares", num(shared)) }));
    const notes = [];
    if (node.why) notes.push(h("p", { class: "why", text: node.why }));
    if (node.end === "stopped") notes.push(h("p", { class: "note", text: t("stopped") }));
    if (node.end === "length") notes.push(h("p", { class: "note", text: t("cut") }));
    if (node.error) notes.push(h("p", { class: "error", role: "alert", text: node.error }));
    turn.stats.replaceChildren(h("div", { class: "figures" }, parts), ...notes);
  }

  #drawRead(turn) {
    const read = this.#reads.get(this.#nameOf(turn.node));
    if (!read) return;
    const { before, behind } = read;
    const text = h("p", { class: "read plain", tabindex: "0", role: "region", "aria-label": t("as_read") }, before && h("mark", { class: "cached", text: before }), behind);
    turn.read.replaceChildren(h("details", { class: "as-read" }, h("summary", { text: t("as_read") }), h("p", { class: "hint", text: t("as_read_hint") }), text));
  }

  /** What of the messages came from the cache when the last answer was computed. */
  #shade() {
    const view = this.#view;
    const path = pathTo(this.#shown);
    const last = path.findLastIndex((node) => node.role === "assistant" && this.#reads.has(this.#nameOf(node)));
    if (last < 0) return;
    const { before, behind } = this.#reads.get(this.#nameOf(path[last]));
    const system = this.#shown.settings.system;
    const nodes = path.slice(0, last);
    const shares = cachedShares([...(system.trim() ? [system] : []), ...nodes.map((node) => node.content)], before, behind);
    nodes.forEach((node, i) => {
      const share = shares[i + shares.length - nodes.length];
      const turn = view.turns.get(node.id);
      if (!turn || share === null) return;
      turn.element.classList.add("shaded");
      turn.element.style.setProperty("--share", `${Math.round(100 * share)}%`);
      if (node.role === "assistant" || turn.isEdited) return;
      const from = node.content.length - node.content.trimStart().length;
      const cut = share >= 1 ? node.content.length : from + Math.round(share * node.content.trim().length);
      turn.body.replaceChildren(...(cut > from ? [h("mark", { class: "cached", text: node.content.slice(0, cut) })] : []), node.content.slice(cut > from ? cut : 0));
    });
  }

  // -- doing --------------------------------------------------------------------------------------------------------
  #typed = (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      if (!this.#view.send.disabled && !this.#runs.has(this.#shown.id)) this.#view.field.form.requestSubmit();
    }
  };

  #submit = (event) => {
    event.preventDefault();
    const run = this.#runs.get(this.#shown.id);
    if (run) {
      run.controller.abort();
      return;
    }
    const text = this.#view.field.value;
    if (!text.trim()) return;
    this.#view.field.value = "";
    fit({ target: this.#view.field });
    addNode(this.#shown, this.#shown.leaf, { role: "user", content: text });
    this.#run();
  };

  #retry(node) {
    if (this.#runs.has(this.#shown.id)) return;
    this.#shown.leaf = node.parent;
    this.#run();
  }

  #edit(turn) {
    if (this.#runs.has(this.#shown.id)) return;
    const { node } = turn;
    turn.isEdited = true;
    const field = h("textarea", { value: node.content, "aria-label": t("edit"), on: { input: fit } });
    const form = h(
      "form",
      {
        class: "editor",
        on: {
          submit: (event) => {
            event.preventDefault();
            if (!field.value.trim()) return;
            addNode(this.#shown, node.parent, { role: "user", content: field.value });
            this.#run();
          },
          keydown: (event) => {
            if (event.key === "Escape") this.#drawLog();
          },
        },
      },
      field,
      h("div", { class: "row" }, h("button", { type: "submit", class: "main", text: t("save_send") }), button(t("cancel"), () => this.#drawLog())),
    );
    turn.body.replaceChildren(form);
    turn.foot.replaceChildren();
    fit({ target: field });
    field.focus();
  }

  #nameOf(node, conversation = this.#shown) {
    return `${conversation.id}/${node.id}`;
  }

  /** Have the leaf of the shown conversation answered. */
  async #run() {
    const conversation = this.#shown;
    const rid = `page-${Date.now().toString(36)}-${Math.random().toString(36).slice(2, 10)}`;
    const model = this.#model();
    let body;
    try {
      body = bodyOf(conversation, model, rid);
    } catch (error) {
      if (!(error instanceof FieldError)) throw error;
      this.#drawLog();
      this.#view.log.append(problem(new ApiError(400, t("bad_json", t(error.field), error.message))));
      return;
    }
    this.#conversations.set(conversation.id, conversation);
    const answer = newAnswer();
    // The message is the answer: it grows with it.
    const id = addNode(conversation, conversation.leaf, { role: "assistant", content: "", model });
    const node = Object.assign(conversation.nodes[id], answer);
    delete node.promptIds;
    delete node.outputIds;
    const controller = new AbortController();
    const listening = new AbortController();
    this.#runs.set(conversation.id, { controller, node, rid });
    this.#drawList();
    this.#drawLog();
    const missing = missOf(rid, listening.signal).then((miss) => {
      if (miss && !node.why) this.#explain(conversation, node, missWords(miss));
    });
    let isRead = false;
    try {
      await readAnswer(body, answer, controller.signal, (grown) => {
        Object.assign(node, { content: answer.content, reasoning: answer.reasoning, calls: answer.calls.filter(Boolean), end: answer.end, stats: answer.stats });
        if (!isRead && answer.promptIds && answer.stats.cached !== null) {
          isRead = true;
          this.#read(conversation, node, answer);
        }
        this.#grew(conversation, node, grown);
      });
    } catch (error) {
      if (error.name === "AbortError") node.end = "stopped";
      else node.error = error.status === 0 ? t("unreachable") : error.message || String(error);
    }
    this.#ids.set(this.#nameOf(node, conversation), [...(answer.promptIds ?? []), ...answer.outputIds.slice(0, -1)]); // the last one was never computed
    this.#runs.delete(conversation.id);
    this.#save(conversation);
    if (this.#shown === conversation && this.#view) {
      const turn = this.#view.turns.get(node.id);
      if (turn) turn.element.replaceWith(this.#drawTurn(node));
      this.#drawSend();
      this.#stayAtEnd();
      say(node.error || t(node.end === "stopped" ? "stopped" : "answer_done"));
    }
    setTimeout(() => listening.abort(), MISS_PATIENCE_MS);
    await missing;
  }

  #grew(conversation, node, grown) {
    if (this.#shown !== conversation) return;
    const turn = this.#view?.turns.get(node.id);
    if (!turn) return;
    if (grown.content) turn.markdown.push(grown.content);
    if (grown.reasoning) {
      turn.thought.hidden = false;
      turn.reasoning.append(grown.reasoning);
    }
    if (node.calls.length) this.#drawCalls(turn);
    const now = performance.now();
    if (!(now - turn.statsAt < 250)) {
      turn.statsAt = now;
      this.#drawStats(turn);
    }
    this.#stayAtEnd();
  }

  /** Scroll with what comes, unless the user has scrolled away. Once a frame: a token does not wait for the layout. */
  #stayAtEnd() {
    const view = this.#view;
    if (!view.isAtEnd || view.frame) return;
    view.frame = requestAnimationFrame(() => {
      view.frame = 0;
      view.log.scrollTop = view.log.scrollHeight;
    });
  }

  /** The prompt's text up to where the cache reached and behind, and what other branches have of it. */
  async #read(conversation, node, answer) {
    const { promptIds, stats } = answer;
    const onPath = new Set(pathTo(conversation, node.id).map((one) => one.id));
    let most = 0;
    let mostBefore = 0;
    for (const other of Object.values(conversation.nodes)) {
      const ids = this.#ids.get(this.#nameOf(other, conversation));
      if (!ids || other === node) continue;
      const shared = sharedStart(promptIds, ids);
      mostBefore = Math.max(mostBefore, shared);
      if (!onPath.has(other.id)) most = Math.max(most, shared);
    }
    stats.shared = most || null;
    const lost = Math.min(mostBefore, promptIds.length - 1) - stats.cached;
    if (lost > 0) this.#explain(conversation, node, t("miss_evicted", num(lost)));
    if (promptIds.length > MAX_READ_TOKENS) return;
    try {
      const cut = stats.cached;
      const tokens = cut > 0 && cut < promptIds.length ? [promptIds.slice(0, cut), promptIds.slice(cut)] : [promptIds];
      const { text } = await json("/detokenize", { body: { tokens, skip_special_tokens: false }, asks: false });
      const [before, behind] = cut > 0 ? [text[0], text[1] ?? ""] : ["", text[0]];
      this.#reads.set(this.#nameOf(node, conversation), { before, behind });
    } catch {
      return; // the counts are there without it
    }
    if (this.#shown !== conversation || !this.#view) return;
    const turn = this.#view.turns.get(node.id);
    if (turn) {
      this.#drawStats(turn);
      this.#drawRead(turn);
    }
    this.#shade();
  }

  #explain(conversation, node, words) {
    node.why = words;
    if (this.#shown !== conversation) return;
    const turn = this.#view?.turns.get(node.id);
    if (turn) this.#drawStats(turn);
  }

  // -- keeping ------------------------------------------------------------------------------------------------------
  #save(conversation = this.#shown) {
    if (!this.#conversations.has(conversation.id)) return;
    clearTimeout(this.#saving?.timer);
    if (this.#saving && this.#saving.conversation !== conversation) this.#saveNow();
    this.#saving = { conversation, timer: setTimeout(() => this.#saveNow(), 400) };
  }

  #saveNow() {
    if (!this.#saving) return;
    const { conversation, timer } = this.#saving;
    clearTimeout(timer);
    this.#saving = null;
    this.#store.put(conversation).catch((error) => this.#view?.log.append(problem(error)));
  }
}

/** As high as its text, up to a limit that the style sheet sets. */
function fit({ target }) {
  target.style.setProperty("height", "auto");
  target.style.setProperty("height", `${target.scrollHeight + 2}px`);
}
