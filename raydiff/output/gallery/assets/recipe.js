"use strict";
/* A row as it can be used again: as a line of a manifest, and as a command. */

const MAX_ARGUMENT = 100000; // characters; Linux allows 131,072 bytes
const NOT_DEFAULTS = ["model", "task", "prompt", "strength", "init_image"];

/* Return the row as one line of JSON with the columns of a manifest, or null if it has none. */
function manifestRow(store, row) {
  if (store.value("prompt", row) === null) return null;
  const own = [...store.columns.values()].filter((column) => column.group === "own");
  const names = [...store.status.manifest_columns, ...own.map((column) => column.name)];
  const pairs = names
    .map((name) => [name, jsonOf(store.value(name, row), store.columns.get(name)?.kind)])
    .filter(([, value]) => value !== null)
    .map(([name, value]) => `${JSON.stringify(name)}: ${value}`);
  return `{${pairs.join(", ")}}`;
}

function jsonOf(value, kind) {
  if (value === null || Number.isNaN(value)) return null;
  if (kind === "json" || (kind === "integer" && typeof value === "string")) return value;
  return JSON.stringify(value);
}

/* Return the command that makes the row's file again, or null if the row asked for none. */
function command(store, row) {
  const prompt = store.value("prompt", row);
  if (prompt === null) return null;
  const negative = store.value("negative_prompt", row) ?? "";
  const needsManifest = store.value("init_image", row) !== null || prompt.includes("\0")
    || negative.includes("\0") || prompt.length + negative.length > MAX_ARGUMENT / 4;
  return needsManifest ? manifestCommand(store, row) : promptCommand(store, row, prompt);
}

function promptCommand(store, row, prompt) {
  const settings = store.status.manifest_columns
    .filter((name) => !NOT_DEFAULTS.includes(name))
    .map((name) => [`defaults.${name}`, store.value(name, row), store.columns.get(name)?.kind])
    .filter(([, value]) => value !== null);
  return joined([
    "raydiff render",
    `--prompt=${quoted(prompt)}`,
    ...target(store, row),
    ...[...settings, ...modelSettings(store, row)].map(setting),
  ]);
}

/* What a command line cannot say goes through a manifest of one row. */
function manifestCommand(store, row) {
  const image = store.value("init_image", row);
  const root = image === null ? [] : [["input.root", image.replace(/\/[^/]*$/, "") || "/"]];
  const name = `again-${store.value("request_id", row).slice(0, 8)}.parquet`;
  return [
    "python3 - <<'END_OF_ROW'",
    "import json",
    "import pyarrow as pa, pyarrow.parquet as pq",
    `row = json.loads(${escaped(manifestRow(store, row))})`,
    `pq.write_table(pa.Table.from_pylist([row]), "${name}")`,
    "END_OF_ROW",
    joined([
      `raydiff render ${name}`,
      ...target(store, row),
      ...[...root, ...modelSettings(store, row)].map(setting),
    ]),
  ].join("\n");
}

function target(store, row) {
  const id = store.value("request_id", row);
  return [`--model=${quoted(store.value("model", row))}`, `--out=again-${id.slice(0, 8)}`];
}

function modelSettings(store, row) {
  const revision = store.value("model_revision", row);
  const pinned = revision === null || revision.startsWith("local-") ? [] : [["model.revision", revision]];
  return [...pinned, ...Object.entries(store.status.settings)];
}

function setting([key, value, kind]) {
  const isPlain = kind === "json" || typeof value === "number" || /^[\d.]+$/.test(value);
  return `--set ${quoted(`${key}=${isPlain ? value : escaped(value)}`)}`;
}

/* JSON text that is YAML and Python text too: both refuse raw control characters, and YAML reads
   some others as line ends. */
function escaped(text) {
  return JSON.stringify(text).replace(
    /[\u007f-\u00a0\u2028\u2029\ufeff\ufffe\uffff]/g,
    (one) => `\\u${one.charCodeAt(0).toString(16).padStart(4, "0")}`
  );
}

function quoted(text) {
  return /^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;
}

function joined(parts) {
  return parts.join(" \\\n  ");
}
