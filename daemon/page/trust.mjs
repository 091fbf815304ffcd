// Why to believe it, or not: who serves, how often outcomes were inside its intervals, and what went wrong lately.

import { ask } from "./ask.mjs";
import { bars, element, number, percent, table, utc } from "./format.mjs";
import { order } from "./orders.mjs";
import { Reckoning } from "./reckoning.mjs";

const MOST = 50;
const AGAIN_MS = 60000; // verifications and looks for drift are rarer

const find = (id) => document.getElementById(id);
const quiet = (text) => element("p", { className: "quiet" }, text);

export class Trust {
  constructor() {
    this.signals = new Map();
    this.events = [];
    this.model = null;
    this.loaded = false;
    this.activations = null;
    this.checked = null;
    this.orders = false;
    this.asked = 0;
    this.said = "";
    this.told = "";
    this.ondraw = () => {};
    this.fault = "";
    this.serving = true;
    this.since = null;
    this.drawn = null;
    this.changes = 0;
    this.reckoning = new Reckoning(() => this.ondraw());
  }

  begin({ about, since, signals, groups, gaps }) {
    this.loaded = true;
    this.orders = about.orders;
    this.since = since;
    this.signals = new Map(signals.map((signal) => [signal.symbol, signal]));
    this.events = [...groups.flatMap(told), ...gaps.map(lacks)].sort((a, b) => a.time - b.time);
    this.changes++;
    this._ask();
  }

  update({ group, signals, gaps }) {
    this.since ??= group.close_time;
    for (const signal of signals) this.signals.set(signal.symbol, signal);
    this.events.push(...told(group), ...gaps.map(lacks));
    this.events.splice(0, Math.max(0, this.events.length - MOST));
    this.changes++;
    this.reckoning.serves(group.model);
    if (group.model !== this.model) {
      this.model = group.model;
      this._ask();
    }
  }

  /** How the training stands: at its end another model may serve. */
  stands({ running }) {
    if (!running) this._ask();
  }

  serve(serves) {
    this.serving = serves;
    this.changes++;
    if (serves) this._ask();
  }

  draw() {
    if (!this.loaded || find("trust").hidden) return;
    if (performance.now() - this.asked > AGAIN_MS) this._ask();
    this.reckoning.draw(find("reckoning"), this.serving);
    if (this.drawn === this.changes) return;
    this.drawn = this.changes;
    const told = JSON.stringify([this.activations, this.fault, this.serving, this.orders]);
    if (told !== this.told) find("champion").replaceChildren(this._champion()); // else a button stays what it is
    this.told = told;
    if (find("rolled").textContent !== this.said) find("rolled").textContent = this.said;
    find("checked").replaceChildren(...this._checked());
    find("coverage").replaceChildren(this._coverage());
    find("faults").replaceChildren(this._faults());
    find("events").replaceChildren(this._events());
  }

  async _ask() {
    this.asked = performance.now();
    try {
      [this.activations, this.checked] = await Promise.all([ask("/activations"), ask("/trust")]);
      this.fault = "";
    } catch (error) {
      [this.model, this.fault] = [null, error.message]; // with the next group it is asked again
    }
    this.changes++;
    this.ondraw();
  }

  async _back(model, serving) {
    const text =
      `From the next group on the forecasts are those of ${model}. ${serving} is left behind: no training brings it ` +
      "back, only another order does.";
    try {
      const done = await order("rollback", { to: model }, { title: `Let ${model} serve again?`, text, action: "Roll back" });
      if (done !== null) this.said = `Done: ${done}.`;
    } catch (error) {
      this.said = error.message;
    }
    this._ask();
  }

  /** What was computed again and compared, and how far outcomes are from what was promised. */
  _checked() {
    if (!this.serving || !this.checked) return [quiet(this.fault ? `Not known: ${this.fault}.` : "Not known yet.")];
    const { verify, verified, verifies, drift, drifts } = this.checked;
    const made = [];
    if (verify) {
      const result = verify.agrees
        ? `Agrees: ${verify.signals} signals computed again are the same, byte by byte.`
        : `Differs: ${verify.differing} of ${verify.signals} signals computed again, ${verify.missing} are missing.`;
      made.push(element("p", { className: verify.agrees ? "good" : "bad" }, result), quiet(`Verified ${utc(Date.parse(verified))}, in ${verify.seconds.toFixed(0)} s.`));
      for (const { topic, symbol, close_time, what } of verify.places) made.push(quiet(`${topic} ${symbol}, close ${close_time}: ${what}`));
    } else if (verifies) made.push(quiet(`Not verified yet since the daemon started; it is at ${verifies} (cron, UTC).`));
    else made.push(quiet("Nothing is verified: the configuration has no [verify]."));
    if (!drift) {
      made.push(quiet(drifts ? "Drift: too few outcomes yet." : "Drift is not looked for: the configuration has no [retrain.drift]."));
      return made;
    }
    const nominals = Object.keys(drift).filter((name) => name.startsWith("in_"));
    const rows = Object.keys(drift[nominals[0]]).map((horizon) => [
      element("th", { scope: "row" }, bars(Number(horizon))),
      ...nominals.map((name) => number(drift[name][horizon], percent(drift[name][horizon]))),
    ]);
    made.push(
      quiet(`The last ${drift.closes} closes with outcomes, ${drift.signals} signals; CRPS over mean |outcome| ${drift.crps.toPrecision(4)}`),
      table(["Horizon", ...nominals.map((name) => `inside ${name.slice(3)} %`)], rows),
    );
    return made;
  }

  _champion() {
    if (!this.serving) return quiet("Not known yet: the daemon is not serving.");
    if (this.activations === null) return quiet(this.fault ? `Not known: ${this.fault}.` : "Loading…");
    if (!this.activations.length) return quiet("The journal names no model yet.");
    const serving = this.activations[0].champion.model;
    const shown = new Set([serving]);
    const back = (model) => {
      if (!this.orders || shown.has(model)) return "";
      shown.add(model);
      const button = element("button", { type: "button" }, "Serve again");
      button.setAttribute("aria-label", `Let ${model} serve again`);
      button.addEventListener("click", () => this._back(model, serving));
      return button;
    };
    const rows = this.activations.map(({ time, champion }) => [
      utc(Date.parse(time)),
      element("td", { className: "id" }, champion.model),
      champion.reason,
      champion.crps === null ? "–" : champion.crps.toPrecision(4),
      champion.until ? utc(champion.until / 1e6) : "–",
      back(champion.model),
    ]);
    const heads = ["Serves since", "Model", "Why", "CRPS / mean |outcome|", "Newest bar it learnt from", "Rollback"];
    return table(heads, rows, { className: "text" });
  }

  /** The coverage that the newest signals of the newest model tell, each weighed by its outcomes. */
  _coverage() {
    const all = [...this.signals.values()];
    if (!all.length) return quiet("Not known yet: there is no signal.");
    const newest = all.reduce((best, one) => (best && best.close_time >= one.close_time ? best : one), null);
    const told = all.filter((one) => one.coverage && one.model === newest.model);
    if (!told.length) {
      return quiet("No signal tells any: the model is not calibrated online, or too few of its horizons have ended.");
    }
    const { horizons, coverage } = told[0];
    const rows = horizons.map((one, h) => {
      const outcomes = told.reduce((sum, signal) => sum + signal.coverage.outcomes[h], 0);
      const share = (nominal) =>
        told.reduce((sum, signal) => sum + signal.coverage.share[nominal][h] * signal.coverage.outcomes[h], 0) / outcomes;
      return [
        element("th", { scope: "row" }, bars(one.bars)),
        ...Object.keys(coverage.share).map((nominal) => number(share(nominal), percent(share(nominal)))),
        number(outcomes, String(outcomes)),
      ];
    });
    const heads = ["Horizon", ...Object.keys(coverage.share).map((nominal) => `inside ${percent(Number(nominal), 0)}`), "Outcomes"];
    return table(heads, rows);
  }

  _faults() {
    if (!this.signals.size) return quiet("Not known yet: there is no signal.");
    const bad = [...this.signals.values()].filter((signal) => signal.flags.length);
    if (!bad.length) return quiet("No newest signal is degraded or warming.");
    const why = (signal) => signal.reasons.join("; ") || "too few bars yet to look back as far as it should";
    const rows = bad.slice(0, MOST).map((signal) => [signal.symbol, signal.flags.join(", "), why(signal)]);
    if (bad.length > MOST) rows.push([`and ${bad.length - MOST} more`, "", ""]);
    return table(["Symbol", "Flag", "Reasons"], rows, { className: "text" });
  }

  _events() {
    if (this.since === null) return quiet("Not known yet: no group has ended since the daemon started.");
    const since = utc(Date.parse(this.since));
    if (!this.events.length) return quiet(`Nothing since the close of ${since}: every group was full, in time, and forecast.`);
    const rows = this.events.toReversed().map(({ time, kind, what }) => [utc(time), kind, what]);
    return table(["Close", "What", "Who and why"], rows, { className: "text" });
  }
}

/** What was not as it should be in a group, in lines. */
function told(group) {
  const time = Date.parse(group.close_time);
  const line = (kind, what) => ({ time, kind, what });
  const found = [];
  if (group.straggler) found.push(line("late", `${names(group.symbols.concat(Object.keys(group.withheld)))}: after its group was sent`));
  if (group.shed) found.push(line("shed", "nothing was forecast: signals would have come after their time"));
  if (group.missing.length) found.push(line("missing", `${names(group.missing)}: not in time`));
  const reasons = Map.groupBy(Object.entries(group.withheld), ([, why]) => why);
  for (const [why, own] of reasons) found.push(line("withheld", `${names(own.map(([symbol]) => symbol))}: ${why}`));
  for (const [strategy, why] of Object.entries(group.refused ?? {})) found.push(line("refused", `${strategy}: ${why}`));
  return found;
}

function lacks(gap) {
  const what = `${gap.symbol}: ${bars(gap.bars)} missing since ${utc(Date.parse(gap.after))}; asked for`;
  return { time: Date.parse(gap.before), kind: "gap", what };
}

function names(symbols) {
  return symbols.length > 8 ? `${symbols.slice(0, 8).join(", ")} and ${symbols.length - 8} more` : symbols.join(", ");
}
