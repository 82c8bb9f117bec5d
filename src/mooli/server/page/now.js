// What the server does now: figures, requests, the last hour, the log, the configuration.

import { BASE, json } from "./api.js";
import { h, labelled } from "./dom.js";
import { problem } from "./shell.js";
import { missWords, num, percent, span, t } from "./words.js";

const EVERY_MS = 2000;
const OWN = / (GET \/v1\/status|POST \/v1\/logs) 200 /; // lines of these looks themselves
const KEPT_LINES = 1000;
const KEPT_SPEEDS = 120;

export class Now {
  #timer = 0;
  #speeds = [];
  #lastLine = 0;
  #hasLog = true;
  #ending = new AbortController();

  enter(main) {
    const view = (this.shown = {});
    view.title = h("h1", { text: t("now") });
    view.problem = h("div", {});
    view.tiles = h("div", { class: "tiles" });
    view.requests = h("div", {});
    view.hour = h("div", {});
    view.log = h("pre", { class: "logtail", tabindex: "0", role: "region", "aria-label": t("log") });
    view.logNote = h("p", { class: "hint" });
    view.config = h("div", {});
    view.speed = h("canvas", { role: "img", "aria-label": t("speed") });
    const part = (title, ...inner) => h("section", { class: "part" }, h("h2", { text: t(title) }), inner);
    const link = (path, text = path) => h("li", {}, h("a", { href: new URL(path.slice(1), BASE).href, text }));
    main.append(
      view.title,
      view.problem,
      view.tiles,
      part("requests", view.requests),
      part("last_hour", view.hour),
      part("log", view.logNote, view.log),
      part("configuration", view.config),
      part("links", h("ul", {}, link("/docs"), link("/metrics"), link("/v1/loads"), link("/openapi.json"))),
    );
    this.#look();
    this.#readConfig();
  }

  leave() {
    this.#ending.abort();
    clearTimeout(this.#timer);
    this.shown = null;
  }

  async #look() {
    const view = this.shown;
    try {
      if (!document.hidden) {
        const status = await json("/v1/status", { signal: this.#ending.signal });
        if (!this.shown) return;
        view.problem.replaceChildren(status.is_draining ? h("p", { class: "error", text: t("draining") }) : "");
        this.#draw(status);
        if (this.#hasLog) await this.#readLog();
      }
    } catch (error) {
      if (!this.shown) return;
      view.problem.replaceChildren(problem(error));
    }
    if (this.shown) this.#timer = setTimeout(() => this.#look(), EVERY_MS);
  }

  #draw(status) {
    const view = this.shown;
    view.title.textContent = `${status.model} · Mooli ${status.version} · ${t("uptime", span(status.uptime_s))}`;
    const { pages = {}, cache = {}, last_hour: hour = {} } = status;
    this.#speeds.push(status.tokens_per_s ?? 0);
    if (this.#speeds.length > KEPT_SPEEDS) this.#speeds.shift();
    const tile = (word, big, small) => h("div", { class: "tile" }, h("h2", { text: t(word) }), h("p", { class: "big", text: big }), h("small", {}, small));
    view.tiles.replaceChildren(
      tile("requests", `${num(status.running ?? 0)}`, `${t("running")} · ${num(status.waiting ?? 0)} ${t("waiting")}`),
      tile("speed", t("per_s", num(status.tokens_per_s ?? 0, 1)), view.speed),
      tile("hit_rate", percent(hour.hit_rate), t("hit_rate_all", percent(cache.hit_rate))),
      tile("pages_used", percent(pages.total ? (pages.in_use ?? 0) / pages.total : null), t("pages_line", num(pages.cached ?? 0), num(pages.free ?? 0), num(pages.total ?? 0))),
      tile("requests_hour", num(hour.requests ?? 0), `${num(hour.output_tokens ?? 0)} ${t("tokens")}`),
    );
    this.#drawSpeed();
    this.#drawRequests(status);
    this.#drawHour(hour);
  }

  #drawSpeed() {
    const canvas = this.shown.speed;
    const scale = window.devicePixelRatio || 1;
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    if (!width) return;
    canvas.width = width * scale;
    canvas.height = height * scale;
    const context = canvas.getContext("2d");
    context.scale(scale, scale);
    const most = Math.max(...this.#speeds, 1);
    context.strokeStyle = getComputedStyle(document.documentElement).getPropertyValue("--leaf").trim();
    context.lineWidth = 1.5;
    context.beginPath();
    this.#speeds.forEach((speed, i) => {
      const x = width - (this.#speeds.length - 1 - i) * (width / KEPT_SPEEDS);
      const y = height - 2 - (speed / most) * (height - 4);
      if (i) context.lineTo(x, y);
      else context.moveTo(x, y);
    });
    context.stroke();
  }

  #drawRequests({ requests = [], more = 0 }) {
    const { shown: view } = this;
    if (!requests.length) {
      view.requests.replaceChildren(h("p", { class: "hint", text: t("no_requests") }));
      return;
    }
    const heads = ["name", "state", "progress", "cached", "output", "first_token_head", "age", "why_not"];
    const rows = requests.slice(0, 100).map((one) => {
      const done = one.computed_tokens ?? 0;
      const whole = Math.max((one.prompt_tokens ?? 0) + (one.output_tokens ?? 0), done, 1);
      return h(
        "tr",
        {},
        h("td", { class: "mono", text: one.id.slice(0, 32) }),
        h("td", { text: one.state === "waiting" && one.waits_for ? t("waits_for", one.waits_for) : t(one.state) }),
        h("td", {}, h("progress", { max: whole, value: done, "aria-label": t("progress") }), ` ${num(done)}/${num(whole)}`),
        h("td", { class: "right", text: one.cached_tokens == null ? "–" : num(one.cached_tokens) }),
        h("td", { class: "right", text: `${num(one.output_tokens ?? 0)}/${num(one.max_output_tokens)}` }),
        h("td", { class: "right", text: span(one.first_token_s) }),
        h("td", { class: "right", text: span(one.age_s) }),
        h("td", { text: one.cached_tokens == null ? "" : missWords(one.miss) }),
      );
    });
    view.requests.replaceChildren(
      h("div", { class: "wide", tabindex: "0", role: "region", "aria-label": t("requests") },
        h("table", {}, h("thead", {}, h("tr", {}, heads.map((word) => h("th", { scope: "col", text: t(word === "first_token_head" ? "ttft" : word) })))), h("tbody", {}, rows))),
      more ? h("p", { class: "hint", text: t("and_more", num(more)) }) : "",
    );
  }

  #drawHour(hour) {
    const rows = [["ttft", hour.first_token_s], ["gap", hour.gap_s]].map(([word, told = {}]) =>
      h("tr", {}, h("th", { scope: "row", text: t(word) }), ["p50", "p90", "p95", "p99"].map((name) => h("td", { class: "right", text: span(told[name]) })), h("td", { class: "right", text: num(told.count ?? 0) })));
    const heads = ["", "p50", "p90", "p95", "p99", t("count")].map((text) => (text ? h("th", { scope: "col", class: "right", text }) : h("td", {})));
    this.shown.hour.replaceChildren(h("table", {}, h("thead", {}, h("tr", {}, heads)), h("tbody", {}, rows)));
  }

  async #readLog() {
    const view = this.shown;
    try {
      const told = await json(`/v1/logs?after=${this.#lastLine}&limit=200`, { method: "POST", headers: { "X-Mooli": "1" }, asks: false, signal: this.#ending.signal });
      const isAtEnd = view.log.scrollHeight - view.log.scrollTop - view.log.clientHeight < 30;
      for (const line of told.lines ?? []) {
        if (OWN.test(line.text)) continue;
        const time = new Date(line.at * 1000).toLocaleTimeString();
        const isBad = ["WARNING", "ERROR", "CRITICAL"].includes(line.level);
        view.log.append(h("span", { class: isBad ? "warn" : null, text: `${time} ${line.level} ${line.text}\n` }));
      }
      while (view.log.childElementCount > KEPT_LINES) view.log.firstElementChild.remove();
      this.#lastLine = told.last ?? this.#lastLine;
      view.logNote.textContent = told.missed ? t("log_missed", num(told.missed)) : "";
      if (isAtEnd) view.log.scrollTop = view.log.scrollHeight;
    } catch (error) {
      if (error.name === "AbortError") throw error;
      this.#hasLog = false;
      view.log.hidden = true;
      view.logNote.textContent = [401, 403].includes(error.status) ? t("log_admin") : error.message;
    }
  }

  async #readConfig() {
    const view = this.shown;
    try {
      const { internal_states: _, ...told } = await json("/server_info", { signal: this.#ending.signal });
      const rows = Object.entries(told).sort(([a], [b]) => a.localeCompare(b)).map(([name, value]) =>
        h("tr", { data: { name } }, h("th", { scope: "row", class: "mono", text: name }), h("td", { class: "mono", text: typeof value === "string" ? value : JSON.stringify(value) })));
      const filter = h("input", {
        type: "search",
        on: { input: () => rows.forEach((row) => (row.hidden = !row.dataset.name.includes(filter.value.trim().toLowerCase()))) },
      });
      if (!this.shown) return;
      view.config.replaceChildren(labelled(t("filter"), filter), h("div", { class: "wide", tabindex: "0", role: "region", "aria-label": t("configuration") }, h("table", {}, h("tbody", {}, rows))));
    } catch (error) {
      if (this.shown) view.config.replaceChildren(problem(error));
    }
  }
}
