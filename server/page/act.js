// What an operator may do: each act is confirmed, and what can be taken back is offered to be.

import { about, admin, key, Problem } from "./api.js";
import { $, el, moment } from "./dom.js";

const NAME = "[a-z0-9][a-z0-9._\\-]{0,63}";

export class Acts {
  constructor(timeline) {
    this.timeline = timeline;
    this.adapter = "default";
    this.paused = null;
    for (const button of document.querySelectorAll("[data-act]")) {
      button.addEventListener("click", () => this.begin(button.dataset.act));
    }
  }

  get line() {
    return `v1/adapters/${encodeURIComponent(this.adapter)}`;
  }

  /** Show what the key that was given allows. */
  async unlock() {
    let allowed = false;
    let why = null;
    if (key("admin")) {
      try {
        const status = await admin(about("v1/adaptation"));
        this.see({ mode: status.paused ? "paused" : "" });
        allowed = true;
      } catch (error) {
        why = error instanceof Problem && error.status === 404 ? "This server has no admin key." : "That admin key is not this server's.";
        if (!(error instanceof Problem)) why = "The server cannot be reached.";
      }
    }
    $("acts").hidden = !allowed;
    $("act-locked").hidden = allowed;
    this.tell(why ?? "");
  }

  see({ mode }) {
    if (mode !== "degraded") this.pausedIs(mode === "paused");
  }

  pausedIs(paused) {
    this.paused = paused;
    document.querySelector("[data-act=pause]").hidden = paused;
    document.querySelector("[data-act=resume]").hidden = !paused;
  }

  async begin(name, ...given) {
    try {
      await this[name](...given);
    } catch (error) {
      this.tell(error instanceof Problem ? error.message : "The server cannot be reached.");
    }
  }

  // --- the acts -----------------------------------------------------------------------------------

  async pause() {
    if (!(await confirmed("Pause learning?", "Questions go on being answered and kept; nothing is learned until it is resumed.", "Pause"))) return;
    await this.setPaused(true);
    this.tell("Learning is paused.", () => this.setPaused(false).then(() => "Learning goes on."));
  }

  async resume() {
    if (!(await confirmed("Resume learning?", "The worker goes on with the queries that wait.", "Resume"))) return;
    await this.setPaused(false);
    this.tell("Learning goes on.", () => this.setPaused(true).then(() => "Learning is paused."));
  }

  async snapshot() {
    const label = el("input", { type: "text", required: true, pattern: NAME, autocomplete: "off", placeholder: "before-fair" });
    if (!(await confirmed("Keep what is live?", "It becomes a version of its own, under a name. What is served does not change.", "Keep",
      field("Name", label, "lower-case letters, digits, . _ -")))) return;
    const made = await admin(`${this.line}/snapshot`, { method: "POST", body: { label: label.value } });
    this.tell(`Kept as ${made.version}, “${made.label}”.`);
  }

  /** Pin a version, or unpin one that is: the choice says which are. */
  async pin() {
    const choice = await this.versions();
    if (!(await confirmed("Pin a version?", "Its weights stay, however many versions come after it. One that is pinned already is unpinned.", "Pin or unpin", field("Version", choice)))) return;
    const pinned = choice.selectedOptions[0].dataset.pinned === "true";
    const said = await this.setPinned(choice.value, !pinned);
    this.tell(said, () => this.setPinned(choice.value, pinned));
  }

  async promote() {
    const [before, choice] = await Promise.all([admin(this.line), this.versions()]);
    if (!(await confirmed("Serve another version?", `${before.live} is live now. The version it leaves becomes last-good.`, "Promote", field("Version", choice)))) return;
    const after = await admin(`${this.line}/promote`, { method: "POST", body: { version: choice.value }, headers: ifStill(before) });
    this.moved(`${after.live} is live.`, before.live, after.generation);
  }

  async rollback(to) {
    const [before, choice] = await Promise.all([admin(this.line), this.versions("last-good")]);
    if (to) choice.value = to;
    if (!(await confirmed("Roll back?", `${before.live} is live now. Learning goes on from the version that is chosen.`, "Roll back", field("To", choice)))) return;
    const after = await admin(`${this.line}/rollback`, { method: "POST", body: { to: choice.value } });
    this.moved(`Rolled back to ${after.live}.`, before.live, after.generation);
  }

  async reset() {
    const before = await admin(this.line);
    const purge = el("input", { type: "checkbox" });
    const field = el("label", { className: "check" }, purge, " also erase the queries that wait; this cannot be undone");
    if (!(await confirmed("Unlearn everything?", `The base is published as a new version and made live in place of ${before.live}. No version is lost.`, "Reset", field))) return;
    const made = await admin(`${this.line}/reset`, { method: "POST", body: { to: "base", purge_buffer: purge.checked } });
    const after = await admin(this.line);
    this.moved(`Reset: ${made.version} is the base again.`, before.live, after.generation);
  }

  // --- parts --------------------------------------------------------------------------------------

  async setPaused(paused) {
    const status = await admin(about(`v1/adaptation/${paused ? "pause" : "resume"}`), { method: "POST", body: {} });
    this.pausedIs(status.paused);
  }

  async setPinned(version, pinned) {
    const made = await admin(`${this.line}/versions/${version}/${pinned ? "pin" : "unpin"}`, { method: "POST", body: {} });
    return `${made.version} is ${made.pinned ? "pinned" : "no longer pinned"}.`;
  }

  /** Say that `live` moved, and offer to move it back as long as nobody else has moved it. */
  moved(text, back, generation) {
    this.tell(text, async () => {
      const after = await admin(`${this.line}/promote`, { method: "POST", body: { version: back }, headers: ifStill({ generation }) });
      return `${after.live} is live again.`;
    });
  }

  /** A choice among the versions that can be served. */
  async versions(first) {
    const { data } = await admin(`${this.line}/versions?limit=100`);
    const options = data.filter((each) => !each.retired).map((each) => el("option", { value: each.version, "data-pinned": String(each.pinned) }, `${each.version} · ${each.label ?? each.origin}${each.pinned ? " · pinned" : ""} · ${moment(each.created)}`));
    return el("select", {}, first ? el("option", { value: first }, first) : null, options);
  }

  tell(text, undo) {
    const button = undo ? el("button", { type: "button", className: "link" }, "Undo") : null;
    button?.addEventListener("click", async () => {
      button.disabled = true;
      try {
        this.tell(await undo());
      } catch (error) {
        this.tell(error instanceof Problem ? error.message : "The server cannot be reached.");
      }
    });
    $("done").replaceChildren(text, ...(button ? [" ", button] : []));
    button?.focus();
  }
}

const ifStill = ({ generation }) => ({ "If-Match": `"${generation}"` });

function field(name, input, hint) {
  return el("label", { className: "field" }, name, hint ? el("small", {}, ` ${hint}`) : null, input);
}

/** Whether the person says yes in the dialog. */
function confirmed(title, text, yes, ...fields) {
  const dialog = $("confirm");
  $("confirm-title").textContent = title;
  $("confirm-text").textContent = text;
  $("confirm-yes").textContent = yes;
  $("confirm-fields").replaceChildren(...fields);
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "confirm"), { once: true });
  });
}
