"use strict";
/* A grid of any number of rows and columns, of which only what is near the screen is in the page. */

const MAX_HEIGHT = 15e6; // pixels; browsers cut elements that are taller than about 17 million
const OVERSCAN = 1; // screens drawn above and below, so that fast scrolling meets drawn cells

class VirtualGrid {
  /* drawCell(column, row) and drawHead("column" | "row", index) return elements, or null. */
  constructor(scroller, spacer, {drawCell, drawHead}) {
    Object.assign(this, {scroller, spacer, drawCell, drawHead});
    this.shape = {
      numColumns: 0, numRows: 0, cellWidth: 1, cellHeight: 1, left: 0, top: 0, inset: 0,
    };
    this.drawn = new Map(); // key → element
    // Heads stick to an edge by themselves, in step with the scrolling.
    this.layers = Object.fromEntries(["column", "row", "corner"].map(
      (kind) => [kind, spacer.appendChild(make("div", {class: `heads ${kind}`, role: "presentation"}))]
    ));
    scroller.addEventListener("scroll", () => this.update(), {passive: true});
  }

  /* left and top are the sizes of the heads, inset the space around the cells. */
  lay(shape) {
    this.shape = shape;
    const {numColumns, numRows, cellWidth, cellHeight, left, top, inset} = shape;
    this.height = top + 2 * inset + numRows * cellHeight;
    this.spacer.style.width = left ? `${left + 2 * inset + numColumns * cellWidth}px` : "100%";
    this.spacer.style.height = `${Math.min(this.height, MAX_HEIGHT)}px`;
    this.redraw();
  }

  redraw() {
    for (const element of this.drawn.values()) discard(element);
    this.drawn.clear();
    this.update();
  }

  /* Where the page is scrolled to, were the spacer as tall as all rows. */
  get offset() {
    const room = this.scroller.clientHeight;
    const {scrollTop} = this.scroller;
    if (this.height <= MAX_HEIGHT) return scrollTop;
    return (scrollTop * (this.height - room)) / (MAX_HEIGHT - room);
  }

  set offset(value) {
    const room = this.scroller.clientHeight;
    this.scroller.scrollTop = this.height <= MAX_HEIGHT
      ? value : (value * (MAX_HEIGHT - room)) / (this.height - room);
  }

  update() {
    const {scroller, shape} = this;
    const {offset} = this;
    const shift = scroller.scrollTop - offset; // 0 unless the spacer was cut
    const [width, height] = [scroller.clientWidth, scroller.clientHeight];
    const rows = visible(offset - shape.top - shape.inset, height, shape.cellHeight, shape.numRows);
    const x = scroller.scrollLeft - shape.left - shape.inset;
    const columns = visible(x, width, shape.cellWidth, shape.numColumns);
    const wanted = new Set();
    for (let row = rows[0]; row < rows[1]; row += 1) {
      const y = shape.top + shape.inset + row * shape.cellHeight + shift;
      for (let column = columns[0]; column < columns[1]; column += 1) {
        const left = shape.left + shape.inset + column * shape.cellWidth;
        this.place(this.spacer, wanted, `${column}.${row}`, left, y, () => this.drawCell(column, row));
      }
      if (shape.left) this.placeHead(wanted, "row", row, 0, y);
    }
    for (let column = columns[0]; shape.top && column < columns[1]; column += 1) {
      this.placeHead(wanted, "column", column, shape.left + shape.inset + column * shape.cellWidth, 0);
    }
    if (shape.left && shape.top) this.placeHead(wanted, "corner", 0, 0, 0);
    for (const [key, element] of this.drawn) {
      if (!wanted.has(key)) {
        discard(element);
        this.drawn.delete(key);
      }
    }
  }

  placeHead(wanted, kind, index, left, top) {
    this.place(this.layers[kind], wanted, `${kind} ${index}`, left, top, () => this.drawHead(kind, index));
  }

  place(layer, wanted, key, left, top, draw) {
    let element = this.drawn.get(key);
    if (!element) {
      element = draw();
      if (!element) return;
      this.drawn.set(key, element);
      layer.append(element);
    }
    wanted.add(key);
    const transform = `translate(${left}px, ${top}px)`;
    if (element.place !== transform) {
      element.place = transform;
      element.style.transform = transform;
    }
  }

  /* Scroll just as far as it takes to have a cell on the screen. */
  reveal(column, row) {
    const {shape, scroller} = this;
    const y = shape.inset + row * shape.cellHeight;
    const bottom = y + shape.top + shape.cellHeight + shape.inset - scroller.clientHeight;
    if (this.offset > y - shape.inset) this.offset = y - shape.inset;
    else if (this.offset < bottom) this.offset = bottom;
    const x = shape.inset + column * shape.cellWidth;
    const right = x + shape.left + shape.cellWidth - scroller.clientWidth;
    if (scroller.scrollLeft > x) scroller.scrollLeft = x - shape.inset;
    else if (scroller.scrollLeft < right) scroller.scrollLeft = right + shape.inset;
    this.update();
  }

  cell(column, row) {
    return this.drawn.get(`${column}.${row}`) ?? null;
  }
}

/* The range of cells between a screen before `start` and a screen after its end. */
function visible(start, room, size, count) {
  const first = Math.floor((start - OVERSCAN * room) / size);
  const end = Math.ceil((start + (1 + OVERSCAN) * room) / size);
  return [Math.min(Math.max(first, 0), count), Math.min(Math.max(end, 0), count)];
}

/* Take an element out, and stop loading what it shows. */
function discard(element) {
  for (const media of element.querySelectorAll("img, video")) media.removeAttribute("src");
  element.remove();
}
