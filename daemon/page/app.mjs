// The connection to the daemon: what it tells goes to the parts of the page, and so does that it is silent.

import { Chart } from "./chart.mjs";
import { Market } from "./market.mjs";
import { Trust } from "./trust.mjs";
import { utc } from "./format.mjs";

const SILENT_MS = 12000; // the daemon says something every five seconds
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
const parts = [market, trust];

let source = null;
let heard = 0;
let lost = null;
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
  heard = performance.now();
  if (lost === null) return;
  lost = null;
  document.body.classList.remove("lost");
  find("alert").hidden = true;
}

function lose() {
  if (lost !== null) return;
  lost = Date.now();
  document.body.classList.add("lost");
  tell("lost", "Disconnected");
  find("alert").textContent =
    `No connection to the daemon since ${utc(lost)}, by this machine's clock. ` +
    "What is shown is from before; it is asked again every two seconds.";
  find("alert").hidden = false;
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
    `Barcast ${about.version}; times are UTC${about.speed === 1 ? "" : `, by a clock that runs ${about.speed} times as fast`}`;
  document.title = `Barcast ${about.instance}`;
  chart.about(about);
  for (const part of parts) part.begin(state);
}

function connect() {
  source?.close();
  heard = performance.now();
  source = new EventSource("/events");
  const on = (name, take) =>
    source.addEventListener(name, (event) => {
      hear();
      take(JSON.parse(event.data));
      draw();
    });
  on("state", begin);
  on("group", (update) => { for (const part of parts) part.update(update); });
  on("beat", (beat) => {
    clock.set(beat.now);
    if (beat.not.length) tell("ill", `Not ready: ${beat.not.map((name) => WRONG[name] ?? name).join("; ")}`);
    else if (beat.paused) tell("ill", "Paused: nothing is forecast");
    else tell("live", "Live");
  });
  source.addEventListener("error", () => {
    lose();
    source.close();
    setTimeout(connect, AGAIN_MS);
  });
}

function show() {
  const [part, symbol] = decodeURIComponent(location.hash.slice(1)).split("/");
  const chosen = part === "trust" ? "trust" : "market";
  for (const link of document.querySelectorAll("nav a")) {
    const name = link.hash.slice(1);
    find(name).hidden = name !== chosen;
    if (name === chosen) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (symbol) market.choose(symbol);
  draw();
}

addEventListener("hashchange", show);
setInterval(() => {
  if (lost === null && performance.now() - heard > SILENT_MS) {
    lose();
    connect();
  }
  find("now").textContent = clock.told ? utc(Math.floor(clock.now() / 1000) * 1000) : "";
  if (performance.now() - drawn > 500) draw(); // what grows old, where nothing new has been drawn
}, 1000);
market.ondraw = draw;
show();
connect();
