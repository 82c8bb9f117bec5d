// The cache's trees as the server tells them: one picture, and the changes to it. Nothing here draws.

import { call, eventsOf, json } from "./api.js";

const EVICTED_KEPT_S = 300;
const HAPPENED_KEPT = 60;

/** Nodes by id, each {id, parent, namespace, start, tokens, pages, locks, stored: pages on disk too, retained: a request
 * asked to keep it, used: Unix seconds of its last use}. */
export class Forest {
  nodes = new Map();
  namespaces = new Map();
  requests = [];
  pages = null;
  tokensPerS = 0;
  evicted = [];
  happened = [];
  version = -1;
  changes = 0; // counts what moved, for whoever keeps a layout

  /** All parts of a tree, in the order they came. */
  begin(parts) {
    this.nodes.clear();
    this.namespaces.clear();
    for (const part of parts) {
      for (const one of part.namespaces ?? []) this.namespaces.set(one.id, one.name);
      this.#put(part.nodes ?? [], part.at);
    }
    const [first] = parts;
    this.version = first.version ?? 0;
    this.requests = first.requests ?? [];
    this.pages = first.pages ?? null;
    this.changes++;
  }

  /** A message of the stream. */
  apply(told) {
    for (const one of told.happened ?? []) this.happened.unshift(one);
    this.happened.length = Math.min(this.happened.length, HAPPENED_KEPT);
    for (const one of told.evicted ?? []) this.evicted.unshift({ ...one, at: told.at });
    this.evicted = this.evicted.filter((one) => told.at - one.at < EVICTED_KEPT_S);
    if (told.requests) this.requests = told.requests;
    if (told.pages) this.pages = told.pages;
    this.tokensPerS = told.tokens_per_s ?? 0;
    if ((told.version ?? 0) <= this.version) return;
    this.version = told.version;
    for (const one of told.namespaces ?? []) this.namespaces.set(one.id, one.name);
    this.#put(told.nodes ?? [], told.at);
    for (const id of told.removed ?? []) this.nodes.delete(id);
    this.changes++;
  }

  #put(nodes, at) {
    for (const { id, parent = null, namespace = null, start = 0, tokens = 0, pages = 0, idle_s = 0, locks = 0, stored = 0, retained = false } of nodes) {
      this.nodes.set(id, { id, parent, namespace, start, tokens, pages, locks, stored, retained, used: at - idle_s });
    }
  }

  /** Ids from the root down to a node, itself included. */
  pathTo(id) {
    const path = [];
    for (let node = this.nodes.get(id); node && path.length < 100_000; node = this.nodes.get(node.parent)) path.push(node.id);
    return path.reverse();
  }

  /** By node in which answers of running requests lie: the position from which on. */
  answers() {
    const found = new Map();
    for (const one of this.requests) {
      const from = one.prompt_tokens ?? 0;
      let node = one.state === "running" ? this.nodes.get(one.node) : null;
      for (let i = 0; node && node.start + node.tokens > from && i < 100_000; i++, node = this.nodes.get(node.parent)) {
        found.set(node.id, Math.min(found.get(node.id) ?? Infinity, Math.max(from, node.start)));
      }
    }
    return found;
  }

  /** Requests that run in a node or below it. */
  requestsIn(id) {
    return this.requests.filter((one) => one.node != null && this.pathTo(one.node).includes(id));
  }
}

/** Keep a forest like the server's until `signal` ends: connects anew where the stream breaks.
 * onChange: after each change. onState: with true while the stream stands, and with an error where it cannot. */
export async function follow(forest, signal, onChange, onState) {
  for (let failures = 0; !signal.aborted; ) {
    try {
      await followOnce(forest, signal, () => {
        failures = 0;
        onState(true, null);
        onChange();
      });
      onState(false, null);
    } catch (error) {
      if (signal.aborted) return;
      onState(false, error);
      if (error.status === 404 || error.status === 403) return; // not there, or not for us
    }
    await new Promise((resolve) => setTimeout(resolve, Math.min(1000 * 2 ** failures++, 10_000)));
  }
}

async function followOnce(forest, signal, onChange) {
  const reply = await call("/v1/cache/events", { signal });
  const waiting = [];
  let loading = null;
  let isLoaded = false;
  let failure = null;
  const load = async () => {
    isLoaded = false;
    const parts = [await json("/v1/cache/tree", { signal })];
    while (parts.at(-1).more && !signal.aborted) parts.push(await json(`/v1/cache/tree?after=${parts.at(-1).after}`, { signal }));
    forest.begin(parts);
    for (const told of waiting.splice(0)) forest.apply(told);
    isLoaded = true;
    onChange();
  };
  const start = () => (loading = load().catch((error) => (failure = error)));
  for await (const events of eventsOf(reply)) {
    if (failure) throw failure;
    for (const { data } of events) {
      const told = JSON.parse(data);
      if (told.type === "hello") start();
      else if (told.type === "missed") {
        await loading;
        start();
      } else if (told.type === "closed") return;
      else if (isLoaded) forest.apply(told);
      else waiting.push(told);
    }
    if (isLoaded) onChange();
  }
  await loading;
  if (failure) throw failure;
}
