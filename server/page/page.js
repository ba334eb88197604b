// The live page: one series route for what was, one stream of events for what happens.

import { Acts } from "./act.js";
import { about, admin, chosen, follow, key, onKeys, Problem, request, setKeys } from "./api.js";
import { prepareAsking } from "./ask.js";
import { LearningCharts, ServingCharts } from "./charts.js";
import { $, duration, durations, el, number, percent, say } from "./dom.js";
import { Review } from "./review.js";
import { Timeline } from "./timeline.js";

const MODES = {
  learning: "learning",
  paused: "paused",
  off: "off",
  waiting: "waiting",
  absent: "no worker",
  degraded: "degraded",
};
const CONNECTION = { live: "live", lost: "reconnecting…", locked: "a key is needed", missing: "no such adapter" };
const ROWS = 20;

const axis = () => document.querySelector("input[name=axis]:checked").value;
const learning = new LearningCharts($("charts"), axis);
const serving = new ServingCharts($("serving"));
const timeline = new Timeline($("marks"), $("no-marks"));
const acts = new Acts(timeline);
const review = new Review();
timeline.rollback = (version) => acts.begin("rollback", version);
let status = null; // the last word on how things stand
let complete = false; // whether the history was read
let newest = "0-0"; // id of the last event that is shown

// --- what was, and what happens --------------------------------------------------------------------

/** Read what happened so far; the id of the last event. */
async function load() {
  const info = await request("info");
  const adapter = chosen || info.adapter;
  say($("what"), `${adapter} · ${info.model}`);
  document.title = `${adapter} · servetune`;
  acts.adapter = timeline.adapter = review.adapter = adapter;
  review.unlock();
  showAdapters(adapter).catch(() => {}); // without them one sees this one
  try {
    const series = await request(about("v1/adaptation/series?limit=5000"));
    learning.clear();
    timeline.clear();
    learning.load(series.columns);
    for (const event of series.marks) {
      learning.event(event);
      timeline.add(event);
      if (event.kind === "verdict") showVerdict(event.data);
    }
    complete = true;
    showSteps();
    newest = series.last_event_id ?? "0-0";
    return newest;
  } catch (error) {
    if (!(error instanceof Problem) || error.code !== "buffer_unavailable") throw error;
    complete = false; // Redis is down: how things stand is told all the same
    return "";
  }
}

/** Whether an event came after what is shown: the history may have been read while it was under way. */
function isNews(id) {
  const [[time, count], [shownTime, shownCount]] = [id, newest].map((each) => each.split("-").map(Number));
  return time > shownTime || (time === shownTime && count > shownCount);
}

function onEvent(event) {
  if (event.id && !isNews(event.id)) return;
  newest = event.id ?? newest;
  if (event.kind === "status") {
    status = event.data;
    serving.add(event.time, status);
    acts.see(status);
    timeline.serving = status.serving;
    showStatus();
    if (!complete && status.buffer.connected) load().catch(() => {});
  } else if (event.kind === "step") {
    if (!("failed" in event.data)) learning.step(event.data, event.time);
    showSteps();
  } else {
    learning.event(event);
    timeline.add(event);
    if (event.kind === "verdict") showVerdict(event.data);
  }
}

function onState(state) {
  const connection = $("connection");
  connection.dataset.state = state;
  say(connection, CONNECTION[state]);
  document.body.classList.toggle("stale", state !== "live");
  if (state === "locked" && !$("keys").open) askKeys($("user-key"));
}

// --- how things stand ------------------------------------------------------------------------------

function vital(name, value, state) {
  const found = $("vitals").querySelector(`[data-vital="${name}"]`);
  const shown = found ?? $("vitals").appendChild(el("div", { "data-vital": name }, el("dt", {}, name), el("dd")));
  shown.dataset.state = state ?? "";
  say(shown.lastChild, value);
}

function showStatus() {
  const { buffer, requests, worker } = status;
  const entries = buffer.waiting + buffer.pending;
  const kept = buffer.connected ? `${number(entries)} · ${percent(entries / buffer.capacity)}` : "unreachable";
  vital("Serving", status.serving);
  showAge();
  vital("Mode", (status.mode === "waiting" && worker.note) || MODES[status.mode], status.mode);
  vital("Lag", status.lag_versions === 1 ? "1 version" : `${status.lag_versions} versions`, status.lag_versions ? "degraded" : "");
  vital("Steps", number(worker.steps));
  vital("Queue", number(requests.waiting));
  vital("Buffer", kept, buffer.connected ? "" : "degraded");
  vital("Answers", `${number(requests.per_s)}/s`);
  const said = buffer.feedback?.[status.serving];
  if (said) vital("Feedback", `${number(said.correct)} right · ${number(said.incorrect)} wrong`);
  vital("p50 · p95", durations(requests.p50_s ?? NaN, requests.p95_s ?? NaN));
  if (!complete && status.last_verdict) showVerdict(status.last_verdict);
}

function showAge() {
  if (status?.created) vital("Age", duration(Date.now() / 1000 - status.created));
}

function showVerdict(verdict) {
  const word = verdict.accepted ? "accepted" : verdict.early ? "waits" : "refused";
  const reasons = verdict.reasons.length ? verdict.reasons.join("; ") : `KL to live ${number(verdict.metrics.kl_step)} nats, valid answers ${percent(verdict.metrics.valid)} of the base's`;
  $("verdict").replaceChildren("The gate's last verdict: ", el("strong", { "data-verdict": word }, word), `. ${reasons}.`);
}

function showSteps() {
  $("empty").hidden = !learning.empty;
  $("numbers").hidden = $("legend").hidden = learning.empty;
  if ($("numbers").open) showNumbers();
}

function showNumbers() {
  const [head, rows] = learning.table(ROWS);
  $("numbers").querySelector("table").replaceChildren(
    el("thead", {}, el("tr", {}, head.map((name) => el("th", { scope: "col" }, name)))),
    el("tbody", {}, rows.map((row) => el("tr", {}, row.map((value) => el("td", {}, value))))));
}

// --- other adapters --------------------------------------------------------------------------------

/** A choice of all adapters, for whoever may list them and where there are several. */
async function showAdapters(shown) {
  const which = $("which");
  which.hidden = true;
  if (!key("admin")) return;
  const { data } = await admin("v1/adapters?limit=200");
  const names = data.map((each) => each.name);
  which.replaceChildren(...names.map((name) => el("option", { value: name }, name)));
  which.value = shown;
  which.hidden = names.length < 2;
}

$("which").addEventListener("change", () => {
  location.search = new URLSearchParams({ adapter: $("which").value });
});

// --- keys ------------------------------------------------------------------------------------------

function askKeys(first) {
  $("user-key").value = key("user");
  $("admin-key").value = key("admin");
  $("keys").showModal();
  first.focus();
}

$("keys").addEventListener("close", () => {
  if ($("keys").returnValue === "save") setKeys({ user: $("user-key").value, admin: $("admin-key").value });
  $("user-key").value = $("admin-key").value = "";
  $("keys").returnValue = "";
});
$("open-keys").addEventListener("click", () => askKeys($("user-key")));
$("unlock").addEventListener("click", () => askKeys($("admin-key")));
onKeys(() => {
  acts.unlock();
  review.unlock();
  showAdapters(acts.adapter).catch(() => {});
});

// --- the rest --------------------------------------------------------------------------------------

$("axis").addEventListener("change", () => learning.soon());
$("numbers").addEventListener("toggle", showNumbers);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  learning.forget();
  serving.forget();
});
setInterval(showAge, 1000);
prepareAsking();
acts.unlock();
showSteps();
follow(load, onEvent, onState);
