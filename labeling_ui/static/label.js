// The labelling page. Gradio draws the frame; this script fills it and sends labels.
//
// What it promises: a key either stores a label for the item that is on the screen, or says that it did not. A label
// leaves this page only when the server has said that it is stored; until then it lies in the browser's storage and is
// sent again, under the same key, however long the server is away.
import { $, Refusal, ask, begin, dark, element, fill, frame, kept, newKey, pause, tick, wait } from "./common.js";

const SCALE = ["Much better", "Better", "Slightly better", "Tie", "Slightly better", "Better", "Much better"];
const REASONS = ["Cannot tell", "Both unusable", "Not my language or subject", "Broken or unreadable", "Other"];

const page = {
  project: null, item: null, busy: false, ranking: [], ratings: {}, ignored: 0, refreshed: 0,
  seen: 0, active: 0, touched: 0, skipping: false,
};

const store = {  // what must outlive a reload
  key: (name) => `align:${page.project}:${name}`,
  get(name) { return kept.get("localStorage", this.key(name)); },
  set(name, value) { kept.set("localStorage", this.key(name), value); },
};

// -- the server ----------------------------------------------------------------------------------------------------

// Sends what lies in storage until the server has taken or refused it.
async function send() {
  for (let attempt = 0; ; attempt += 1) {
    const waiting = store.get("pending") || page.pending;
    if (!waiting) return null;
    try {
      const told = await ask(waiting.path, waiting.body);
      store.set("pending", null); page.pending = null;
      return told;
    } catch (error) {
      if (error instanceof Refusal && error.reason === "login") { page.pending = waiting; throw error; }
      if (error instanceof Refusal) { store.set("pending", null); page.pending = null; throw error; }
      say("offline", "Offline: your label is kept here and sent again.");
      await new Promise((resolve) => {
        const timer = setTimeout(resolve, wait(attempt));
        window.addEventListener("online", () => { clearTimeout(timer); resolve(); }, { once: true });
      });
    }
  }
}

async function act(path, body) {
  if (page.busy) { ignore(); return; }
  page.busy = true;
  page.pending = { path, body: { ...body, project: page.project, key: newKey() } };
  store.set("pending", page.pending);
  say("saving", "Saving…");
  $("message").textContent = "";
  lock(true);
  try {
    const told = await send();
    store.set(`draft:${body.lease}`, null);
    page.ignored = 0;
    show(told);
    say("saved", path === "/api/undo" ? "Taken back" : "Saved");
  } catch (error) {
    lock(false);
    if (error.reason === "login") { say("offline", "Logged out"); message(`${error.message} `, "/login", "Log in"); }
    else if (error.reason === "nothing" || error.reason === "depth") { say("saved", "Nothing changed"); message(error.message); }
    else { say("refused", "Not stored"); await load(error.message); }
  } finally { page.busy = false; }
}

function ignore() {
  page.ignored += 1;
  const keys = page.ignored === 1 ? "1 key was" : `${page.ignored} keys were`;
  $("message").textContent = `${keys} not taken: the next item was not on the screen yet.`;
  frame().dataset.ignored = page.ignored;
}

async function load(because) {
  page.busy = true;
  try {
    for (let attempt = 0; ; attempt += 1) {
      try {
        const told = await ask(`/api/next?project=${encodeURIComponent(page.project)}`);
        page.busy = false;
        if (told.guidelines) showGuidelines(told.guidelines);
        show(told);
        if (because) message(because); else say("saved", "Ready");
        return;
      } catch (error) {
        if (error instanceof Refusal) {
          say("refused", "Not loaded");
          if (error.reason === "login") message(`${error.message} `, "/login", "Log in"); else message(error.message);
          return;
        }
        say("offline", "Offline: trying again.");
        await pause(attempt);
      }
    }
  } finally { page.busy = false; }
}

// -- what is on the screen -----------------------------------------------------------------------------------------

function say(state, words) { frame().dataset.state = state; $("state").textContent = words; }

function message(words, link, name) {
  const box = $("message");
  box.textContent = words;
  if (link) { const a = document.createElement("a"); a.href = link; a.textContent = name; box.append(a); }
}

function written(told, className) {
  const box = element("div", { class: className, dir: "auto", tabindex: told.characters > 1500 ? "0" : null });
  fill(box, told);
  return box;
}

function show(told) {
  page.item = told.item; page.ranking = []; page.ratings = {}; page.skipping = false;
  page.seen = performance.now(); page.active = 0; page.touched = performance.now();
  const { mine, given, wanted } = told.progress;
  $("progress").textContent = `${mine} by you · ${given} of ${wanted} in all${pace()}`;
  for (const name of ["prompt", "answers", "choices", "criteria"]) $(name).replaceChildren();
  $("reasons").hidden = true; $("skip").setAttribute("aria-expanded", "false");
  for (const name of ["comment", "flag", "rewrite"]) $(name).value = "";
  $("notes").open = false;
  $("done").hidden = Boolean(told.item);
  $("notes").hidden = $("skips").hidden = !told.item;
  if (!told.item) {
    const all = given >= wanted;
    $("done").replaceChildren(
      element("h2", { text: all ? "All done" : "Nothing left for you just now" }),
      element("p", { text: all ? "Every item has all its labels. Thank you." :
        "What is left is with other annotators. This page looks again every 20 seconds." }));
    if (!all) setTimeout(() => { if (!page.item && !page.busy) load(); }, 20000);
    return;
  }
  for (const turn of told.item.prompt) {
    $("prompt").append(element("div", { class: `al-turn al-${turn.role === "user" ? "user" : "other"}` },
      element("h2", { text: turn.role }), written(turn, "al-text")));
  }
  const ranking = told.item.mode === "ranking";
  $("answers").dataset.count = told.item.answers.length;
  frame().dataset.mode = told.item.mode;
  told.item.answers.forEach((answer, place) => {
    const name = ranking ? `Answer ${place + 1}` : place ? "Right" : "Left";
    const head = element("h2", { text: name });
    const box = element("article", { class: "al-answer", "aria-label": name }, head);
    if (ranking) {
      box.append(element("button", { type: "button", class: "al-pick", "data-place": place, click: (event) =>
        rank(place, event.shiftKey) }, `Rank ${name} next `, element("kbd", { text: place + 1 })));
    }
    box.append(written(answer, "al-text"));
    $("answers").append(box);
  });
  if (ranking) choicesOfRanking(); else choicesOfPair();
  criteria();
  restore(told.item.before || store.get(`draft:${told.item.lease}`));
  lock(false);
  window.scrollTo({ top: 0 });
  frame().dataset.lease = told.item.lease;
  requestAnimationFrame(() => { frame().dataset.painted = told.item.lease; });
}

function choicesOfPair() {
  const row = element("div", { class: "al-scale", role: "group", "aria-label": "From left is better to right is better" });
  SCALE.forEach((words, index) => {
    const side = index < 3 ? "left" : index > 3 ? "right" : "";
    row.append(element("button", { type: "button", class: "al-value", "data-value": index + 1, "data-side": side,
      "aria-label": `${index + 1}: ${side ? `${side} is ${words.toLowerCase()}` : "tie"}`,
      click: () => label({ value: index + 1 }) },
    element("kbd", { text: index + 1 }), element("span", { text: words })));
  });
  $("choices").append(
    element("div", { class: "al-ends", "aria-hidden": "true" }, element("span", { text: "← Left" }), element("span", { text: "Right →" })), row);
}

function choicesOfRanking() {
  $("choices").append(
    element("p", { id: "al-ranking", class: "al-ranking", "aria-live": "polite", text: "Best first: press 1, 2, … ; Shift + number for as good as the one before." }),
    element("button", { type: "button", id: "al-submit", click: submitRanking }, "Submit ", element("kbd", { text: "Enter" })),
    element("button", { type: "button", id: "al-clear", click: () => { page.ranking = []; showRanking(); } }, "Start over ", element("kbd", { text: "Esc" })));
}

function rank(place, tied) {
  if (page.busy || !page.item || place >= page.item.answers.length) return;
  if (page.ranking.flat().includes(place)) { message(`Answer ${place + 1} is ranked already.`); return; }
  if (tied && page.ranking.length) page.ranking[page.ranking.length - 1].push(place);
  else page.ranking.push([place]);
  showRanking();
}

function showRanking() {
  const words = page.ranking.map((group) => group.map((place) => place + 1).join(" = ")).join("  >  ");
  document.getElementById("al-ranking").textContent = words || "Best first.";
  const flat = page.ranking.flat();
  document.querySelectorAll(".al-pick").forEach((button) => {
    button.closest("article").classList.toggle("al-ranked", flat.includes(Number(button.dataset.place)));
  });
  draft();
}

function submitRanking() {
  if (page.ranking.flat().length < 2) { message("Rank at least two answers."); return; }
  label({ ranking: page.ranking });
}

function criteria() {
  page.item.criteria.forEach((name) => {
    page.item.answers.forEach((_, place) => {
      const id = `al-rate-${place}-${page.item.criteria.indexOf(name)}`;
      const choice = element("select", { id }, element("option", { value: "", text: "–" }),
        ...[1, 2, 3, 4, 5].map((value) => element("option", { value, text: value })));
      choice.addEventListener("change", () => {
        const of = page.ratings[name] || (page.ratings[name] = {});
        if (choice.value) of[place] = Number(choice.value); else delete of[place];
        if (!Object.keys(of).length) delete page.ratings[name];
        draft();
      });
      $("criteria").append(element("label", { for: id, text: `${name}, ${page.item.mode === "ranking" ? `answer ${place + 1}` : place ? "right" : "left"}` }), choice);
    });
  });
}

function restore(before) {
  if (!before) return;
  for (const name of ["comment", "flag", "rewrite"]) if (before[name]) { $(name).value = before[name]; $("notes").open = true; }
  if (before.ranking && page.item.mode === "ranking") { page.ranking = before.ranking; showRanking(); }
  for (const [name, of] of Object.entries(before.ratings || {})) {
    const index = page.item.criteria.indexOf(name);
    for (const [place, value] of Object.entries(of)) {
      const choice = document.getElementById(`al-rate-${place}-${index}`);
      if (choice) { choice.value = value; (page.ratings[name] ||= {})[place] = value; }
    }
  }
  document.querySelectorAll(".al-value").forEach((button) =>
    button.classList.toggle("al-before", Number(button.dataset.value) === before.value));
}

function lock(busy) {
  document.querySelectorAll("#al-choices button, .al-pick, #al-reasons button, #al-undo").forEach((button) => {
    button.setAttribute("aria-disabled", busy);
  });
}

function showGuidelines(told) {
  const box = $("guidelines");
  box.innerHTML = told.html || "<p>There are no guidelines.</p>";
  const known = store.get("guidelines");
  if (told.html && known !== told.version) { toggleGuidelines(true); store.set("guidelines", told.version); }
}

function toggleGuidelines(open) {
  $("guidelines").hidden = !open;
  $("guide").setAttribute("aria-expanded", open);
}

// -- what the annotator does ---------------------------------------------------------------------------------------

function said() {
  tick(page);
  const word = (name) => $(name).value.trim() ? $(name).value : null;
  return {
    lease: page.item.lease, seconds: Math.round(page.active) / 1000, comment: word("comment"), flag: word("flag"),
    rewrite: word("rewrite"), ratings: Object.keys(page.ratings).length ? page.ratings : null,
  };
}

function label(judgement) {
  if (page.busy) { ignore(); return; }
  if (!page.item) return;
  times.push(performance.now());
  act("/api/label", { ...said(), ...judgement });
}

function skip(reason) {
  if (!page.item) return;
  const { lease, seconds, comment, flag } = said();
  act("/api/skip", { lease, seconds, comment, flag, reason });
}

function toggleSkip() {
  const box = $("reasons");
  box.replaceChildren(...REASONS.map((reason, index) =>
    element("button", { type: "button", click: () => skip(reason) }, `${reason} `, element("kbd", { text: index + 1 }))));
  page.skipping = box.hidden;
  box.hidden = !box.hidden;
  $("skip").setAttribute("aria-expanded", !box.hidden);
}

function undo() { act("/api/undo", { lease: page.item ? page.item.lease : "" }); }

let drafting = 0;
function draft() {
  if (!page.item) return;
  clearTimeout(drafting);
  drafting = setTimeout(() => {
    if (!page.item || page.busy) return;
    const { lease, ...words } = said();
    store.set(`draft:${lease}`, { ...words, ranking: page.ranking });
    say("draft", "Draft kept");
  }, 300);
}

const times = [];
function pace() {
  const recent = times.filter((at) => at > performance.now() - 600000);
  return recent.length < 3 ? "" : ` · ${Math.round(recent.length * 60000 / (performance.now() - recent[0]))} a minute`;
}

function onKey(event) {
  const field = event.target.closest("textarea, input, select");
  if (event.key === "Escape" && field) { field.blur(); event.preventDefault(); return; }
  if (field) return;
  const digit = /^(Digit|Numpad)([1-9])$/.exec(event.code);
  const key = event.key.toLowerCase();
  if (event.repeat && (digit || key === "u")) { event.preventDefault(); return; }  // a key held down is one key
  if (digit) {
    event.preventDefault();
    const number = Number(digit[2]);
    if (page.busy) ignore();
    else if (!page.item) return;
    else if (page.skipping) { if (number <= REASONS.length) skip(REASONS[number - 1]); }
    else if (page.item.mode === "ranking") rank(number - 1, event.shiftKey);
    else if (number <= 7) label({ value: number });
    return;
  }
  const focus = (name) => { $("notes").open = true; $(name).focus(); };
  const keys = {
    u: undo, g: () => toggleGuidelines($("guidelines").hidden), d: dark, s: toggleSkip,
    c: () => focus("comment"), f: () => focus("flag"), r: () => focus("rewrite"),
  };
  if (page.item && page.item.mode === "ranking") {
    if (event.target.closest("button, summary, a") === null) keys.enter = submitRanking;
    keys.escape = () => { page.ranking = []; showRanking(); };
  } else if (page.skipping) keys.escape = toggleSkip;
  if (keys[key]) { event.preventDefault(); keys[key](); }
}

async function start() {
  $("undo").addEventListener("click", undo);
  $("guide").addEventListener("click", () => toggleGuidelines($("guidelines").hidden));
  $("skip").addEventListener("click", toggleSkip);
  for (const name of ["comment", "flag", "rewrite"]) $(name).addEventListener("input", draft);
  let told;
  for (let attempt = 0; ; attempt += 1) {
    try { told = await ask("/api/projects"); break; } catch (error) {
      if (error instanceof Refusal) { message(`${error.message} `, "/login", "Log in"); return; }
      say("offline", "Offline: trying again.");
      await pause(attempt);
    }
  }
  if (!told.projects.length) { say("saved", "Ready"); message("There is no project to label yet."); return; }
  const wanted = new URLSearchParams(location.search).get("project");
  $("project").replaceChildren(...told.projects.map((each) => element("option", { value: each.name, text: each.name })));
  page.project = told.projects.some((each) => each.name === wanted) ? wanted : told.projects[0].name;
  $("project").value = page.project;
  $("project").addEventListener("change", () => { page.project = $("project").value; load(); });
  setInterval(() => {
    if (page.item && !document.hidden && !page.busy) {
      ask("/api/heartbeat", { project: page.project, lease: page.item.lease }).catch((error) => {
        if (error instanceof Refusal && error.reason === "lost") load(error.message);
      });
    }
  }, 60000);
  if (store.get("pending")) {  // a label that the last visit could not send
    page.busy = true; say("saving", "Sending a label kept from before…");
    try { await send(); } catch (error) { page.busy = false; await load(error.message); return; }
    page.busy = false;
  }
  await load();
}

begin("done", page, onKey, start);
