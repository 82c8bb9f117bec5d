// What all pages have around them: the bar on top, the language, the colours, and the question for a key.

import * as api from "./api.js";
import { button, h, kept, labelled, say } from "./dom.js";
import { language, setLanguage, t } from "./words.js";

const settings = kept("localStorage");
const THEMES = ["auto", "light", "dark"];

/** Draw the bar. tabs: [{href, word, isHere}]; redraw: called when the language has changed. */
export function drawTop(tabs, redraw) {
  applyTheme(theme());
  document.documentElement.lang = language() === "zh" ? "zh-Hans" : "en";
  const top = document.getElementById("top");
  const skip = h("a", { class: "skip", href: "#main", text: t("skip"), on: { click: toMain } });
  const brand = h("a", { class: "brand", href: api.BASE.pathname }, h("span", { class: "leaf", "aria-hidden": "true" }), "Mooli");
  const nav = h(
    "nav",
    { "aria-label": t("views") },
    tabs.map(({ href, word, isHere }) => h("a", { href, text: t(word), "aria-current": isHere ? "page" : null })),
  );
  const other = language() === "zh" ? "en" : "zh";
  const tools = h(
    "div",
    { class: "tools" },
    api.key() && button(t("forget_key"), () => {
      api.setKey("");
      location.reload();
    }),
    button(other === "zh" ? "中文" : "English", () => {
      setLanguage(other);
      redraw();
    }, { lang: other === "zh" ? "zh-Hans" : "en", "aria-label": other === "zh" ? "中文" : "English" }),
    button(t(`theme_${theme()}`), () => {
      settings.setItem("mooli.theme", THEMES[(THEMES.indexOf(theme()) + 1) % THEMES.length]);
      drawTop(tabs, redraw);
      top.querySelector(".tools button:last-child").focus();
      window.dispatchEvent(new Event("themechange"));
    }, { title: t("theme"), "aria-label": `${t("theme")}: ${t(`theme_${theme()}`)}` }),
  );
  top.replaceChildren(skip, brand, nav, tools);
}

function toMain(event) {
  event.preventDefault();
  document.getElementById("main").focus();
}

const theme = () => (THEMES.includes(settings.getItem("mooli.theme")) ? settings.getItem("mooli.theme") : "auto");

function applyTheme(name) {
  if (name === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
}

/** Ask the user for a key. Resolves to it, or to null. It is kept by this tab alone. */
export function askForKey() {
  return new Promise((resolve) => {
    const field = h("input", { type: "password", autocomplete: "off", name: "key", required: true, spellcheck: "false" });
    const wrong = api.key() && h("p", { class: "error", role: "alert", text: t("key_wrong") });
    let given = null;
    const dialog = h(
      "dialog",
      { "aria-labelledby": "key-title" },
      h(
        "form",
        {
          method: "dialog",
          on: {
            submit: () => {
              given = field.value.trim();
              if (given) api.setKey(given);
            },
          },
        },
        h("h2", { id: "key-title", text: t("key_title") }),
        h("p", { text: t("key_text") }),
        wrong,
        labelled(t("key"), field, t("key_hint")),
        h("div", { class: "row" }, h("button", { type: "submit", class: "main", text: t("key_use") }), button(t("cancel"), () => dialog.close())),
      ),
    );
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(given || null);
    });
    document.body.append(dialog);
    dialog.showModal();
  });
}

/** A line that says what went wrong. */
export function problem(error) {
  const words = error.status === 0 ? t("unreachable") : error.status === 401 ? t("needs_key") : error.message;
  say(words);
  return h("p", { class: "error", role: "alert", text: words });
}
