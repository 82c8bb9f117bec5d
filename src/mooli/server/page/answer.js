// One answer of the chat route as it comes: text, reasoning, calls, and what is known of the cache.

import { call, eventsOf } from "./api.js";

/** Ask, and tell `onPiece` after each piece of the network. Resolves to the answer when it is whole; it is as far as it
 * came where `signal` stops it or an error (ApiError, network) ends it: that error is thrown.
 *
 * The answer: {content, reasoning, calls, end, promptIds, outputIds, stats: {prompt, cached, output, firstS, perS}}. */
export async function readAnswer(body, answer, signal, onPiece) {
  const sentAt = performance.now();
  let firstAt = null;
  const reply = await call("/v1/chat/completions", { body, signal });
  for await (const events of eventsOf(reply)) {
    const grown = { content: "", reasoning: "" };
    for (const { data } of events) {
      if (data === "[DONE]") continue;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message ?? String(chunk.error));
      take(chunk, answer, grown);
    }
    const now = performance.now();
    if (firstAt === null && (grown.content || grown.reasoning || answer.calls.length)) {
      firstAt = now;
      answer.stats.firstS = (now - sentAt) / 1000;
    } else if (firstAt !== null && answer.stats.output > 1) {
      answer.stats.perS = (answer.stats.output - 1) / Math.max((now - firstAt) / 1000, 1e-3);
    }
    onPiece(grown);
  }
  return answer;
}

export const newAnswer = () => ({
  content: "",
  reasoning: "",
  calls: [],
  end: "",
  promptIds: null,
  outputIds: [],
  stats: { prompt: null, cached: null, output: 0, firstS: null, perS: null, shared: null },
});

function take(chunk, answer, grown) {
  if (chunk.usage) {
    answer.stats.prompt = chunk.usage.prompt_tokens;
    answer.stats.output = chunk.usage.completion_tokens;
    answer.stats.cached = chunk.usage.prompt_tokens_details?.cached_tokens ?? answer.stats.cached;
  }
  const choice = chunk.choices?.[0];
  if (!choice) return;
  if (choice.prompt_token_ids) answer.promptIds = choice.prompt_token_ids;
  if (choice.token_ids) answer.outputIds.push(...choice.token_ids);
  const delta = choice.delta ?? {};
  if (delta.content) {
    answer.content += delta.content;
    grown.content += delta.content;
  }
  if (delta.reasoning_content) {
    answer.reasoning += delta.reasoning_content;
    grown.reasoning += delta.reasoning_content;
  }
  for (const one of delta.tool_calls ?? []) {
    const entry = (answer.calls[one.index] ??= { id: "", name: "", arguments: "" });
    if (one.id) entry.id = one.id;
    if (one.function?.name) entry.name = one.function.name;
    entry.arguments += one.function?.arguments ?? "";
  }
  if (choice.finish_reason) answer.end = choice.finish_reason;
}

/** Why no more of a request's prompt was in the cache: the engine's word for it ({reason, tokens}), or null where it is
 * not told before `signal` ends. Listens to the stream of the cache for that long alone. */
export async function missOf(rid, signal) {
  try {
    const reply = await call("/v1/cache/events", { signal, asks: false });
    for await (const events of eventsOf(reply)) {
      for (const { data } of events) {
        const told = JSON.parse(data);
        const began = (told.happened ?? []).find((one) => one.what === "began" && one.id === rid);
        const open = (told.requests ?? []).find((one) => one.id === rid && one.cached_tokens != null);
        if (began || open) return (began ?? open).miss ?? null;
      }
    }
  } catch {
    // An explanation is worth no complaint.
  }
  return null;
}

/** How many of the first tokens two lists have in common. */
export function sharedStart(a, b) {
  const most = Math.min(a.length, b.length);
  let i = 0;
  while (i < most && a[i] === b[i]) i++;
  return i;
}

/** How much of each of `contents`, which stand in the prompt in this order, was cached: shares of 0 to 1, null for one
 * that is not found. before, behind: the prompt's text up to the cached tokens and after them. */
export function cachedShares(contents, before, behind) {
  const prompt = before + behind;
  let from = 0;
  return contents.map((content) => {
    const wanted = content.trim();
    if (!wanted) return null;
    const at = prompt.indexOf(wanted, from);
    if (at < 0) return null;
    from = at + wanted.length;
    return Math.max(0, Math.min(1, (before.length - at) / wanted.length));
  });
}
