"use strict";
/* Which rows are shown, in which order, and on which place of an X/Y/Z grid. */

/* Filters: {type: "text", text}, {type: "range", low, high} (null: open),
   {type: "values", values: Set}. Null values pass only a "values" filter that has null. */
function filterTest(filter) {
  if (filter.type === "values") return (value) => filter.values.has(value);
  if (filter.type === "text") {
    const wanted = filter.text.toLowerCase();
    return (value) => value !== null && String(value).toLowerCase().includes(wanted);
  }
  const {low, high} = filter;
  return (value) =>
    value !== null && !Number.isNaN(value) && !(low !== null && compareNumbers(value, low) < 0)
    && !(high !== null && compareNumbers(value, high) > 0);
}

/* Return the rows that pass every filter ({column: filter}), in the run's order. */
function matchingRows(store, filters) {
  const rows = new Uint32Array(store.numRows);
  const tests = [...filters].map(([name, filter]) => [name, filterTest(filter)]);
  let size = 0;
  store.shown.forEach((chunk, index) => {
    const mask = new Uint8Array(chunk.rows).fill(1);
    for (const [name, test] of tests) maskColumn(mask, chunk.columns[name], test);
    const start = index * store.status.chunk_rows;
    for (let i = 0; i < chunk.rows; i += 1) if (mask[i]) rows[size++] = start + i;
  });
  return rows.subarray(0, size);
}

function maskColumn(mask, cells, test) {
  if (cells?.codes) {
    const passes = cells.values.map(test);
    const nullPasses = test(null);
    cells.codes.forEach((code, i) => {
      if (!(code < 0 ? nullPasses : passes[code])) mask[i] = 0;
    });
  } else if (cells?.values) {
    cells.values.forEach((value, i) => {
      if (mask[i] && !test(value)) mask[i] = 0;
    });
  } else if (!test(cells ? cells.constant : null)) mask.fill(0);
}

/* Order two numbers: integers beyond 2^53 are text of digits; null and NaN come last. */
function compareNumbers(a, b) {
  const isLastA = a === null || Number.isNaN(a);
  const isLastB = b === null || Number.isNaN(b);
  if (isLastA || isLastB) return isLastA - isLastB;
  const isExact = [a, b].every((one) => typeof one === "string" || Number.isInteger(one));
  if (!isExact || (typeof a === "number" && typeof b === "number")) return Number(a) - Number(b);
  const [bigA, bigB] = [BigInt(a), BigInt(b)];
  return bigA < bigB ? -1 : bigA > bigB ? 1 : 0;
}

function compareTexts(a, b) {
  if (a === null || b === null) return (a === null) - (b === null);
  return a < b ? -1 : a > b ? 1 : 0;
}

function comparison(column) {
  return column.kind === "integer" || column.kind === "number" ? compareNumbers : compareTexts;
}

/* Return rows sorted by a column, nulls last in both directions, equals in the run's order. */
function sortedRows(store, rows, name, isDescending) {
  const column = store.columns.get(name);
  if (!column) return rows;
  const compare = comparison(column);
  const values = new Array(store.numRows);
  for (const row of rows) values[row] = store.value(name, row);
  const sign = isDescending ? -1 : 1;
  return Uint32Array.from(rows).sort((a, b) => {
    const [x, y] = [values[a], values[b]];
    const isLast = (value) => value === null || Number.isNaN(value);
    if (isLast(x) || isLast(y)) return isLast(x) - isLast(y) || a - b;
    return sign * compare(x, y) || a - b;
  });
}

/* Lay rows out by the values of up to three columns ("" is none). Return the sorted values of
   each axis and rowsAt(x, y, z), the rows at a place. Rows that have none of the values, as those
   that asked for no image, have no place. */
function layOut(store, allRows, names) {
  const used = names.filter((name) => store.columns.has(name));
  const rows = used.length
    ? allRows.filter((row) => used.some((name) => store.value(name, row) !== null)) : allRows;
  const axes = names.map((name) => axisOf(store, rows, name));
  const places = new Map();
  for (const row of rows) {
    const [x, y, z] = axes.map((axis) => axis.placeOf(row));
    const place = x + axes[0].values.length * (y + axes[1].values.length * z);
    if (places.has(place)) places.get(place).push(row);
    else places.set(place, [row]);
  }
  const none = [];
  return {
    values: axes.map((axis) => axis.values),
    rowsAt: (x, y, z) =>
      places.get(x + axes[0].values.length * (y + axes[1].values.length * z)) ?? none,
  };
}

function axisOf(store, rows, name) {
  const column = store.columns.get(name);
  if (!column) return {values: [null], placeOf: () => 0};
  const values = [...new Set(Array.from(rows, (row) => store.value(name, row)))];
  values.sort(comparison(column));
  const places = new Map(values.map((value, place) => [value, place]));
  return {values, placeOf: (row) => places.get(store.value(name, row))};
}

/* Choose axes to begin with: what varies most beside the prompt, and a page for each prompt. */
function likelyAxes(store) {
  const axes = store.axes();
  const fit = axes.filter(({name, kind, choices}) => name !== "prompt" && kind !== "json" && choices);
  fit.sort((a, b) => b.num_distinct - a.num_distinct);
  const hasPrompts = axes.some(({name}) => name === "prompt");
  return [fit[0]?.name ?? "", fit[1]?.name ?? "", hasPrompts ? "prompt" : fit[2]?.name ?? ""];
}
