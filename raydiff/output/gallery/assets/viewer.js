"use strict";
/* One result, large, with all that its metadata says. */

class Viewer {
  constructor(gallery, dialog) {
    Object.assign(this, {gallery, dialog});
    dialog.addEventListener("close", () => this.clear());
    dialog.addEventListener("keydown", (event) => this.key(event));
  }

  /* Show rows[index]; the arrows go through `rows`. */
  open(rows, index) {
    Object.assign(this, {rows, index});
    this.draw();
  }

  get row() {
    return this.rows[this.index];
  }

  step(by) {
    const index = this.index + by;
    if (index < 0 || index >= this.rows.length) return;
    this.index = index;
    this.draw();
    this.gallery.moveToRow(this.row);
  }

  draw() {
    const {store} = this.gallery;
    const {row} = this;
    this.stage?.close();
    this.stage = new Stage(store, [row]);
    const url = store.fileUrl(row);
    const choose = button("", () => {
      this.gallery.choose(row);
      label();
    }, {title: "x"});
    const label = () => {
      choose.textContent = this.gallery.chosen.has(store.key(row)) ? "Chosen ✓" : "Choose";
    };
    label();
    this.dialog.replaceChildren(
      make(
        "header", {class: "dialog-head"},
        make("h2", {}, store.label(row)),
        make("span", {class: "of"}, `${(this.index + 1).toLocaleString("en")} of ${this.rows.length.toLocaleString("en")}`),
        make("span", {class: "grow"}),
        button("‹", () => this.step(-1), {class: "button icon", "aria-label": "The one before", title: "←"}),
        button("›", () => this.step(1), {class: "button icon", "aria-label": "Next", title: "→"}),
        button("×", () => this.dialog.close(), {class: "button icon", "aria-label": "Close", title: "Escape"}),
      ),
      make(
        "div", {class: "viewer-body"},
        make("div", {class: "stage"}, ...this.stage.panes),
        make(
          "div", {class: "side"},
          ...this.story(row),
          make(
            "div", {class: "actions"},
            choose,
            button("Copy manifest row", () => copyText(manifestRow(store, row), "Manifest row"), {"data-copy": "row"}),
            button("Copy command", () => copyText(command(store, row), "Command"), {"data-copy": "command"}),
            url ? make("a", {class: "button", href: url, target: "_blank", rel: "noopener"}, "Open file") : null,
          ),
          ...this.tables(row),
        ),
      ),
    );
    openDialog(this.dialog);
    this.stage.play();
  }

  story(row) {
    const {store} = this.gallery;
    const [prompt, error, warning] = ["prompt", "error", "warning"].map((name) => store.value(name, row));
    const flaw = store.flaw(row);
    return [
      error ? clippedText(error, {class: "error"}) : null,
      flaw ? clippedText(flaw, {class: "error"}) : null,
      warning ? clippedText(warning, {class: "warning"}) : null,
      prompt !== null ? clippedText(prompt, {class: "prompt"}) : null,
    ].filter(Boolean);
  }

  tables(row) {
    const {store} = this.gallery;
    const told = new Set(["prompt", "error", "warning"]);
    const columns = [...store.columns.values()].filter(
      (column) => !told.has(column.name) && store.value(column.name, row) !== null
    );
    return ["request", "own", "outcome", "file", "cost", "run"].flatMap((group) => {
      const mine = columns.filter((column) => column.group === group);
      if (!mine.length) return [];
      return [
        make("h3", {}, GROUPS[group]),
        make("dl", {}, ...mine.flatMap((column) => {
          const value = store.value(column.name, row);
          return [
            make("dt", {dir: "auto"}, column.name),
            make("dd", {title: typeof value === "number" ? String(value) : undefined}, clippedText(shown(value, column.name))),
          ];
        })),
      ];
    });
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.tagName === "VIDEO" && event.key.startsWith("Arrow")) return;
    const steps = {ArrowLeft: -1, ArrowRight: 1};
    if (this.stage.key(event)) event.preventDefault();
    else if (steps[event.key]) {
      event.preventDefault();
      this.step(steps[event.key]);
    } else if (event.key === "x") {
      this.gallery.choose(this.row);
      this.draw();
    } else if (event.key === "c") {
      this.dialog.close();
      this.gallery.compareChosen();
    }
  }

  clear() {
    this.stage?.close();
    this.stage = null;
    this.dialog.replaceChildren();
    this.gallery.dialogClosed();
  }
}
