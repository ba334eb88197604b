// What became of the versions, newest first; each opens what is known of it.

import { admin, key, Problem } from "./api.js";
import { $, duration, el, moment, number } from "./dom.js";
import { versus } from "./review.js";

const MOST = 200;
const ENDS_IN_SWAP = new Set(["publish", "promote", "rollback", "reset"]);

/** What an event is called, and what else is said of it. */
function words({ kind, data }) {
  const by = data.by === "worker" ? "by the worker" : "by an operator";
  switch (kind) {
    case "publish": return [`${data.version} published${data.alias ? ` as ${data.alias}` : ""}`, `${data.num_queries} queries, from ${data.parent ?? "the base"}`];
    case "swap": return data.refused ? [`${data.version} not served`, data.refused] : [`${data.version} served`, `after ${data.previous}`];
    case "snapshot": return [`${data.version} kept`, `snapshot “${data.label}”`];
    case "promote": return [`${data.version} promoted`, by];
    case "rollback": return [`rolled back to ${data.version}`, [by, ...(data.reasons ?? [])].join("; ")];
    case "reset": return [`reset: ${data.version}`, by];
    case "pause": return ["learning paused", by];
    case "resume": return ["learning resumed", by];
    case "import": return [`${data.version} imported`, `${by}; not live until it is promoted`];
    case "probes": return [data.num_probes ? `${data.num_probes} probes uploaded` : "probes removed", by];
    case "settings": return ["settings changed", [data.mode && `mode ${data.mode}`, by].filter(Boolean).join("; ")];
    case "dismiss": return [`${data.version} is no candidate`, data.reasons.join("; ")];
    case "pin": return [`${data.version} pinned`, `its weights stay; ${by}`];
    case "unpin": return [`${data.version} unpinned`, by];
    case "retire": return ["weights deleted", `of ${data.versions.join(", ")}; the manifests stay`];
    case "erase": return ["queries erased", `${data.dropped?.length ?? 0} versions dropped`];
    case "verdict": return ["candidate refused", data.reasons.join("; ")];
    default: return [kind, ""];
  }
}

export class Timeline {
  constructor(list, empty) {
    this.list = list;
    this.emptiness = empty;
    this.adapter = "default";
    this.serving = null;
    this.rollback = () => {}; // what moves `live` back to a version
    this.clear();
  }

  clear() {
    this.list.replaceChildren();
    this.versions = new Map(); // what publications told, by version
    this.newest = null;
    this.emptiness.hidden = false;
  }

  add(event) {
    const { kind, data } = event;
    if (kind === "verdict" && (data.accepted || data.early)) return; // a publication follows, or another verdict
    if (kind === "publish") this.versions.set(data.version, data);
    if (kind === "swap" && !data.refused && this.newest?.data.version === data.version && ENDS_IN_SWAP.has(this.newest.kind)) {
      this.list.firstChild.querySelector(".more").append(`; served ${duration(event.time - this.newest.time)} later`);
      this.newest = null;
      return;
    }
    const [title, more] = words(event);
    const open = el("button", { type: "button" }, el("span", { className: "title" }, title), el("span", { className: "more" }, more),
      el("time", { datetime: new Date(1000 * event.time).toISOString() }, moment(event.time)));
    open.addEventListener("click", () => this.show(event, title));
    this.list.prepend(el("li", { "data-kind": kind, "data-by": data.by }, open));
    if (this.list.children.length > MOST) this.list.lastChild.remove();
    this.newest = event;
    this.emptiness.hidden = true;
  }

  /** Open what is known of an event and, where it is about a version, of that. */
  async show(event, title) {
    const { reasons, version, metrics } = event.data;
    const told = [facts({ Time: moment(event.time), Why: reasons?.join("; ") })];
    if (event.kind === "verdict") told.push(difference("Gate", metrics, {}, "candidate", null));
    const body = el("div", {}, ...told); // what is asked for may come when another event is open
    $("detail-title").textContent = title;
    $("detail-body").replaceChildren(body);
    $("detail").showModal();
    if (version) body.append(...(await this.describe(version)).filter(Boolean));
    if (version && key("admin")) body.append(...(await this.choice(version)));
  }

  /** Offers to lay another version beside one. */
  async choice(version) {
    const { data } = await admin(`${this.line}/versions?limit=100`).catch(() => ({ data: [] }));
    const others = data.map((each) => each.version).filter((each) => each !== version);
    if (!others.length) return [];
    const other = el("select", { id: "versus-other" }, others.map((each) => el("option", { value: each }, each)));
    if (others.includes(this.serving)) other.value = this.serving;
    const place = el("div", { id: "versus-result" });
    const told = el("p", { className: "fine", role: "status" });
    const form = el("form", { id: "versus", className: "row" }, el("label", { className: "inline" }, "Compare with ", other),
      el("button", { type: "submit", className: "quiet" }, "Compare"));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.compare(version, other.value, place, told);
    });
    return [form, told, place];
  }

  async compare(version, other, place, told) {
    told.textContent = "Comparing…";
    place.replaceChildren();
    try {
      const [old, newer] = [version, other].sort();
      const back = el("button", { type: "button", id: "versus-back" }, `Roll back to ${old}…`);
      back.addEventListener("click", () => {
        $("detail").close();
        this.rollback(old);
      });
      const found = await versus(this.line, old, newer);
      place.replaceChildren(...found, ...(old === this.serving ? [] : [back]));
      told.textContent = `${old} and ${newer}:`;
    } catch (error) {
      told.textContent = error instanceof Problem ? error.message : "The server cannot be reached.";
    }
  }

  get line() {
    return `v1/adapters/${encodeURIComponent(this.adapter)}`;
  }

  async describe(version) {
    const made = await this.about(version);
    if (!made) return [el("p", { className: "notice" }, "More is known with the admin key.")];
    const other = made.parent && made.parent !== version ? made.parent : null;
    const before = (other && (await this.about(other))) || {};
    const manifest = made.origin
      ? el("details", {}, el("summary", {}, "Manifest"), el("pre", { tabindex: "0" }, JSON.stringify(made, null, 2)))
      : el("p", { className: "notice" }, "The manifest is shown with the admin key.");
    return [
      facts({ Parent: made.parent, Queries: made.num_queries, Steps: made.step_range?.join(" to "), Origin: made.origin,
        Label: made.label, Weights: made.retired ? "deleted" : made.pinned ? "pinned" : null, Rank: made.rank, Temperature: made.temperature, Digest: made.digest }),
      difference("Steps", made.metrics, before.metrics, version, other),
      difference("Gate", gate(made), gate(before), version, other),
      manifest,
    ];
  }

  /** The manifest with the admin key, else what its publication told. */
  async about(version) {
    if (key("admin")) {
      try {
        return await admin(`${this.line}/versions/${encodeURIComponent(version)}`);
      } catch { /* a wrong key, or a version that is gone: what was told is left */ }
    }
    return this.versions.get(version) ?? null;
  }
}

const gate = (made) => made.gate?.metrics ?? made.gate ?? {};

function facts(known) {
  const given = Object.entries(known).filter(([, value]) => value !== null && value !== undefined && value !== "");
  return el("dl", { className: "facts" }, given.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, String(value)))));
}

/** A table of numbers beside those of another version. */
function difference(title, ours, theirs, name, other) {
  const names = Object.keys(ours ?? {}).filter((each) => Number.isFinite(ours[each])).sort();
  if (!names.length) return null;
  const head = ["", name, ...(other ? [other, "change"] : [])];
  const row = (each) => {
    const [now, then] = [ours[each], theirs?.[each]];
    const change = Number.isFinite(then) ? (now > then ? "+" : "") + number(now - then) : "–";
    return el("tr", {}, el("th", { scope: "row" }, each.replaceAll("_", " ")), el("td", {}, number(now)),
      other ? el("td", {}, number(then)) : null, other ? el("td", {}, change) : null);
  };
  return el("table", {}, el("caption", {}, title), el("thead", {}, el("tr", {}, head.map((each) => el(each ? "th" : "td", each ? { scope: "col" } : {}, each)))),
    el("tbody", {}, names.map(row)));
}
