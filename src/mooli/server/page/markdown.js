// Markdown of a model as elements. What the model wrote reaches the document as text nodes alone: no HTML of it is
// interpreted, links lead to http and https only, and pictures are links. Work grows with the length of the text alone.

import { button, copyText, h } from "./dom.js";
import { t } from "./words.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$/;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])(?:[ \t]+|$)/;
const DELIMITERS = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;
const MAX_DEPTH = 12;
const MAX_SPAN = 4000; // characters that one emphasis or link may reach over

/** Markdown that grows: what is complete is left as it is, and only its last block is drawn anew. */
export class GrowingMarkdown {
  #text = "";
  #open = 0; // where the last block begins
  #last = null; // that block, and its element
  #node = null;

  constructor(element) {
    this.element = element;
  }

  push(text) {
    this.#text += text;
    const blocks = splitBlocks(this.#text.slice(this.#open));
    if (!blocks.length) return;
    const [first] = blocks;
    if (blocks.length === 1 && first.kind === "code" && this.#last?.kind === "code" && first.language === this.#last.language) {
      // Code is often long, and somebody may be selecting in it.
      this.#node.querySelector("code").textContent = first.text;
    } else {
      this.#node?.remove();
      for (const block of blocks) this.element.append((this.#node = drawBlock(block, 0)));
    }
    this.#last = blocks.at(-1);
    this.#open += this.#last.at;
  }
}

/** The elements of a whole text. */
export function drawMarkdown(text, depth = 0) {
  return splitBlocks(text).map((block) => drawBlock(block, depth));
}

// -- blocks ---------------------------------------------------------------------------------------------------------

/** Blocks of a text in order, each {kind, at: where it begins, …}. What comes later never changes any but the last. */
export function splitBlocks(text) {
  const lines = text.split("\n");
  const starts = [];
  let offset = 0;
  for (const line of lines) {
    starts.push(offset);
    offset += line.length + 1;
  }
  const blocks = [];
  let i = 0;
  while (i < lines.length) {
    const line = lines[i];
    const first = i;
    let match;
    if (!line.trim()) {
      i++;
      continue;
    }
    if ((match = FENCE.exec(line))) {
      const isEnd = new RegExp(`^ {0,3}${match[1][0]}{${match[1].length},}[ \\t]*$`);
      for (i++; i < lines.length && !isEnd.test(lines[i]); i++);
      const code = lines.slice(first + 1, i).join("\n");
      blocks.push({ kind: "code", at: starts[first], language: match[2].trim().split(/\s/)[0], text: code });
      i++;
    } else if ((match = HEADING.exec(line))) {
      blocks.push({ kind: "heading", at: starts[first], level: match[1].length, text: match[2] });
      i++;
    } else if (RULE.test(line)) {
      blocks.push({ kind: "rule", at: starts[first] });
      i++;
    } else if (QUOTE.test(line)) {
      while (i < lines.length && QUOTE.test(lines[i])) i++;
      const inner = lines.slice(first, i).map((one) => one.replace(QUOTE, ""));
      blocks.push({ kind: "quote", at: starts[first], text: inner.join("\n") });
    } else if (ITEM.test(line)) {
      i = endOfList(lines, i);
      blocks.push({ kind: "list", at: starts[first], lines: lines.slice(first, i) });
    } else if (isTable(lines, i)) {
      for (i += 2; i < lines.length && lines[i].includes("|"); i++);
      blocks.push({ kind: "table", at: starts[first], lines: lines.slice(first, i) });
    } else {
      for (i++; i < lines.length && lines[i].trim() && !beginsBlock(lines, i); i++);
      blocks.push({ kind: "paragraph", at: starts[first], text: lines.slice(first, i).join("\n") });
    }
  }
  return blocks;
}

const isTable = (lines, i) =>
  lines[i].includes("|") && i + 1 < lines.length && lines[i + 1].includes("-") && DELIMITERS.test(lines[i + 1]);

const beginsBlock = (lines, i) =>
  FENCE.test(lines[i]) || HEADING.test(lines[i]) || RULE.test(lines[i]) || QUOTE.test(lines[i]) ||
  ITEM.test(lines[i]) || isTable(lines, i);

function endOfList(lines, start) {
  const isNumbered = /\d/.test(ITEM.exec(lines[start])[2]);
  let i = start + 1;
  let isFenced = false;
  for (; i < lines.length; i++) {
    const line = lines[i];
    if (/^\s+(`{3,}|~{3,})/.test(line)) isFenced = !isFenced;
    if (isFenced || /^ {2,}\S|^\t/.test(line)) continue;
    if (!line.trim()) {
      let next = i + 1;
      while (next < lines.length && !lines[next].trim()) next++;
      if (next === lines.length) break;
      if (/^ {2,}\S|^\t/.test(lines[next]) || isItemOf(lines[next], isNumbered)) continue;
      break;
    }
    if (isItemOf(line, isNumbered)) continue;
    if (beginsBlock(lines, i) || !lines[i - 1].trim()) break;
  }
  return i;
}

function isItemOf(line, isNumbered) {
  const match = ITEM.exec(line);
  return match !== null && !RULE.test(line) && /\d/.test(match[2]) === isNumbered;
}

function drawBlock(block, depth) {
  switch (block.kind) {
    case "code":
      return drawCode(block);
    case "heading":
      // The page has its own h1 and h2.
      return h(`h${Math.min(block.level + 2, 6)}`, {}, drawInline(block.text));
    case "rule":
      return h("hr");
    case "quote":
      return h("blockquote", {}, depth < MAX_DEPTH ? drawMarkdown(block.text, depth + 1) : block.text);
    case "list":
      return drawList(block.lines, depth);
    case "table":
      return drawTable(block.lines);
    default:
      return h("p", {}, drawInline(block.text));
  }
}

function drawCode({ language, text }) {
  const code = h("code", { text });
  const copy = button(t("copy"), async () => {
    try {
      await copyText(code.textContent);
      copy.textContent = t("copied");
    } catch {
      copy.textContent = t("copy_failed");
    }
    setTimeout(() => (copy.textContent = t("copy")), 2000);
  });
  const name = /^[\w+#.-]{1,30}$/.test(language) ? language : "";
  return h(
    "figure",
    { class: "code" },
    h("figcaption", {}, h("span", { text: name }), copy),
    h("pre", { tabindex: "0", "aria-label": name || t("code") }, code),
  );
}

function drawList(lines, depth) {
  const first = ITEM.exec(lines[0]);
  const isNumbered = /\d/.test(first[2]);
  const items = [];
  let width = 0;
  for (const line of lines) {
    const match = ITEM.exec(line);
    const indent = line.length - line.trimStart().length;
    if (match && !RULE.test(line) && (!items.length || indent < width) && /\d/.test(match[2]) === isNumbered) {
      width = Math.min(match[0].length, 6);
      items.push([line.slice(match[0].length)]);
    } else {
      items.at(-1).push(line.slice(Math.min(width, indent)));
    }
  }
  const start = isNumbered ? parseInt(first[2], 10) : 1;
  return h(
    isNumbered ? "ol" : "ul",
    { start: start === 1 ? null : start },
    items.map((item) => {
      const text = item.join("\n");
      if (depth >= MAX_DEPTH) return h("li", { text });
      const blocks = splitBlocks(text);
      const isTight = blocks.length > 0 && blocks[0].kind === "paragraph" && !/\n\s*\n/.test(text);
      return h("li", {}, blocks.map((block, i) => (i === 0 && isTight ? drawInline(block.text) : drawBlock(block, depth + 1))));
    }),
  );
}

function cellsOf(line) {
  const cells = [""];
  const inner = line.trim().replace(/^\|/, "");
  for (let i = 0; i < inner.length; i++) {
    if (inner[i] === "\\" && inner[i + 1] === "|") cells[cells.length - 1] += inner[++i];
    else if (inner[i] === "|") cells.push("");
    else cells[cells.length - 1] += inner[i];
  }
  if (cells.length > 1 && !cells.at(-1).trim()) cells.pop();
  return cells.map((cell) => cell.trim());
}

function drawTable(lines) {
  const head = cellsOf(lines[0]);
  const sides = cellsOf(lines[1]).map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : ""));
  const row = (cells, tag) =>
    h("tr", {}, head.map((_, i) => h(tag, { class: sides[i] || null, scope: tag === "th" ? "col" : null }, drawInline(cells[i] ?? ""))));
  return h(
    "div",
    { class: "wide", tabindex: "0", role: "region", "aria-label": t("table") },
    h("table", {}, h("thead", {}, row(head, "th")), h("tbody", {}, lines.slice(2).map((line) => row(cellsOf(line), "td")))),
  );
}

// -- inside a line --------------------------------------------------------------------------------------------------

const SPECIAL = /[\\`*_~[!<\n]|https?:\/\//g;

/** Nodes of a text without blocks. */
export function drawInline(text, depth = 0) {
  const nodes = [];
  const missing = new Set(); // what has no other end behind here
  let plain = "";
  const flush = () => {
    if (plain) nodes.push(document.createTextNode(plain));
    plain = "";
  };
  const put = (node) => {
    flush();
    nodes.push(node);
  };
  /** Where `end` comes next, -1 if not near. */
  const find = (end, from) => {
    if (missing.has(end)) return -1;
    const at = text.indexOf(end, from);
    if (at < 0) missing.add(end);
    return at >= 0 && at - from <= MAX_SPAN ? at : -1;
  };
  let i = 0;
  while (i < text.length) {
    SPECIAL.lastIndex = i;
    const match = SPECIAL.exec(text);
    if (!match) {
      plain += text.slice(i);
      break;
    }
    plain += text.slice(i, match.index);
    i = match.index;
    const [sign] = match;
    if (sign === "\\") {
      if (text[i + 1] === "\n") {
        put(h("br"));
        i += 2;
      } else if (/[!-/:-@[-`{-~]/.test(text[i + 1] ?? "")) {
        plain += text[i + 1];
        i += 2;
      } else {
        plain += text[i++];
      }
    } else if (sign === "\n") {
      // Models mean a line where they end one.
      plain = plain.trimEnd();
      put(h("br"));
      i++;
    } else if (sign === "`") {
      let end = i;
      while (text[end] === "`") end++;
      const ticks = text.slice(i, end);
      const close = ticks.length > 8 ? -1 : find(ticks, end);
      if (close < 0) {
        plain += ticks;
        i = end;
      } else {
        put(h("code", { text: text.slice(end, close).replace(/^ (.*\S.*) $/s, "$1") }));
        i = close + ticks.length;
      }
    } else if (sign === "*" || sign === "_" || sign === "~") {
      i = emphasis(text, i, sign, depth, find, put, (some) => (plain += some));
    } else if (sign === "[" || sign === "!") {
      const link = readLink(text, sign === "!" ? i + 1 : i, find);
      if (link) {
        put(drawLink(link.href, link.label, depth));
        i = link.end;
      } else {
        plain += text[i++];
      }
    } else if (sign === "<") {
      const close = find(">", i);
      const inner = close < 0 ? "" : text.slice(i + 1, close);
      if (/^https?:\/\/[^\s<>]+$/.test(inner)) {
        put(drawLink(inner, inner, MAX_DEPTH));
        i = close + 1;
      } else {
        plain += text[i++];
      }
    } else {
      const [address] = /^[^\s<>"'`|\\^{}]{1,2000}/.exec(text.slice(i, i + 2000));
      const href = address.replace(/[.,:;!?*_~)\]]+$/, (tail) => (address.includes("(") && tail.startsWith(")") ? ")" : ""));
      put(drawLink(href, href, MAX_DEPTH));
      i += href.length;
    }
  }
  flush();
  return nodes;
}

function emphasis(text, i, sign, depth, find, put, plain) {
  let run = i;
  while (text[run] === sign && run - i < 3) run++;
  const marks = text.slice(i, run);
  const isWord = (char) => char !== undefined && /[\p{L}\p{N}]/u.test(char);
  const canOpen =
    run < text.length && !/\s/.test(text[run]) && depth < MAX_DEPTH &&
    !(sign === "_" && isWord(text[i - 1])) && !(sign === "~" && marks.length < 2);
  if (canOpen) {
    let close = find(marks, run);
    // A closing mark stands behind a word; ones that do not are passed by, a few of them.
    for (let tries = 0; close >= 0 && tries < 20; tries++) {
      const isEnd = !/\s/.test(text[close - 1]) && close > run && !(sign === "_" && isWord(text[close + marks.length]));
      const isInside = marks.length === 1 && (text[close + 1] === sign || text[close - 1] === sign);
      if (isEnd && !isInside) {
        const tag = { 1: "em", 2: sign === "~" ? "del" : "strong", 3: "strong" }[marks.length];
        const inner = drawInline(text.slice(run, close), depth + 1);
        put(h(tag, {}, marks.length === 3 ? h("em", {}, inner) : inner));
        return close + marks.length;
      }
      close = find(marks, close + (isInside ? 2 : 1));
    }
  }
  plain(marks);
  return run;
}

/** [label](address "title") at i, or null. */
function readLink(text, i, find) {
  if (text[i] !== "[") return null;
  const middle = find("](", i);
  if (middle < 0) return null;
  let depth = 1;
  let end = middle + 2;
  for (; end < text.length && end - middle < 2000; end++) {
    if (text[end] === "(") depth++;
    else if (text[end] === ")" && --depth === 0) break;
    else if (text[end] === "\n") return null;
  }
  if (text[end] !== ")") return null;
  const label = text.slice(i + 1, middle);
  if (label.includes("\n\n") || label.includes("[")) return null;
  const href = text.slice(middle + 2, end).trim().split(/\s+["']/)[0].replace(/^<(.*)>$/, "$1");
  return { label, href, end: end + 1 };
}

/** Where a link may lead, or null. */
export function safeAddress(href) {
  try {
    const url = new URL(href);
    return url.protocol === "https:" || url.protocol === "http:" ? url.href : null;
  } catch {
    return null;
  }
}

function drawLink(href, label, depth) {
  const address = safeAddress(href);
  const inner = depth < MAX_DEPTH ? drawInline(label, MAX_DEPTH) : [label];
  if (!address) return h("span", {}, inner.length ? inner : href);
  const rel = "noopener noreferrer nofollow ugc";
  return h("a", { href: address, rel, target: "_blank", title: address }, inner.length ? inner : address);
}
