// Numbers and times as people read them: every time in UTC, every number with its unit.

const significant = new Intl.NumberFormat("en", {
  maximumSignificantDigits: 6, maximumFractionDigits: 0, roundingPriority: "morePrecision", useGrouping: false,
});

/** Six digits, and more where there are more before the point. */
export const price = (value) => significant.format(value);

export const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)} %`;

export const signed = (value) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(2)}`;

/** Milliseconds since 1970 as 2026-11-22 10:00 UTC, with seconds where there are some. */
export function utc(milliseconds) {
  const text = new Date(milliseconds).toISOString();
  return `${text.slice(0, 10)} ${text.slice(11, text.endsWith(":00.000Z") ? 16 : 19)} UTC`;
}

/** Seconds as the two digits or so that matter of them. */
export function span(seconds) {
  if (seconds < 120) return `${Math.floor(seconds)} s`;
  if (seconds < 7200) return `${Math.floor(seconds / 60)} min`;
  if (seconds < 172800) return `${Math.floor(seconds / 3600)} h`;
  return `${Math.floor(seconds / 86400)} d`;
}

export const bars = (count) => `${count} ${count === 1 ? "bar" : "bars"}`;

/** An element of a name, with texts and elements in it. */
export function element(name, properties = {}, ...content) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key in made) made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...content);
  return made;
}

/** A table of texts; the cells may be elements. */
export function table(heads, rows, properties = {}) {
  const cell = (content) => (content instanceof HTMLTableCellElement ? content : element("td", {}, content));
  return element(
    "table",
    properties,
    element("thead", {}, element("tr", {}, ...heads.map((head) => element("th", { scope: "col" }, head)))),
    element("tbody", {}, ...rows.map((row) => element("tr", {}, ...row.map(cell)))),
  );
}

/** A cell that shows a number rounded and keeps all of it. */
export function number(value, shown) {
  const made = element("td", { title: String(value) }, shown);
  made.dataset.value = value;
  return made;
}
