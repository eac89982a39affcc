// Live parts: the server sends them as HTML, escaped by its templates; a part that somebody works in is left alone.
"use strict";
(() => {
  const here = document.querySelector(".box.here");
  if (here) {
    const frame = here.closest(".drawing");
    const box = here.getBoundingClientRect(), room = frame.getBoundingClientRect();
    frame.scrollLeft = Math.max(0, box.left - room.left - (room.width - box.width) / 2);
  }

  const url = document.body.dataset.live;
  if (!url || !window.EventSource) return;
  const state = document.getElementById("live-state");
  const announce = document.getElementById("announce");
  const tell = (text) => { if (state.textContent !== text) state.textContent = text; };

  const waiting = new Map();
  const isBusy = (part) => part.contains(document.activeElement);
  const put = (part, html) => {
    const framed = ".drawing, .scroll";
    const lefts = [...part.querySelectorAll(framed)].map((frame) => frame.scrollLeft);
    part.innerHTML = html;
    part.querySelectorAll(framed).forEach((frame, index) => { frame.scrollLeft = lefts[index] || 0; });
  };
  document.addEventListener("focusout", () => setTimeout(() => {
    for (const [part, html] of waiting) {
      if (isBusy(part)) continue;
      waiting.delete(part);
      put(part, html);
    }
  }));

  const source = new EventSource(url);
  source.addEventListener("open", () => tell("This page is live."));
  source.addEventListener("parts", (event) => {
    const parts = JSON.parse(event.data);
    for (const [name, html] of Object.entries(parts)) {
      const part = document.getElementById(name);
      if (name === "announce") announce.textContent = html;
      else if (part && isBusy(part)) waiting.set(part, html);
      else if (part) put(part, html);
    }
    tell("This page is live.");
  });
  source.addEventListener("trouble", (event) => tell("Not live: " + JSON.parse(event.data).message));
  source.addEventListener("error", () => tell(
    source.readyState === EventSource.CLOSED ? "Not live: load the page again." : "Not live: connecting again."));
  window.addEventListener("pagehide", () => source.close());
})();
