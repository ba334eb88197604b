// Elements and numbers, as the other modules need them. Text is only ever set as text.

export const $ = (id) => document.getElementById(id);

/** An element with properties and children; strings become text, null is left out. */
export function el(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name in made && typeof value !== "string") made[name] = value;
    else made.setAttribute(name === "className" ? "class" : name, value === true ? "" : value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return made;
}

/** Change an element's text only where it differs, so that nothing is announced twice. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Three digits that matter. */
export function number(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  if (Number.isInteger(value)) return String(value);
  return size < 0.001 ? value.toExponential(1) : String(Number(value.toPrecision(3)));
}

export function percent(share) {
  if (!Number.isFinite(share)) return "–";
  return share > 0 && share < 0.001 ? "< 0.1 %" : `${number(Math.round(1000 * share) / 10)} %`;
}

/** Two durations in one unit. */
export function durations(first, second) {
  if (!Number.isFinite(second)) return "–";
  const [factor, unit] = second < 1 ? [1000, "ms"] : [1, "s"];
  const [one, other] = [first, second].map((seconds) => (factor === 1 ? number(seconds) : Math.round(factor * seconds)));
  return `${one} · ${other} ${unit}`;
}

/** A duration in its two largest units. */
export function duration(seconds) {
  if (!Number.isFinite(seconds)) return "–";
  if (seconds < 1) return `${Math.round(1000 * seconds)} ms`;
  const units = [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]];
  let left = Math.round(seconds);
  const parts = [];
  for (const [unit, size] of units) {
    if (parts.length === 2) break;
    const count = Math.floor(left / size);
    if (count || (unit === "s" && !parts.length)) parts.push(`${count} ${unit}`);
    else if (parts.length) break;
    left -= count * size;
  }
  return parts.join(" ");
}

const DAY = new Intl.DateTimeFormat(undefined, { month: "short", day: "numeric" });
const CLOCK = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", second: "2-digit" });

/** A moment; the day only where it is not today. */
export function moment(seconds) {
  const at = new Date(1000 * seconds);
  const today = at.toDateString() === new Date().toDateString();
  return today ? CLOCK.format(at) : `${DAY.format(at)}, ${CLOCK.format(at)}`;
}
