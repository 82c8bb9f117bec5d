// Trees as bars: left to right the position of tokens, one row for each leaf. A layout, and a drawing of what is seen.

/** Rows and order of a forest's nodes. Arrays by the place in the order: a node stands before what hangs on it, and
 * `end[i]` is the place behind all of that. reach: the last position below a node. */
export function layOut(forest) {
  const children = new Map();
  const roots = [];
  for (const node of forest.nodes.values()) {
    if (node.parent === null || !forest.nodes.has(node.parent)) roots.push(node);
    else if (children.has(node.parent)) children.get(node.parent).push(node);
    else children.set(node.parent, [node]);
  }
  const byAge = (a, b) => a.id - b.id;
  roots.sort((a, b) => (a.namespace ?? 0) - (b.namespace ?? 0) || byAge(a, b));
  for (const list of children.values()) list.sort(byAge);
  const count = forest.nodes.size;
  const layout = {
    nodes: new Array(count), end: new Int32Array(count), row: new Float64Array(count), rows: new Float64Array(count),
    reach: new Float64Array(count), place: new Map(), numRows: 0, maxEnd: 0, children, roots,
  };
  let next = 0;
  let row = 0;
  // Without recursion: chains are long.
  const stack = roots.map((node) => [node, false]).reverse();
  while (stack.length) {
    const [node, isLeaving] = stack.pop();
    if (isLeaving) {
      const i = layout.place.get(node.id);
      layout.end[i] = next;
      layout.rows[i] = Math.max(row - layout.row[i], 1);
      for (let j = i + 1; j < next; j = layout.end[j]) layout.reach[i] = Math.max(layout.reach[i], layout.reach[j]);
      continue;
    }
    const i = next++;
    layout.nodes[i] = node;
    layout.place.set(node.id, i);
    layout.row[i] = row;
    layout.reach[i] = node.start + node.tokens;
    layout.maxEnd = Math.max(layout.maxEnd, layout.reach[i]);
    stack.push([node, true]);
    const below = children.get(node.id);
    if (below) for (let j = below.length - 1; j >= 0; j--) stack.push([below[j], false]);
    else row++;
  }
  layout.numRows = row;
  return layout;
}

/** Draw what is seen of a layout. view: {left, top: token and row at the corner, perToken, perRow: pixels}. colours:
 * {of: step of last use -> fill, inkOn: step -> ink, paper, held, chosen, disk, answer, steps}. marks: {selected, path:
 * Set of ids, found: Set of ids, answers: Map of ids -> position}. labelOf: words for a node, or "". Returns {rects,
 * stored, answers, retained: how many were drawn, wide: nodes with room for words}. */
export function draw(context, size, layout, view, colours, marks, now, labelOf) {
  const { width, height } = size;
  context.clearRect(0, 0, width, height);
  context.font = '11px ui-monospace, Menlo, Consolas, monospace';
  context.textBaseline = "middle";
  const seen = { rects: 0, stored: 0, answers: 0, retained: 0, wide: [] };
  // A band along a bar, from one position to another.
  const band = (from, to, y, height, below, colour) => {
    const x = Math.max((from - view.left) * view.perToken, -2);
    const w = Math.min((to - view.left) * view.perToken, width + 2) - x;
    if (w < 0.5) return 0;
    context.fillStyle = colours.paper;
    context.fillRect(x, y - below, w, height + 1);
    context.fillStyle = colour;
    context.fillRect(x, y, w, height);
    return 1;
  };
  let thin = null; // neighbours that share a line of pixels, drawn as one
  const fill = (x0, y0, x1, y1, step) => {
    context.fillStyle = colours.of[step];
    context.fillRect(x0, y0, x1 - x0, y1 - y0);
    seen.rects++;
  };
  const flush = () => {
    if (thin) fill(thin.x0, thin.line, thin.x1, thin.line + 1, thin.step);
    thin = null;
  };
  const outlines = [];
  for (let i = 0; i < layout.nodes.length; ) {
    const node = layout.nodes[i];
    const y0 = (layout.row[i] - view.top) * view.perRow;
    const y1 = y0 + layout.rows[i] * view.perRow;
    const x0 = (node.start - view.left) * view.perToken;
    if (y1 <= 0 || x0 >= width || (layout.reach[i] - view.left) * view.perToken <= 0) {
      i = layout.end[i];
      continue;
    }
    if (y0 >= height) break; // what follows stands lower
    const step = stepOf(node, now, colours.steps);
    const x1 = (node.start + node.tokens - view.left) * view.perToken;
    if (y1 - y0 < 1.5) {
      const line = Math.floor(y0);
      const last = (layout.reach[i] - view.left) * view.perToken;
      if (thin?.line === line) {
        thin.x0 = Math.min(thin.x0, Math.max(x0, 0));
        thin.x1 = Math.max(thin.x1, Math.min(last, width));
        thin.step = Math.max(thin.step, step);
      } else {
        flush();
        thin = { line, x0: Math.max(x0, 0), x1: Math.min(last, width), step };
      }
      i = layout.end[i];
      continue;
    }
    i++;
    if (x1 <= 0 || Math.floor(x1) === Math.floor(x0) && !marks.path.has(node.id)) continue; // left of the picture, or no pixel wide
    const gap = y1 - y0 > 5 ? 1 : 0;
    const left = Math.max(x0, -2);
    const right = Math.min(x1, width + 2);
    fill(left, y0, Math.max(right - (right - left > 3 ? 1 : 0), left + 0.5), y1 - gap, step);
    const thick = y1 - y0 > 16 ? 4 : y1 - y0 > 7 ? 2 : 0;
    if (thick && node.stored) {
      const to = node.start + Math.min(node.stored / node.pages, 1) * node.tokens;
      seen.stored += band(node.start, to, y1 - gap - thick, thick, 1, colours.disk);
    }
    const from = marks.answers.get(node.id);
    if (thick && from !== undefined) seen.answers += band(from, node.start + node.tokens, y0, thick, 0, colours.answer);
    if (thick && node.retained && x0 > -4) {
      context.fillStyle = colours.chosen;
      context.fillRect(x0, y0, Math.min(3, x1 - x0), y1 - gap - y0);
      seen.retained++;
    }
    if (node.locks > 0 || marks.path.has(node.id) || marks.found.has(node.id) || marks.selected === node.id) {
      outlines.push([node, left, y0, right, y1 - gap]);
    }
    if (right - left > 34 && y1 - y0 > 11) {
      seen.wide.push(node);
      const words = labelOf(node);
      if (words) {
        context.save();
        context.beginPath();
        context.rect(left, y0, right - left - 3, y1 - y0);
        context.clip();
        context.fillStyle = colours.inkOn[step];
        const middle = Math.min(Math.max((Math.max(y0, 0) + Math.min(y1, height)) / 2, y0 + 6), y1 - 6);
        context.fillText(words.slice(0, Math.ceil((right - left) / 5)), Math.max(left, 0) + 4, middle);
        context.restore();
      }
    }
  }
  flush();
  for (const [node, x0, y0, x1, y1] of outlines) {
    const isChosen = marks.selected === node.id || marks.path.has(node.id) || marks.found.has(node.id);
    context.lineWidth = marks.selected === node.id ? 3 : 2;
    context.strokeStyle = isChosen ? colours.chosen : colours.held;
    context.strokeRect(x0 + 1, y0 + 1, Math.max(x1 - x0 - 3, 1), Math.max(y1 - y0 - 2, 1));
  }
  return seen;
}

/** 0 for an hour ago or more, up to `steps - 1` for now: by the order of magnitude. */
export function stepOf(node, now, steps) {
  const idle = node.locks > 0 ? 0 : Math.max(now - node.used, 0);
  const share = 1 - Math.log1p(idle) / Math.log1p(3600);
  return Math.max(0, Math.min(steps - 1, Math.round(share * (steps - 1))));
}

/** The node at a point of the picture, or null. */
export function hit(layout, view, x, y) {
  const token = view.left + x / view.perToken;
  const row = view.top + y / view.perRow;
  let found = null;
  for (let i = 0; i < layout.nodes.length; ) {
    const node = layout.nodes[i];
    if (row < layout.row[i] || row >= layout.row[i] + layout.rows[i] || token < node.start) {
      i = layout.end[i];
      continue;
    }
    if (token < node.start + node.tokens) return node;
    found = null;
    i++;
  }
  return found;
}
