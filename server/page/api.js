// The server: keys, requests, problems, and the one stream of events.

const KEYS = { user: "servetune.key", admin: "servetune.admin-key" };
const FIRST_DELAY = 500;
const MOST_DELAY = 4000;
const SILENCE = 15000; // how things stand is told every two seconds

/** The adapter that the page is about; "" for the server's own. */
export const chosen = new URLSearchParams(location.search).get("adapter") ?? "";

/** A path about that adapter. */
export function about(path) {
  if (!chosen) return path;
  return `${path}${path.includes("?") ? "&" : "?"}adapter=${encodeURIComponent(chosen)}`;
}

/** A refusal, in the server's words. */
export class Problem extends Error {
  constructor(status, document) {
    super(document.detail || document.title || `The server answered ${status}.`);
    this.status = status;
    this.code = document.code || "";
  }
}

// A browser may forbid its storage: then keys are kept as long as the page.
const memory = new Map();
const storage = {
  get(name) {
    try { return sessionStorage.getItem(name) ?? memory.get(name) ?? ""; } catch { return memory.get(name) ?? ""; }
  },
  set(name, value) {
    memory.set(name, value);
    try { if (value) sessionStorage.setItem(name, value); else sessionStorage.removeItem(name); } catch { /* kept in memory */ }
  },
};

const changed = new EventTarget();
export const key = (kind) => storage.get(KEYS[kind]);
export const onKeys = (listener) => changed.addEventListener("keys", listener);

export function setKeys({ user, admin }) {
  storage.set(KEYS.user, user.trim());
  storage.set(KEYS.admin, admin.trim());
  changed.dispatchEvent(new Event("keys"));
}

function authorization(admin) {
  const found = admin ? key("admin") : key("user") || key("admin");
  return found ? { Authorization: `Bearer ${found}` } : {};
}

async function problem(response) {
  const document = await response.json().catch(() => ({}));
  return new Problem(response.status, document.error ? { detail: document.error.message } : document);
}

/** What the server answers, as JSON. Throws Problem, and TypeError where it cannot be reached. */
export async function request(path, { admin = false, method = "GET", body, form, headers = {} } = {}) {
  const sent = { ...authorization(admin), ...headers };
  if (body !== undefined) sent["Content-Type"] = "application/json";
  const content = form ?? (body === undefined ? undefined : JSON.stringify(body));
  const response = await fetch(path, { method, headers: sent, body: content, cache: "no-store" });
  if (!response.ok) throw await problem(response);
  return response.json();
}

export const admin = (path, options = {}) => request(path, { ...options, admin: true });

const sleep = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));
const nextKeys = () => new Promise((resolve) => changed.addEventListener("keys", resolve, { once: true }));

/**
 * Follow what happens, for ever: through lost connections, restarts of the server, and until a key is given.
 *
 * `onState` is told "live", "lost", "locked" or, in the end, "missing", and `load` is awaited until it once succeeds: it reads what happened
 * before and returns the id of the last event of it, or "" to go on without.
 */
export async function follow(load, onEvent, onState) {
  let last = null;
  let delay = FIRST_DELAY;
  for (;;) {
    try {
      last ??= await load();
      await listen(last, (event) => {
        delay = FIRST_DELAY;
        last = event.id ?? last;
        onEvent(event);
      }, () => onState("live"));
    } catch (error) {
      if (error.status === 401 || error.status === 403) {
        onState("locked");
        await nextKeys();
        continue;
      }
      if (error.code === "adapter_not_found") {
        onState("missing");
        return;
      }
    }
    onState("lost");
    await sleep(delay * (0.75 + 0.25 * Math.random()));
    delay = Math.min(2 * delay, MOST_DELAY);
  }
}

/** One connection: ends when the server ends it or says nothing for too long. */
async function listen(last, onEvent, onOpen) {
  const silence = new AbortController();
  let watchdog;
  const heard = () => {
    clearTimeout(watchdog);
    watchdog = setTimeout(() => silence.abort(), SILENCE);
  };
  heard();
  try {
    const response = await fetch(about("v1/adaptation/events?status=true"), {
      headers: { ...authorization(false), ...(last ? { "Last-Event-ID": last } : {}) },
      signal: silence.signal,
      cache: "no-store",
    });
    if (!response.ok) throw await problem(response);
    onOpen();
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      heard();
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const data = block.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6));
        if (data.length) onEvent(JSON.parse(data.join("\n")));
      }
    }
  } finally {
    clearTimeout(watchdog);
    silence.abort();
  }
}
