"use strict";
/* The panel with a filter for every column, and the chips that say which are on. */

const GROUPS = {
  outcome: "Outcome", request: "Request", own: "Your columns", cost: "Cost", file: "File", run: "Run",
};
const MAX_HINT = 28; // characters
const TYPING_MS = 120;

class FilterPanel {
  constructor(gallery, panel, chips) {
    Object.assign(this, {gallery, panel, chips});
    this.open = new Set(["status"]);
    this.drawnFor = "";
  }

  /* Draw the panel anew if the columns or their values have changed, and nobody types in it. */
  draw() {
    const {store} = this.gallery;
    const state = JSON.stringify([store.status.columns]);
    if (state === this.drawnFor || this.panel.contains(document.activeElement)) return;
    this.drawnFor = state;
    this.redraw();
  }

  redraw() {
    const {store} = this.gallery;
    const columns = [...store.columns.values()];
    const {scrollTop} = this.panel;
    this.panel.replaceChildren(
      make(
        "div", {class: "panel-head"}, make("h2", {}, "Filters"),
        button("Clear", () => this.gallery.clearFilters(), {class: "button link"}),
        button("Done", () => this.gallery.toggleFilters(false), {class: "button done"}),
      ),
      ...Object.entries(GROUPS).flatMap(([group, title]) => {
        const mine = columns.filter((column) => column.group === group && column.num_distinct > 0);
        mine.sort((a, b) => (distinctValues(b) > 1) - (distinctValues(a) > 1));
        if (!mine.length) return [];
        return [make("h3", {}, title), ...mine.map((column) => this.drawColumn(column))];
      }),
    );
    this.panel.scrollTop = scrollTop;
    this.drawChips();
  }

  drawColumn(column) {
    const {name} = column;
    const body = make("div", {class: "filter-body"});
    const isConstant = distinctValues(column) === 1;
    const details = make(
      "details", {class: isConstant ? "filter constant" : "filter", "data-column": name},
      make(
        "summary", {}, make("span", {class: "name", dir: "auto"}, name),
        make("span", {class: "hint", dir: "auto"}, isConstant ? shown(column.choices[0][0], name).slice(0, 60) : this.hint(column)),
      ),
      body,
    );
    const fill = () => {
      if (details.open) this.open.add(name);
      else this.open.delete(name);
      if (details.open && !body.childElementCount) this.fill(body, column);
    };
    details.addEventListener("toggle", fill);
    details.open = this.open.has(name) || this.gallery.filters.has(name);
    if (details.open) this.fill(body, column);
    return details;
  }

  hint(column) {
    if (column.low !== undefined) return `${shown(column.low, column.name)} – ${shown(column.high, column.name)}`;
    const list = column.choices?.map(([value]) => shown(value, column.name)).join(", ");
    if (list && list.length <= MAX_HINT) return list;
    const count = column.num_distinct;
    return count === 1 ? "1 value" : `${count.toLocaleString("en")} values`;
  }

  fill(body, column) {
    const isNumeric = column.kind === "integer" || column.kind === "number";
    if (isNumeric) body.append(this.range(column));
    if (column.choices && !(column.kind === "text" && isLong(column))) body.append(this.choices(column));
    else if (!isNumeric) body.append(this.text(column));
  }

  text(column) {
    const filter = this.gallery.filters.get(column.name);
    const field = make("input", {type: "search", placeholder: "contains …", "aria-label": `${column.name} contains`, dir: "auto", spellcheck: "false"});
    field.value = filter?.type === "text" ? filter.text : "";
    field.addEventListener("input", debounced(() => {
      this.gallery.setFilter(column.name, field.value ? {type: "text", text: field.value} : null);
    }));
    return field;
  }

  range(column) {
    const filter = this.gallery.filters.get(column.name);
    const isRange = filter?.type === "range";
    const [low, high] = ["low", "high"].map((end) => {
      const field = make("input", {
        inputmode: "decimal", "aria-label": `${column.name} ${end === "low" ? "from" : "to"}`,
        placeholder: end === "low" ? "from" : "to", spellcheck: "false", autocomplete: "off",
      });
      if (isRange && filter[end] !== null) field.value = String(filter[end]);
      return field;
    });
    const apply = debounced(() => {
      const ends = [low, high].map((field) => readField(field));
      if (ends.includes(undefined)) return;
      const isOpen = ends[0] === null && ends[1] === null;
      this.gallery.setFilter(column.name, isOpen ? null : {type: "range", low: ends[0], high: ends[1]});
    });
    low.addEventListener("input", apply);
    high.addEventListener("input", apply);
    return make("div", {class: "range"}, low, make("span", {}, "–"), high);
  }

  choices(column) {
    const filter = this.gallery.filters.get(column.name);
    const chosen = new Set(filter?.type === "values" ? filter.values : []);
    return make(
      "div", {class: "choices"},
      ...column.choices.map(([value, count]) => {
        const box = make("input", {type: "checkbox"});
        box.checked = chosen.has(value);
        box.addEventListener("change", () => {
          if (box.checked) chosen.add(value);
          else chosen.delete(value);
          this.gallery.setFilter(column.name, chosen.size ? {type: "values", values: new Set(chosen)} : null);
        });
        const text = shown(value, column.name);
        return make(
          "label", {title: text.slice(0, 1000)}, box,
          make("span", {class: value === null ? "value none" : "value", dir: "auto"}, text.slice(0, 120)),
          make("span", {class: "number"}, count.toLocaleString("en")),
        );
      }),
    );
  }

  drawChips() {
    const {filters} = this.gallery;
    this.chips.replaceChildren(...[...filters].map(([name, filter]) => {
      const text = `${shortName(name)} ${describeFilter(filter)}`;
      return button("", () => this.remove(name), {class: "chip", title: "Remove this filter", "data-column": name},
      ).appendChild(make("span", {dir: "auto"}, text)).parentElement;
    }));
    const count = byId("filters-count");
    count.textContent = filters.size;
    count.hidden = filters.size === 0;
  }

  remove(name) {
    this.gallery.setFilter(name, null);
    this.redraw();
  }
}

function isLong(column) {
  return column.choices.some(([value]) => typeof value === "string" && value.length > 120);
}

/* Return the number in a field, null if it is empty, undefined (and marked) if it is none. */
function readField(field) {
  const text = field.value.trim().replace(",", ".");
  const isInteger = /^[+-]?\d+$/.test(text);
  const value = text === "" ? null
    : isInteger && !Number.isSafeInteger(Number(text)) ? text : Number(text);
  const isWrong = typeof value === "number" && Number.isNaN(value);
  field.setAttribute("aria-invalid", String(isWrong));
  return isWrong ? undefined : value;
}

function describeFilter(filter) {
  if (filter.type === "text") return `contains “${filter.text.slice(0, 40)}”`;
  if (filter.type === "values") {
    return [...filter.values].map((value) => shown(value).slice(0, 30)).slice(0, 3).join(", ")
      + (filter.values.size > 3 ? ` and ${filter.values.size - 3} more` : "");
  }
  if (filter.high === null) return `≥ ${filter.low}`;
  return filter.low === null ? `≤ ${filter.high}` : `${filter.low} – ${filter.high}`;
}

function debounced(action) {
  let timer = 0;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(action, TYPING_MS);
  };
}
