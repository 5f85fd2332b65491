"use strict";
/* One result in the grid: its thumbnail, or why there is none, and what tells it apart. */

const HOVER_MS = 250;

/* Describe a row in the grid. `place` says where it is; `others` counts rows beneath it. */
function drawResult(gallery, row, {id, position, size, others = 0}) {
  const {store} = gallery;
  const prompt = store.value("prompt", row);
  const status = store.value("status", row);
  const picture = make("div", {class: "picture"});
  fillPicture(store, picture, row);
  const isChosen = gallery.chosen.has(store.key(row));
  const check = button("", (event) => {
    event.stopPropagation();
    gallery.choose(row);
  }, {class: "check", tabindex: "-1", "aria-label": "Choose for comparison", title: "Choose for comparison (x)"});
  const told = facts(store, row, gallery.captionColumns);
  return make(
    "div",
    {
      class: "cell", id, role: "option", "aria-selected": String(isChosen), "aria-posinset": position + 1,
      "aria-setsize": size, "data-row": row, "data-key": store.key(row), "data-status": status,
    },
    picture,
    check,
    others ? make("span", {class: "badge others", title: `${others} more here`}, `+${others}`) : null,
    make("p", {class: "caption", dir: "auto"}, prompt ? prompt.slice(0, 200) : store.label(row)),
    make("p", {class: "facts", title: told}, told),
  );
}

function fillPicture(store, picture, row) {
  const status = store.value("status", row);
  if (status !== "completed") {
    picture.append(placeholder(status, store.value("error", row) ?? ""));
    return;
  }
  const flaw = store.flaw(row);
  if (flaw) {
    picture.append(placeholder("no picture", flaw));
  } else if (flaw === "") {
    picture.append(make("span", {class: "pending"}, "thumbnail to come"));
  } else {
    const image = make("img", {alt: "", decoding: "async", draggable: "false"});
    image.addEventListener("error", () => {
      if (image.hasAttribute("src")) image.replaceWith(placeholder("no thumbnail", "Its file is missing. Run `raydiff gallery` again."));
    });
    image.src = store.thumbnailUrl(row);
    picture.append(image);
  }
  if (store.mediaKind(row) === "video") {
    picture.append(make("span", {class: "badge video"}, "▶"));
    playOnHover(picture, store.fileUrl(row));
  }
}

function placeholder(title, text) {
  return make(
    "div", {class: "placeholder"},
    make("strong", {}, title), make("span", {dir: "auto", title: text.slice(0, 1000)}, text.slice(0, 300)),
  );
}

/* A video plays silently under the pointer; opened, it has its sound and controls. */
function playOnHover(picture, url) {
  let timer = 0;
  let video = null;
  picture.addEventListener("pointerenter", (event) => {
    if (event.pointerType !== "mouse") return;
    timer = setTimeout(() => {
      video = make("video", {playsinline: true, loop: true});
      video.muted = true;
      video.src = url;
      picture.append(video);
      video.play().catch(() => video?.remove());
    }, HOVER_MS);
  });
  picture.addEventListener("pointerleave", () => {
    clearTimeout(timer);
    if (video) discard(video);
    video?.removeAttribute("src");
    video = null;
  });
}

/* "steps 20 · guidance 7.5 · euler · seed 3" */
function facts(store, row, columns) {
  return columns
    .map((column) => [column, store.value(column.name, row)])
    .filter(([, value]) => value !== null)
    .map(([column, value]) => {
      const text = shown(value, column.name);
      return column.kind === "text" ? text.slice(0, 60) : `${shortName(column.name)} ${text}`;
    })
    .join(" · ");
}
