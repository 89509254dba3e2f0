// The chat page. Gradio draws the frame; this script fills it, sends messages and votes.
//
// What it promises: what was typed is in the field until the models have answered it, and a vote leaves this page only
// when the server has said that it is stored; until then it is kept and sent again under the same key.
import { $, Refusal, ask, begin, dark, element, fill, frame, kept, newKey, pause, posted, tick } from "./common.js";

const SIDES = ["Left", "Right"];
const WORDS = { left: "left is better", tie: "tie", right: "right is better" };

const page = { view: null, busy: false, voting: false, seen: 0, active: 0, touched: 0 };

// -- the server ----------------------------------------------------------------------------------------------------

const put = (path, body) => ask(`/api/chat/${path}`, body, 60000);  // milliseconds: a model may be busy

// Every line of an answer while it is written; the last one is the view, or an error.
async function listen(path, body, heard) {
  const response = await fetch(path, posted(body));
  if (!response.ok) throw new Refusal(await response.json());
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The connection broke off.");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const told = JSON.parse(line);
      if (told.error) throw new Refusal(told);
      if (told.view) return told.view;
      heard(told);
    }
  }
}

// -- what is on the screen -----------------------------------------------------------------------------------------

function state(name, words) { frame().dataset.state = name; $("state").textContent = words; }

function message(words, good) { $("message").textContent = words; $("message").classList.toggle("ch-told", Boolean(good)); }

function title(place) {
  const { names, sides } = page.view;
  if (!names) return SIDES[place];
  return sides === 1 ? names[0] : `${SIDES[place]}: ${names[place]}`;
}

function asked(told) {
  const box = element("div", { class: "al-text", dir: "auto" });
  if (typeof told === "string") { box.textContent = told; box.style.whiteSpace = "pre-wrap"; } else fill(box, told);
  return element("article", { class: "ch-mine", "aria-label": "You" }, box);
}

function answers(turn) {
  const row = element("div", { class: "ch-answers", "data-sides": page.view.sides });
  for (let place = 0; place < page.view.sides; place += 1) {
    const box = element("div", { class: "al-text", dir: "auto" });
    const note = element("p", { class: "ch-note" });
    const told = turn && turn.answers[place];
    if (told) { fill(box, told); note.textContent = told.note; }
    note.hidden = !note.textContent;
    row.append(element("article", { class: "al-answer", "aria-label": title(place), "data-writing": told ? null : "wait" },
      element("h2", { text: title(place) }), box, note));
  }
  return row;
}

function show(view) {
  page.view = view;
  kept.set("sessionStorage", "align-chat:conversation", view.id);
  const names = view.names && view.names.join(" and ");
  $("who").textContent = view.sides === 1 ? names : names ? names : "two models, names hidden until your vote";
  $("hiding").hidden = view.sides === 1;
  $("talk").replaceChildren(...view.turns.flatMap((turn) => [asked(turn.message), answers(turn)]));
  if (!view.turns.length) {
    $("talk").append(element("p", { class: "ch-empty", text: view.sides === 1 ? "Ask something." :
      "Ask something: both models answer, each goes on with its own answers. Say which is better whenever you know." }));
  }
  for (const box of $("talk").querySelectorAll(".al-text, .al-text pre")) {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;  // what can be scrolled, the keyboard must reach
  }
  votes();
  page.active = 0; page.seen = page.touched = performance.now();
  frame().dataset.shown = `${view.id} ${view.turns.length} ${view.voted || ""}`;
}

function votes() {
  const { sides, turns, voted, unvotable } = page.view;
  $("votes").hidden = sides < 2 || !turns.length || Boolean(voted);
  const off = page.busy || page.voting || Boolean(unvotable);
  document.querySelectorAll(".ch-vote").forEach((button) => button.setAttribute("aria-disabled", off));
  $("send").setAttribute("aria-disabled", page.busy || page.voting);
  $("new").setAttribute("aria-disabled", page.busy || page.voting);
}

const atEnd = () => innerHeight + scrollY >= document.documentElement.scrollHeight - 80;
const toEnd = () => scrollTo({ top: document.documentElement.scrollHeight });

// -- what the person does ------------------------------------------------------------------------------------------

function trouble(error) {
  if (error.reason === "login") { state("offline", "Not let in"); message(error.message); }
  else if (error instanceof Refusal) { state("refused", error.reason === "stopped" ? "Stopped" : "Not done"); message(error.message); }
  else { state("offline", "Offline"); message("The program cannot be reached; your message is kept here. Start it again, or try again."); }
}

async function send() {
  if (page.busy || page.voting || !page.view) return;
  const text = $("text").value;
  if (!text.trim()) { message("The message is empty: write something."); return; }
  page.busy = true;
  message("");
  try {
    if (page.view.voted) show(await put("new", { blind: $("blind").checked }));
    const before = page.view;
    if (!before.turns.length) $("talk").replaceChildren();
    const row = answers(null);
    $("talk").append(asked(text), row);
    $("text").value = "";
    $("stop").hidden = false; $("send").hidden = true;
    votes();
    state("saving", "Answering…");
    toEnd();
    try {
      const view = await listen("/api/chat/say", { conversation: before.id, text }, (told) => {
        const follow = atEnd();
        [...row.children].forEach((box, place) => { box.dataset.writing = place === told.place; });
        fill(row.children[told.place].querySelector(".al-text"), told);
        if (follow) toEnd();
      });
      kept.set("sessionStorage", "align-chat:draft", null);
      page.busy = false;
      show(view);
      state("saved", "Ready");
      if (view.unvotable && view.sides > 1) message(view.unvotable);
      toEnd();
    } catch (error) {
      page.busy = false;
      show(before);
      if (!$("text").value) $("text").value = text;
      trouble(error);
      if (error.reason === "unknown") await load(error.message);
    }
  } catch (error) { page.busy = false; trouble(error); }
  $("stop").hidden = true; $("send").hidden = false;
  votes();
  $("text").focus({ preventScroll: true });
}

function stop() { put("stop", { conversation: page.view.id }).catch(trouble); }

async function restart() {
  if (page.busy || page.voting) return;
  try {
    show(await put("new", { blind: $("blind").checked }));
    message(""); state("saved", "Ready");
    $("text").focus();
  } catch (error) { trouble(error); }
}

function hide() {
  if (page.busy || page.voting) return;
  if (!page.view.turns.length || page.view.voted) restart();
  else message(`Names are ${$("blind").checked ? "hidden" : "shown"} from the next conversation on.`);
}

function vote(choice) {
  if (page.busy || page.voting || $("votes").hidden) return;
  if (page.view.unvotable) { message(page.view.unvotable); return; }
  tick(page);
  const seconds = Math.round(page.active) / 1000;
  kept.set("localStorage", "align-chat:vote", { conversation: page.view.id, choice, key: newKey(), seconds });
  page.vote = kept.get("localStorage", "align-chat:vote") || { conversation: page.view.id, choice, key: newKey(), seconds };
  deliver();
}

// Sends the vote that is kept until the server has taken or refused it.
async function deliver() {
  page.voting = true;
  votes();
  state("saving", "Saving…");
  message("");
  for (let attempt = 0; page.vote; attempt += 1) {
    try {
      const view = await put("vote", page.vote);
      show(view);
      state("saved", "Saved");
      const [left, right] = view.names;
      message(`Your vote: ${WORDS[view.voted]}. Left was ${left}, right was ${right}. Your next message begins a new conversation.`, true);
      page.vote = null;
    } catch (error) {
      if (error instanceof Refusal) {
        page.vote = null;
        page.voting = false;
        state("refused", "Not stored");
        if (error.reason === "unknown") await load(error.message);
        message(`Your vote was not stored: ${error.message}`);
      } else {
        state("offline", "Not stored yet");
        message("The vote is not stored yet: the label database or the program cannot be reached. It is kept here and sent again.");
        await pause(attempt);
      }
    }
  }
  kept.set("localStorage", "align-chat:vote", null);
  page.voting = false;
  votes();
}

function onKey(event) {
  const field = event.target.closest("textarea");
  if (field) {
    if (event.key === "Escape") { field.blur(); event.preventDefault(); }
    if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); if (!event.repeat) send(); }
    return;
  }
  if (event.repeat) return;
  const keys = {
    1: () => vote("left"), 2: () => vote("tie"), 3: () => vote("right"), m: () => $("text").focus(), n: restart, d: dark,
  };
  const key = event.key.toLowerCase();
  if (keys[key]) { event.preventDefault(); keys[key](); }
}

async function load(because) {
  for (let attempt = 0; ; attempt += 1) {
    try {
      const id = kept.get("sessionStorage", "align-chat:conversation") || "";
      const view = await put(`conversation?id=${encodeURIComponent(id)}`);
      $("blind").checked = view.blind;
      show(view);
      if (because) message(because); else state("saved", "Ready");
      return;
    } catch (error) {
      trouble(error);
      if (error instanceof Refusal) return;
      await pause(attempt);
    }
  }
}

async function start() {
  $("send").addEventListener("click", send);
  $("stop").addEventListener("click", stop);
  $("new").addEventListener("click", restart);
  $("blind").addEventListener("change", hide);
  $("text").value = kept.get("sessionStorage", "align-chat:draft") || "";
  $("text").addEventListener("input", () => kept.set("sessionStorage", "align-chat:draft", $("text").value));
  document.querySelectorAll(".ch-vote").forEach((button) => button.addEventListener("click", () => vote(button.dataset.choice)));
  await load();
  page.vote = kept.get("localStorage", "align-chat:vote");
  if (page.vote && page.view) await deliver();  // a vote that the last visit could not send
}

begin("send", page, onKey, start);
