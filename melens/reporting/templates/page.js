"use strict";
// Opens what a link leads to, and what a printer should show. The page works without it.
function reveal() {
  const place = document.getElementById(location.hash.slice(1)) ||
    document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (!place || !place.closest("details")) return;
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
// A narrow screen shows a figure whole; enlarged, it is moved sideways.
for (const button of document.querySelectorAll(".enlarge")) {
  button.hidden = false;
  button.addEventListener("click", () => {
    const large = button.closest("figure").classList.toggle("large");
    button.setAttribute("aria-pressed", large);
  });
}
// circuitsvis draws maps without names, and enlarges them for a mouse only.
function reachable(panel) {
  for (const title of panel.querySelectorAll("h4")) {
    const box = title.parentElement;
    if (box.tabIndex >= 0) continue;
    box.tabIndex = 0;
    box.setAttribute("role", "button");
    box.setAttribute("aria-label", "Enlarge " + title.textContent);
    box.addEventListener("keydown", event => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      title.click();
    });
  }
  for (const map of panel.querySelectorAll("canvas")) {
    const box = map.closest("[role=button]");
    const large = [...panel.querySelectorAll("h3")].find(title => /Zoomed/.test(title.textContent));
    const name = box ? box.querySelector("h4").textContent : large ? large.textContent : "heads";
    const label = "Attention map " + name;
    if (map.getAttribute("aria-label") !== label) map.setAttribute("aria-label", label);
  }
}
for (const panel of document.querySelectorAll(".panel")) {
  const again = () => reachable(panel);
  new MutationObserver(again).observe(panel, { childList: true, subtree: true, characterData: true });
  again();
}
