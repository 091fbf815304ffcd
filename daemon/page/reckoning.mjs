// How forecasts held what they promised over time: coverage in spans, where outcomes fell, and what they gain.

import { ask } from "./ask.mjs";
import { bars, element, number, percent, table, utc } from "./format.mjs";

const AGAIN_MS = 600000; // the daemon keeps an answer as long
const FAILED_MS = 60000;
const PATIENCE_MS = 600000; // it is worked out beside the daemon, after all else
const SVG = "http://www.w3.org/2000/svg";
const [WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM] = [320, 150, 34, 8, 8, 20];
const COUNTED = "Being counted: a process beside the daemon holds its signals against what happened…";
const IDLE = "Not known yet: the daemon is not serving.";
const NAMES = { hs: "historical simulation (hs)", fhs: "filtered historical simulation (fhs)" };

const quiet = (text) => element("p", { className: "quiet" }, text);
const day = (time) => utc(Date.parse(time));
const about = (value, error) => `${percent(value).replace(/^-(?=0\.0 )/, "").replace("-", "−")} ± ${(100 * error).toFixed(1)}`;
const counted = (count) => number(count, String(count));
const shown = (share) => (share ? number(share.inside, about(share.inside, share.error)) : "–");

export class Reckoning {
  constructor(ondraw) {
    this.found = null;
    this.fault = "";
    this.due = 0;
    this.asking = false;
    this.serving = true;
    this.model = null;
    this.changes = 0; // of the model that serves
    this.told = null; // what is drawn
    this.open = new Set();
    this.ondraw = ondraw;
  }

  /** Whose signals come now: what is known of another model is forgotten. */
  serves(model) {
    if (this.model !== null && this.model !== model) {
      [this.found, this.fault, this.due] = [null, "", 0];
      this.changes++;
    }
    this.model = model;
  }

  /** Draw what is known, and ask where it is time to: whoever looks says so. */
  draw(box, serving) {
    if (serving && !this.serving && this.fault) this.due = 0; // it may have failed for that
    this.serving = serving;
    if (serving && !this.asking && performance.now() >= this.due) this._ask();
    const told = serving ? (this.fault || (this.found ?? COUNTED)) : IDLE;
    if (told === this.told) return; // what is open stays so, and where somebody is
    this.told = told;
    box.replaceChildren(...(told === this.found ? this._all(told) : [quiet(told === this.fault ? `Not known: ${told}.` : told)]));
  }

  async _ask() {
    this.asking = true;
    const { changes } = this;
    let [found, fault] = [null, ""];
    try {
      const told = await ask("/reckoning", "GET", PATIENCE_MS);
      if (told.error) fault = told.error;
      else found = told;
    } catch (error) {
      fault = error.message;
    } finally {
      this.asking = false;
    }
    if (changes === this.changes) [this.found, this.fault, this.due] = [found, fault, performance.now() + (found ? AGAIN_MS : FAILED_MS)];
    this.ondraw();
  }

  _all({ least, closes, signals, symbols, spans, horizons }) {
    const told = horizons.filter((one) => one.coverage.length);
    if (!told.length) return [quiet(`Too few outcomes yet: signals of this model at ${closes} closes have one, and ${least} closes are needed.`)];
    const few = horizons.filter((one) => !one.coverage.length).map((one) => `over ${bars(one.bars)} at ${one.closes} of ${least} closes`);
    return [
      quiet(
        `${signals} signals of this model for ${symbols} ${symbols === 1 ? "symbol" : "symbols"} at ${closes} closes, ` +
        `${day(spans[0][0])} to ${day(spans.at(-1)[1])}. ± is one standard error.` +
        (few.length ? ` Too few outcomes yet ${few.join(", ")}.` : ""),
      ),
      quiet(
        "Lines: the share of outcomes inside each interval in parts of the time, with one standard error; dashed what was promised. Columns: outcomes " +
        "between the levels, times what is expected, of all (wide) and of the last day (narrow); dashed 1 ×.",
      ),
      element("div", { className: "sheets" }, this._skill(horizons), ...told.map((one) => this._horizon(one))),
    ];
  }

  _skill(horizons) {
    const names = Object.keys(horizons[0].skill);
    const gained = (skill) => (skill ? number(skill.gain, about(skill.gain, skill.error)) : "too few");
    const rows = horizons.map(({ bars: ahead, skill }) => [
      element("th", { scope: "row" }, bars(ahead)), ...names.map((name) => gained(skill[name])), counted(skill[names[0]]?.origins ?? 0),
    ]);
    const heads = ["Horizon", ...names.map((name) => `CRPS below that of ${NAMES[name] ?? name}`), "Same origins"];
    return element("div", {}, element("h4", {}, "Skill"), table(heads, rows));
  }

  _horizon({ bars: ahead, coverage, pit, lately }) {
    const { levels, expected, spans } = this.found;
    const row = (name, shares) => [element("th", { scope: "row" }, name), ...shares.map(shown), counted(shares[0]?.outcomes ?? 0)];
    const covered = [
      ...coverage[0].spans.map((_, k) => row(day(spans[k][1]), coverage.map((one) => one.spans[k]))), row("All", coverage.map((one) => one.whole)),
    ];
    const fell = [pit, lately].map((counts) => counts.map((count) => count / counts.reduce((sum, each) => sum + each, 0)));
    const edges = ["", ...levels.map((level) => percent(level, 0)), ""];
    const between = (k) => (k === 0 ? `below ${edges[1]}` : k === levels.length ? `above ${edges[k]}` : `${edges[k]} to ${edges[k + 1]}`);
    const bins = expected.map((share, k) => [
      element("th", { scope: "row" }, between(k)), ...[share, ...fell.map((one) => one[k])].map((each) => number(each, percent(each))),
    ]);
    const heads = ["Until", ...coverage.map(({ nominal }) => `inside ${percent(nominal, 0)}`), "Outcomes"];
    const figures = element(
      "details", { open: this.open.has(ahead) },
      element("summary", {}, `Figures over ${bars(ahead)}`), table(heads, covered), table(["Outcomes", "Expected", "All", "Last day"], bins),
    );
    figures.addEventListener("toggle", () => this.open[figures.open ? "add" : "delete"](ahead));
    return element(
      "div", { className: "held" },
      element("h4", {}, `Over ${bars(ahead)}`), lines(bars(ahead), coverage, spans), columns(bars(ahead), expected, ...fell), figures,
    );
  }
}

/** An SVG element of a name with attributes. */
function drawn(name, attributes, ...content) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...content);
  return made;
}

const picture = (label, content) => drawn("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": label }, ...content);
const text = (x, y, anchor, words) => drawn("text", { x, y, "text-anchor": anchor }, words);

/** The coverage of each interval in each span, beside a dashed line where it should be. */
function lines(title, kinds, spans) {
  const all = kinds.flatMap((one) => [one.nominal, ...one.spans.filter(Boolean).map((share) => share.inside)]);
  const low = Math.max(0, Math.floor(10 * Math.min(...all)) / 10);
  const x = (k) => LEFT + ((WIDTH - LEFT - RIGHT) * (k + 0.5)) / spans.length;
  const y = (share) => TOP + ((HEIGHT - TOP - BOTTOM) * (1 - share)) / (1 - low);
  const made = [text(LEFT - 4, y(1) + 4, "end", "100 %"), text(LEFT - 4, y(low) + 4, "end", percent(low, 0))];
  const [first, last] = [spans[0][0], spans.at(-1)[1]];
  const digits = first.slice(0, 10) === last.slice(0, 10) ? 16 : 10; // within a day, also the time
  for (const [at, anchor, time] of [[LEFT, "start", first], [WIDTH - RIGHT, "end", last]]) made.push(text(at, HEIGHT - 4, anchor, time.slice(0, digits).replace("T", " ")));
  kinds.forEach(({ nominal, spans: own }, kind) => {
    const points = own.map((share, k) => share && [x(k), y(share.inside)]).filter(Boolean);
    const errors = own.map((share, k) => share && [x(k), y(Math.min(1, share.inside + share.error)), y(Math.max(low, share.inside - share.error))]);
    made.push(
      drawn("line", { class: `nominal kind${kind}`, x1: LEFT, x2: WIDTH - RIGHT, y1: y(nominal), y2: y(nominal) }),
      text(LEFT - 4, y(nominal) + 4, "end", percent(nominal, 0)),
      ...errors.filter(Boolean).map(([at, y1, y2]) => drawn("line", { class: `error kind${kind}`, x1: at, x2: at, y1, y2 })),
      drawn("polyline", { class: `kind${kind}`, points: points.map((point) => point.map((each) => each.toFixed(1)).join(",")).join(" ") }),
      ...points.map(([cx, cy]) => drawn("circle", { class: `kind${kind}`, cx, cy, r: 2.2 })),
    );
  });
  const said = kinds.map(({ nominal, whole }) => `${about(whole.inside, whole.error)} inside the ${percent(nominal, 0)} interval`).join(", ");
  return picture(`Coverage over ${title} in ${spans.length} parts of the time; in all ${said}`, made);
}

/** Where outcomes fell between the levels, each bar over what is expected of it: 1 where it is calibrated. */
function columns(title, expected, whole, lately) {
  const ratio = (share, k) => share / expected[k];
  const top = Math.max(1.5, ...whole.map(ratio), ...lately.map(ratio));
  const y = (value) => HEIGHT - BOTTOM - ((HEIGHT - TOP - BOTTOM) * value) / top;
  const width = WIDTH - LEFT - RIGHT;
  let from = 0;
  const made = [];
  expected.forEach((share, k) => {
    const [x, wide] = [LEFT + width * from, width * share];
    from += share;
    const bar = (value, name, start, part) =>
      drawn("rect", { class: name, x: (x + start * wide + 0.5).toFixed(1), width: Math.max(1, part * wide - 1).toFixed(1), y: y(value).toFixed(1), height: (y(0) - y(value)).toFixed(1) });
    made.push(bar(ratio(whole[k], k), "all", 0, 0.6), bar(ratio(lately[k], k), "lately", 0.6, 0.4));
  });
  made.push(
    drawn("line", { class: "nominal", x1: LEFT, x2: WIDTH - RIGHT, y1: y(1), y2: y(1) }),
    text(LEFT - 4, y(1) + 4, "end", "1 ×"), text(LEFT - 4, y(top) + 8, "end", `${top.toFixed(1)} ×`), text(LEFT, HEIGHT - 4, "start", "lowest outcomes"), text(WIDTH - RIGHT, HEIGHT - 4, "end", "highest"),
  );
  const said = whole.map((share, k) => `${percent(share)} for ${percent(expected[k])}`).join(", ");
  return picture(`Outcomes over ${title} between the levels, from the lowest, for what is expected: ${said}`, made);
}
