// Shows the words of the element under the pointer. Everything else on the page stands in its markup.
"use strict";
(() => {
  const tip = document.getElementById("tip");
  const show = (event) => {
    const owner = event.target instanceof Element ? event.target.closest("[data-tip]") : null;
    tip.hidden = owner === null;
    if (owner === null) return;
    tip.textContent = owner.getAttribute("data-tip");
    const { width, height } = tip.getBoundingClientRect();
    const besides = event.clientX + 14 + width > innerWidth ? event.clientX - 14 - width : event.clientX + 14;
    const below = event.clientY + 14 + height > innerHeight ? event.clientY - 14 - height : event.clientY + 14;
    tip.style.left = `${Math.max(besides, 4)}px`;
    tip.style.top = `${Math.max(below, 4)}px`;
  };
  document.addEventListener("pointermove", show);
  document.addEventListener("pointerdown", show);
  document.addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
})();
