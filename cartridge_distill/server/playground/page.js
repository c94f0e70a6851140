"use strict";
/* The page asks the server that it came from, through OpenAI's chat API. What comes from there is
   shown as text alone: nothing here writes markup. */
const byId = (id) => document.getElementById(id);
const form = byId("form"), question = byId("question"), status = byId("status");
let about = null, chosen = 0, columns = [], running = null;

function words(error) {
  if (error.name === "AbortError") return "stopped";
  if (error instanceof TypeError) return "The server does not answer. Is it still running?";
  return error.message;
}

async function refusal(answer) {
  let said = "";
  try { said = (await answer.json()).error.message; } catch { /* no JSON: the status must do */ }
  return new Error(said || `The server answered with HTTP ${answer.status}.`);
}

function megabytes(tokens) {
  const size = tokens * about.token_bytes;
  const units = [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]];
  const [unit, of] = units.find(([, least]) => size >= least) || ["bytes", 1];
  return `${(size / of).toLocaleString("en", { maximumSignificantDigits: 3 })} ${unit}`;
}

function count(number, what) {
  return `${number.toLocaleString("en")} ${what}${number === 1 ? "" : "s"}`;
}

function addColumn(kind, title, place, largest, why) {
  const section = byId("column").content.firstElementChild.cloneNode(true);
  const part = (name) => section.querySelector(name);
  section.classList.add(kind);
  part("h2").textContent = title;
  part("h2").id = `title-${kind}`;
  section.setAttribute("aria-labelledby", `title-${kind}`);
  part(".answer").setAttribute("aria-label", `Answer, ${title}`);
  part(".answer").classList.add("empty");
  const tokens = place ? place.tokens : 0;
  part(".bar div").style.width = `${largest ? (100 * tokens) / largest : 0}%`;
  part(".bar").hidden = !place;
  part(".memory").textContent = !place ? "" : tokens
    ? `${count(tokens, "KV token")}, ${megabytes(tokens)} before the question`
    : "nothing before the question";
  part(".answer").textContent = why || "";
  byId("columns").append(section);
  if (place) columns.push({ kind, model: place.model, part });
}

function show() {
  const one = about.cartridges[chosen];
  byId("columns").replaceChildren();
  columns = [];
  const places = [one?.cartridge, one?.document].filter(Boolean);
  const largest = Math.max(0, ...places.map((place) => place.tokens));
  addColumn("none", "No document", { model: about.model, tokens: 0 }, largest);
  if (one) {
    addColumn("cartridge", "Cartridge", one.cartridge, largest);
    addColumn("document", "Full document", one.document, largest, one.no_document);
  }
  byId("examples").replaceChildren(...(one ? one.questions : []).map((text) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = text;
    button.addEventListener("click", () => { question.value = text; ask(); });
    return button;
  }));
}

function list() {
  byId("cartridges").hidden = about.cartridges.length === 0;
  byId("list").replaceChildren(...about.cartridges.map((one, number) => {
    const label = document.createElement("label"), radio = document.createElement("input");
    const size = document.createElement("span"), name = document.createElement("b");
    Object.assign(radio, { type: "radio", name: "cartridge", checked: number === chosen });
    radio.addEventListener("change", () => { stop(); chosen = number; show(); });
    name.textContent = one.cartridge.model;
    const { tokens } = one.cartridge, times = one.document ? one.document.tokens / tokens : 0;
    size.textContent = count(tokens, "token")
      + (times ? `, the document has ${times.toFixed(1)}\u00d7 as many` : "");
    label.append(radio, name, size);
    return label;
  }));
}

/* Hands the events of a stream on, as they come. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let kept = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (kept + value).split("\n\n");
    kept = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function answer(column, text, signal) {
  const place = column.part(".answer"), figures = column.part(".figures");
  const begun = performance.now();
  let first = 0, usage = null, ended = "";
  place.setAttribute("aria-busy", "true");
  figures.textContent = "asked \u2026";
  try {
    const reply = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      signal,
      body: JSON.stringify({
        model: column.model,
        messages: [{ role: "user", content: text }],
        max_completion_tokens: Number(byId("tokens").value),
        temperature: Number(byId("temperature").value),
        stream: true,
        stream_options: { include_usage: true },
      }),
    });
    if (!reply.ok) throw await refusal(reply);
    for await (const event of events(reply.body)) {
      if (event.error) throw new Error(event.error.message);
      usage = event.usage || usage;
      for (const choice of event.choices) {
        if (choice.delta.content) {
          first = first || performance.now();
          place.append(document.createTextNode(choice.delta.content));
        }
        ended = choice.finish_reason || ended;
      }
    }
  } catch (error) {
    const said = column.part(".error");
    if (error.name === "AbortError") ended = "stopped";
    else { said.textContent = words(error); said.hidden = false; figures.textContent = ""; }
  }
  place.setAttribute("aria-busy", "false");
  if (!column.part(".error").hidden) return;
  const total = Math.round(performance.now() - begun), said = [];
  if (usage) said.push(count(usage.completion_tokens, "token"));
  said.push(`${total.toLocaleString("en")} ms`);
  if (first) said.push(`first after ${Math.round(first - begun).toLocaleString("en")} ms`);
  if (ended === "length") said.push("cut off at the limit");
  if (ended === "stopped") said.push("stopped");
  figures.textContent = said.join(" \u00b7 ");
}

function stop() {
  if (running) running.abort();
}

async function ask() {
  const text = question.value.trim();
  if (!text || !about) { question.focus(); return; }
  if (!byId("tokens").reportValidity() || !byId("temperature").reportValidity()) return;
  stop();
  const own = running = new AbortController(), asked = columns;
  status.hidden = true;
  byId("stop").disabled = false;
  for (const { part } of asked) {
    part(".answer").replaceChildren();
    part(".answer").classList.remove("empty");
    part(".figures").textContent = "";
    part(".error").hidden = true;
  }
  if (byId("together").checked) {
    await Promise.all(asked.map((column) => answer(column, text, own.signal)));
  } else {
    for (const column of asked) if (!own.signal.aborted) await answer(column, text, own.signal);
  }
  if (running === own) { running = null; byId("stop").disabled = true; }
}

form.addEventListener("submit", (event) => { event.preventDefault(); ask(); });
byId("stop").addEventListener("click", stop);
document.addEventListener("keydown", (event) => { if (event.key === "Escape") stop(); });
question.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    ask();
  }
});

(async () => {
  try {
    const reply = await fetch("/playground");
    if (!reply.ok) throw await refusal(reply);
    about = await reply.json();
    byId("tokens").max = about.context;
    byId("model").title = about.model;
    byId("model").textContent = `${about.model.split("/").pop()} \u00b7 context of ${count(about.context, "token")}`;
    list();
    show();
    document.documentElement.dataset.ready = "yes";
  } catch (error) {
    status.textContent = words(error);
    status.hidden = false;
  }
})();
