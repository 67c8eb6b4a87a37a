"use strict";
// Sorts and filters the table. Without it, the page holds all the same: this only helps to look.
(() => {
  const table = document.getElementById("workers");
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const words = document.getElementById("words");
  const leaking = document.getElementById("leaking");
  const shown = document.getElementById("shown");
  const texts = rows.map((row) => row.textContent.toLowerCase());

  const filter = () => {
    const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    rows.forEach((row, at) => {
      row.hidden = (leaking.checked && !("leaks" in row.dataset)) || !wanted.every((word) => texts[at].includes(word));
      count += !row.hidden;
    });
    shown.textContent = `${count} of ${rows.length} workers`;
  };

  const value = (row, column) => {
    const cell = row.cells[column];
    return "v" in cell.dataset ? Number(cell.dataset.v) : cell.textContent.trim().toLowerCase();
  };

  table.tHead.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    const head = button.closest("th");
    // Of numbers, the largest come first; of the time left, the least.
    const first = head.dataset.first || "ascending";
    const other = first === "ascending" ? "descending" : "ascending";
    const order = head.getAttribute("aria-sort") === first ? other : first;
    for (const one of table.tHead.rows[0].cells) one.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", order);
    const sign = order === "ascending" ? 1 : -1;
    const sorted = rows
      .map((row, at) => [value(row, head.cellIndex), at, row])
      .sort(([a, at], [b, bt]) => (a < b ? -sign : a > b ? sign : at - bt));
    body.append(...sorted.map(([, , row]) => row));
  });

  for (const one of [words, leaking]) one.addEventListener("input", filter);
  document.getElementById("tools").hidden = false;
  // A link to a worker that does not leak opens it.
  const open = () => {
    const target = location.hash && document.getElementById(location.hash.slice(1));
    if (target && target.tagName === "DETAILS") target.open = true;
  };
  addEventListener("hashchange", open);
  open();
  filter();
})();
