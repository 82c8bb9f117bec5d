// The cache as it is now: a picture that can be walked by mouse or keys, the same as a table, and what just happened.

import { json } from "./api.js";
import { button, h, labelled, newId, say } from "./dom.js";
import { follow, Forest } from "./forest.js";
import { draw, hit, layOut } from "./icicle.js";
import { problem } from "./shell.js";
import { missWords, num, span, t } from "./words.js";

const STEPS = 12;
const ROW_PX = 26;
const TABLE_ROWS = 100;
const LABEL_TOKENS = 48;
const TEXT_TOKENS = 512;
const LABELS_AT_ONCE = 24; // texts asked for, for bars that have room for them
const LABEL_PAUSE_MS = 1500;

export class Tree {
  #forest = new Forest();
  #layout = layOut(this.#forest);
  #layoutOf = -1;
  #view = { left: 0, top: 0, perToken: 1, perRow: ROW_PX };
  #isFitted = true;
  #selected = null;
  #followed = null; // a request
  #answers = new Map();
  #found = new Set();
  #texts = new Map(); // beginnings of nodes, for their bars
  #asked = 0;
  #page = 0;
  #ending = new AbortController();
  #frame = 0;

  enter(main) {
    const view = (this.shown = { main });
    view.live = h("span", { class: "live", text: t("reconnecting") });
    view.summary = h("span", {});
    view.canvas = h("canvas", { tabindex: "0", role: "application", "aria-label": t("tree_canvas") });
    view.help = h("p", { class: "unseen", id: newId("help"), text: t("tree_help") });
    view.canvas.setAttribute("aria-describedby", view.help.id);
    view.empty = h("p", { class: "empty", text: t("loading") });
    view.picture = h("div", { class: "picture" }, view.canvas, view.empty, view.help);
    view.tabled = h("div", { class: "tabled", tabindex: "0", role: "region", "aria-label": t("as_table") });
    view.tabled.hidden = true;
    view.asTable = button(t("as_table"), () => this.#toggleTable(), { "aria-pressed": "false" });
    const bar = h(
      "div",
      { class: "treebar" },
      h("h1", { text: t("tree_canvas") }),
      view.live,
      view.summary,
      h(
        "div",
        { class: "row" },
        button("+", () => this.#zoom(1.5), { "aria-label": t("zoom_in") }),
        button("−", () => this.#zoom(1 / 1.5), { "aria-label": t("zoom_out") }),
        button(t("fit"), () => this.#fit()),
        view.asTable,
      ),
    );
    main.append(bar, view.picture, view.tabled, this.#drawBeside());
    this.#listen();
    this.#readColours();
    this.#observer = new ResizeObserver(() => this.#plan());
    this.#observer.observe(view.picture);
    this.#recolour = () => {
      this.#readColours();
      this.#plan();
    };
    window.addEventListener("themechange", this.#recolour);
    this.#scheme = matchMedia("(prefers-color-scheme: dark)");
    this.#scheme.addEventListener("change", this.#recolour);
    this.#clock = setInterval(() => this.#plan(), 1000); // what was just used fades
    follow(this.#forest, this.#ending.signal, () => this.#changed(), (isLive, error) => {
      view.live.classList.toggle("on", isLive);
      view.live.textContent = t(isLive ? "live" : "reconnecting");
      if (error) view.empty.replaceChildren(problem(error));
      view.empty.hidden = isLive && this.#forest.nodes.size > 0;
    });
  }

  #observer;
  #recolour;
  #scheme;
  #clock;

  leave() {
    this.#ending.abort();
    clearInterval(this.#clock);
    cancelAnimationFrame(this.#frame);
    this.#observer.disconnect();
    window.removeEventListener("themechange", this.#recolour);
    this.#scheme.removeEventListener("change", this.#recolour);
    this.shown = null;
  }

  // -- beside the picture -------------------------------------------------------------------------------------------
  #drawBeside() {
    const view = this.shown;
    view.node = h("div", {}, h("p", { class: "hint", text: t("select_node") }));
    view.requests = h("ul", {});
    view.evicted = h("ul", {});
    view.happened = h("ul", {});
    view.prompt = h("textarea", { rows: "3" });
    view.answer = h("p", { role: "status", class: "hint" });
    const form = h(
      "form",
      { on: { submit: (event) => this.#find(event) } },
      labelled(t("prompt"), view.prompt),
      h("button", { type: "submit", text: t("find") }),
      view.answer,
    );
    const legend = h(
      "p",
      { class: "legend" },
      [["new", "legend_now"], ["old", "legend_old"], ["held", "legend_locked"], ["answer", "legend_answer"], ["disk", "legend_disk"], ["kept", "legend_kept"]].map(([kind, word]) =>
        h("span", {}, h("span", { class: `swatch ${kind}`, "aria-hidden": "true" }), t(word))),
    );
    const part = (title, ...inner) => h("section", {}, h("h2", { text: t(title) }), inner);
    return h(
      "aside",
      { class: "beside", "aria-label": t("node") },
      legend,
      part("node", view.node),
      part("requests_here", view.requests),
      part("who_shares", form),
      part("evicted", view.evicted),
      part("happened", view.happened),
    );
  }

  #changed() {
    const view = this.shown;
    if (!view) return;
    const { forest } = { forest: this.#forest };
    if (this.#layoutOf !== forest.changes) {
      this.#layout = layOut(forest);
      this.#layoutOf = forest.changes;
    }
    if (this.#selected !== null && !forest.nodes.has(this.#selected)) this.#selected = null;
    view.empty.hidden = forest.nodes.size > 0;
    if (!forest.nodes.size) view.empty.textContent = t("tree_empty");
    let [tokens, stored] = [0, 0];
    for (const node of forest.nodes.values()) {
      tokens += node.tokens;
      stored += node.stored;
    }
    this.#answers = forest.answers();
    const { pages } = forest;
    view.summary.textContent = (stored ? `${t("pages_on_disk", num(stored))} · ` : "") + t("tree_summary", num(forest.nodes.size), num(tokens), num(pages && pages.total - pages.free), num(pages?.total), num(pages?.free));
    view.main.dataset.nodes = forest.nodes.size;
    this.#drawRequests();
    this.#drawHappened();
    if (this.#followed !== null) this.#centre(this.#nodeOfFollowed());
    if (!view.tabled.hidden) this.#drawTable();
    this.#plan();
  }

  #drawRequests() {
    const view = this.shown;
    const items = this.#forest.requests.slice(0, 50).map((one) => {
      const isHere = this.#followed === one.id;
      return h(
        "li",
        {},
        h("span", { class: "mono", text: one.id.slice(0, 24) }),
        ` ${num(one.computed_tokens ?? 0)}/${num((one.prompt_tokens ?? 0) + (one.output_tokens ?? 0))} `,
        one.guessed_tokens ? `${t("guesses", num(one.right_guesses ?? 0), num(one.guessed_tokens))} ` : "",
        button(t(isHere ? "unfollow" : "follow"), () => this.#followRequest(isHere ? null : one.id), { "aria-pressed": String(isHere) }),
      );
    });
    keepFocus(view.requests, () => view.requests.replaceChildren(...(items.length ? items : [h("li", { class: "hint", text: t("no_requests") })])));
  }

  #drawHappened() {
    const view = this.shown;
    const { evicted, happened } = this.#forest;
    const gone = evicted.slice(0, 30).map((one) => {
      const known = this.#texts.get(one.node)?.text;
      return h("li", { title: known ?? null, text: t("evicted_line", num(one.tokens), num(one.start ?? 0), span(one.idle_s ?? 0)) + (one.stored ? t("kept_on_disk", num(one.stored), num(one.pages)) : "") });
    });
    view.evicted.replaceChildren(...(gone.length ? gone : [h("li", { class: "hint", text: t("evicted_none") })]));
    const lines = happened.filter((one) => one.what === "began" || one.what === "ended").slice(0, 12).map((one) => {
      const id = one.id.slice(0, 20);
      return h("li", {
        text: one.what === "began"
          ? t("began_line", id, num(one.cached_tokens ?? 0), num(one.prompt_tokens ?? 0), missWords(one.miss))
          : t("ended_line", id, one.reason, num(one.output_tokens ?? 0), num(one.after_s, 2)),
      });
    });
    view.happened.replaceChildren(...(lines.length ? lines : [h("li", { class: "hint", text: t("evicted_none") })]));
  }

  async #find(event) {
    event.preventDefault();
    const view = this.shown;
    const prompt = view.prompt.value;
    if (!prompt) return;
    try {
      const found = await json("/v1/cache/find", { body: { prompt } });
      this.#found = new Set(found.path ?? []);
      const share = found.found_tokens ?? 0;
      const words = [share ? t("found", num(share), num(found.tokens)) : t("found_none", num(found.tokens))];
      if (found.requests?.length) words.push(t("found_by", found.requests.slice(0, 8).join(", ")));
      if (found.miss) words.push(missWords(found.miss));
      view.answer.textContent = words.join(" ");
      const last = (found.path ?? []).at(-1);
      if (last !== undefined && this.#forest.nodes.has(last)) this.#select(last, true);
    } catch (error) {
      view.answer.textContent = error.message;
    }
    this.#plan();
  }

  // -- the picture --------------------------------------------------------------------------------------------------
  #readColours() {
    const style = getComputedStyle(document.documentElement);
    const read = (name) => style.getPropertyValue(name).trim();
    const parts = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
    const [old, recent] = [parts(read("--soft")), parts(read("--leaf"))];
    const mixed = Array.from({ length: STEPS }, (_, step) => old.map((value, i) => Math.round(value + ((recent[i] - value) * step) / (STEPS - 1))));
    const light = ([r, g, b]) => 0.2126 * (r / 255) ** 2.2 + 0.7152 * (g / 255) ** 2.2 + 0.0722 * (b / 255) ** 2.2;
    this.colours = {
      steps: STEPS,
      of: mixed.map((colour) => `rgb(${colour.join(" ")})`),
      inkOn: mixed.map((colour) => (light(colour) > 0.18 ? "#0d1a11" : "#ffffff")),
      held: read("--warn"),
      paper: read("--paper"),
      disk: read("--disk"),
      answer: read("--answer"),
      chosen: read("--ink"),
    };
  }

  #plan() {
    if (this.#frame || !this.shown) return;
    this.#frame = requestAnimationFrame(() => {
      this.#frame = 0;
      this.#draw();
    });
  }

  #draw() {
    const view = this.shown;
    if (!view || view.picture.hidden) return;
    const width = view.picture.clientWidth;
    const height = view.picture.clientHeight;
    const scale = window.devicePixelRatio || 1;
    if (view.canvas.width !== Math.round(width * scale) || view.canvas.height !== Math.round(height * scale)) {
      view.canvas.width = Math.round(width * scale);
      view.canvas.height = Math.round(height * scale);
    }
    if (this.#isFitted) this.#fitTo(width, height);
    const context = view.canvas.getContext("2d");
    context.setTransform(scale, 0, 0, scale, 0, 0);
    const path = new Set(this.#followed === null ? [] : this.#forest.pathTo(this.#nodeOfFollowed()));
    const marks = { selected: this.#selected, path, found: this.#found, answers: this.#answers };
    const seen = draw(context, { width, height }, this.#layout, this.#view, this.colours, marks, Date.now() / 1000, (node) => this.#labelOf(node));
    Object.assign(view.canvas.dataset, { rects: seen.rects, stored: seen.stored, answers: seen.answers, retained: seen.retained, read: this.#texts.size });
    this.#readLabels(seen.wide);
  }

  #labelOf(node) {
    const known = this.#texts.get(node.id);
    return known && known.start === node.start && known.text ? known.text.replace(/\s+/g, " ") : num(node.tokens);
  }

  /** Ask for the beginnings of the widest bars, a few at a time. */
  async #readLabels(nodes) {
    const now = performance.now();
    if (now - this.#asked < LABEL_PAUSE_MS) return;
    const wanted = nodes.filter((node) => this.#texts.get(node.id)?.start !== node.start).slice(0, LABELS_AT_ONCE);
    if (!wanted.length) return;
    this.#asked = now;
    for (const node of wanted) {
      if (this.#ending.signal.aborted) return;
      const text = await this.#textOf(node, LABEL_TOKENS);
      this.#texts.set(node.id, { start: node.start, text: text?.text ?? "" });
    }
    if (this.#texts.size > 5000) for (const id of this.#texts.keys()) if (!this.#forest.nodes.has(id)) this.#texts.delete(id);
    this.#plan();
  }

  async #textOf(node, tokens) {
    try {
      return await json(`/v1/cache/nodes/${node.id}?max_tokens=${tokens}`, { signal: this.#ending.signal, asks: false });
    } catch {
      return null;
    }
  }

  #fitTo(width, height) {
    const { numRows, maxEnd } = this.#layout;
    this.#view = { left: 0, top: 0, perToken: (width - 4) / Math.max(maxEnd, 1), perRow: Math.min(ROW_PX * 2, height / Math.max(numRows, 1)) };
  }

  #fit() {
    this.#isFitted = true;
    this.#plan();
  }

  #zoom(factor, x = this.shown.picture.clientWidth / 2, y = this.shown.picture.clientHeight / 2) {
    const view = this.#view;
    const token = view.left + x / view.perToken;
    const row = view.top + y / view.perRow;
    view.perToken = Math.min(Math.max(view.perToken * factor, 1e-4), 60);
    view.perRow = Math.min(Math.max(view.perRow * factor, 1e-3), 90);
    view.left = token - x / view.perToken;
    view.top = row - y / view.perRow;
    this.#isFitted = false;
    this.#bound();
    this.#plan();
  }

  #move(x, y) {
    this.#view.left += x / this.#view.perToken;
    this.#view.top += y / this.#view.perRow;
    this.#isFitted = false;
    this.#bound();
    this.#plan();
  }

  #bound() {
    const view = this.#view;
    view.left = Math.max(0, Math.min(view.left, this.#layout.maxEnd - 20 / view.perToken));
    view.top = Math.max(0, Math.min(view.top, this.#layout.numRows - 20 / view.perRow));
  }

  /** Bring a node into the picture, if it is not. */
  #centre(id) {
    const i = this.#layout.place.get(id);
    if (i === undefined || this.#isFitted) return;
    const view = this.#view;
    const { clientWidth: width, clientHeight: height } = this.shown.picture;
    const node = this.#layout.nodes[i];
    const x = (node.start + node.tokens - view.left) * view.perToken;
    const y = (this.#layout.row[i] + this.#layout.rows[i] / 2 - view.top) * view.perRow;
    if (x < 0 || x > width) view.left += (x - width * 0.6) / view.perToken;
    if (y < 0 || y > height) view.top += (y - height / 2) / view.perRow;
    this.#bound();
  }

  // -- hands --------------------------------------------------------------------------------------------------------
  #listen() {
    const { canvas } = this.shown;
    let from = null;
    let pointing = 0;
    canvas.addEventListener("pointerdown", (event) => {
      from = { x: event.clientX, y: event.clientY, isMoved: false };
      canvas.setPointerCapture(event.pointerId);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (from) {
        const [x, y] = [event.clientX - from.x, event.clientY - from.y];
        if (!from.isMoved && Math.hypot(x, y) < 4) return;
        this.#move(-x, -y);
        from = { x: event.clientX, y: event.clientY, isMoved: true };
        return;
      }
      clearTimeout(pointing);
      const { offsetX, offsetY } = event;
      pointing = setTimeout(() => {
        const node = this.shown && hit(this.#layout, this.#view, offsetX, offsetY);
        if (node && node.id !== this.#selected) this.#select(node.id, false);
      }, 80);
    });
    canvas.addEventListener("pointerup", (event) => {
      const isClick = from && !from.isMoved;
      from = null;
      if (!isClick) return;
      const node = hit(this.#layout, this.#view, event.offsetX, event.offsetY);
      if (node) {
        this.#select(node.id, false);
        this.#followRequest(this.#forest.requestsIn(node.id)[0]?.id ?? null);
      }
    });
    canvas.addEventListener("pointercancel", () => (from = null));
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      if (event.ctrlKey) this.#zoom(Math.exp(-event.deltaY / 300), event.offsetX, event.offsetY);
      else this.#move(event.shiftKey ? event.deltaY : event.deltaX, event.shiftKey ? 0 : event.deltaY);
    }, { passive: false });
    canvas.addEventListener("keydown", (event) => this.#key(event));
  }

  #key(event) {
    const { key } = event;
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (key === "+" || key === "=") this.#zoom(1.3);
    else if (key === "-") this.#zoom(1 / 1.3);
    else if (key === "0") this.#fit();
    else if (key === "Escape") this.#followRequest(null);
    else if (key === "Enter" && this.#selected !== null) this.#followRequest(this.#forest.requestsIn(this.#selected)[0]?.id ?? null);
    else if (key.startsWith("Arrow")) this.#walk(key.slice(5));
    else return;
    event.preventDefault();
  }

  #walk(way) {
    const layout = this.#layout;
    if (!layout.nodes.length) return;
    const node = this.#forest.nodes.get(this.#selected);
    if (!node) {
      this.#select(layout.nodes[0].id, true);
      return;
    }
    const beside = layout.children.get(node.parent) ?? layout.roots;
    const at = beside.indexOf(node);
    const next = {
      Left: layout.place.has(node.parent) ? layout.nodes[layout.place.get(node.parent)] : null,
      Right: layout.children.get(node.id)?.[0],
      Up: beside[at - 1],
      Down: beside[at + 1],
    }[way];
    if (next) this.#select(next.id, true);
  }

  async #select(id, isSaid) {
    this.#selected = id;
    const node = this.#forest.nodes.get(id);
    const view = this.shown;
    const requests = this.#forest.requestsIn(id);
    const used = node.locks > 0 ? t("in_use") : t("ago", span(Date.now() / 1000 - node.used));
    const answer = this.#answers.get(id);
    const words = [
      t("node_said", id, num(node.start), num(node.start + node.tokens), used, node.locks),
      node.stored ? t("stored_said", num(node.stored), num(node.pages)) : "",
      node.retained ? t("legend_kept") : "",
      answer === undefined ? "" : t("answer_said", num(answer)),
    ].filter(Boolean).join(", ");
    if (isSaid) {
      say(words);
      this.#centre(id);
    }
    this.#plan();
    const text = h("pre", { tabindex: "0", "aria-label": t("node"), text: this.#texts.get(id)?.text || "…" });
    view.node.replaceChildren(
      h("p", { text: words }),
      h("p", { class: "hint", text: `${t("namespace")}: ${this.#forest.namespaces.get(node.namespace) ?? "–"} · ${t("pages")}: ${num(node.pages)}${requests.length ? ` · ${requests.map((one) => one.id.slice(0, 20)).join(", ")}` : ""}` }),
      text,
    );
    const told = await this.#textOf(node, TEXT_TOKENS);
    if (this.#selected !== id || !this.shown) return;
    text.textContent = told ? told.text + (told.is_cut ? t("text_cut") : "") : t("text_gone");
    if (isSaid && told) say(`${words}. ${told.text.slice(0, 200)}`);
  }

  #nodeOfFollowed() {
    return this.#forest.requests.find((one) => one.id === this.#followed)?.node ?? null;
  }

  #followRequest(id) {
    if (id === this.#followed) return;
    this.#followed = id;
    if (id !== null) say(t("following", id));
    this.#drawRequests();
    this.#plan();
  }

  // -- the table ----------------------------------------------------------------------------------------------------
  #toggleTable() {
    const view = this.shown;
    view.tabled.hidden = !view.tabled.hidden;
    view.picture.hidden = !view.tabled.hidden;
    view.asTable.textContent = t(view.tabled.hidden ? "as_table" : "as_picture");
    view.asTable.setAttribute("aria-pressed", String(!view.tabled.hidden));
    if (!view.tabled.hidden) this.#drawTable();
    else this.#plan();
  }

  #drawTable() {
    const { nodes } = this.#layout;
    const last = Math.max(Math.ceil(nodes.length / TABLE_ROWS) - 1, 0);
    this.#page = Math.min(this.#page, last);
    const from = this.#page * TABLE_ROWS;
    const now = Date.now() / 1000;
    const rows = nodes.slice(from, from + TABLE_ROWS).map((node) => {
      const cells = [node.parent ?? "–", num(node.start), num(node.tokens), num(node.pages), num(node.stored), node.locks ? t("in_use") : t("ago", span(now - node.used)), node.locks, node.retained ? "✓" : "", this.#forest.namespaces.get(node.namespace) ?? "–"];
      return h("tr", {}, h("td", {}, button(String(node.id), () => this.#select(node.id, true))), cells.map((text) => h("td", { text })));
    });
    const go = (step) => () => {
      this.#page += step;
      this.#drawTable();
    };
    const heads = ["node", "parent", "start", "tokens", "pages", "on_disk", "idle", "locks", "legend_kept", "namespace"].map((word) => h("th", { scope: "col", text: t(word) }));
    const { tabled } = this.shown;
    keepFocus(tabled, () => tabled.replaceChildren(
      h(
        "div",
        { class: "row" },
        button(t("earlier"), go(-1), { disabled: this.#page === 0 }),
        h("span", { text: t("rows", num(nodes.length ? from + 1 : 0), num(Math.min(from + TABLE_ROWS, nodes.length)), num(nodes.length)) }),
        button(t("later"), go(1), { disabled: this.#page >= last }),
      ),
      h("table", {}, h("thead", {}, h("tr", {}, heads)), h("tbody", {}, rows)),
    ));
  }
}

/** Draw a list anew, and give the focus back to the button at the same place. */
function keepFocus(element, redraw) {
  const buttons = () => [...element.querySelectorAll("button")];
  const at = buttons().indexOf(document.activeElement);
  redraw();
  if (at >= 0) buttons()[Math.min(at, buttons().length - 1)]?.focus();
}
