"use strict";
// Sliders: the range input has the value and the keyboard; pointers are read from the whole
// picture, because some phones move a range input only by its thumb.
for (const box of document.querySelectorAll(".compare:not(.missing)")) {
  const input = box.querySelector("input");
  const show = () => box.style.setProperty("--at", input.value + "%");
  const follow = (event) => {
    const frame = box.getBoundingClientRect();
    const share = (event.clientX - frame.left) / frame.width;
    input.value = String(Math.round(100 * Math.min(1, Math.max(0, share))));
    show();
  };
  input.addEventListener("input", show);
  box.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    box.setPointerCapture(event.pointerId);
    input.focus({ preventScroll: true, focusVisible: false });
    follow(event);
  });
  box.addEventListener("pointermove", (event) => {
    if (box.hasPointerCapture(event.pointerId)) follow(event);
  });
  show();
}

// Tables: numbers sort as numbers, names in natural order, unknown values always last.
const words = new Intl.Collator(undefined, { numeric: true, sensitivity: "base" });
function valueOf(row, column) {
  const cell = row.cells[column];
  if (cell.dataset.value !== undefined) return Number(cell.dataset.value);
  const text = cell.textContent.trim();
  return text === "–" ? null : text;
}
function compare(a, b) {
  if (typeof a === "number" && typeof b === "number") return a - b;
  return words.compare(String(a), String(b));
}
function sort(table, column, direction) {
  const body = table.tBodies[0];
  const keyed = Array.from(body.rows, (row) => [valueOf(row, column), row]);
  keyed.sort(([a], [b]) =>
    a === null || b === null ? (a === null) - (b === null) : direction * compare(a, b));
  body.append(...keyed.map(([, row]) => row));
}
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = Array.from(table.tHead.rows[0].cells);
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    for (const other of heads) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    sort(table, column, up ? 1 : -1);
  }));
}

// Filter: rows whose name or status contains the words typed.
const filter = document.getElementById("filter");
if (filter) filter.addEventListener("input", () => {
  const wanted = filter.value.trim().toLowerCase();
  for (const row of document.getElementById("images-table").tBodies[0].rows) {
    const text = (row.cells[0].textContent + " " + row.cells[1].textContent).toLowerCase();
    row.hidden = !text.includes(wanted);
  }
});
