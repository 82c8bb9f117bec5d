// The page at /docs: every route of /openapi.json with its schemas, and a form to try it.

import { call, fetchRoute, json, setAsker } from "./api.js";
import { button, h, labelled } from "./dom.js";
import { askForKey, drawTop, problem } from "./shell.js";
import { num, span, t } from "./words.js";

const MAX_DEPTH = 6;
const MAX_SHOWN = 200_000; // characters of an answer
const GREETING = [{ role: "user", content: "Hello!" }];
const EXAMPLES = {
  "/generate": { text: "The capital of France is", sampling_params: { max_new_tokens: 16, temperature: 0 } },
  "/v1/completions": { prompt: "The capital of France is", max_tokens: 16, temperature: 0 },
  "/v1/chat/completions": { messages: GREETING, max_tokens: 32, stream: true },
  "/v1/messages": { messages: GREETING, max_tokens: 32, model: "any" },
  "/v1/messages/count_tokens": { messages: GREETING, model: "any" },
  "/v1/responses": { input: "Hello!", max_output_tokens: 32 },
  "/v1/responses/input_tokens": { input: "Hello!" },
  "/v1/cache/find": { prompt: "The capital of France is" },
  "/api/chat": { messages: GREETING, model: "any", stream: false },
  "/api/generate": { prompt: "Hello!", model: "any", stream: false },
  "/tokenize": { prompt: "Hello!" },
  "/v1/tokenize": { prompt: "Hello!" },
  "/detokenize": { tokens: [1, 2, 3] },
  "/v1/detokenize": { tokens: [1, 2, 3] },
};

const main = document.getElementById("main");

async function show() {
  drawTop([...["chat", "tree", "now"].map((word) => ({ href: `./#${word}`, word, isHere: false })), { href: "docs", word: "api", isHere: true }], show);
  main.className = "docs";
  main.replaceChildren(h("h1", { text: t("docs_title") }), h("p", { class: "hint", text: t("loading") }));
  try {
    draw(await json("/openapi.json"));
  } catch (error) {
    main.replaceChildren(h("h1", { text: t("docs_title") }), problem(error), button(t("retry_load"), show));
  }
}

function draw(document) {
  const routes = [];
  for (const [path, operations] of Object.entries(document.paths)) {
    for (const [method, operation] of Object.entries(operations)) routes.push(drawRoute(document, path, method, operation));
  }
  const filter = h("input", {
    type: "search",
    on: { input: () => routes.forEach((route) => (route.hidden = !route.dataset.words.includes(filter.value.trim().toLowerCase()))) },
  });
  main.replaceChildren(
    h("h1", { text: `${t("docs_title")} · ${document.info.title} ${document.info.version}` }),
    h("p", { class: "hint" }, t("docs_hint", "openapi.json"), " ", t("changes_server")),
    labelled(t("filter"), filter),
    h("div", {}, routes),
  );
}

function drawRoute(document, path, method, operation) {
  const isOpen = Array.isArray(operation.security) && operation.security.length === 0;
  const inner = h("div", {});
  const route = h(
    "details",
    { class: "route", data: { words: `${method} ${path} ${operation.summary}`.toLowerCase() } },
    h("summary", {}, h("span", { class: `method ${method}`, text: method.toUpperCase() }), h("code", { text: path }), h("span", { text: operation.summary }), isOpen && h("small", { text: t("open_to_all") })),
    inner,
  );
  // Many schemas are large: what nobody opens is not drawn.
  route.addEventListener("toggle", () => {
    if (!route.open || inner.childElementCount) return;
    const body = operation.requestBody?.content?.["application/json"]?.schema;
    const answers = Object.entries(operation.responses?.["200"]?.content ?? {}).filter(([, told]) => told.schema);
    inner.append(
      ...(operation.description ? [h("p", { class: "plain", text: operation.description })] : []),
      ...(body ? [h("h2", { text: t("body") }), drawSchema(document, body, 0, new Set())] : []),
      ...answers.flatMap(([type, told]) => [h("h2", { text: `${t("answer")} · ${type}` }), drawSchema(document, told.schema.properties?.data?.contentSchema ?? told.schema, 0, new Set())]),
      h("h2", { text: t("try_it") }),
      drawForm(document, path, method, operation, body),
    );
  });
  return route;
}

// -- schemas --------------------------------------------------------------------------------------------------------

function resolve(document, schema) {
  const name = schema?.$ref?.replace("#/components/schemas/", "");
  return name ? { ...(document.components.schemas[name] ?? {}), name } : (schema ?? {});
}

function typeOf(document, given) {
  const schema = resolve(document, given);
  if (schema.name) return schema.name;
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((one) => JSON.stringify(one)).join(" | ");
  const parts = schema.anyOf ?? schema.oneOf;
  if (parts) return parts.map((one) => typeOf(document, one)).join(" | ");
  if (schema.type === "array") return `[${typeOf(document, schema.items ?? {})}]`;
  return [schema.type ?? t("any_value")].flat().join(" | ");
}

/** What a schema has inside, as lists. */
function drawSchema(document, given, depth, above) {
  const schema = resolve(document, given);
  const inside = partsOf(document, schema);
  const told = schema.description && h("p", { class: "plain", text: schema.description });
  if (depth >= MAX_DEPTH || (schema.name && above.has(schema.name))) return h("p", { class: "schema type", text: typeOf(document, given) });
  const seen = new Set(above).add(schema.name);
  if (!schema.properties) {
    return h("div", { class: "schema" }, h("span", { class: "type", text: typeOf(document, given) }), told, inside.map((one) => drawSchema(document, one, depth + 1, seen)));
  }
  const required = new Set(schema.required ?? []);
  const items = Object.entries(schema.properties).map(([name, one]) => {
    const resolved = resolve(document, one);
    const head = [h("code", { text: name }), " ", h("span", { class: "type", text: typeOf(document, one) + (required.has(name) ? ` · ${t("required")}` : "") })];
    const deeper = resolved.properties ? [one] : partsOf(document, resolved);
    if (!deeper.length || depth + 1 >= MAX_DEPTH) return h("li", {}, head, one.description && h("p", { text: one.description }));
    const more = h("details", {}, h("summary", {}, head));
    more.addEventListener("toggle", () => {
      if (more.open && more.childElementCount === 1) more.append(...deeper.map((part) => drawSchema(document, part, depth + 1, seen)));
    });
    return h("li", {}, more);
  });
  return h("div", {}, told, h("ul", { class: "schema" }, items));
}

/** Parts of a schema that have fields of their own. */
function partsOf(document, schema) {
  const parts = [...(schema.anyOf ?? schema.oneOf ?? []), ...(schema.items ? [schema.items] : [])];
  return parts.flatMap((one) => {
    const resolved = resolve(document, one);
    return resolved.properties ? [one] : resolved.name ? [] : partsOf(document, resolved);
  });
}

function exampleOf(document, path, schema) {
  if (EXAMPLES[path]) return EXAMPLES[path];
  const { properties = {}, required = [] } = resolve(document, schema);
  const values = { string: "", integer: 1, number: 1, boolean: false, array: [], object: {} };
  return Object.fromEntries(required.map((name) => [name, values[[resolve(document, properties[name]).type].flat()[0]] ?? null]));
}

// -- trying ---------------------------------------------------------------------------------------------------------

function drawForm(document, path, method, operation, body) {
  const names = (operation.parameters ?? []).filter((one) => one.in === "path").map((one) => one.name);
  const fields = names.map((name) => h("input", { required: true, data: { name } }));
  const query = h("input", { spellcheck: "false" });
  const payload = body && h("textarea", { rows: "6", class: "code", spellcheck: "false", value: JSON.stringify(exampleOf(document, path, body), null, 2) });
  const status = h("p", { class: "hint", role: "status" });
  const answer = h("pre", { class: "told", tabindex: "0", role: "region", "aria-label": t("answer") });
  answer.hidden = true;
  const cancel = button(t("stop"), () => controller?.abort());
  cancel.hidden = true;
  let controller = null;
  const send = async (event) => {
    event.preventDefault();
    controller?.abort();
    controller = new AbortController();
    const { signal } = controller;
    let target = path;
    for (const field of fields) target = target.replace(`{${field.dataset.name}}`, field.value.split("/").map(encodeURIComponent).join("/"));
    if (query.value.trim()) target += `?${query.value.trim().replace(/^\?/, "")}`;
    const started = performance.now();
    status.textContent = "…";
    answer.hidden = false;
    answer.textContent = "";
    cancel.hidden = false;
    try {
      const options = { method: method.toUpperCase(), signal, headers: { "X-Mooli": "1" } };
      if (payload) options.body = payload.value;
      const reply = await askedFor(target, options);
      status.textContent = `${reply.status} · ${span((performance.now() - started) / 1000)} · ${reply.headers.get("content-type") ?? ""}`;
      const size = await showBody(reply, answer);
      status.textContent += ` · ${num(size)} B · ${span((performance.now() - started) / 1000)}`;
    } catch (error) {
      status.textContent = error.name === "AbortError" ? t("stopped") : error.message || t("unreachable");
    }
    cancel.hidden = true;
  };
  return h(
    "form",
    { on: { submit: send } },
    fields.map((field) => labelled(field.dataset.name, field)),
    labelled(t("query"), query),
    payload && labelled(t("body"), payload),
    h("div", { class: "row" }, h("button", { type: "submit", class: "main", text: t("send_request") }), cancel),
    status,
    answer,
  );
}

/** The answer, whatever its status; a key is asked for where one is wanted. */
async function askedFor(path, options) {
  const reply = await fetchRoute(path, options);
  if (reply.status !== 401) return reply;
  try {
    return await call(path, options);
  } catch (error) {
    if (error.status) return fetchRoute(path, options);
    throw error;
  }
}

async function showBody(reply, element) {
  const reader = reply.body?.getReader();
  if (!reader) return 0;
  const decoder = new TextDecoder();
  let size = 0;
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    size += value.length;
    if (text.length >= MAX_SHOWN) continue;
    text += decoder.decode(value, { stream: true });
    element.textContent = text.length >= MAX_SHOWN ? `${text.slice(0, MAX_SHOWN)}\n${t("body_cut")}` : text;
  }
  if (/json/.test(reply.headers.get("content-type") ?? "") && text.length < MAX_SHOWN) {
    try {
      element.textContent = JSON.stringify(JSON.parse(text), null, 2);
    } catch {
      // lines of JSON stay as they are
    }
  }
  return size;
}

setAsker(askForKey);
show();
