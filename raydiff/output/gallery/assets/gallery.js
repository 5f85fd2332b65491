"use strict";
/* The page: what is chosen, filtered and sorted, and the keys. */

const KEYS = [
  ["← → ↑ ↓", "Go to the next result; in an open one, the one before or after"],
  ["Home  End  PgUp  PgDn", "Go far"],
  ["Enter", "Open the result"],
  ["Escape", "Close; leave a field"],
  ["/", "Filter by prompt"],
  ["f", "Show or hide the filters"],
  ["x", "Choose for comparison, or not"],
  ["c", "Compare what is chosen (two to four)"],
  ["g  v", "Grid, X/Y/Z grid"],
  ["[  ]", "Page before, next page (Z)"],
  ["+  -  0", "Zoom in, out, whole picture; Shift and arrows move it"],
  ["?", "These keys"],
];
const THEMES = ["auto", "light", "dark"];
const CAPTION_HEIGHT = 42;
const INSET = 8;

class Gallery {
  constructor() {
    this.filters = new Map();
    this.sort = {name: "row_index", isDescending: false};
    this.view = "grid";
    this.axes = ["", "", ""];
    this.page = 0;
    this.chosen = new Map(); // key → row
    this.current = {column: 0, row: 0};
    this.rows = new Uint32Array(0);
    this.captionColumns = [];
    this.store = new Store({
      onRows: () => this.showRows(),
      onStatus: () => this.showStatus(),
      onProblem: (text) => this.showProblem(text),
      isBusy: () => document.querySelector("dialog[open]") !== null,
    });
    this.scroller = byId("scroller");
    this.grid = new VirtualGrid(this.scroller, byId("spacer"), {
      drawCell: (column, row) => this.drawCell(column, row),
      drawHead: (kind, index) => this.drawHead(kind, index),
    });
    this.panel = new FilterPanel(this, byId("filters"), byId("chips"));
    this.viewer = new Viewer(this, byId("viewer"));
    this.compare = new Compare(this, byId("compare"));
    this.listen();
    this.setTheme(remembered("theme") ?? "auto");
    this.setSize(Number(remembered("size")) || (innerWidth < 600 ? 112 : 168));
    this.toggleFilters(innerWidth >= 900);
  }

  listen() {
    const on = (id, event, action) => byId(id).addEventListener(event, action);
    on("search", "input", debounced(() => {
      const text = byId("search").value;
      this.setFilter("prompt", text ? {type: "text", text} : null);
    }));
    on("sort", "change", () => this.setSort({...this.sort, name: byId("sort").value}));
    on("direction", "click", () => this.setSort({...this.sort, isDescending: !this.sort.isDescending}));
    on("size", "input", () => this.setSize(Number(byId("size").value)));
    on("view-grid", "click", () => this.setView("grid"));
    on("view-xyz", "click", () => this.setView("xyz"));
    ["x", "y", "z"].forEach((axis, index) => on(`axis-${axis}`, "change", (event) => {
      const name = event.target.value;
      this.axes = this.axes.map((other, place) => (place === index ? name : other === name ? "" : other));
      this.page = 0;
      this.fillSelects();
      this.arrange();
    }));
    on("page", "change", () => this.setPage(Number(byId("page").value)));
    on("page-back", "click", () => this.setPage(this.page - 1));
    on("page-on", "click", () => this.setPage(this.page + 1));
    on("filters-button", "click", () => this.toggleFilters());
    on("theme-button", "click", () => {
      const next = THEMES[(THEMES.indexOf(this.theme) + 1) % THEMES.length];
      this.setTheme(next);
      toast(`Theme: ${next}`);
    });
    on("help-button", "click", () => this.showHelp());
    on("compare-button", "click", () => this.compareChosen());
    on("clear-button", "click", () => this.clearChosen());
    this.scroller.addEventListener("click", (event) => this.click(event));
    this.scroller.addEventListener("focus", () => this.showCurrent());
    document.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => this.lay()).observe(this.scroller);
  }

  /* -- what the store tells -- */

  showStatus() {
    const {status} = this.store;
    document.title = `${status.title} · raydiff gallery`;
    byId("title").textContent = status.title;
    this.captionColumns = captionColumns(this.store);
    this.fillSelects();
    this.panel.draw();
    this.showSummary();
  }

  showRows() {
    const {store} = this;
    const anchor = this.anchor();
    for (const key of this.chosen.keys()) this.chosen.set(key, null);
    if (this.chosen.size) {
      for (let row = 0; row < store.numRows; row += 1) {
        const key = store.key(row);
        if (this.chosen.has(key)) this.chosen.set(key, row);
      }
      for (const [key, row] of this.chosen) if (row === null) this.chosen.delete(key);
    }
    this.arrange(anchor);
    this.drawTray();
    document.body.dataset.rows = store.numRows;
    document.body.dataset.complete = String(store.isComplete);
  }

  showSummary() {
    const {status, numRows, isComplete} = this.store;
    const number = (count) => count.toLocaleString("en");
    const parts = [this.rows.length === numRows
      ? `${number(numRows)} results` : `${number(this.rows.length)} of ${number(numRows)} results`];
    const failed = (this.store.columns.get("status")?.choices ?? [])
      .filter(([value]) => value !== "completed").reduce((sum, [, count]) => sum + count, 0);
    if (failed) parts.push(`${number(failed)} failed`);
    if (!isComplete && numRows < status.num_rows) parts.push(`loading ${number(status.num_rows)} …`);
    if (status.state === "running") {
      parts.push(status.num_expected ? `running, ${number(status.num_expected)} expected` : "running");
    }
    byId("summary").textContent = parts.join(" · ");
  }

  showProblem(text) {
    if (this.store.status) toast(text);
    else this.showEmpty("No data", text);
  }

  /* -- which rows, where -- */

  setFilter(name, filter) {
    if (filter) this.filters.set(name, filter);
    else this.filters.delete(name);
    if (name === "prompt" && byId("search") !== document.activeElement) {
      byId("search").value = filter?.type === "text" ? filter.text : "";
    }
    this.panel.drawChips();
    this.current = {column: 0, row: 0};
    this.scroller.scrollTop = 0;
    this.page = 0;
    this.arrange();
  }

  clearFilters() {
    this.filters.clear();
    byId("search").value = "";
    this.panel.redraw();
    this.arrange();
  }

  setSort(sort) {
    this.sort = sort;
    const direction = byId("direction");
    direction.textContent = sort.isDescending ? "↓" : "↑";
    direction.setAttribute("aria-label", sort.isDescending ? "Descending" : "Ascending");
    byId("sort").value = sort.name;
    this.scroller.scrollTop = 0;
    this.current = {column: 0, row: 0};
    this.arrange();
  }

  setView(view) {
    this.view = view;
    byId("view-grid").setAttribute("aria-pressed", String(view === "grid"));
    byId("view-xyz").setAttribute("aria-pressed", String(view === "xyz"));
    byId("grid-controls").hidden = view !== "grid";
    byId("xyz-controls").hidden = view !== "xyz";
    document.body.dataset.view = view;
    if (view === "xyz" && this.axes.every((name) => name === "")) this.axes = likelyAxes(this.store);
    this.fillSelects();
    this.current = {column: 0, row: 0};
    this.scroller.scrollTo(0, 0);
    this.arrange();
  }

  setPage(page) {
    const count = this.layout?.values[2].length ?? 1;
    this.page = Math.min(Math.max(page, 0), count - 1);
    this.lay();
    this.showPages();
  }

  setSize(size) {
    this.size = size;
    byId("size").value = size;
    remember("size", size);
    this.lay();
  }

  /* The result at the top of the screen, to be there again when rows come in before it. */
  anchor() {
    if (this.view !== "grid" || !this.rows.length || this.scroller.scrollTop === 0) return null;
    const row = Math.floor(this.grid.offset / this.grid.shape.cellHeight);
    const index = row * this.grid.shape.numColumns;
    if (index >= this.rows.length) return null;
    return {row: this.rows[index], within: this.grid.offset - row * this.grid.shape.cellHeight};
  }

  arrange(anchor = null) {
    const {store} = this;
    if (!store.status) return;
    this.rows = matchingRows(store, this.filters);
    if (this.view === "grid") {
      if (this.sort.name !== "row_index" || this.sort.isDescending) {
        this.rows = sortedRows(store, this.rows, this.sort.name, this.sort.isDescending);
      }
      this.layout = null;
    } else {
      this.layout = layOut(store, this.rows, this.axes);
      this.page = Math.min(this.page, this.layout.values[2].length - 1);
    }
    this.showPages();
    this.lay();
    if (anchor) {
      const index = this.rows.indexOf(anchor.row);
      const {numColumns, cellHeight} = this.grid.shape;
      if (index >= 0) this.grid.offset = Math.floor(index / numColumns) * cellHeight + anchor.within;
      this.grid.update();
    }
    this.showSummary();
    this.showEmptiness();
  }

  lay() {
    if (!this.store.status) return;
    const width = this.scroller.clientWidth - 2 * INSET;
    const isGrid = this.view === "grid";
    const numColumns = isGrid ? Math.max(1, Math.round(width / (this.size + 8))) : this.layout.values[0].length;
    const cellWidth = isGrid ? width / numColumns : this.size + 8;
    const isNarrow = this.scroller.clientWidth < 600;
    const hasCaption = this.size >= 104;
    this.scroller.classList.toggle("is-bare", !hasCaption);
    const cellHeight = cellWidth + (hasCaption ? CAPTION_HEIGHT : 4);
    this.scroller.style.setProperty("--cell", `${cellWidth}px`);
    this.scroller.style.setProperty("--cell-height", `${cellHeight}px`);
    this.grid.lay({
      numColumns,
      numRows: isGrid ? Math.ceil(this.rows.length / numColumns) : this.layout.values[1].length,
      cellWidth,
      cellHeight,
      left: isGrid ? 0 : isNarrow ? 84 : 140,
      top: isGrid ? 0 : 36,
      inset: isGrid ? INSET : 0,
    });
    this.showCurrent();
  }

  /* The rows at a place of the grid: none, one, or several in an X/Y/Z grid. */
  rowsAt(column, row) {
    if (this.view === "xyz") return this.layout.rowsAt(column, row, this.page);
    const index = row * this.grid.shape.numColumns + column;
    return index < this.rows.length ? [this.rows[index]] : [];
  }

  drawCell(column, row) {
    const rows = this.rowsAt(column, row);
    if (!rows.length) return this.view === "xyz" ? make("div", {class: "cell none"}) : null;
    const cell = drawResult(this, rows[0], {
      id: `cell-${column}-${row}`,
      position: row * this.grid.shape.numColumns + column,
      size: this.rows.length,
      others: rows.length - 1,
    });
    cell.dataset.column = column;
    cell.dataset.line = row;
    if (column === this.current.column && row === this.current.row) cell.classList.add("is-current");
    return cell;
  }

  drawHead(kind, index) {
    const [x, y] = this.axes;
    if (kind === "corner") {
      const text = [y && `${shortName(y)} ↓`, x && `${shortName(x)} →`].filter(Boolean).join("  ");
      return make("div", {class: "head corner"}, text);
    }
    const name = kind === "column" ? x : y;
    const value = this.layout.values[kind === "column" ? 0 : 1][index];
    const text = name ? shown(value, name) : "all";
    return make(
      "div", {class: `head ${kind}`, title: `${name} ${text}`.slice(0, 1000)},
      make("span", {dir: "auto"}, text.slice(0, 200)),
    );
  }

  /* -- the current result -- */

  click(event) {
    const cell = event.target.closest(".cell[data-row]");
    if (!cell) return;
    this.moveTo(Number(cell.dataset.column), Number(cell.dataset.line));
    if (event.ctrlKey || event.metaKey || event.shiftKey) this.choose(Number(cell.dataset.row));
    else this.openCurrent();
  }

  moveTo(column, row) {
    const {numColumns, numRows} = this.grid.shape;
    let [x, y] = [Math.min(Math.max(column, 0), numColumns - 1), Math.min(Math.max(row, 0), numRows - 1)];
    if (this.view === "grid") {
      const index = Math.min(y * numColumns + x, this.rows.length - 1);
      [x, y] = [index % numColumns, Math.floor(index / numColumns)];
    }
    this.current = {column: x, row: y};
    if (!document.querySelector("dialog[open]")) this.focusGrid();
    this.grid.reveal(x, y);
    this.showCurrent();
  }

  moveToRow(row) {
    if (this.view !== "grid") return;
    const index = this.rows.indexOf(row);
    const {numColumns} = this.grid.shape;
    if (index >= 0) this.moveTo(index % numColumns, Math.floor(index / numColumns));
  }

  showCurrent() {
    const {column, row} = this.current;
    for (const cell of this.scroller.querySelectorAll(".is-current")) cell.classList.remove("is-current");
    const cell = this.grid.cell(column, row);
    cell?.classList.add("is-current");
    if (cell?.id) this.scroller.setAttribute("aria-activedescendant", cell.id);
    else this.scroller.removeAttribute("aria-activedescendant");
  }

  focusGrid() {
    this.scroller.focus({preventScroll: true});
  }

  dialogClosed() {
    this.focusGrid();
    this.store.advance();
  }

  openCurrent() {
    const {column, row} = this.current;
    const here = this.rowsAt(column, row);
    if (!here.length) return;
    if (this.view === "xyz") this.viewer.open(here, 0);
    else this.viewer.open(this.rows, row * this.grid.shape.numColumns + column);
  }

  /* -- the comparison -- */

  choose(row) {
    const key = this.store.key(row);
    if (this.chosen.has(key)) this.chosen.delete(key);
    else if (this.chosen.size >= MAX_COMPARED) toast(`${MAX_COMPARED} are chosen; that is as many as fit side by side`);
    else this.chosen.set(key, row);
    this.drawTray();
  }

  clearChosen() {
    this.chosen.clear();
    this.drawTray();
  }

  drawTray() {
    for (const cell of this.scroller.querySelectorAll(".cell[data-key]")) {
      cell.setAttribute("aria-selected", String(this.chosen.has(cell.dataset.key)));
    }
    byId("tray").hidden = this.chosen.size === 0;
    byId("compare-button").disabled = this.chosen.size < MIN_COMPARED;
    byId("compare-button").textContent = this.chosen.size < MIN_COMPARED ? "Choose another" : `Compare ${this.chosen.size}`;
    byId("tray-items").replaceChildren(...[...this.chosen.values()].map((row) => {
      const picture = make("div", {class: "picture"});
      fillPicture(this.store, picture, row);
      return button("", () => this.choose(row), {class: "tray-item", title: "Take out", "aria-label": `Take out ${this.store.label(row)}`})
        .appendChild(picture).parentElement;
    }));
  }

  compareChosen() {
    if (this.chosen.size < MIN_COMPARED) toast("Choose two to four results first: x, or the box in a corner");
    else this.compare.open([...this.chosen.values()]);
  }

  /* -- controls -- */

  fillSelects() {
    const {store} = this;
    const columns = [...store.columns.values()];
    const several = columns.filter((column) => distinctValues(column) > 1 || column.name === "row_index");
    fillSelect(byId("sort"), several.map((column) => [column.name, column.name]), this.sort.name);
    const axes = [["", "—"], ...several.map((column) => [column.name, column.name])];
    ["x", "y", "z"].forEach((axis, index) => fillSelect(byId(`axis-${axis}`), axes, this.axes[index]));
  }

  showPages() {
    const values = this.layout?.values[2] ?? [];
    byId("pages").hidden = values.length < 2;
    const name = this.axes[2];
    fillSelect(byId("page"), values.slice(0, 2000).map((value, place) => [String(place), `${shown(value, name).slice(0, 60)} (${place + 1}/${values.length})`]), String(this.page));
  }

  toggleFilters(isShown = document.body.dataset.filters !== "true") {
    document.body.dataset.filters = String(isShown);
    byId("filters-button").setAttribute("aria-expanded", String(isShown));
  }

  setTheme(theme) {
    this.theme = THEMES.includes(theme) ? theme : "auto";
    remember("theme", this.theme);
    document.documentElement.dataset.theme = this.theme;
    byId("theme-button").title = `Theme: ${this.theme}`;
  }

  showEmptiness() {
    if (this.rows.length) byId("empty").hidden = true;
    else if (this.filters.size && this.store.numRows) {
      this.showEmpty("Nothing passes these filters", "", button("Clear the filters", () => this.clearFilters()));
    } else if (this.store.isComplete) {
      this.showEmpty("No results yet", this.store.status.refresh_s
        ? "They appear here as they are made." : "Run `raydiff gallery` again when there are some.");
    }
  }

  showEmpty(title, text, ...more) {
    byId("empty").replaceChildren(make("h2", {}, title), make("p", {}, text), ...more);
    byId("empty").hidden = false;
  }

  showHelp() {
    const dialog = byId("help");
    dialog.replaceChildren(
      make("header", {class: "dialog-head"}, make("h2", {}, "Keys"), make("span", {class: "grow"}),
        button("×", () => dialog.close(), {class: "button icon", "aria-label": "Close"})),
      make("dl", {}, ...KEYS.flatMap(([keys, text]) => [make("dt", {}, ...keys.split("  ").map((key) => make("kbd", {}, key))), make("dd", {}, text)])),
    );
    openDialog(dialog);
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
    const isField = event.target.matches("input, select, textarea");
    if (isField) {
      if (event.key === "Escape" || (event.key === "Enter" && event.target.id === "search")) this.focusGrid();
      return;
    }
    const action = this.actions()[event.key];
    const isPress = event.key === "Enter" && event.target.matches("button, summary, a");
    if (!action || isPress) return;
    event.preventDefault();
    action();
  }

  actions() {
    const {column, row} = this.current;
    const {numColumns, numRows, cellHeight} = this.grid.shape;
    const page = Math.max(1, Math.floor(this.scroller.clientHeight / cellHeight));
    const last = this.rows.length - 1;
    const along = (by) => {
      if (this.view === "xyz") return this.moveTo(column + by, row);
      const index = Math.min(Math.max(row * numColumns + column + by, 0), last);
      return this.moveTo(index % numColumns, Math.floor(index / numColumns));
    };
    return {
      ArrowLeft: () => along(-1),
      ArrowRight: () => along(1),
      ArrowUp: () => this.moveTo(column, row - 1),
      ArrowDown: () => this.moveTo(column, row + 1),
      PageUp: () => this.moveTo(column, row - page),
      PageDown: () => this.moveTo(column, row + page),
      Home: () => this.moveTo(0, 0),
      End: () => this.moveTo(numColumns - 1, numRows - 1),
      Enter: () => this.openCurrent(),
      "/": () => byId("search").select(),
      f: () => this.toggleFilters(),
      x: () => this.chooseCurrent(),
      c: () => this.compareChosen(),
      g: () => this.setView("grid"),
      v: () => this.setView("xyz"),
      "[": () => this.setPage(this.page - 1),
      "]": () => this.setPage(this.page + 1),
      "?": () => this.showHelp(),
      Escape: () => this.clearChosen(),
    };
  }

  chooseCurrent() {
    const [row] = this.rowsAt(this.current.column, this.current.row);
    if (row !== undefined) this.choose(row);
  }
}

/* Columns whose values differ, for the line under a picture: the shortest come first. */
function captionColumns(store) {
  const untold = new Set(["prompt", "model_revision", "init_image_sha256", "init_image"]);
  const columns = store.axes().filter((column) => !untold.has(column.name) && column.kind !== "json");
  const width = (column) => {
    const values = column.choices ? column.choices.map(([value]) => value) : [column.high ?? "a long text"];
    return Math.max(...values.map((value) => shown(value, column.name).length));
  };
  const widths = new Map(columns.map((column) => [column, width(column)]));
  return columns.sort((a, b) => widths.get(a) - widths.get(b));
}

function fillSelect(select, options, value) {
  const state = JSON.stringify(options);
  if (select.dataset.state !== state) {
    select.dataset.state = state;
    select.replaceChildren(...options.map(([key, text]) => make("option", {value: key}, text)));
  }
  select.value = value;
}

const gallery = new Gallery();
const receiveStatus = (text) => gallery.store.takeStatus(JSON.parse(text));
const receiveChunk = (name, text) => gallery.store.takeChunk(name, JSON.parse(text));
gallery.store.askForStatus();
