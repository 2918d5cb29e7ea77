// The chat box: streams from /v1/chat/completions, or from /v1/completions if the model has no chat template.

import { call, events, Refused } from "./api.js";
import { byId, count, duration, element } from "./draw.js";
import { passkeyText } from "./passkey.js";

const log = byId("chat-log");
let model = null;
let turns = [];
let running = null;

export function setModel(now) {
  model = now;
  const [label, hint] = model.chat ? ["Message", "Type a message."] : ["Text to continue", "Type a text for the model to continue."];
  byId("chat-label").textContent = label;
  byId("chat-input").placeholder = `${hint} Enter sends, Shift+Enter starts a new line.`;
}

function say(kind, text) {
  const stick = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  const message = element("div", { class: `message ${kind}` });
  message.textContent = text;
  log.append(message);
  if (stick || kind === "user") log.scrollTop = log.scrollHeight;
  return message;
}

function number(id) {
  const input = byId(id);
  return input.value === "" ? undefined : Number(input.value);
}

function send() {
  const text = byId("chat-input").value.trim();
  if (!text || !model || running) return;
  byId("chat-input").value = "";
  say("user", text);
  if (model.chat) {
    turns.push({ role: "user", content: text });
    answer("v1/chat/completions", { messages: turns, max_tokens: number("chat-max") }, turns);
  } else {
    answer("v1/completions", { prompt: text, max_tokens: number("chat-max") });
  }
}

function sendLong() {
  if (!model || running) return;
  const { prompt, about } = passkeyText(model.max_model_len);
  say("user", about);
  answer("v1/completions", { prompt, max_tokens: 8, temperature: 0 });
}

// Streams one answer into the log, and into `conversation` if it belongs to one.
async function answer(path, body, conversation = null) {
  running = new AbortController();
  setBusy(true);
  const message = say("assistant waiting", "");
  let thinking = null;
  let usage = null;
  const started = performance.now();
  let first = null;
  try {
    const response = await call(path, {
      method: "POST",
      signal: running.signal,
      headers: { "content-type": "application/json" },
      body: JSON.stringify({
        model: model.name, stream: true, stream_options: { include_usage: true }, temperature: number("chat-temperature"), ...body,
      }),
    });
    for await (const event of events(response)) {
      if (event.error) throw new Refused(event.error.code, event.error.message);
      usage = event.usage ?? usage;
      const choice = event.choices[0];
      if (!choice) continue;
      if (choice.delta?.reasoning_content) {
        if (!thinking) {
          thinking = element("div", { class: "message thinking" });
          message.before(thinking);
        }
        append(thinking, choice.delta.reasoning_content);
        first ??= performance.now();
      }
      const text = choice.delta ? choice.delta.content : choice.text;
      if (text) {
        first ??= performance.now();
        append(message, text);
      }
    }
  } catch (error) {
    if (error.name !== "AbortError") say("error", explain(error));
  }
  message.classList.remove("waiting");
  if (message.textContent) {
    conversation?.push({ role: "assistant", content: message.textContent });
    note(message, usage, first === null ? null : (first - started) / 1000, (performance.now() - (first ?? started)) / 1000);
  } else {
    message.remove();
    conversation?.pop(); // drop the question too: roles must alternate
  }
  running = null;
  setBusy(false);
}

function append(message, text) {
  const stick = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  message.append(document.createTextNode(text));
  if (stick) log.scrollTop = log.scrollHeight;
}

function note(message, usage, first, rest) {
  const parts = [];
  if (usage) parts.push(`${count(usage.prompt_tokens)} prompt tokens`, `${count(usage.completion_tokens)} generated`);
  if (first !== null) parts.push(`first token after ${duration(first)}`);
  if (usage?.completion_tokens > 1 && rest > 0) parts.push(`${((usage.completion_tokens - 1) / rest).toFixed(1)} tokens/s`);
  const line = element("p", { class: "meta" });
  line.textContent = parts.join(" · ");
  message.after(line);
  log.scrollTop = log.scrollHeight;
}

function explain(error) {
  if (!(error instanceof Refused)) return "The server can't be reached, or the connection was lost.";
  if (error.status === 401) {
    byId("chat-form").querySelector("details").open = true;
    byId("api-key").focus();
    return "This server needs an API key. Enter it under Settings; it is kept in this page's memory only.";
  }
  return error.message;
}

function setBusy(busy) {
  byId("chat-send").disabled = byId("chat-long").disabled = busy;
  byId("chat-stop").hidden = !busy;
}

byId("chat-form").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
byId("chat-input").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
byId("chat-stop").addEventListener("click", () => running?.abort());
byId("chat-long").addEventListener("click", sendLong);
byId("chat-clear").addEventListener("click", () => {
  running?.abort();
  turns = [];
  log.replaceChildren();
});
