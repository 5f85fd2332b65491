"use strict";
/* One to four pictures side by side, zoomed and moved in step. */

const MAX_ZOOM = 40;
const SHARP_ZOOM = 4; // from here on, pixels are shown as squares

class Stage {
  constructor(store, rows) {
    this.store = store;
    this.view = {scale: 1, x: 0, y: 0};
    this.pointers = new Map();
    this.panes = rows.map((row, index) => this.pane(row, index));
  }

  pane(row, index) {
    const pane = make("div", {class: "pane", "data-pane": index}, this.media(row));
    pane.addEventListener("wheel", (event) => {
      event.preventDefault();
      this.zoom(Math.exp(-event.deltaY * (event.ctrlKey ? 0.01 : 0.0016)), ...offsets(pane, event));
    }, {passive: false});
    pane.addEventListener("dblclick", (event) => {
      if (this.view.scale > 1) this.reset();
      else this.zoom(3, ...offsets(pane, event));
    });
    pane.addEventListener("pointerdown", (event) => this.hold(pane, event));
    pane.addEventListener("pointermove", (event) => this.drag(pane, event));
    for (const end of ["pointerup", "pointercancel"]) {
      pane.addEventListener(end, (event) => this.pointers.delete(event.pointerId));
    }
    return pane;
  }

  media(row) {
    const {store} = this;
    const status = store.value("status", row);
    if (status !== "completed") return placeholder(status, store.value("error", row) ?? "");
    if (store.flaw(row)) return placeholder("no picture", store.flaw(row));
    const url = store.fileUrl(row);
    const onerror = (event) => {
      if (!event.target.hasAttribute("src")) return;
      event.target.replaceWith(placeholder("no picture", `${store.value("file_name", row)} cannot be shown`));
    };
    if (store.mediaKind(row) === "video") {
      const video = make("video", {class: "media", controls: true, loop: true, playsinline: true, preload: "auto", onerror});
      if (store.flaw(row) === null) video.poster = store.thumbnailUrl(row);
      video.src = url;
      return video;
    }
    const image = make("img", {class: "media", alt: store.value("prompt", row)?.slice(0, 300) ?? "", draggable: "false", onerror});
    image.src = url;
    return image;
  }

  /* Zoom all panes around the same point, given from the centre of a pane. */
  zoom(factor, x = 0, y = 0) {
    const {view} = this;
    const scale = Math.min(Math.max(view.scale * factor, 1), MAX_ZOOM);
    view.x = x - (x - view.x) * (scale / view.scale);
    view.y = y - (y - view.y) * (scale / view.scale);
    view.scale = scale;
    this.show();
  }

  move(x, y) {
    this.view.x += x;
    this.view.y += y;
    this.show();
  }

  reset() {
    this.view = {scale: 1, x: 0, y: 0};
    this.show();
  }

  show() {
    const {view} = this;
    const [pane] = this.panes;
    const reach = (view.scale - 1) / 2; // the picture never leaves its pane
    view.x = Math.max(Math.min(view.x, reach * pane.clientWidth), -reach * pane.clientWidth);
    view.y = Math.max(Math.min(view.y, reach * pane.clientHeight), -reach * pane.clientHeight);
    for (const one of this.panes) {
      const media = one.firstElementChild;
      media.style.transform = `translate(${view.x}px, ${view.y}px) scale(${view.scale})`;
      one.classList.toggle("is-zoomed", view.scale > 1);
      one.classList.toggle("is-sharp", view.scale >= SHARP_ZOOM);
    }
  }

  hold(pane, event) {
    // A video's own controls take the pointer unless it is zoomed.
    if (event.button !== 0 || (event.target.tagName === "VIDEO" && this.view.scale === 1)) return;
    pane.setPointerCapture(event.pointerId);
    this.pointers.set(event.pointerId, event);
  }

  /* One pointer moves, two pinch. */
  drag(pane, event) {
    const last = this.pointers.get(event.pointerId);
    if (!last) return;
    const others = [...this.pointers.values()].filter((one) => one.pointerId !== event.pointerId);
    this.pointers.set(event.pointerId, event);
    if (others.length) {
      const [other] = others;
      const distance = (one) => Math.hypot(one.clientX - other.clientX, one.clientY - other.clientY);
      const middle = {clientX: (event.clientX + other.clientX) / 2, clientY: (event.clientY + other.clientY) / 2};
      this.zoom(distance(event) / Math.max(distance(last), 1), ...offsets(pane, middle));
    } else this.move(event.clientX - last.clientX, event.clientY - last.clientY);
  }

  /* Keys that zoom and move. Return whether it was one. */
  key(event) {
    const step = 60;
    const actions = {
      "+": () => this.zoom(1.4), "=": () => this.zoom(1.4), "-": () => this.zoom(1 / 1.4),
      0: () => this.reset(),
      ...(event.shiftKey ? {
        ArrowLeft: () => this.move(step, 0), ArrowRight: () => this.move(-step, 0),
        ArrowUp: () => this.move(0, step), ArrowDown: () => this.move(0, -step),
      } : {}),
    };
    const action = actions[event.key];
    action?.();
    return Boolean(action);
  }

  play() {
    for (const pane of this.panes) pane.querySelector("video")?.play().catch(() => {});
  }

  close() {
    for (const pane of this.panes) discard(pane);
  }
}

function offsets(pane, event) {
  const box = pane.getBoundingClientRect();
  return [event.clientX - box.left - box.width / 2, event.clientY - box.top - box.height / 2];
}
