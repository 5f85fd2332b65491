"use strict";
/* Two to four results side by side, with zoom and place kept in step, and what tells them apart. */

const MIN_COMPARED = 2;
const MAX_COMPARED = 4;
const NEVER_TOLD = new Set(["row_index", "image_index", "request_id", "sha256", "file_name", "finished_at"]);

class Compare {
  constructor(gallery, dialog) {
    Object.assign(this, {gallery, dialog});
    dialog.addEventListener("close", () => this.clear());
    dialog.addEventListener("keydown", (event) => {
      if (!event.ctrlKey && !event.metaKey && !event.altKey && this.stage?.key(event)) event.preventDefault();
    });
  }

  open(rows) {
    this.rows = rows;
    this.draw();
    openDialog(this.dialog);
    this.stage.show();
  }

  draw() {
    const {store} = this.gallery;
    const {rows} = this;
    this.stage?.close();
    this.stage = new Stage(store, rows);
    const hasVideo = rows.some((row) => store.mediaKind(row) === "video");
    this.dialog.replaceChildren(
      make(
        "header", {class: "dialog-head"},
        make("h2", {}, `Compare ${rows.length}`),
        make("span", {class: "grow"}),
        hasVideo ? button("Play all", () => this.playFromStart()) : null,
        button("−", () => this.stage.zoom(1 / 1.4), {class: "button icon", "aria-label": "Zoom out", title: "-"}),
        button("Fit", () => this.stage.reset(), {"aria-label": "Whole picture", title: "0"}),
        button("+", () => this.stage.zoom(1.4), {class: "button icon", "aria-label": "Zoom in", title: "+"}),
        button("×", () => this.dialog.close(), {class: "button icon", "aria-label": "Close", title: "Escape"}),
      ),
      make("div", {class: `stage of-${rows.length}`}, ...rows.map((row, index) => this.figure(row, index))),
      this.differences(),
    );
  }

  figure(row, index) {
    const {store} = this.gallery;
    const name = String.fromCharCode(65 + index);
    return make(
      "figure", {},
      this.stage.panes[index],
      make(
        "figcaption", {}, make("strong", {}, name), make("span", {class: "caption", dir: "auto"}, (store.value("prompt", row) ?? store.label(row)).slice(0, 300)),
        button("Copy row", () => copyText(manifestRow(store, row), "Manifest row"), {class: "button link"}),
        button("Copy command", () => copyText(command(store, row), "Command"), {class: "button link"}),
      ),
    );
  }

  /* A table of the columns whose values differ. */
  differences() {
    const {store} = this.gallery;
    const columns = [...store.columns.values()].filter((column) => {
      if (NEVER_TOLD.has(column.name)) return false;
      const values = new Set(this.rows.map((row) => store.value(column.name, row)));
      return values.size > 1;
    });
    if (!columns.length) return make("p", {class: "differences none"}, "Nothing tells them apart but their place in the manifest.");
    return make(
      "div", {class: "differences"},
      make(
        "table", {},
        make("thead", {}, make("tr", {}, make("th", {}, "Differences"), ...this.rows.map((row, index) => make("th", {}, `${String.fromCharCode(65 + index)} · ${store.label(row)}`)))),
        make("tbody", {}, ...columns.map((column) => make(
          "tr", {}, make("th", {scope: "row", dir: "auto"}, column.name),
          ...this.rows.map((row) => make("td", {}, clippedText(shown(store.value(column.name, row), column.name)))),
        ))),
      ),
    );
  }

  playFromStart() {
    for (const video of this.dialog.querySelectorAll("video")) {
      video.currentTime = 0;
      video.play().catch(() => {});
    }
  }

  clear() {
    this.stage?.close();
    this.stage = null;
    this.dialog.replaceChildren();
    this.gallery.dialogClosed();
  }
}
