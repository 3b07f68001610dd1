// A column is as wide as what stands in it wants: numbers stay on a line, sentences get room, and
// long names in code may break behind an underscore.
document$.subscribe(() => {
  for (const table of document.querySelectorAll("article table:not([class])")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const cells = [...table.tBodies[0].rows].map((row) => row.cells[column]).filter(Boolean);
      const longest = Math.max(0, ...cells.map((cell) => cell.textContent.trim().length));
      if (longest <= 14) cells.forEach((cell) => (cell.style.whiteSpace = "nowrap"));
      else head.style.minWidth = `${Math.min(longest * 0.25, heads.length > 2 ? 9 : 6.5)}rem`;
    });
    for (const code of table.querySelectorAll("td code")) {
      const parts = code.textContent.split(/(?<=[_/])/);
      if (code.children.length || code.textContent.length < 20 || parts.length < 3) continue;
      code.replaceChildren(...parts.flatMap((part) => [part, document.createElement("wbr")]));
    }
  }
});
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
