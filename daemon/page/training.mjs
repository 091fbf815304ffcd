// A training: how one may be set, what that takes in memory, and how the one under way stands.

import { ask } from "./ask.mjs";
import { element, number, percent, span, table, utc } from "./format.mjs";
import { order } from "./orders.mjs";

const find = (id) => document.getElementById(id);
const quiet = (text) => element("p", { className: "quiet" }, text);
const LATENT = ["batch", "image", "attention", "checkpoint_gradients"];
const RESULTS = {
  promoted: "The challenger took over.", refused: "The challenger was refused.",
  failed: "The training failed.", stopped: "The training was stopped.",
};
const DOES = { train: "It learns", gate: "The gate judges", waits: "It failed, and is tried again later" };
const EPOCHS = 12;

export class Training {
  constructor(clock) {
    this.clock = clock;
    this.choices = null;
    this.fault = "";
    this.stand = null;
    this.about = null;
    this.changes = 0;
    this.drawn = null;
    this.asking = false;
    this.ondraw = () => {};
    const form = find("settings");
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this._order("retrain", () => ({ training: this._wanted() }));
    });
    form.addEventListener("input", () => this._estimate());
    find("stop").addEventListener("click", () => this._order("stop", () => ({})));
  }

  begin({ about, training }) {
    [this.about, this.stand] = [about, training];
    this.fault = "";
    this.changes++;
  }

  update() {}

  /** How the training stands now. */
  stands(training) {
    if (this.stand?.running && !training.running) this.fault = ""; // whoever trains has time to answer again
    this.stand = training;
    this.changes++;
  }

  serve() {
    this.fault = "";
    this.changes++;
  }

  draw() {
    if (!this.about || find("training").hidden) return;
    if (!this.choices && !this.fault && !this.asking) this._ask();
    const running = Boolean(this.stand?.running);
    if (running) this._left();
    if (this.drawn === this.changes) return;
    this.drawn = this.changes;
    find("settings").hidden = !this.choices;
    find("unset").hidden = Boolean(this.choices);
    find("unset").textContent = this.fault ? `No training can be set here: ${this.fault}` : "Loading: whoever trains is asked what it can.";
    find("start").disabled = running || !this.about.orders;
    find("stop").disabled = !running || !this.about.orders;
    find("readonly").hidden = this.about.orders;
    this._stand();
  }

  async _ask() {
    this.asking = true;
    try {
      const told = await ask("/training");
      if (told.error) throw new Error(told.error);
      this.choices = told;
      this._fill();
    } catch (error) {
      this.fault = error.message;
    }
    this.asking = false;
    this.changes++;
    this.ondraw();
  }

  _fill() {
    const { images, batches, backends, memory, window, symbols } = this.choices;
    const options = (name, values) => find(`set-${name}`).replaceChildren(...values);
    options("image", images.map((pixels) => element("option", { value: pixels }, `${pixels} pixels`)));
    options("batch", batches.map((size) => element("option", { value: size }, String(size))));
    options("attention", backends.map(({ name, usable, training, why }) => {
      const reason = !usable ? `: not here, ${why}` : training ? `: ${why}` : ": cannot train";
      return element("option", { value: name, disabled: !usable || !training }, `${name}${reason}`);
    }));
    find("set-budget").value = memory.toFixed(1);
    find("set-symbols").placeholder = `all ${symbols.length}`;
    const fixed = [
      ["Timeframe", this.about.timeframe],
      ["Window", `${window} bars, as the timeframe wants`],
      ["Horizons", "those of the champion, with which the gate compares"],
      ["Diffusion steps", "are chosen when it forecasts: steps of [model]"],
    ];
    find("fixed").replaceChildren(...fixed.flatMap(([name, text]) => [element("dt", {}, name), element("dd", {}, text)]));
    this._estimate();
  }

  /** The settings of the form, as the daemon takes them. */
  _wanted() {
    const latent = find("set-kind").value === "ldm4ts";
    const symbols = find("set-symbols").value.split(",").map((name) => name.trim()).filter(Boolean);
    const wanted = { kind: find("set-kind").value, preset: find("set-preset").value, seed: find("set-seed").valueAsNumber };
    if (symbols.length) wanted.symbols = symbols;
    for (const name of ["steps", "rate"]) {
      const value = find(`set-${name}`).valueAsNumber;
      if (!Number.isNaN(value)) wanted[name] = value;
    }
    if (latent) {
      wanted.batch = Number(find("set-batch").value);
      wanted.image = Number(find("set-image").value);
      wanted.attention = find("set-attention").value;
      wanted.checkpoint_gradients = find("set-checkpoint_gradients").checked;
    }
    return wanted;
  }

  /** What the settings take, and the largest batch for the budget. */
  _estimate() {
    if (!this.choices) return;
    const wanted = this._wanted();
    const latent = wanted.kind === "ldm4ts";
    for (const name of LATENT) find(`set-${name}`).disabled = !latent;
    find("set-budget").disabled = !latent;
    const [told, most] = [find("memory"), find("largest")];
    if (!latent || wanted.preset !== "small") {
      told.textContent = "Known for ldm4ts of the preset small alone.";
      told.dataset.state = "unknown";
      most.textContent = "";
      return;
    }
    const alike = this.choices.usages.filter(
      (one) => one.image === wanted.image && one.attention === wanted.attention && one.checkpoint_gradients === wanted.checkpoint_gradients,
    );
    const usage = alike.find((one) => one.batch === wanted.batch);
    const { memory } = this.choices;
    const saved = usage.savings >= 0.5 ? `, ${usage.savings.toFixed(0)} % less than plain` : "";
    const fits = usage.needs <= memory;
    told.textContent = `${usage.gb.toFixed(2)} GB at the peak${saved}${fits ? "" : `: too much for the ${memory.toFixed(1)} GB there are`}`;
    told.dataset.value = usage.gb;
    told.dataset.state = fits ? (saved ? "good" : "plain") : "bad";
    const budget = find("set-budget").valueAsNumber;
    const largest = Math.max(0, ...alike.filter((one) => one.needs <= budget).map((one) => one.batch));
    most.textContent = Number.isNaN(budget) ? "" : largest ? `The largest batch for the budget: ${largest}` : "No batch fits into the budget";
    most.dataset.value = largest;
  }

  async _order(verb, body) {
    const said = find("ordered");
    said.textContent = "";
    try {
      const done = await order(verb, body(), { action: verb === "stop" ? "Stop" : "Start" });
      if (done !== null) said.textContent = `Done: ${done}.`;
      said.dataset.state = "done";
    } catch (error) {
      said.textContent = error.message;
      said.dataset.state = "refused";
    }
  }

  /** What it does, for how long, and how much longer at the pace of the try under way. */
  _left() {
    const { does, epochs, began } = this.stand;
    const [first, newest] = [epochs[0], epochs.at(-1)];
    const seconds = (nanoseconds) => nanoseconds / 1e9 / this.clock.speed;
    const steps = newest ? newest.done - first.done : 0;
    const left = does === "train" && steps > 0 ? (seconds(newest.at - first.at) * (newest.total - newest.done)) / steps : 0;
    const passed = Math.max(0, seconds(this.clock.now() * 1e6 - began));
    const text = `${DOES[does] ?? "Begins"}; under way for ${span(passed)}${left > 0 ? `, about ${span(left)} of learning left` : ""}`;
    if (find("left").textContent !== text) find("left").textContent = text;
  }

  _stand() {
    const box = find("stand");
    const { running = false, reasons, began, ended, result, epochs = [], lines = [] } = this.stand ?? {};
    const bar = find("progress");
    bar.hidden = !running;
    find("left").hidden = !running;
    if (!reasons) {
      box.replaceChildren(quiet("No training since the daemon started."));
      find("lines").hidden = true;
      return;
    }
    const newest = epochs.at(-1);
    if (newest) [bar.max, bar.value] = [newest.total, newest.done];
    else bar.removeAttribute("value");
    const verdict = lines.findLast((line) => line.startsWith("challenger "));
    const said = [element("p", {}, `Begun ${utc(began / 1e6)}: ${reasons.join("; ")}`)];
    if (!running) said.unshift(element("p", { className: "result" }, `${RESULTS[result]} ${utc(ended / 1e6)}`));
    if (verdict) said.push(element("p", { id: "verdict" }, `The gate: ${verdict}`));
    if (epochs.length) said.push(...curve(epochs), this._epochs(epochs));
    box.replaceChildren(...said);
    const [pre, text] = [find("lines"), lines.join("\n")];
    pre.hidden = !lines.length;
    if (pre.textContent !== text) pre.textContent = text;
  }

  _epochs(epochs) {
    const rows = epochs.slice(-EPOCHS).toReversed().map(({ phase, step, steps, loss, crps, done, total }) => [
      element("th", { scope: "row" }, phase), `${step} of ${steps}`,
      loss === null ? "–" : number(loss, loss.toPrecision(4)), crps === null ? "–" : number(crps, crps.toPrecision(4)),
      number(done / total, percent(done / total, 0)),
    ]);
    return table(["Phase", "Step", "Loss", "On unseen bars", "Done"], rows);
  }
}

const SVG = "http://www.w3.org/2000/svg";

/** How the score on unseen bars went in the phase under way; nothing of one look. */
function curve(epochs) {
  const { phase } = epochs.at(-1);
  const own = epochs.filter((one) => one.phase === phase && one.crps !== null);
  if (own.length < 2) return [];
  const [low, high] = [Math.min(...own.map((one) => one.crps)), Math.max(...own.map((one) => one.crps))];
  const made = document.createElementNS(SVG, "svg");
  made.setAttribute("viewBox", "0 0 300 60");
  made.setAttribute("role", "img");
  made.setAttribute("aria-label", `Score on unseen bars in the phase ${phase}: from ${own[0].crps.toPrecision(4)} to ${own.at(-1).crps.toPrecision(4)}`);
  const line = document.createElementNS(SVG, "polyline");
  const x = (one) => 5 + (290 * one.step) / Math.max(1, one.steps);
  const y = (one) => 55 - (50 * (one.crps - low)) / (high - low || 1);
  line.setAttribute("points", own.map((one) => `${x(one).toFixed(1)},${y(one).toFixed(1)}`).join(" "));
  made.append(line);
  return [made];
}
