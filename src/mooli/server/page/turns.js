// A conversation as data: messages in a tree, whose branches share what is before them. Nothing here draws or asks.

/** Of a request, each under the API's name; "" leaves it to the server. */
export const SAMPLING = [
  { name: "temperature", min: 0, max: 2, step: 0.1 },
  { name: "top_p", min: 0, max: 1, step: 0.05 },
  { name: "top_k", min: -1, max: 1_000_000, step: 1 },
  { name: "max_tokens", min: 1, max: 10_000_000, step: 1 },
  { name: "seed", min: 0, max: 2 ** 53 - 1, step: 1 },
];

const ROLES = ["user", "assistant", "tool"];
const FORMAT = "mooli-conversations";
const MAX_IMPORT_NODES = 100_000;

export function newConversation() {
  const now = Date.now();
  return {
    id: crypto.randomUUID?.() ?? `${now}-${Math.random().toString(36).slice(2)}`,
    title: "",
    created: now,
    updated: now,
    settings: { model: "", system: "", schema: "", tools: "" },
    nodes: {},
    next: 1,
    leaf: null,
  };
}

/** Put a message behind `parent` (null: at the start), and go on from there. Its id. */
export function addNode(conversation, parent, node) {
  const id = String(conversation.next++);
  conversation.nodes[id] = { ...node, id, parent };
  conversation.leaf = id;
  conversation.updated = Date.now();
  if (!conversation.title && node.role === "user") conversation.title = node.content.trim().split("\n")[0].slice(0, 60);
  return id;
}

/** The messages from the first to `leaf`. */
export function pathTo(conversation, leaf = conversation.leaf) {
  const path = [];
  for (let node = conversation.nodes[leaf]; node; node = conversation.nodes[node.parent]) path.push(node);
  return path.reverse();
}

/** Ids of the messages that stand at the same place, itself among them, oldest first. */
export function siblingsOf(conversation, id) {
  const { parent } = conversation.nodes[id];
  return Object.values(conversation.nodes).filter((node) => node.parent === parent).map((node) => node.id)
    .sort((a, b) => a - b);
}

/** The newest end of the branch that `id` begins. */
export function endOf(conversation, id) {
  for (;;) {
    const children = Object.values(conversation.nodes).filter((node) => node.parent === id);
    if (!children.length) return id;
    id = children.reduce((a, b) => (Number(b.id) > Number(a.id) ? b : a)).id;
  }
}

/** In the API's shape, the system prompt first. */
export function messagesOf(conversation, leaf = conversation.leaf) {
  const { system } = conversation.settings;
  const messages = system.trim() ? [{ role: "system", content: system }] : [];
  for (const node of pathTo(conversation, leaf)) {
    if (node.role === "tool") messages.push({ role: "tool", content: node.content, tool_call_id: node.call });
    else if (node.role === "user") messages.push({ role: "user", content: node.content });
    else {
      const message = { role: "assistant", content: node.content };
      if (node.reasoning) message.reasoning_content = node.reasoning;
      if (node.calls?.length) {
        message.tool_calls = node.calls.map((call) => ({
          id: call.id, type: "function", function: { name: call.name, arguments: call.arguments },
        }));
      }
      messages.push(message);
    }
  }
  return messages;
}

/** The body of a request that continues at the leaf. Throws Error whose message names the field that is no JSON. */
export function bodyOf(conversation, model, rid) {
  const { settings } = conversation;
  const body = {
    model,
    messages: messagesOf(conversation),
    rid,
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
    return_token_ids: true,
  };
  for (const { name } of SAMPLING) {
    if (settings[name] !== undefined && settings[name] !== "") body[name] = Number(settings[name]);
  }
  const schema = readJson(settings.schema, "schema", (value) => value && typeof value === "object" && !Array.isArray(value));
  if (schema) body.response_format = { type: "json_schema", json_schema: { name: "answer", schema } };
  const tools = readJson(settings.tools, "tools", Array.isArray);
  if (tools?.length) {
    body.tools = tools.map((tool) => (tool && tool.type === undefined && tool.name ? { type: "function", function: tool } : tool));
  }
  return body;
}

export class FieldError extends Error {
  constructor(field, detail) {
    super(detail);
    this.field = field;
  }
}

export function readJson(text, field, fits) {
  if (!text?.trim()) return null;
  let value;
  try {
    value = JSON.parse(text);
  } catch (error) {
    throw new FieldError(field, error.message);
  }
  if (!fits(value)) throw new FieldError(field, "");
  return value;
}

// -- files ----------------------------------------------------------------------------------------------------------

export function writeFile(conversations) {
  return JSON.stringify({ format: FORMAT, version: 1, conversations }, null, 1);
}

/** Conversations of a file, with ids of their own. Throws Error for a file that is none of ours. */
export function readFile(text) {
  const file = JSON.parse(text);
  if (file?.format !== FORMAT || file.version !== 1 || !Array.isArray(file.conversations)) throw new Error(FORMAT);
  return file.conversations.map(readConversation);
}

const textOf = (value, most = 10_000_000) => (typeof value === "string" ? value.slice(0, most) : "");
const numberOf = (value) => (Number.isFinite(value) ? value : null);

function readConversation(given) {
  const made = newConversation();
  made.title = textOf(given?.title, 200);
  made.created = numberOf(given?.created) ?? made.created;
  for (const name of ["model", "system", "schema", "tools"]) made.settings[name] = textOf(given?.settings?.[name]);
  for (const { name } of SAMPLING) {
    const value = given?.settings?.[name];
    if (value !== "" && Number.isFinite(Number(value ?? NaN))) made.settings[name] = String(value);
  }
  const nodes = Object.values(given?.nodes ?? {});
  if (nodes.length > MAX_IMPORT_NODES) throw new Error(FORMAT);
  for (const node of nodes.sort((a, b) => a?.id - b?.id)) {
    const id = Number(node?.id);
    // A parent is older than its child: so there are no circles.
    if (!Number.isSafeInteger(id) || id < 1 || !ROLES.includes(node.role)) throw new Error(FORMAT);
    if (node.parent !== null && !(Number(node.parent) < id && made.nodes[node.parent])) throw new Error(FORMAT);
    made.nodes[id] = {
      id: String(id),
      parent: node.parent === null ? null : String(node.parent),
      role: node.role,
      content: textOf(node.content),
      ...(node.role === "tool" ? { call: textOf(node.call, 200) } : {}),
      ...(node.role === "assistant" ? readAnswer(node) : {}),
    };
    made.next = Math.max(made.next, id + 1);
  }
  const ids = Object.keys(made.nodes);
  made.leaf = made.nodes[given?.leaf] ? String(given.leaf) : ids.length ? ids.at(-1) : null;
  return made;
}

function readAnswer(node) {
  const calls = Array.isArray(node.calls) ? node.calls.slice(0, 1000) : [];
  const stats = {};
  for (const name of ["prompt", "cached", "output", "firstS", "perS", "shared"]) stats[name] = numberOf(node.stats?.[name]);
  return {
    reasoning: textOf(node.reasoning),
    calls: calls.map((call) => ({ id: textOf(call?.id, 200), name: textOf(call?.name, 200), arguments: textOf(call?.arguments) })),
    end: textOf(node.end, 40),
    error: textOf(node.error, 2000),
    model: textOf(node.model, 1024),
    stats,
  };
}
