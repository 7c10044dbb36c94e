"use strict";
const tip = document.getElementById("tip");
let pinned = null; // the mark whose card stays open, so that its links can be reached

function place(x, y) {
  const box = tip.getBoundingClientRect();
  tip.style.left = Math.max(8, Math.min(x + 14, innerWidth - box.width - 8)) + "px";
  tip.style.top = (y + 18 + box.height > innerHeight ? Math.max(8, y - box.height - 12) : y + 18) + "px";
}

function fill(mark, withRuns) {
  const text = document.createElement("p");
  text.textContent = mark.dataset.tip;
  tip.replaceChildren(text);
  if (!withRuns) return;
  const close = document.createElement("button");
  close.type = "button";
  close.textContent = "close";
  close.addEventListener("click", event => { event.stopPropagation(); unpin(true); });
  tip.prepend(close);
  const article = mark.closest("article");
  const runs = article && article.querySelector(`template[data-runs="${mark.dataset.arm}"]`);
  if (runs) tip.append(runs.content.cloneNode(true));
}

function showTip(mark, x, y) {
  if (pinned) return;
  fill(mark, false);
  tip.hidden = false;
  place(x, y);
}

function hideTip() { if (!pinned) tip.hidden = true; }

function pin(mark, x, y, byKey) {
  pinned = mark;
  fill(mark, true);
  tip.classList.add("pinned");
  tip.hidden = false;
  place(x, y);
  if (byKey) (tip.querySelector("a") || tip.querySelector("button")).focus();
}

function unpin(refocus) {
  const mark = pinned;
  pinned = null;
  tip.classList.remove("pinned");
  if (refocus && mark) mark.focus();
  tip.hidden = true;
}

for (const mark of document.querySelectorAll(".mark")) {
  const corner = () => {
    const box = mark.querySelector(".dot").getBoundingClientRect();
    return [box.right, box.bottom];
  };
  mark.addEventListener("pointermove", event => showTip(mark, event.clientX, event.clientY));
  mark.addEventListener("pointerleave", hideTip);
  mark.addEventListener("focus", () => showTip(mark, ...corner()));
  mark.addEventListener("blur", hideTip);
  mark.addEventListener("click", event => {
    event.stopPropagation();
    if (pinned === mark) unpin(false); else pin(mark, event.clientX, event.clientY, false);
  });
  mark.addEventListener("keydown", event => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    pin(mark, ...corner(), true);
  });
}
addEventListener("click", event => { if (pinned && !tip.contains(event.target)) unpin(false); });
addEventListener("keydown", event => {
  if (event.key !== "Escape") return;
  if (pinned) unpin(true); else tip.hidden = true;
});

function hints() {
  for (const hint of document.querySelectorAll(".hint")) {
    const box = hint.parentElement.querySelector(".scroll");
    hint.hidden = box.scrollWidth <= box.clientWidth + 1;
  }
}
hints();
addEventListener("resize", hints);
for (const details of document.querySelectorAll("details")) details.addEventListener("toggle", hints);

for (const button of document.querySelectorAll(".legend button")) {
  button.addEventListener("click", () => {
    const shown = button.getAttribute("aria-pressed") !== "true";
    const same = `[data-arm="${button.dataset.arm}"]`;
    const article = button.closest("article");
    for (const other of article.querySelectorAll(".legend " + same)) other.setAttribute("aria-pressed", shown);
    for (const mark of article.querySelectorAll(".mark" + same)) mark.classList.toggle("off", !shown);
  });
}

function compare(a, b) {
  if (a === b) return 0;
  if (a === "" || b === "") return a === "" ? 1 : -1;
  const [p, q] = [a, b].map(v => v === "inf" ? Infinity : Number(v));
  return Number.isNaN(p) || Number.isNaN(q) ? a.localeCompare(b) : p - q;
}

for (const table of document.querySelectorAll("table")) {
  table.querySelectorAll("th button").forEach((button, column) => {
    button.addEventListener("click", () => {
      const head = button.parentElement;
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = row => row.cells[column].dataset.sort;
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => {
        const [x, y] = [key(a), key(b)];
        const order = compare(x, y);
        return down && x !== "" && y !== "" ? -order : order;
      });
      table.tBodies[0].append(...rows);
    });
  });
}

const unfolded = [];
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details:not([open])")) {
    details.open = true;
    unfolded.push(details);
  }
});
addEventListener("afterprint", () => { for (const details of unfolded.splice(0)) details.open = false; });
