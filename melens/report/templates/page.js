"use strict";
// Opens what a link leads to, and what a printer should show. The page works without it.
function reveal() {
  const place = document.getElementById(location.hash.slice(1)) ||
    document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (!place) return;
  for (let box = place.closest("details"); box; box = box.parentElement.closest("details"))
    box.open = true;
  place.scrollIntoView({ block: "center" });
  if (place.closest("pre")) {
    place.tabIndex = -1;
    place.focus({ preventScroll: true });
  }
}
addEventListener("hashchange", reveal);
if (location.hash) reveal();
let closed = [];
addEventListener("beforeprint", () => {
  closed = [...document.querySelectorAll("details.print:not([open])")];
  for (const box of closed) box.open = true;
});
addEventListener("afterprint", () => {
  for (const box of closed) box.open = false;
});
