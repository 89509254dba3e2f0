// What the labelling and the chat page share: talking to the server, drawing, light and dark, and time that counts.
const WAITS = [500, 1000, 2000, 4000, 8000];  // milliseconds between attempts
const IDLE = 30000;  // after so long without a sign of life, time does not count

export const $ = (name) => document.getElementById(`al-${name}`);
export const frame = () => document.getElementById("align");
export const wait = (attempt) => WAITS[Math.min(attempt, WAITS.length - 1)];
export const pause = (attempt) => new Promise((resolve) => setTimeout(resolve, wait(attempt)));

export const newKey = () => {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
};

// What the server refused, as against what it could not be asked.
export class Refusal extends Error {
  constructor(told) { super(told.error || "The server refused."); this.reason = told.reason || ""; }
}

export const posted = (body) => ({
  method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
});

export async function ask(path, body, patience = 15000) {
  const stop = new AbortController();
  const timer = setTimeout(() => stop.abort(), patience);
  try {
    const response = await fetch(path, { signal: stop.signal, ...(body === undefined ? {} : posted(body)) });
    const told = await response.json();
    if (response.ok) return told;
    if (response.status >= 500) throw new Error(told.error || "The server is in trouble.");
    throw new Refusal(told);
  } finally { clearTimeout(timer); }
}

// JSON in a storage; private windows may have none: what is kept then lives as long as the page.
export const kept = {
  get(storage, key) { try { return JSON.parse(window[storage].getItem(key)); } catch { return null; } },
  set(storage, key, value) {
    try {
      if (value === null) window[storage].removeItem(key);
      else window[storage].setItem(key, JSON.stringify(value));
    } catch { /* see above */ }
  },
};

export function element(tag, options = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) {
    if (name === "text") made.textContent = value;
    else if (name === "click") made.addEventListener("click", value);
    else if (value !== null && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

export function fill(box, told) {
  if (told.blank) box.replaceChildren(element("em", { class: "al-blank", text: told.characters ? "(only blank characters)" : "(empty)" }));
  else box.innerHTML = told.html;  // sanitised by the server: see labeling_ui/render.py
}

function theme(name) {
  frame().dataset.theme = name;
  document.body.classList.toggle("dark", name === "dark");
  $("dark").setAttribute("aria-pressed", name === "dark");
}

export function dark() {
  const name = frame().dataset.theme === "dark" ? "light" : "dark";
  theme(name);
  try { localStorage.setItem("align:theme", name); } catch { /* no storage, no memory */ }
}

// Begins once Gradio has drawn the last of the frame's elements, which is after this script was loaded. Time counts in
// `page.active` while the page is visible and somebody is there.
export function begin(last, page, onKey, start) {
  const drawn = setInterval(() => {
    if (!$(last)) return;
    clearInterval(drawn);
    let chosen = null;
    try { chosen = localStorage.getItem("align:theme"); } catch { /* no storage */ }
    theme(chosen || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
    document.documentElement.lang = "en";
    document.addEventListener("keydown", (event) => {
      page.touched = performance.now();
      if (!event.ctrlKey && !event.altKey && !event.metaKey && !event.isComposing) onKey(event);
    });
    for (const name of ["pointermove", "pointerdown", "wheel", "touchstart"]) {
      document.addEventListener(name, () => { page.touched = performance.now(); }, { passive: true });
    }
    setInterval(() => tick(page), 1000);
    $("dark").addEventListener("click", dark);
    start();
  }, 20);
}

export function tick(page) {
  const now = performance.now();
  if (!document.hidden && now - page.touched < IDLE) page.active += now - page.seen;
  page.seen = now;
}
