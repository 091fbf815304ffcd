// Backtests in the daemon's folder of reports: what each was of, its report, and two of them side by side.

import { ask } from "./ask.mjs";
import { bars, element, number, percent, signed, table, utc } from "./format.mjs";

const MOST = 2;
const find = (id) => document.getElementById(id);
const quiet = (text) => element("p", { className: "quiet" }, text);
const plain = (value) => signed(value);
const share = (value) => `${value < 0 ? "−" : ""}${percent(Math.abs(value), 2)}`;
const count = (value) => String(value);

/** Figures of a strategy: what they are called, and how they are written. */
const FIGURES = [
  ["total_return", "Return", share], ["cagr", "Return a year", share], ["volatility", "Volatility a year", share],
  ["sharpe", "Sharpe", plain], ["dsr", "Deflated Sharpe", (value) => percent(value)],
  ["max_drawdown", "Deepest fall", share], ["exposure", "Exposure", share], ["turnover", "Turnover a year", plain],
  ["costs", "Costs", share], ["fills", "Fills", count],
];
const SCORES = [
  ["n", "Forecasts", count], ["crps", "CRPS, log price", (value) => value.toPrecision(4)],
  ["coverage_50", "Inside 50 %", (value) => percent(value)], ["coverage_80", "Inside 80 %", (value) => percent(value)],
  ["coverage_90", "Inside 90 %", (value) => percent(value)],
];
const SETTINGS = [
  ["written", "Written", (value) => utc(Date.parse(value))], ["model", "Model"], ["kind", "Kind"], ["sampler", "Sampler"],
  ["steps", "Steps"], ["timeframe", "Timeframe"], ["calendar", "Calendar"], ["files", "Bars", (value) => value.join(", ")],
  ["trials", "Trials"], ["warning", "To mind"],
];

export class Backtests {
  constructor() {
    this.found = undefined; // null: the daemon has no folder of reports
    this.fault = "";
    this.picked = [];
    this.changes = 0;
    this.drawn = null;
    this.ondraw = () => {};
  }

  begin() {
    this.found = undefined;
    this.changes++;
  }

  update() {}

  serve() {}

  draw() {
    if (find("backtests").hidden) {
      if (this.found !== undefined || this.fault) [this.found, this.fault] = [undefined, ""]; // read again when looked at
      return;
    }
    if (this.found === undefined && !this.fault && !this.asking) this._ask();
    if (this.drawn === this.changes) return;
    this.drawn = this.changes;
    find("backtest-list").replaceChildren(this._list());
    find("compared").replaceChildren(this._compared());
  }

  async _ask() {
    this.asking = true;
    try {
      const told = await ask("/backtests");
      if (told?.error) throw new Error(told.error);
      [this.found, this.fault] = [told, ""];
      const names = new Set((told ?? []).map(({ name }) => name));
      this.picked = this.picked.filter((name) => names.has(name));
    } catch (error) {
      this.fault = error.message;
    }
    this.asking = false;
    this.changes++;
    this.ondraw();
  }

  _list() {
    if (this.fault) return quiet(`Not known: ${this.fault}.`);
    if (this.found === undefined) return quiet("Loading…");
    if (this.found === null) return quiet("The configuration names no folder: set reports in [http] to one into which barcast backtest --out writes.");
    if (!this.found.length) return quiet("There is no backtest in the folder yet: barcast backtest FILES --out FOLDER/NAME writes one.");
    const rows = this.found.map((one) => {
      const name = one.report
        ? element("a", { href: `/backtests/${encodeURIComponent(one.name)}`, target: "_blank", rel: "noopener" }, one.name)
        : one.name;
      const box = element("input", { type: "checkbox", checked: this.picked.includes(one.name), disabled: Boolean(one.fault), ariaLabel: `Compare ${one.name}` });
      box.addEventListener("change", () => this._pick(one.name, box.checked));
      const best = (one.portfolio ?? []).filter(({ sharpe }) => sharpe != null).sort((a, b) => b.sharpe - a.sharpe)[0];
      return [
        box, element("th", { scope: "row" }, name), utc(Date.parse(one.written)),
        one.fault ?? one.kind, element("td", { className: "id" }, one.model ?? ""), one.timeframe ?? "",
        (one.strategies ?? []).join(", "),
        best === undefined ? "–" : number(best.sharpe, `${signed(best.sharpe)} ${best.strategy}`),
      ];
    });
    return table(["Compare", "Name", "Written", "Kind", "Model", "Timeframe", "Strategies", "Best Sharpe"], rows, { className: "text" });
  }

  _pick(name, picked) {
    this.picked = this.picked.filter((other) => other !== name);
    if (picked) this.picked = [...this.picked, name].slice(-MOST);
    this.changes++;
    this.ondraw();
    for (const box of find("backtest-list").querySelectorAll("input")) {
      if (box.ariaLabel === `Compare ${name}`) box.focus();
    }
  }

  _compared() {
    const two = this.picked.map((name) => this.found?.find((one) => one.name === name)).filter(Boolean);
    if (two.length < MOST) return quiet("Choose two backtests in the list.");
    const [one, other] = two;
    const heads = ["", one.name, other.name];
    const sheet = (title, rows, properties) => element("div", {}, element("h4", {}, title), table(heads, rows, properties));
    const row = (name, values, write = String) => [
      element("th", { scope: "row" }, name),
      ...values.map((value) => (value == null || value === "" ? "–" : typeof value === "number" ? number(value, write(value)) : write(value))),
    ];
    const made = [sheet("What they were of", SETTINGS.map(([key, name, write]) => row(name, [one[key], other[key]], write)), { className: "text" })];
    for (const strategy of new Set([...one.portfolio, ...other.portfolio].map((book) => book.strategy))) {
      const books = two.map((each) => each.portfolio.find((book) => book.strategy === strategy));
      made.push(sheet(strategy, FIGURES.map(([key, name, write]) => row(name, books.map((book) => book?.[key]), write))));
    }
    for (const horizon of new Set([...one.scores, ...other.scores].map((score) => score.horizon))) {
      const scores = two.map((each) => each.scores.find((score) => score.horizon === horizon));
      made.push(sheet(`Forecasts over ${bars(horizon)}`, SCORES.map(([key, name, write]) => row(name, scores.map((score) => score?.[key]), write))));
    }
    return element("div", { className: "sheets" }, ...made);
  }
}
