// The connection to the daemon: what it tells goes to the parts of the page, and so does that it is silent.

import { Backtests } from "./backtests.mjs";
import { Chart } from "./chart.mjs";
import { Market } from "./market.mjs";
import { Training } from "./training.mjs";
import { Trust } from "./trust.mjs";
import { ask } from "./ask.mjs";
import { utc } from "./format.mjs";

const SILENT_MS = 12000; // the daemon says something every five seconds
const STATE_MS = 120000; // what it says first may be long, and the line slow
const AGAIN_MS = 2000;
const WRONG = {
  leading: "another instance serves, this one stands by",
  recovered: "it is still reading its journal",
  serving: "it is not serving",
  connected: "no connection to the broker",
  hearing: "the broker delivers no bars",
  moving: "the path stands still",
  journal: "the journal cannot be written",
  model: "no model serves",
};

const find = (id) => document.getElementById(id);

/** The instance's clock, which may run faster than ours: milliseconds since 1970. */
const clock = {
  told: 0, at: 0, speed: 1,
  now() { return this.told ? this.told + (performance.now() - this.at) * this.speed : 0; },
  set(text) { [this.told, this.at] = [Date.parse(text), performance.now()]; },
};

const chart = new Chart(clock);
const market = new Market(clock, chart);
const trust = new Trust();
const training = new Training(clock);
const backtests = new Backtests();
const parts = [market, trust, training, backtests];

let source = null;
let again = 0;
let heard = 0;
let patience = 0;
let lost = null;
let serving = true;
let due = false;
let drawn = 0;

function draw() {
  if (due) return;
  due = true;
  requestAnimationFrame(() => {
    [due, drawn] = [false, performance.now()];
    for (const part of parts) part.draw();
  });
}

function hear() {
  [heard, patience] = [performance.now(), SILENT_MS];
  if (lost === null) return;
  lost = null;
  document.body.classList.remove("lost");
  find("alert").hidden = true;
}

/** Say that nothing is heard, since when, and why. */
function lose(why) {
  lost ??= Date.now();
  document.body.classList.add("lost");
  tell("lost", "Disconnected");
  const text =
    `Not connected since ${utc(lost)}, by this machine's clock: ${why}. ` +
    `${clock.told ? "What is shown is from before. " : ""}It is tried again every two seconds.`;
  if (find("alert").textContent !== text) find("alert").textContent = text;
  find("alert").hidden = false;
}

/** Why there are no events, which a browser does not tell. */
async function explain() {
  try {
    await ask("/events", "HEAD");
    return "the connection broke";
  } catch (error) {
    return error.message;
  }
}

function tell(state, text) {
  const link = find("link");
  if (link.textContent !== text) link.textContent = text;
  link.dataset.state = state;
}

function begin(state) {
  const { about } = state;
  clock.speed = about.speed;
  find("instance").textContent = `${about.instance}, ${about.timeframe} bars`;
  find("version").textContent =
    `Barcast ${about.version}; times are UTC${about.speed === 1 ? "" : `, by a clock that runs ${Number(about.speed.toPrecision(6))} times as fast`}`;
  document.title = `Barcast ${about.instance}`;
  chart.about(about);
  for (const part of parts) part.begin(state);
}

function connect() {
  leave();
  [heard, patience] = [performance.now(), SILENT_MS];
  const own = (source = new EventSource("/events"));
  own.addEventListener("open", () => { patience = STATE_MS; });
  const on = (name, take) =>
    own.addEventListener(name, (event) => {
      hear();
      take(JSON.parse(event.data));
      draw();
    });
  on("state", begin);
  on("training", (stand) => { for (const part of [training, trust]) part.stands(stand); });
  on("group", (update) => { for (const part of parts) part.update(update); });
  on("beat", (beat) => {
    clock.set(beat.now);
    serve(!beat.not.includes("serving"));
    if (beat.not.length) tell("ill", `Not ready: ${beat.not.map((name) => WRONG[name] ?? name).join("; ")}`);
    else if (beat.paused) tell("ill", "Paused: nothing is forecast");
    else tell("live", "Live");
  });
  own.addEventListener("error", async () => {
    own.close();
    if (lost === null) lose("the connection broke");
    const why = await explain();
    if (source !== own) return;
    lose(why);
    again = setTimeout(connect, AGAIN_MS);
  });
}

function leave() {
  clearTimeout(again);
  source?.close();
  source = null;
}

/** Before it serves the daemon has read neither bars nor models. */
function serve(serves) {
  if (serves === serving) return;
  serving = serves;
  for (const part of parts) part.serve(serves);
}

/** The part and the symbol that the address names. */
function named() {
  const text = location.hash.slice(1);
  try {
    return decodeURIComponent(text).split("/");
  } catch {
    return text.split("/"); // it is not encoded as it should be
  }
}

function show() {
  const [part, symbol] = named();
  const links = [...document.querySelectorAll("nav a")];
  const chosen = links.some((link) => link.hash === `#${part}`) ? part : "market";
  for (const link of links) {
    const name = link.hash.slice(1);
    find(name).hidden = name !== chosen;
    if (name === chosen) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (symbol && chosen === "market") market.choose(symbol);
  draw();
}

addEventListener("hashchange", show);
// A browser opens six connections to a host at most, for all tabs: one that nobody sees takes none.
document.addEventListener("visibilitychange", () => (document.hidden ? leave() : connect()));
setInterval(() => {
  if (document.hidden) return;
  if (performance.now() - heard > patience) {
    lose("the daemon says nothing");
    connect();
  }
  find("now").textContent = clock.told ? utc(Math.floor(clock.now() / 1000) * 1000) : "";
  if (performance.now() - drawn > 500) draw(); // what grows old, where nothing new has been drawn
}, 1000);
for (const part of parts) part.ondraw = draw;
if (!document.hidden) connect();
show();
