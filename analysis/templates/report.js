"use strict";
const tip = document.getElementById("tip");

function showTip(mark, x, y) {
  tip.textContent = mark.dataset.tip;
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = Math.max(8, Math.min(x + 14, innerWidth - box.width - 8)) + "px";
  tip.style.top = (y + 18 + box.height > innerHeight ? Math.max(8, y - box.height - 12) : y + 18) + "px";
}

for (const mark of document.querySelectorAll(".mark")) {
  mark.addEventListener("pointermove", event => showTip(mark, event.clientX, event.clientY));
  mark.addEventListener("pointerleave", () => { tip.hidden = true; });
  mark.addEventListener("focus", () => {
    const box = mark.querySelector(".dot").getBoundingClientRect();
    showTip(mark, box.right, box.bottom);
  });
  mark.addEventListener("blur", () => { tip.hidden = true; });
}
addEventListener("keydown", event => { if (event.key === "Escape") tip.hidden = true; });

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
