"use strict";
/* Elements and what every dialog uses. Text is only ever set as text, never as markup. */

/* make("p", {class: "x", title: "t", onclick: f, hidden: true}, "text", child, …) */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (typeof value === "boolean") element.toggleAttribute(name, value);
    else if (value !== undefined && value !== null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

function byId(id) {
  return document.getElementById(id);
}

function button(text, onclick, attributes = {}) {
  return make("button", {class: "button", type: "button", onclick, ...attributes}, text);
}

/* Open a dialog with none of its buttons marked as the one that Enter presses. */
function openDialog(dialog) {
  if (!dialog.open) dialog.showModal();
  dialog.focus();
}

/* Long text, clipped until it is asked for. */
const CLIP_CHARACTERS = 600;

function clippedText(text, attributes = {}) {
  const body = make("p", {dir: "auto", ...attributes}, text);
  if (text.length <= CLIP_CHARACTERS) return body;
  body.textContent = `${text.slice(0, CLIP_CHARACTERS)} …`;
  const more = button(`Show all ${text.length.toLocaleString("en")} characters`, () => {
    body.textContent = text;
    more.closest("dialog")?.focus(); // which would lose the keys with the button
    more.remove();
  }, {class: "button link expand"});
  return make("div", {class: "clipped"}, body, more);
}

const toastElement = make("div", {id: "toast", class: "toast", role: "status"});
let toastTimer = 0;

function toast(text) {
  // It lies in the open dialog, which is above everything else, and goes when that is redrawn.
  (document.querySelector("dialog[open]") ?? document.body).append(toastElement);
  toastElement.textContent = text;
  toastElement.classList.add("is-shown");
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => toastElement.classList.remove("is-shown"), 2200);
}

async function copyText(text, what) {
  if (text === null) {
    toast("This row asked for no image: there is nothing to copy");
    return;
  }
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Pages from plain http may not use the clipboard directly.
    const field = make("textarea", {class: "offscreen"});
    field.value = text;
    (document.querySelector("dialog[open]") ?? document.body).append(field);
    field.select();
    const isCopied = document.execCommand("copy");
    field.remove();
    if (!isCopied) {
      toast("The browser does not let this page use the clipboard");
      return;
    }
  }
  toast(`${what} copied`);
}

function remembered(key) {
  try {
    return localStorage.getItem(`raydiff-gallery.${key}`);
  } catch {
    return null; // storage is off for pages from files in some browsers
  }
}

function remember(key, value) {
  try {
    localStorage.setItem(`raydiff-gallery.${key}`, value);
  } catch {
    // It is only a convenience.
  }
}
