// The server's API: where it is, the key for it, errors as one kind, and streams of events.

import { kept } from "./dom.js";

/** Where this server is, behind whatever path a proxy shows it. */
export const BASE = new URL("../../", import.meta.url);

const KEY = "mooli.key";
const tab = kept("sessionStorage");
let asking = null;
let asker = null;

export class ApiError extends Error {
  /** status: of the answer; 0 where there was none. */
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export const key = () => tab.getItem(KEY) ?? "";

/** For this tab alone; "" forgets it. */
export function setKey(value) {
  if (value) tab.setItem(KEY, value);
  else tab.removeItem(KEY);
}

/** ask: called where the server wants a key; resolves to one, or to null where the user gives none. */
export function setAsker(ask) {
  asker = ask;
}

/** The answer of a route, of any status. body: sent as JSON. */
export async function fetchRoute(path, { body, method, signal, headers = {} } = {}) {
  const sent = { ...headers };
  if (key()) sent.Authorization = `Bearer ${key()}`;
  if (body !== undefined) sent["Content-Type"] = "application/json";
  const payload = body === undefined || typeof body === "string" ? body : JSON.stringify(body);
  try {
    return await fetch(new URL(path.replace(/^\//, ""), BASE), {
      method: method ?? (body === undefined ? "GET" : "POST"),
      headers: sent,
      body: payload,
      signal,
      cache: "no-store",
      credentials: "same-origin",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, error.message);
  }
}

/** The answer of a route that went well. asks: have the user give a key where one is wanted. Throws ApiError. */
export async function call(path, { asks = true, ...options } = {}) {
  for (;;) {
    const before = key();
    const answer = await fetchRoute(path, options);
    if (answer.ok) return answer;
    if (answer.status === 401 && asks && asker) {
      if (key() !== before) continue; // given meanwhile
      asking ??= asker().finally(() => (asking = null));
      if ((await asking) !== null) continue;
    }
    throw new ApiError(answer.status, await messageOf(answer));
  }
}

export const json = async (path, options) => (await call(path, options)).json();

async function messageOf(answer) {
  const text = await answer.text();
  try {
    const { error, message } = JSON.parse(text);
    return (typeof error === "string" ? error : error?.message) ?? message ?? text;
  } catch {
    return text.slice(0, 500) || `HTTP ${answer.status}`;
  }
}

/** Server-sent events of an answer: lists of {event, data}, those of one piece of the network together, so that whoever
 * draws does it once a piece. */
export async function* eventsOf(answer) {
  const reader = answer.body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const frames = (rest + decoder.decode(value, { stream: true })).split(/\r?\n\r?\n/);
      rest = frames.pop();
      const events = frames.map(readFrame).filter((event) => event.data !== null);
      if (events.length) yield events;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function readFrame(frame) {
  let event = "message";
  const data = [];
  for (const line of frame.split(/\r?\n/)) {
    if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
    else if (line.startsWith("event:")) event = line.slice(6).trim();
  }
  return { event, data: data.length ? data.join("\n") : null };
}
