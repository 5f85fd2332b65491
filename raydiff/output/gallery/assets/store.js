"use strict";
/* The run's rows. status.js names the columns and the chunks; a chunk holds rows by column.
   A row is a number, counted over the chunks that are shown. */

const DATA = "data/";
const RETRY_MS = 2000;
const SHOW_MS = 250; // between two states of a page that is still loading

class Store {
  /* A page that has something open (isBusy) keeps its rows until it calls `advance`. */
  constructor({onRows, onStatus, onProblem, isBusy}) {
    this.status = null;
    this.columns = new Map(); // name → {name, kind, group, num_distinct, num_null, choices | low, high}
    this.shown = []; // chunks, in order
    this.numRows = 0;
    this.shownAt = 0;
    this.known = new Map(); // file name → chunk
    this.next = null; // the status whose chunks are on their way
    this.on = {onRows, onStatus, onProblem, isBusy};
  }

  get isComplete() {
    return this.next === null && this.status !== null;
  }

  askForStatus() {
    addScript(`${DATA}status.js?at=${Date.now()}`, () => {
      this.on.onProblem("data/status.js cannot be loaded. Run `raydiff gallery` again.");
      if (this.status?.refresh_s) this.askLater(RETRY_MS);
    });
  }

  askLater(delayMs) {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.askForStatus(), delayMs);
  }

  takeStatus(status) {
    clearTimeout(this.timer);
    if (status.refresh_s) this.askLater(status.refresh_s * 1000);
    for (const {kind, choices} of status.columns) {
      if (kind === "number") for (const choice of choices ?? []) choice[0] = readNumber(choice[0]);
    }
    const asked = new Set(this.next ? this.next.chunks : []);
    this.next = status;
    for (const name of status.chunks) {
      if (!this.known.has(name) && !asked.has(name)) {
        addScript(DATA + name, () => {
          // It was replaced by a newer one between our reading of the status and now.
          this.on.onProblem(`data/${name} cannot be loaded; trying again.`);
          this.next = null;
          this.askLater(RETRY_MS);
        });
      }
    }
    this.advance();
  }

  takeChunk(name, chunk) {
    for (const [column, cells] of Object.entries(chunk.columns)) {
      const kind = this.next?.columns.find((one) => one.name === column)?.kind;
      if (kind !== "number") continue;
      if (cells.values) cells.values = cells.values.map(readNumber);
      else cells.constant = readNumber(cells.constant);
    }
    this.known.set(name, chunk);
    this.advance();
  }

  /* Show what has arrived: at first every chunk as it comes, later only a whole new state. */
  advance() {
    if (!this.next || (this.isSettled && this.on.isBusy())) return;
    const arrived = [];
    for (const name of this.next.chunks) {
      if (!this.known.has(name)) break;
      arrived.push(this.known.get(name));
    }
    const isWhole = arrived.length === this.next.chunks.length;
    const isTooSoon = this.numRows > 0 && performance.now() - this.shownAt < SHOW_MS;
    if (!isWhole && (this.isSettled || isTooSoon || !arrived.length)) return;
    const isSame = isWhole && this.isSettled && this.status
      && String(this.status.chunks) === String(this.next.chunks);
    this.status = this.next;
    this.columns = new Map(this.status.columns.map((column) => [column.name, column]));
    if (isWhole) {
      this.next = null;
      this.isSettled = true;
      const names = new Set(this.status.chunks);
      for (const name of this.known.keys()) if (!names.has(name)) this.known.delete(name);
    }
    this.on.onStatus();
    if (isSame) return;
    this.shown = arrived;
    this.shownAt = performance.now();
    this.numRows = arrived.reduce((sum, chunk) => sum + chunk.rows, 0);
    this.on.onRows();
  }

  value(name, row) {
    const chunk = this.shown[Math.floor(row / this.status.chunk_rows)];
    return chunk ? cellOf(chunk.columns[name], row % this.status.chunk_rows) : null;
  }

  /* What names a row in every state of the run: rows may be inserted before it. */
  key(row) {
    return `${this.value("row_index", row)}.${this.value("image_index", row)}`;
  }

  /* Null, or why there is no thumbnail: "" is "not made yet". */
  flaw(row) {
    const chunk = this.shown[Math.floor(row / this.status.chunk_rows)];
    return cellOf(chunk.flaws, row % this.status.chunk_rows);
  }

  /* A browser cannot look into a shard: what it can show of one is the thumbnail. */
  fileUrl(row) {
    if (this.inShard(row)) return this.thumbnailUrl(row);
    // Of a folder of frames a page shows the first.
    const name = this.value("file_name", row)?.replace(/\/frames\.json$/, "/00000.png") ?? null;
    return name === null ? null : this.status.root + name.split("/").map(encodeURIComponent).join("/");
  }

  inShard(row) {
    return this.value("member", row) !== null;
  }

  thumbnailUrl(row) {
    const id = this.value("request_id", row);
    return `thumbnails/${id.slice(0, 2)}/${id}.jpg`;
  }

  mediaKind(row) {
    if (this.inShard(row)) return "image";
    const name = (this.value("file_name", row) ?? "").toLowerCase();
    return /\.(mp4|webm|mov|mkv)$/.test(name) ? "video" : "image";
  }

  label(row) {
    const image = this.value("image_index", row);
    return `row ${this.value("row_index", row)}${image ? `, image ${image}` : ""}`;
  }

  /* Columns that tell results apart: of the request and of the user's own. */
  axes() {
    return [...this.columns.values()].filter(
      (column) => (column.group === "request" || column.group === "own") && column.num_distinct > 1
    );
  }
}

function distinctValues(column) {
  return column.num_distinct + (column.num_null > 0 ? 1 : 0);
}

function cellOf(cells, index) {
  if (cells === undefined) return null;
  if (cells.codes) return cells.codes[index] < 0 ? null : cells.values[cells.codes[index]];
  return cells.values ? cells.values[index] : cells.constant;
}

/* NaN and the infinities travel as text. */
function readNumber(value) {
  return typeof value === "string" ? Number(value) : value;
}

function addScript(url, onError) {
  const script = document.createElement("script");
  script.src = url;
  script.async = false; // in the order of asking
  script.addEventListener("load", () => script.remove());
  script.addEventListener("error", () => {
    script.remove();
    onError();
  });
  document.head.append(script);
}

const LABELS = new Map([
  ["num_inference_steps", "steps"],
  ["guidance_scale", "guidance"],
  ["guidance_rescale", "rescale"],
  ["negative_prompt", "negative"],
]);

function shortName(name) {
  return LABELS.get(name) ?? name;
}

/* A value as people read it. */
function shown(value, name = "") {
  if (value === null || value === undefined) return "none";
  if (typeof value === "string") return value;
  if (typeof value === "number") {
    if (name.endsWith("_bytes")) return shownBytes(value);
    if (name.endsWith("_s")) return `${+value.toPrecision(4)} s`;
    return Number.isInteger(value) ? String(value) : String(+value.toPrecision(7));
  }
  return String(value);
}

function shownBytes(size) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (size >= 1000 && unit < units.length - 1) {
    size /= 1000;
    unit += 1;
  }
  return `${unit ? size.toPrecision(3) : size} ${units[unit]}`;
}
