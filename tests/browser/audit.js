// A few of the rules of WCAG that a program can judge. Answers what is wrong, in words.
() => {
  const wrong = [];
  const shown = (e) => e.getClientRects().length > 0;
  const told = (e) => (e.textContent || "").trim() || e.getAttribute("aria-label") || e.getAttribute("title") ||
    (e.labels && [...e.labels].map((l) => l.textContent).join(" ").trim()) || "";
  const all = (s) => [...document.querySelectorAll(s)];
  if (!document.documentElement.lang) wrong.push("no language");
  if (!document.title.trim()) wrong.push("no title");
  for (const one of ["header", "main", "nav", "footer"]) if (!document.querySelector(one)) wrong.push("no " + one);
  if (all("main").length !== 1) wrong.push("not one main");
  if (all("h1").length !== 1) wrong.push("not one h1");
  let before = 0;
  for (const heading of all("main h1, main h2, main h3, main h4")) {
    const level = Number(heading.tagName[1]);
    if (level > before + 1) wrong.push("heading skips: " + heading.textContent.trim());
    if (!heading.textContent.trim()) wrong.push("empty heading");
    before = level;
  }
  for (const e of all("a[href], button, input:not([type=hidden]), select, textarea, summary"))
    if (shown(e) && !told(e)) wrong.push("no name: " + e.outerHTML.slice(0, 120));
  for (const e of all("input:not([type=hidden]), select, textarea"))
    if (!e.labels.length && !e.getAttribute("aria-label")) wrong.push("no label: " + e.outerHTML.slice(0, 120));
  for (const e of all("svg")) if (e.getAttribute("aria-hidden") !== "true" && e.getAttribute("role") !== "img") wrong.push("svg without role");
  for (const e of all("svg[role=img]")) {
    const by = (e.getAttribute("aria-labelledby") || "").split(" ").filter(Boolean);
    if (!e.getAttribute("aria-label") && !(by.length && by.every((id) => document.getElementById(id)))) wrong.push("svg without a name");
  }
  for (const e of all("table")) if (!e.querySelector("thead th[scope=col]")) wrong.push("table without headings");
  for (const e of all("[aria-labelledby], [aria-describedby]"))
    for (const id of ((e.getAttribute("aria-labelledby") || "") + " " + (e.getAttribute("aria-describedby") || "")).split(" ").filter(Boolean))
      if (!document.getElementById(id)) wrong.push("points at nothing: " + id);
  const ids = all("[id]").map((e) => e.id);
  for (const id of new Set(ids)) if (ids.filter((one) => one === id).length > 1) wrong.push("id twice: " + id);
  if (!document.querySelector("[aria-live]")) wrong.push("no live region");
  for (const e of all(".drawing, .scroll")) if (e.scrollWidth > e.clientWidth + 1 && e.tabIndex < 0) wrong.push("scrolls, but not by keyboard");

  const parts = (text) => (text.match(/[\d.]+/g) || []).map(Number);
  const light = (c) => c.slice(0, 3).map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (e) => { for (; e; e = e.parentElement) {
    const c = parts(getComputedStyle(e).backgroundColor); if (c.length === 3 || c[3] > 0.99) return c; } return [255, 255, 255]; };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode());) {
    const e = node.parentElement;
    if (!node.textContent.trim() || !shown(e) || e.closest("svg, .quiet, .skip, option")) continue;
    const style = getComputedStyle(e);
    const a = light(parts(style.color)), b = light(ground(e));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.6 && Number(style.fontWeight) >= 600);
    if (ratio < (large ? 3 : 4.5)) wrong.push("contrast " + ratio.toFixed(2) + ": " + node.textContent.trim().slice(0, 40));
  }
  return [...new Set(wrong)];
}
