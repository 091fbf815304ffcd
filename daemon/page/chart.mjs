// The chart of one symbol: its candles, the fan of the newest signal ahead of them, and how earlier ones went.

import { CandlestickSeries, createChart } from "./lightweight-charts.mjs";
import { ask } from "./ask.mjs";
import { bars, element, number, percent, price, span, table, utc } from "./format.mjs";
import { spread } from "./signal.mjs";

const AGAIN_MS = 5000;

const find = (id) => document.getElementById(id);
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

/** Draws fans behind the candles: an interval for each pair of levels, the median, and what came of it. */
class Fans {
  constructor() {
    this.fans = [];
    this.inks = [];
    this.fresh = true;
    const renderer = { draw: (target) => target.useMediaCoordinateSpace(({ context }) => this._draw(context)) };
    this._views = [{ zOrder: () => "bottom", renderer: () => renderer }];
  }

  attached({ chart, series, requestUpdate }) {
    [this._chart, this._series, this._request] = [chart, series, requestUpdate];
  }

  paneViews() { return this._views; }

  set(fans) {
    this.fans = fans;
    this._request?.();
  }

  /** Whether the newest fan may be acted on: else it is drawn as one of before. */
  freshen(fresh) {
    if (fresh === this.fresh) return;
    this.fresh = fresh;
    this._request?.();
  }

  autoscaleInfo(from, to) {
    const seen = this.fans.filter((fan) => fan.from <= to && fan.from + fan.points.at(-1).bars >= from);
    const prices = seen.flatMap((fan) => fan.points.flatMap((point) => [point.prices[0], point.prices.at(-1)]));
    if (!prices.length) return null;
    return { priceRange: { minValue: Math.min(...prices), maxValue: Math.max(...prices) } };
  }

  _draw(context) {
    const scale = this._chart.timeScale();
    const [ink, up, down] = this.inks;
    for (const fan of this.fans) {
      const strong = fan.newest && this.fresh;
      const xs = [fan.from, ...fan.points.map((point) => fan.from + point.bars)].map((k) => scale.logicalToCoordinate(k));
      const y = (k, level) => this._series.priceToCoordinate(k ? fan.points[k - 1].prices[level] : fan.reference);
      context.fillStyle = context.strokeStyle = ink;
      for (const [low, high] of fan.pairs) {
        context.globalAlpha = strong ? 0.2 : 0.06;
        context.beginPath();
        xs.forEach((x, k) => context.lineTo(x, y(k, low)));
        for (let k = xs.length - 1; k >= 0; k--) context.lineTo(xs[k], y(k, high));
        context.fill();
      }
      context.globalAlpha = strong ? 0.9 : 0.35;
      context.lineWidth = strong ? 1.5 : 1;
      context.setLineDash(strong ? [] : [3, 3]);
      context.beginPath();
      if (fan.median >= 0) xs.forEach((x, k) => context.lineTo(x, y(k, fan.median)));
      context.stroke();
      context.setLineDash([]);
      fan.points.forEach(({ outcome, prices }, k) => {
        if (outcome === undefined) return;
        const inside = prices[0] <= outcome && outcome <= prices.at(-1);
        mark(context, xs[k + 1], this._series.priceToCoordinate(outcome), inside, inside ? up : down);
      });
      context.globalAlpha = 1;
    }
  }
}

/** A dot where the price was inside the interval, a cross where it was not. */
function mark(context, x, y, inside, ink) {
  context.globalAlpha = 1;
  context.fillStyle = context.strokeStyle = ink;
  context.lineWidth = 1.5;
  context.beginPath();
  if (inside) {
    context.arc(x, y, 2.5, 0, 7);
    context.fill();
    return;
  }
  for (const side of [-1, 1]) {
    context.moveTo(x - 4 * side, y - 4);
    context.lineTo(x + 4 * side, y + 4);
  }
  context.stroke();
}

export class Chart {
  constructor(clock) {
    this.clock = clock;
    this.symbol = null;
    this.drawn = null;
    this.fault = "";
    this.asking = false;
    this.again = false;
    this.later = 0;
  }

  about({ timeframe }) {
    this._make();
    const unit = timeframe.at(-1);
    this.chart.applyOptions({ timeScale: { timeVisible: "smh".includes(unit), secondsVisible: unit === "s" } });
  }

  show(symbol) {
    [this.symbol, this.drawn, this.fault] = [symbol, null, ""];
    this.candles?.setData([]);
    this.fans?.set([]);
    find("quantiles").replaceChildren();
    this.ask();
  }

  /** Ask for the symbol's bars and signals; once more when it is asked while an answer is under way. */
  async ask() {
    if (this.symbol === null || !this.chart) return;
    if (this.asking) {
      this.again = true;
      return;
    }
    [this.asking, this.again] = [true, false];
    const { symbol } = this;
    let [found, fault] = [null, ""];
    try {
      found = await ask(`/symbols/${encodeURIComponent(symbol)}`);
      if (found === null) fault = "no bars of this symbol are known yet";
    } catch (error) {
      fault = error.message;
      clearTimeout(this.later);
      this.later = setTimeout(() => this.ask(), AGAIN_MS);
    } finally {
      this.asking = false;
    }
    if (symbol === this.symbol) {
      this.fault = fault;
      if (found !== null) this._take(found);
    }
    if (this.again || symbol !== this.symbol) await this.ask();
  }

  /** Say what is to be said of the symbol now: its age goes on without news. */
  draw(entry, horizon) {
    const title = this.symbol === null ? "No symbol is chosen" : this.symbol;
    if (find("chart-title").textContent !== title) find("chart-title").textContent = title;
    const [state, text] = this._state(entry);
    const said = find("chart-state");
    if (said.textContent !== text) said.textContent = text;
    said.dataset.state = state;
    this.fans?.freshen(!this.fault && this.clock.now() <= this.drawn?.until);
    const told = this._told(entry?.signal, horizon);
    if (find("chart-told").textContent !== told) find("chart-told").textContent = told;
  }

  _state(entry) {
    if (!entry) return ["loading", this.symbol === null ? "" : "no such symbol yet"];
    if (!entry.signal) return ["ill", `no forecast: ${entry.trouble.why}`];
    const close = `bar closed ${utc(entry.close)}`;
    if (entry.trouble) return ["ill", `${entry.trouble.kind} at ${utc(entry.trouble.close)}: ${entry.trouble.why}; ${close}`];
    if (this.clock.now() > entry.until) {
      return ["stale", `stale: ${close}, do not act on it since ${span((this.clock.now() - entry.until) / 1000)}`];
    }
    if (this.fault) return ["ill", this.fault];
    if (!this.drawn) return ["loading", "loading…"];
    const flags = entry.signal.flags.length ? `${entry.signal.flags.join(", ")}: ${entry.signal.reasons.join("; ") || "too few bars yet"}; ` : "";
    return [flags ? "ill" : "good", `${flags}${close}, valid until ${utc(entry.until)}`];
  }

  _told(signal, horizon) {
    const row = signal?.horizons.findIndex((one) => one.bars === horizon) ?? -1;
    if (row < 0) return "";
    const prices = signal.quantiles[row];
    const share = percent(signal.levels.at(-1) - signal.levels[0], 0);
    return (
      `${signal.symbol} at ${price(signal.reference)}. In ${bars(horizon)}, ${utc(Date.parse(signal.horizons[row].end_time))}: ` +
      `${share} interval ${price(prices[0])} to ${price(prices.at(-1))}, probability of a rise ${percent(signal.rise[row], 0)}. ` +
      "Earlier fans are faint; a dot is an outcome inside the widest interval, a cross one outside."
    );
  }

  _make() {
    if (this.chart) return;
    this.chart = createChart(find("chart"), {
      autoSize: true,
      // Its logo would bring a style element and markup, which the page's policy forbids: the footer names the maker.
      layout: { attributionLogo: false },
      localization: { locale: "en", timeFormatter: (time) => utc(time * 1000) },
      rightPriceScale: { borderVisible: false },
      timeScale: { borderVisible: false },
      handleScroll: { vertTouchDrag: false },
    });
    this.candles = this.chart.addSeries(CandlestickSeries, { borderVisible: false, priceLineVisible: false });
    this.fans = new Fans();
    this.candles.attachPrimitive(this.fans);
    const paint = () => this._paint();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
    paint();
  }

  _paint() {
    const line = { color: colour("line") };
    const [up, down] = [colour("up"), colour("down")];
    this.fans.inks = [colour("fan"), up, down];
    this.chart.applyOptions({
      layout: { background: { color: colour("panel") }, textColor: colour("quiet") },
      grid: { vertLines: line, horzLines: line },
    });
    this.candles.applyOptions({ upColor: up, downColor: down, wickUpColor: up, wickDownColor: down });
  }

  _take(found) {
    const { bars: rows, ahead, signals } = found;
    const before = this.drawn;
    const range = before && this.chart.timeScale().getVisibleLogicalRange();
    const decimals = Math.max(2, 5 - Math.floor(Math.log10(rows.at(-1)[4])));
    this.candles.applyOptions({ priceFormat: { type: "price", precision: decimals, minMove: 10 ** -decimals } });
    this.candles.setData([
      ...rows.map(([time, open, high, low, close]) => ({ time, open, high, low, close })),
      ...ahead.map((time) => ({ time })),
    ]);
    const places = new Map(rows.map(([time], k) => [time, k]));
    this.fans.set(
      signals.flatMap((signal, k) => {
        const from = places.get(Date.parse(signal.close_time) / 1000);
        if (from === undefined) return [];
        // A horizon counts the symbol's own bars, over holes too: so do the calibration and the backtest.
        const points = signal.horizons.map((one, h) => ({
          bars: one.bars, prices: signal.quantiles[h], outcome: rows[from + one.bars]?.[4],
        }));
        return [{ from, reference: signal.reference, points, newest: k === signals.length - 1, ...spread(signal.levels) }];
      }),
    );
    this._scroll(before, range, rows, ahead);
    const until = signals.length ? Date.parse(signals.at(-1).valid_until) : 0;
    this.drawn = { rows, until, total: rows.length + ahead.length };
    this._table(signals.at(-1));
  }

  /** Keep what somebody looks at where it is, or follow the newest bar where that is looked at. */
  _scroll(before, range, rows, ahead) {
    const total = rows.length + ahead.length;
    const scale = this.chart.timeScale();
    if (!before || !range) {
      const width = find("chart").clientWidth < 500 ? 60 : 120;
      scale.setVisibleLogicalRange({ from: Math.max(-0.5, rows.length - width), to: total });
    } else if (range.to >= before.total - 1) {
      scale.setVisibleLogicalRange({ from: range.from + total - before.total, to: range.to + total - before.total });
    } else {
      const gone = Math.max(0, before.rows.findIndex(([time]) => time === rows[0][0]));
      scale.setVisibleLogicalRange({ from: range.from - gone, to: range.to - gone });
    }
  }

  _table(signal) {
    if (!signal) {
      find("quantiles").replaceChildren();
      return;
    }
    const rows = signal.horizons.map((one, h) => [
      element("th", { scope: "row" }, bars(one.bars), element("small", {}, utc(Date.parse(one.end_time)))),
      ...signal.quantiles[h].map((value) => number(value, price(value))),
      number(signal.rise[h], percent(signal.rise[h], 0)),
    ]);
    const heads = ["Until", ...signal.levels.map((level) => percent(level, 0)), "Rise"];
    const made = table(heads, rows);
    made.prepend(element("caption", { className: "hidden" }, `Quantiles of ${signal.symbol}, prices by probability of being below`));
    find("quantiles").replaceChildren(made);
  }
}
