"use strict";
(() => {
  const root = document.documentElement;
  const data = JSON.parse(document.getElementById("report-data").textContent);
  const systemIsDark = window.matchMedia("(prefers-color-scheme: dark)");
  const PICTURES_AT_ONCE = 12;
  const THEME_KEY = "teacher-student-mask-report-theme";

  // ---- theme ----

  function isDark() {
    return root.dataset.theme ? root.dataset.theme === "dark" : systemIsDark.matches;
  }

  // Figures are written in the colours of the light theme.
  function themed(value) {
    if (typeof value === "string") {
      return isDark() && Object.hasOwn(data.dark, value) ? data.dark[value] : value;
    }
    if (Array.isArray(value)) {
      return value.map(themed);
    }
    if (value !== null && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, x]) => [key, themed(x)]));
    }
    return value;
  }

  function stored(theme) {
    // Some browsers refuse storage to local files.
    try {
      if (theme) {
        localStorage.setItem(THEME_KEY, theme);
      }
      return localStorage.getItem(THEME_KEY);
    } catch (error) {
      return null;
    }
  }

  function applyTheme() {
    document.getElementById("theme").textContent = isDark() ? "Light theme" : "Dark theme";
    for (const element of document.querySelectorAll("[data-colour]")) {
      const colour = element.dataset.colour;
      if (element.classList.contains("swatch")) {
        element.style.background = "fixed" in element.dataset ? colour : themed(colour);
      } else {
        element.style.color = themed(colour);
      }
    }
    for (const chart of document.querySelectorAll(".chart.drawn")) {
      draw(chart);
    }
  }

  // ---- figures ----

  function draw(chart) {
    const figure = themed(data.figures[chart.dataset.figure]);
    const config = {
      responsive: true,
      displaylogo: false,
      modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
      toImageButtonOptions: { filename: chart.dataset.figure, scale: 2 },
    };
    chart.classList.add("drawn");
    return Plotly.react(chart, figure.data, figure.layout, config);
  }

  // One after the other, so that the page answers meanwhile. Hidden ones would get a wrong size.
  function drawAll() {
    const next = [...document.querySelectorAll(".chart:not(.drawn)")].find(
      (chart) => chart.offsetParent !== null
    );
    if (next) {
      draw(next).then(() => setTimeout(drawAll, 0));
    } else {
      root.dataset.ready = "true";
    }
  }

  function setUpPairs() {
    const select = document.getElementById("pair");
    if (!select) {
      return;
    }
    select.addEventListener("change", () => {
      for (const block of document.querySelectorAll(".pair")) {
        block.hidden = block.id !== select.value;
      }
      const chart = document.querySelector(".pair:not([hidden]) .chart");
      draw(chart).then(() => Plotly.Plots.resize(chart));
    });
  }

  // ---- tables ----

  function sortKey(row, column) {
    const cell = row.cells[column];
    if (cell === undefined) {
      return null;
    }
    if ("value" in cell.dataset) {
      return Number(cell.dataset.value);
    }
    const text = cell.textContent.trim();
    return text === "-" ? null : text;
  }

  function compare(a, b) {
    return typeof a === "number" && typeof b === "number"
      ? a - b
      : String(a).localeCompare(String(b), "en", { numeric: true });
  }

  function sortTable(heading) {
    const row = heading.parentElement;
    const body = row.closest("table").tBodies[0];
    const column = heading.cellIndex;
    const first = heading.classList.contains("number") ? "descending" : "ascending";
    const second = first === "descending" ? "ascending" : "descending";
    const order = heading.getAttribute("aria-sort") === first ? second : first;
    const factor = order === "ascending" ? 1 : -1;
    const rows = [...body.rows].map((x) => [sortKey(x, column), x]);
    // Undefined values come last in both directions.
    rows.sort(([a], [b]) => {
      if (a === null || b === null) {
        return (a === null) - (b === null);
      }
      return factor * compare(a, b);
    });
    for (const other of row.cells) {
      other.setAttribute("aria-sort", other === heading ? order : "none");
    }
    body.append(...rows.map(([, x]) => x));
    body.classList.add("sorted");
  }

  function toTsv(table) {
    const lines = [...table.rows].map((row) =>
      [...row.cells].map((cell) => cell.textContent.trim().replace(/\s+/g, " ")).join("\t")
    );
    return lines.join("\n");
  }

  function notify(text) {
    const notice = document.getElementById("notice");
    notice.textContent = text;
    notice.classList.add("shown");
    clearTimeout(notify.timer);
    notify.timer = setTimeout(() => notice.classList.remove("shown"), 2500);
  }

  async function copyTable(button) {
    const table = document.getElementById(button.dataset.table);
    const text = toTsv(table);
    try {
      await navigator.clipboard.writeText(text);
    } catch (error) {
      // No clipboard on a local file in some browsers, or no permission.
      if (!copyBySelection(text, button)) {
        return;
      }
    }
    notify(`Copied ${table.tBodies[0].rows.length} rows`);
  }

  function copyBySelection(text, button) {
    const block = button.closest(".table-block");
    const area = block.querySelector(".copy-text") || document.createElement("textarea");
    area.className = "copy-text";
    area.readOnly = true;
    area.setAttribute("aria-label", "Table as text");
    area.value = text;
    block.append(area);
    area.select();
    if (document.execCommand("copy")) {
      area.remove();
      button.focus();
      return true;
    }
    notify("Press Ctrl+C to copy the selected text");
    return false;
  }

  function setUpTables() {
    for (const button of document.querySelectorAll(".sort")) {
      button.addEventListener("click", () => sortTable(button.closest("th")));
    }
    for (const button of document.querySelectorAll(".copy")) {
      button.addEventListener("click", () => copyTable(button));
    }
  }

  // ---- pictures ----

  function setUpPictures() {
    const box = document.getElementById("pictures");
    if (!box) {
      return;
    }
    const [order, only, unseen, more, count] = ["order", "class", "unseen", "more", "count"].map(
      (name) => document.getElementById(`picture-${name}`)
    );
    const all = [...box.children];
    const number = (figure, key) => Number(figure.dataset[key]);
    const orders = {
      difference: null,
      gain: (a, b) => number(b, "gain") - number(a, "gain"),
      loss: (a, b) => number(a, "gain") - number(b, "gain"),
      overlap: (a, b) => number(b, "overlap") - number(a, "overlap"),
      iou: (a, b) => number(a, "iou") - number(b, "iou"),
    };
    let limit = PICTURES_AT_ONCE;

    const observer = new IntersectionObserver(
      (entries) => {
        for (const entry of entries.filter((x) => x.isIntersecting)) {
          entry.target.src = entry.target.dataset.src;
          entry.target.removeAttribute("data-src");
          observer.unobserve(entry.target);
        }
      },
      { rootMargin: "400px" }
    );
    box.querySelectorAll("img").forEach((image) => observer.observe(image));

    function show() {
      const chosen = all.filter(
        (x) =>
          (!only.value || x.dataset.class === only.value) &&
          (!unseen.checked || x.dataset.unseen === "1")
      );
      const compareFigures = orders[order.value];
      if (compareFigures) {
        chosen.sort(compareFigures);
      }
      const visible = new Set(chosen.slice(0, limit));
      all.forEach((x) => (x.hidden = !visible.has(x)));
      box.append(...chosen);
      count.textContent = `${visible.size} of ${chosen.length} shown`;
      more.hidden = visible.size === chosen.length;
    }

    for (const control of [order, only, unseen]) {
      control.addEventListener("change", () => {
        limit = PICTURES_AT_ONCE;
        show();
      });
    }
    more.addEventListener("click", () => {
      limit += 2 * PICTURES_AT_ONCE;
      show();
    });
    show();
  }

  // ---- start ----

  const theme = stored();
  if (theme === "light" || theme === "dark") {
    root.dataset.theme = theme;
  }
  document.getElementById("theme").addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    stored(root.dataset.theme);
    applyTheme();
  });
  systemIsDark.addEventListener("change", applyTheme);
  document.querySelector(".filters")?.addEventListener("submit", (event) => event.preventDefault());
  applyTheme();
  setUpTables();
  setUpPairs();
  setUpPictures();
  drawAll();
})();
