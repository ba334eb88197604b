// Is it helping me? Two versions answer recent queries, and a person says, without knowing whose it is, which is right.

import { admin, key, Problem } from "./api.js";
import { $, el, number, percent } from "./dom.js";

const CHOICES = { 1: "first", 2: "second", 3: "both", 4: "neither" };
const AGAIN = 1000; // milliseconds, where others need the model

export class Review {
  constructor() {
    this.adapter = "default";
    this.run = 0; // counts starts: what an earlier one still waits for is dropped
    this.pair = null;
    $("review-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.start();
    });
    for (const button of document.querySelectorAll("[data-choice]")) {
      button.addEventListener("click", () => this.judge(button.dataset.choice));
    }
    $("review").addEventListener("keydown", (event) => {
      const isTyped = event.ctrlKey || event.altKey || event.metaKey || event.target.closest("select");
      if (this.pair && !isTyped && CHOICES[event.key]) this.judge(CHOICES[event.key]);
    });
  }

  get line() {
    return `v1/adapters/${encodeURIComponent(this.adapter)}`;
  }

  /** Show what the key that was given allows. */
  async unlock() {
    let names = null;
    if (key("admin")) {
      try {
        names = (await admin(`${this.line}/versions?limit=100`)).data.map((each) => each.version);
      } catch { /* a wrong key: it stays locked */ }
    }
    $("reviewing").hidden = !names;
    $("review-locked").hidden = Boolean(names);
    if (!names) return;
    $("review-old").replaceChildren(...["base", ...names].map(option));
    $("review-new").replaceChildren(...["live", ...names].map(option));
  }

  async start() {
    this.run += 1;
    this.show(null);
    try {
      const report = await admin(`${this.line}/review?${this.asked($("review-old").value, $("review-new").value)}`);
      this.versions = this.asked(report.old, report.new); // `live` may move on meanwhile
      this.names = { old: report.old, new: report.new };
      this.tell(report);
      if (!report.kept) this.say("No queries are kept to compare on: the server's setting review_queries says how many.");
      else await this.next(this.run);
    } catch (error) {
      this.fail(error);
    }
  }

  asked(old, other) {
    return new URLSearchParams({ old, new: other });
  }

  /** Show the next pair, once it is found. */
  async next(run) {
    this.show(null);
    for (;;) {
      let found;
      try {
        found = await admin(`${this.line}/review/pair?${this.versions}`);
      } catch (error) {
        if (!(error instanceof Problem) || error.code !== "queue_full") throw error;
        this.say("Others need the model; this waits for them.");
        await new Promise((resolve) => setTimeout(resolve, AGAIN));
      }
      if (run !== this.run) return;
      if (found?.pair) return this.show(found.pair);
      if (found && !found.left) break;
      if (found) this.say(`Comparing: ${number(found.left)} queries are left.`);
    }
    this.say("All recent queries are compared, and all that differ are judged.");
    $("review-result").open = true;
  }

  show(pair) {
    this.pair = pair;
    $("pair").hidden = !pair;
    if (!pair) return;
    $("pair-images").replaceChildren(...pair.images.map((src, place) => el("img", { src, alt: `Image ${place + 1} of the query` })));
    $("pair-question").textContent = pair.labels.length ? `${pair.question} (of ${pair.labels.length} labels)` : pair.question;
    for (const choice of ["first", "second"]) {
      document.querySelector(`[data-choice=${choice}] span`).textContent = pair[choice] ?? "no answer";
    }
    this.say("");
    $("pair").focus();
  }

  async judge(choice) {
    const { pair, run } = this;
    if (!pair) return;
    this.show(null);
    try {
      const body = { id: pair.id, choice, ...this.names };
      const report = await admin(`${this.line}/review/judge`, { method: "POST", body }).catch((error) => {
        if (error.code !== "pair_not_found") throw error; // its query was erased or is too old
      });
      if (report) this.tell(report);
      await this.next(run);
    } catch (error) {
      this.fail(error);
    }
  }

  /** Say what was found out so far. */
  tell(report) {
    $("review-result").hidden = false;
    const counts = `${number(report.compared)} queries compared, ${number(report.different)} answered differently, ${number(report.judged)} of these judged: `
      + `only ${report.new} right in ${number(report.only_new)}, only ${report.old} in ${number(report.only_old)}, both in ${number(report.both)}, neither in ${number(report.neither)}.`;
    const place = $("review-result").querySelector("div");
    if (report.gain === null) {
      place.replaceChildren(el("p", {}, counts));
      return;
    }
    const [word, helps] = report.low > 0 ? ["It helps", "yes"] : report.high < 0 ? ["It does harm", "no"] : ["It cannot be told yet", ""];
    place.replaceChildren(
      el("p", { className: "said", "data-helps": helps }, `${word}: ${signed(report.gain)}`),
      el("p", {}, `${report.new} is right in that many more of the compared queries than ${report.old}; the 95 % interval is ${signed(report.low)} to ${signed(report.high)}.`),
      el("p", { className: "fine" }, counts));
  }

  fail(error) {
    this.say(error instanceof Problem ? error.message : "The server cannot be reached.");
  }

  say(text) {
    $("review-told").textContent = text;
  }
}

const option = (name) => el("option", { value: name }, name);
const signed = (share) => (share === 0 ? percent(0) : share < 0 ? `−${percent(-share)}` : `+${percent(share)}`);

/** What two versions differ in, as elements: numbers, and recent queries that they answer differently. */
export async function versus(line, old, other, most = 20) {
  let found = null;
  let after = null;
  do {
    const asked = new URLSearchParams({ old, new: other, images: "true", limit: String(most - (found?.answers.length ?? 0)) });
    if (after) asked.set("after", after);
    const page = await admin(`${line}/diff?${asked}`);
    found = found ? { ...page, answers: [...found.answers, ...page.answers], compared: found.compared + page.compared } : page;
    after = page.next_after;
  } while (after);
  const tables = [["Manifest", found.facts], ["Steps", found.metrics], ["Gate", found.gate]].map(([title, changes]) => changesTable(title, changes, found));
  const answers = found.answers.map((each) => el("li", {}, el("div", {}, each.images.map((src) => el("img", { src, alt: "" }))),
    el("p", {}, each.question, el("br"), el("small", {}, `${found.old}: `), each.old ?? "no answer", el("br"), el("small", {}, `${found.new}: `), each.new ?? "no answer")));
  const compared = found.compared ? `${number(answers.length)} of ${number(found.compared)} recent queries are answered differently.`
    : "No recent queries are kept to compare answers on.";
  return [...tables.filter(Boolean), el("p", { className: "fine" }, compared), answers.length ? el("ul", { className: "changed" }, answers) : null].filter(Boolean);
}

function changesTable(title, changes, { old, new: other }) {
  const names = Object.keys(changes);
  if (!names.length) return null;
  const shown = (value) => (typeof value === "number" ? number(value) : value === null ? "–" : String(value));
  return el("table", {}, el("caption", {}, title),
    el("thead", {}, el("tr", {}, el("td"), el("th", { scope: "col" }, old), el("th", { scope: "col" }, other))),
    el("tbody", {}, names.map((name) => el("tr", {}, el("th", { scope: "row" }, name.replaceAll("_", " ")),
      el("td", { className: "wrap" }, shown(changes[name].old)), el("td", { className: "wrap" }, shown(changes[name].new))))));
}
