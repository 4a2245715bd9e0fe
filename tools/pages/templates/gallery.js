"use strict";
// Sorts and filters tiles by what #gallery-data says of them, and shows what lies under the mouse.
(() => {
  const root = document.documentElement;
  const TILES_AT_ONCE = 60;
  const THEME_KEY = "teacher-student-mask-report-theme";
  const control = (id) => document.getElementById(id);

  // ---- theme, shared with the report ----

  const systemIsDark = window.matchMedia("(prefers-color-scheme: dark)");

  function isDark() {
    return root.dataset.theme ? root.dataset.theme === "dark" : systemIsDark.matches;
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

  function nameTheme() {
    control("theme").textContent = isDark() ? "Light theme" : "Dark theme";
  }

  const theme = stored();
  if (theme === "light" || theme === "dark") {
    root.dataset.theme = theme;
  }
  control("theme").addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    stored(root.dataset.theme);
    nameTheme();
  });
  systemIsDark.addEventListener("change", nameTheme);
  nameTheme();

  // ---- tiles ----

  const gallery = control("gallery");
  const tiles = JSON.parse(control("gallery-data").textContent).map((tile, i) => ({
    ...tile,
    element: gallery.children[i],
    position: i,
  }));
  // An item is [class, kind, value]; value is null where there is none.
  const orders = {
    "": (a, b) => a.position - b.position,
    name: (a, b) => a.name.localeCompare(b.name, "en", { numeric: true }),
    count: (a, b) => b.matches.length - a.matches.length,
    high: (a, b) => extreme(b, Math.max) - extreme(a, Math.max),
    low: (a, b) => extreme(a, Math.min) - extreme(b, Math.min),
  };
  let limit = TILES_AT_ONCE;

  function extreme(tile, choose) {
    const values = tile.matches.map((x) => x[2]).filter((x) => x !== null);
    // Tiles without a value come last.
    return values.length ? choose(...values) : choose === Math.max ? -1 : 2;
  }

  function choice(id) {
    return control(id) ? control(id).value : "";
  }

  function describe(tile) {
    const count = tile.element.querySelector(".tile-count");
    const number = tile.matches.length;
    count.textContent = `${number} object${number === 1 ? "" : "s"}`;
    const values = tile.element.querySelector(".tile-values");
    const scores = tile.matches.map((x) => x[2]);
    if (values && scores.length) {
      const ends = [Math.min(...scores), Math.max(...scores)].map((x) => x.toFixed(2));
      values.textContent = `score ${ends[0] === ends[1] ? ends[0] : ends.join(" to ")}`;
    } else if (values) {
      values.textContent = "";
    }
    const shapes = tile.element.querySelectorAll("[data-item]");
    shapes.forEach((x) => x.classList.toggle("dim", !tile.matching.has(Number(x.dataset.item))));
  }

  function show() {
    const [class_, kind] = [choice("class"), choice("kind")];
    const minimum = Number(choice("minimum")) || 0;
    const isFiltered = class_ !== "" || kind !== "" || minimum > 0;
    for (const tile of tiles) {
      tile.matching = new Set(
        tile.items.flatMap((x, i) => {
          const matches =
            (class_ === "" || x[0] === Number(class_)) &&
            (kind === "" || x[1] === kind) &&
            (minimum === 0 || (x[2] !== null && x[2] >= minimum));
          return matches ? [i] : [];
        })
      );
      tile.matches = tile.items.filter((x, i) => tile.matching.has(i));
    }
    const withEmpty = !isFiltered && (!control("empty") || control("empty").checked);
    const chosen = tiles.filter((x) => x.matches.length || withEmpty);
    chosen.sort(orders[choice("order")]);
    const visible = chosen.slice(0, limit);
    tiles.forEach((x) => (x.element.hidden = true));
    for (const tile of visible) {
      tile.element.hidden = false;
      describe(tile);
    }
    gallery.append(...chosen.map((x) => x.element));
    const objects = chosen.reduce((sum, x) => sum + x.matches.length, 0);
    control("count").textContent =
      `${visible.length} of ${chosen.length} pictures shown, with ${objects} objects in all`;
    control("more").hidden = visible.length === chosen.length;
  }

  for (const id of ["order", "class", "kind", "minimum", "empty"]) {
    control(id)?.addEventListener("input", () => {
      limit = TILES_AT_ONCE;
      show();
    });
  }
  control("more").addEventListener("click", () => {
    limit += 2 * TILES_AT_ONCE;
    show();
  });
  control("names")?.addEventListener("input", (event) =>
    root.classList.toggle("no-names", !event.target.checked)
  );
  document.querySelector(".filters").addEventListener("submit", (event) => event.preventDefault());

  // ---- what is under the mouse, or has the focus ----

  const tooltip = control("tooltip");

  function place(x, y) {
    const box = tooltip.getBoundingClientRect();
    const left = Math.min(x + 14, innerWidth - box.width - 4);
    const top = y + 18 + box.height > innerHeight ? y - box.height - 10 : y + 18;
    tooltip.style.left = `${Math.max(4, left)}px`;
    tooltip.style.top = `${Math.max(4, top)}px`;
  }

  function tell(event, x, y) {
    const shape = event.target.closest("[data-tip]");
    tooltip.hidden = !shape;
    if (shape) {
      tooltip.textContent = shape.dataset.tip;
      place(x, y);
    }
  }

  document.addEventListener("pointermove", (event) => tell(event, event.clientX, event.clientY));
  document.addEventListener("focusin", (event) => {
    const box = event.target.getBoundingClientRect();
    tell(event, box.left, box.bottom);
  });
  document.addEventListener("scroll", () => (tooltip.hidden = true), { passive: true });

  show();
  root.dataset.ready = "true";
})();
