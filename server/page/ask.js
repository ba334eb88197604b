// Try it: an image, a question or labels, and what the server makes of them.

import { chosen, request } from "./api.js";
import { $, duration, el, percent } from "./dom.js";

const FEEDBACK = [["Right", true], ["Wrong", false]];
const SIDE = 2048; // pixels; the server reads no more
const WHY = {
  adapt_false: "not kept, as you wished",
  not_live: "not kept: only what the live version answers is learned from",
  duplicate: "not kept: the same was asked before",
  buffer_full: "not kept: the buffer is full",
  client_share: "not kept: this key already has its share of the buffer",
  buffer_unavailable: "not kept: the buffer is not reachable",
  buffer_timeout: "perhaps kept: the buffer did not say so in time",
  unparsed: "not kept: there was no answer",
};
const KINDS = ["image/png", "image/jpeg", "image/webp"];

let image = null;

export function prepareAsking() {
  const drop = $("drop");
  $("image").addEventListener("change", () => take($("image").files[0]));
  document.addEventListener("paste", (event) => take(event.clipboardData?.files[0], event));
  for (const kind of ["dragover", "dragleave", "drop"]) {
    drop.addEventListener(kind, (event) => {
      event.preventDefault();
      drop.classList.toggle("over", kind === "dragover");
      if (kind === "drop") take(event.dataTransfer?.files[0]);
    });
  }
  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    ask();
  });
}

async function take(file, event) {
  if (!file || !file.type.startsWith("image/")) return;
  event?.preventDefault();
  image = await fitting(file);
  const preview = $("preview");
  if (preview.src) URL.revokeObjectURL(preview.src);
  preview.src = URL.createObjectURL(image);
  preview.alt = file.name && file.name !== "image.png" ? `Your image: ${file.name}` : "Your image";
  preview.hidden = false;
  $("drop-hint").classList.add("hidden");
  $("answer").replaceChildren();
}

/** The file itself, or a smaller copy where it has more pixels than the server reads. */
async function fitting(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    return file; // the server will say what is wrong with it
  }
  const scale = SIDE / Math.max(bitmap.width, bitmap.height);
  if (scale >= 1 && KINDS.includes(file.type)) return file;
  const canvas = el("canvas");
  canvas.width = Math.round(bitmap.width * Math.min(1, scale));
  canvas.height = Math.round(bitmap.height * Math.min(1, scale));
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return new Promise((resolve) => { canvas.toBlob(resolve, file.type === "image/jpeg" ? "image/jpeg" : "image/png"); });
}

/** Labels as they were typed: between commas or line ends, each once. */
const labels = () => [...new Set($("labels").value.split(/[,\n]/).map((each) => each.trim()).filter(Boolean))];

async function ask() {
  const place = $("answer");
  const [question, choices] = [$("question").value.trim(), labels()];
  if (!image) return complain("Choose an image first.", $("image"));
  if (!question && choices.length < 2) return complain(choices.length ? "Give at least two labels." : "Ask a question, or give labels to choose from.", $("question"));
  const form = new FormData();
  form.append("image", image, "image");
  if (question) form.append("question", question);
  for (const label of choices) form.append("candidate_labels", label);
  form.append("top_k", choices.length ? "5" : "3");
  form.append("adapt", $("adapt").checked ? "true" : "false");
  form.append("adapter", chosen ? `${chosen}@${$("adapter").value}` : $("adapter").value);
  $("submit").disabled = true;
  try {
    place.replaceChildren(...shown(await request("v1/answer", { method: "POST", form })));
  } catch (error) {
    complain(error.status ? error.message : "The server cannot be reached.");
  } finally {
    $("submit").disabled = false;
  }
  return undefined;
}

function complain(text, field) {
  $("answer").replaceChildren(el("p", { className: "problem" }, text));
  field?.focus();
}

function shown(answer) {
  const { adaptation, adapter, timings } = answer;
  const kept = adaptation.status === "queued" ? "queued to learn from" : WHY[adaptation.reason] ?? `not kept: ${adaptation.reason}`;
  return [
    el("p", { className: "said" }, answer.answer ?? "no answer", el("small", {}, answer.confidence === null ? "" : ` ${percent(answer.confidence)}`)),
    answer.candidates.length ? el("table", { className: "bars" },
      el("caption", { className: "hidden" }, "Candidates with their probabilities"),
      el("tbody", {}, answer.candidates.map(bar))) : null,
    el("p", { className: "fine" },
      el("span", { "data-fact": "version" }, adapter.version), ` answered in ${duration(timings.queue_s + timings.inference_s)}; `,
      el("span", { "data-fact": "kept", "data-status": adaptation.status }, kept), "."),
    feedback(answer.id),
  ].filter(Boolean);
}

/** Asks whether an answer was right. The last word counts. */
function feedback(id) {
  const told = el("span", { role: "status" });
  const buttons = FEEDBACK.map(([word, correct]) => el("button", { type: "button", className: "link", "data-correct": String(correct) }, word));
  FEEDBACK.forEach(([word, correct], place) => buttons[place].addEventListener("click", async () => {
    try {
      await request(`v1/answers/${encodeURIComponent(id)}/feedback`, { method: "POST", body: { correct } });
      told.textContent = `Counted as ${word.toLowerCase()}.`;
    } catch (error) {
      told.textContent = error.status ? error.message : "The server cannot be reached.";
    }
  }));
  return el("p", { className: "fine feedback" }, "Was it right? ", buttons[0], " ", buttons[1], " ", told);
}

function bar({ label, answer, score }) {
  const filled = el("span", { className: "bar", "aria-hidden": "true" });
  filled.style.setProperty("--share", String(score));
  return el("tr", {}, el("th", { scope: "row" }, label ?? answer ?? "–"), el("td", { className: "track" }, filled), el("td", {}, percent(score)));
}
