// The table of all symbols. Only the rows in sight are elements, so that a thousand symbols cost no more than forty.

import { bars, element, price, signed, span } from "./format.mjs";
import { figures } from "./signal.mjs";

const ROW = 32;
const SPARE = 6;

const find = (id) => document.getElementById(id);

const COLUMNS = [
  { key: "symbol", head: "Symbol", title: "" },
  { key: "last", head: "Last", title: "The close of the bar that was forecast from, in its unit", rest: true },
  { key: "width", head: "Width %", title: "The 90 % interval, in percent of the last price" },
  { key: "skew", head: "Skew", title: "How much further the 90 % interval reaches up than down, in logs: −1 to +1" },
  { key: "rise", head: "Rise %", title: "Probability of a price above the last one" },
  { key: "age", head: "Age", title: "How long ago the bar closed" },
  { key: "state", head: "State", title: "What to mind" },
];

export class Market {
  constructor(clock, chart) {
    [this.clock, this.chart] = [clock, chart];
    this.entries = new Map(); // symbol -> {symbol, signal, trouble, close, until, told}
    this.order = [];
    this.elements = new Map();
    this.sorted = { key: "symbol", down: false };
    this.horizon = 0;
    this.chosen = null;
    this.loaded = false;
    this.unsorted = true;
    this.ondraw = () => {};
    this.body = document.querySelector("#symbols tbody");
    this.above = element("tr", { className: "space", ariaHidden: "true" }, element("td", { colSpan: COLUMNS.length }));
    this.below = this.above.cloneNode(true);
    this.body.append(this.above, this.below);
    this._heads();
    find("rows").addEventListener("scroll", () => this.ondraw(), { passive: true });
    find("rows").addEventListener("keydown", (event) => this._key(event));
    find("filter").addEventListener("submit", (event) => event.preventDefault());
    find("search").addEventListener("input", () => this._again());
    find("horizon").addEventListener("change", (event) => {
      this.horizon = Number(event.target.value);
      for (const entry of this.entries.values()) entry.told = null;
      this._again();
    });
    this.body.addEventListener("click", (event) => {
      const row = event.target.closest("tr[data-symbol]");
      if (row) this.pick(row.dataset.symbol);
    });
  }

  begin({ signals, groups, about }) {
    this.loaded = this.unsorted = true;
    this.about = about;
    this.entries.clear();
    for (const signal of signals) this._take(signal);
    for (const group of groups) this._trouble(group);
    this.chart.ask();
  }

  update({ group, signals }) {
    this.unsorted = true;
    for (const signal of signals) this._take(signal);
    this._trouble(group);
    const touched = this.chosen && (group.symbols.includes(this.chosen) || this.chosen in group.withheld);
    if (touched) this.chart.ask();
  }

  serve(serves) {
    if (serves) this.chart.ask();
  }

  /** Show a symbol's chart, and say so in the address. */
  pick(symbol) {
    history.replaceState(null, "", `#market/${encodeURIComponent(symbol)}`);
    this.choose(symbol);
  }

  choose(symbol) {
    if (symbol === this.chosen) return;
    this.chosen = symbol;
    this.chart.show(symbol);
    this.ondraw();
  }

  draw() {
    if (find("market").hidden) return;
    const empty = this.loaded && this.entries.size === 0;
    find("empty").hidden = !empty && this.loaded;
    document.querySelector(".market").hidden = !this.loaded || empty;
    if (!this.loaded) {
      this._say("Loading: the daemon is asked for its newest signals.");
      return;
    }
    if (empty) {
      this._say(
        `No signal yet. They come with the first bars on ${this.about.bars}/SYMBOL that a model can forecast from; ` +
        "until then a symbol that has too few bars is named here with the reason.",
      );
      return;
    }
    this._horizons();
    if (this.chosen === null) this.choose([...this.entries.keys()].sort()[0]);
    if (this.unsorted || this.sorted.key === "state") this._sort(); // the state changes with the time alone
    this._rows();
    this.chart.draw(this.entries.get(this.chosen), this.horizon);
  }

  _again() {
    this.unsorted = true;
    this.ondraw();
  }

  _say(text) {
    if (find("empty").textContent !== text) find("empty").textContent = text;
  }

  _take(signal) {
    this.entries.set(signal.symbol, {
      symbol: signal.symbol, signal, trouble: null, told: null,
      close: Date.parse(signal.close_time), until: Date.parse(signal.valid_until),
    });
  }

  _trouble(group) {
    const close = Date.parse(group.close_time);
    const named = [
      ...Object.entries(group.withheld).map(([symbol, why]) => [symbol, "withheld", why]),
      ...group.missing.map((symbol) => [symbol, "missing", "its bar did not come in time"]),
    ];
    for (const [symbol, kind, why] of named) {
      const entry = this.entries.get(symbol);
      if (entry && entry.close >= close) continue;
      const known = entry ?? { symbol, signal: null, told: null, close: NaN, until: NaN };
      this.entries.set(symbol, { ...known, trouble: { kind, why, close } });
    }
  }

  _heads() {
    const row = document.querySelector("#symbols thead tr");
    for (const { key, head, title, rest } of COLUMNS) {
      const button = element("button", { type: "button", title }, head);
      button.addEventListener("click", () => {
        const down = this.sorted.key === key ? !this.sorted.down : key !== "symbol";
        this.sorted = { key, down };
        for (const other of row.cells) other.removeAttribute("aria-sort");
        cell.setAttribute("aria-sort", down ? "descending" : "ascending");
        find("rows").scrollTop = 0;
        this._again();
      });
      const cell = element("th", { scope: "col", className: rest ? "rest" : "" }, button);
      if (key === "symbol") cell.setAttribute("aria-sort", "ascending");
      row.append(cell);
    }
  }

  _horizons() {
    const some = [...this.entries.values()].find((entry) => entry.signal)?.signal;
    const known = (some?.horizons ?? []).map((one) => one.bars);
    const menu = find("horizon");
    if (known.join() === this.known) return;
    this.known = known.join();
    if (!known.includes(this.horizon)) this.horizon = known[0] ?? 0;
    menu.replaceChildren(...known.map((count) => element("option", { value: count }, bars(count))));
    menu.value = this.horizon;
    this.unsorted = true;
    for (const entry of this.entries.values()) entry.told = null;
  }

  _told(entry) {
    entry.told ??= (entry.signal && figures(entry.signal, this.horizon)) || {};
    return entry.told;
  }

  _sort() {
    this.unsorted = false;
    const { key, down } = this.sorted;
    const wanted = find("search").value.trim().toUpperCase();
    const value = (entry) => {
      if (key === "age") return -entry.close;
      if (key === "state") return this._state(entry);
      return this._told(entry)[key] ?? NaN;
    };
    const found = [...this.entries.values()].filter((entry) => entry.symbol.includes(wanted));
    const by = (a, b) => (a.symbol < b.symbol ? -1 : 1);
    if (key === "symbol") found.sort((a, b) => (down ? by(b, a) : by(a, b)));
    else {
      const keys = new Map(found.map((entry) => [entry, value(entry)]));
      found.sort((a, b) => {
        const [one, other] = [keys.get(a), keys.get(b)];
        if (one === other) return by(a, b);
        if (Number.isNaN(one) || Number.isNaN(other)) return Number.isNaN(one) - Number.isNaN(other) || by(a, b);
        return (one < other) === down ? 1 : -1;
      });
    }
    this.order = found.map((entry) => entry.symbol);
    const all = this.entries.size;
    const told = found.length === all ? `${all} symbols` : `${found.length} of ${all} symbols`;
    if (find("count").textContent !== told) find("count").textContent = told;
  }

  /** What to mind of an entry, the worst first; empty when there is nothing. */
  _state(entry) {
    if (entry.trouble) return entry.trouble.kind;
    if (this.clock.now() > entry.until) return "stale";
    if (!entry.signal.tradable) return "late";
    return entry.signal.flags.at(-1) ?? "";
  }

  _rows() {
    const box = find("rows");
    const first = Math.max(0, Math.floor(box.scrollTop / ROW) - SPARE);
    const last = Math.min(this.order.length, Math.ceil((box.scrollTop + box.clientHeight) / ROW) + SPARE);
    find("symbols").setAttribute("aria-rowcount", this.order.length + 1);
    this.above.style.height = `${first * ROW}px`;
    this.below.style.height = `${(this.order.length - last) * ROW}px`;
    this.above.hidden = first === 0;
    this.below.hidden = last === this.order.length;
    const shown = this.order.slice(first, last);
    const wanted = new Set(shown);
    for (const [symbol, row] of this.elements) {
      if (!wanted.has(symbol)) {
        if (row.contains(document.activeElement)) box.focus({ preventScroll: true });
        row.remove();
        this.elements.delete(symbol);
      }
    }
    const roving = wanted.has(this.chosen) ? this.chosen : shown[0];
    let place = this.above;
    shown.forEach((symbol, k) => {
      const row = this.elements.get(symbol) ?? this._row(symbol);
      if (place.nextSibling !== row) place.after(row);
      place = row;
      row.setAttribute("aria-rowindex", first + k + 2);
      row.firstChild.firstChild.tabIndex = symbol === roving ? 0 : -1;
      this._fill(row, this.entries.get(symbol));
    });
  }

  _row(symbol) {
    const row = element("tr", {}, element("td", {}, element("button", { type: "button" }, symbol)));
    for (const { rest } of COLUMNS.slice(1)) row.append(element("td", { className: rest ? "rest" : "" }, ""));
    row.dataset.symbol = symbol;
    this.elements.set(symbol, row);
    return row;
  }

  _fill(row, entry) {
    const told = this._told(entry);
    const state = this._state(entry);
    const age = Number.isNaN(entry.close) || !this.clock.told ? "–" : span(Math.max(0, this.clock.now() - entry.close) / 1000);
    const texts = "last" in told
      ? [
        price(told.last), told.width === null ? "–" : (100 * told.width).toFixed(2),
        told.skew === null ? "–" : signed(told.skew), (100 * told.rise).toFixed(0), age, state || "ok",
      ]
      : ["–", "–", "–", "–", age, state || "ok"];
    texts.forEach((text, k) => {
      const cell = row.cells[k + 1];
      if (cell.firstChild?.data !== text) cell.textContent = text;
      if (k < 4 && "last" in told) cell.dataset.value = told[COLUMNS[k + 1].key] ?? "";
    });
    const why = entry.trouble?.why ?? entry.signal?.reasons.join("; ") ?? "";
    if (row.lastChild.title !== why) row.lastChild.title = why;
    const minded = !state ? "" : entry.trouble || state === "stale" ? "stale" : "minded";
    row.className = `${entry.symbol === this.chosen ? "chosen" : ""} ${minded}`;
    const current = String(entry.symbol === this.chosen);
    if (row.firstChild.firstChild.ariaPressed !== current) row.firstChild.firstChild.ariaPressed = current;
  }

  _key(event) {
    const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -1e9, End: 1e9 };
    const step = steps[event.key];
    if (!step || !event.target.closest("tr[data-symbol]")) return;
    event.preventDefault();
    const at = this.order.indexOf(event.target.closest("tr").dataset.symbol);
    const to = Math.min(this.order.length - 1, Math.max(0, at + step));
    const box = find("rows");
    const top = to * ROW;
    if (top < box.scrollTop) box.scrollTop = top;
    else if (top + 3 * ROW > box.scrollTop + box.clientHeight) box.scrollTop = top + 3 * ROW - box.clientHeight;
    this.pick(this.order[to]);
    this._rows();
    this.elements.get(this.order[to])?.firstChild.firstChild.focus({ preventScroll: true });
  }
}
