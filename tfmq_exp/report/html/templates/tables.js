"use strict";
// A column's numbers are in data-v; lines without one stay last.
function sortBy(header) {
  const table = header.closest("table");
  const column = [...header.parentElement.children].indexOf(header);
  const down = header.getAttribute("aria-sort") === "ascending";
  for (const other of header.parentElement.children) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", down ? "descending" : "ascending");
  const key = (row) => row.children[column].dataset.v ?? row.children[column].textContent.trim();
  const numeric = header.classList.contains("n") || header.dataset.order === "number";
  const body = table.tBodies[0];
  const rows = [...body.rows].sort((a, b) => {
    const [x, y] = [key(a), key(b)];
    if (x === "" || y === "") return (x === "") - (y === "");
    const difference = numeric ? Number(x) - Number(y) : x.localeCompare(y);
    return down ? -difference : difference;
  });
  body.append(...rows);
}
document.querySelectorAll("th button").forEach((button) =>
  button.addEventListener("click", () => sortBy(button.closest("th"))));
