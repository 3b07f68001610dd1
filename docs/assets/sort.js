// A click on a column's head sorts the table by it; another click turns it round.
document$.subscribe(() => {
  for (const table of document.querySelectorAll("article table:not([class])")) {
    const body = table.tBodies[0];
    if (!body || body.rows.length < 12) continue;
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      const key = (row) => (row.cells[column] ? row.cells[column].textContent.trim() : "");
      const sort = () => {
        const up = head.getAttribute("aria-sort") !== "ascending";
        for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const rows = [...body.rows].sort((a, b) => key(a).localeCompare(key(b), "en", { numeric: true }));
        body.append(...(up ? rows : rows.reverse()));
      };
      head.tabIndex = 0;
      head.style.cursor = "pointer";
      head.title = "sort";
      head.addEventListener("click", sort);
      head.addEventListener("keydown", (event) => event.key === "Enter" && sort());
    });
  }
});
