// What a page must keep to so that everybody can use it. An expression: the list of what is broken, in words.
(() => {
  const broken = [];
  const isSeen = (element) => {
    const box = element.getBoundingClientRect();
    const style = getComputedStyle(element);
    return box.width > 1 && box.height > 1 && style.visibility !== "hidden" && style.display !== "none" &&
      element.checkVisibility({ opacityProperty: true, visibilityProperty: true });
  };
  const shown = (element) => element.outerHTML.slice(0, 140);
  const nameOf = (element) => {
    const by = element.getAttribute("aria-labelledby");
    const label = element.id && document.querySelector(`label[for="${element.id}"]`);
    return (element.getAttribute("aria-label") || (by && document.getElementById(by)?.textContent) ||
      label?.textContent || element.textContent || element.getAttribute("title") || "").trim();
  };
  if (!/^[a-z]{2}(-[A-Za-z]+)?$/.test(document.documentElement.lang)) broken.push("no language");
  if (!document.title) broken.push("no title");
  if (document.querySelectorAll("main").length !== 1) broken.push("not one main");
  if (document.querySelectorAll("h1").length !== 1) broken.push(`${document.querySelectorAll("h1").length} h1`);
  const ids = [...document.querySelectorAll("[id]")].map((element) => element.id);
  if (new Set(ids).size !== ids.length) broken.push(`an id twice: ${ids.find((id, i) => ids.indexOf(id) !== i)}`);
  for (const name of ["aria-labelledby", "aria-describedby", "aria-controls", "for"]) {
    for (const element of document.querySelectorAll(`[${name}]`)) {
      if (!document.getElementById(element.getAttribute(name))) broken.push(`${name} leads nowhere: ${shown(element)}`);
    }
  }
  for (const element of document.querySelectorAll("button, a[href], input, select, textarea, summary, canvas, [tabindex], [role]")) {
    if (!isSeen(element) || element.id === "main" || ["status", "alert"].includes(element.getAttribute("role"))) continue;
    if (!nameOf(element)) broken.push(`no name: ${shown(element)}`);
    if (element.tabIndex > 0) broken.push(`an order of its own: ${shown(element)}`);
    if (element.tagName === "BUTTON" && element.getBoundingClientRect().height < 24) broken.push(`too small: ${shown(element)}`);
  }
  for (const image of document.querySelectorAll("img:not([alt])")) broken.push(`no words for ${shown(image)}`);
  for (const table of document.querySelectorAll("table")) {
    if (table.querySelector("th:not([scope])")) broken.push(`a head without scope: ${shown(table)}`);
  }

  const read = (colour) => {
    const [r, g, b, a = 1] = colour.match(/[\d.]+/g).map(Number);
    return { r, g, b, a };
  };
  const over = (top, low) => ({
    r: top.r * top.a + low.r * (1 - top.a), g: top.g * top.a + low.g * (1 - top.a), b: top.b * top.a + low.b * (1 - top.a), a: 1,
  });
  const light = ({ r, g, b }) => {
    const part = (value) => ((value /= 255) <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
    return 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
  };
  const groundOf = (element) => {
    const layers = [];
    for (let one = element; one; one = one.parentElement) {
      const colour = read(getComputedStyle(one).backgroundColor);
      if (colour.a > 0) layers.push(colour);
      if (colour.a === 1) break;
    }
    return layers.reverse().reduce((low, top) => over(top, low), { r: 255, g: 255, b: 255, a: 1 });
  };
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const told = new Set();
  for (let node = texts.nextNode(); node; node = texts.nextNode()) {
    const element = node.parentElement;
    if (!node.data.trim() || !isSeen(element) || element.closest(".unseen, .skip, :disabled, noscript, option")) continue;
    const style = getComputedStyle(element);
    const ground = groundOf(element);
    const ink = over(read(style.color), ground);
    const [a, b] = [light(ink), light(ground)].sort((x, y) => y - x);
    const size = parseFloat(style.fontSize);
    const wanted = size >= 24 || (size >= 18.66 && style.fontWeight >= 700) ? 3 : 4.5;
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < wanted && !told.has(element)) {
      told.add(element);
      broken.push(`contrast ${ratio.toFixed(2)} of ${style.color} on ${JSON.stringify(ground)}: ${shown(element)}`);
    }
  }
  const root = document.scrollingElement;
  if (root.scrollWidth > root.clientWidth) broken.push(`scrolls sideways: ${root.scrollWidth} > ${root.clientWidth}`);
  const main = document.querySelector("main");
  if (main.scrollWidth > main.clientWidth) broken.push(`main scrolls sideways: ${main.scrollWidth} > ${main.clientWidth}`);
  return broken;
})()
