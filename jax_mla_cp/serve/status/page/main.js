// Polls GET /status once a second and draws it.

import { call } from "./api.js";
import { setModel } from "./chat.js";
import { drawLatency, drawRate } from "./charts.js";
import { ago, byId, count, duration, element, percent } from "./draw.js";
import { drawMesh } from "./mesh.js";
import { startTheme } from "./theme.js";
import { describe, drawBars, drawPrompts, stateOf } from "./zigzag.js";

const EVERY = 1000;
const PATIENCE = 5000;
let last = null;

const text = (id, value) => { byId(id).textContent = value; };

function setHealth(state, words) {
  byId("health").dataset.state = state;
  if (byId("health-text").textContent !== words) text("health-text", words); // screen readers announce every change
}

function drawOnce(status) {
  text("model", status.model.name);
  document.title = `${status.model.name} · jax_mla_cp`;
  text("subtitle", `jax_mla_cp · requests of up to ${count(status.model.max_model_len)} tokens`);
  byId("facts").replaceChildren(...Object.entries(status.model.facts).map(([key, value]) =>
    element("div", {}, element("dt", {}, key.replaceAll("_", " ")), element("dd", {}, value))));
  setModel(status.model);
}

// The average over 5 seconds, since a step may take longer than one.
function perSecond(series) {
  const recent = series.filter(([age]) => age <= 5).reduce((sum, [, amount]) => sum + amount, 0);
  return count(Math.round(recent / 5));
}

function drawTiles(status) {
  text("running", count(status.running));
  text("waiting", count(status.waiting));
  text("prompt-rate", perSecond(status.prompt_rate));
  text("token-rate", perSecond(status.token_rate));
  text("prefix", percent(status.prefix_hits, status.prefix_queries));
  text("prefix-note", status.prefix_queries ? `of ${count(status.prefix_queries)} tokens` : "of prompt tokens");
  text("preemptions", count(status.preemptions));
  const drafts = status.speculation;
  text("drafts", drafts ? percent(drafts.accepted, drafts.drafted) : "off");
  text("drafts-note", drafts ? `of ${count(drafts.drafted)} drafts` : "speculative decoding");
}

function drawCompiling(compiling) {
  const notice = byId("compiling");
  const words = compiling
    ? `Compiling ${compiling.done + 1} of ${compiling.total} programs (${count(compiling.tokens)} tokens per step). Requests wait until it is done.`
    : "";
  notice.hidden = !compiling;
  if (notice.textContent !== words) notice.textContent = words; // screen readers announce every change
}

function drawPages({ total, used, cached, free }) {
  const parts = [["used", used], ["cached", cached]].map(([kind, pages]) => {
    const part = element("i", { class: kind });
    part.style.width = `${(100 * pages) / total}%`;
    return part;
  });
  byId("pages").replaceChildren(...parts);
  byId("pages").setAttribute("aria-label", `${used} of ${total} pages in use, ${cached} reusable, ${free} free`);
  text("pages-size", `${count(total)} pages`);
  text("pages-used", count(used));
  text("pages-cached", count(cached));
  text("pages-free", count(free));
}

function drawProcesses(processes) {
  byId("processes-card").hidden = !processes;
  if (!processes) return;
  text("processes-size", `${count(processes.length)} processes`);
  byId("processes").replaceChildren(...processes.map((p) => element("tr", {}, ...[
    p.process, p.host, p.process ? `${duration(p.heartbeat_age)} ago` : "this server", count(p.step), p.step ? duration(p.step_seconds) : "–",
  ].map((value) => element("td", {}, String(value))))));
}

function drawMeshCard(mesh) {
  drawMesh(byId("mesh"), mesh);
  text("mesh-size", `dp ${mesh.dp} × cp ${mesh.cp} × tp ${mesh.tp} = ${mesh.dp * mesh.cp * mesh.tp} devices`);
  byId("mesh-dp").hidden = mesh.dp === 1;
}

function drawPrefill({ prefill, mesh: { cp }, running }) {
  const { live, text: words } = stateOf(prefill, running);
  byId("zigzag-state").classList.toggle("live", live);
  text("zigzag-state", words);
  drawPrompts(byId("prompts"), prefill, cp);
  const none = Array(cp).fill(0);
  drawBars(byId("rank-tokens"), prefill?.tokens ?? none, "tokens");
  drawBars(byId("rank-pairs"), prefill?.pairs ?? none, "pairs");
  text("balance", prefill ? describe(prefill) : "");
}

function drawLatencies(status) {
  for (const [id, name, latency] of [
    ["ttft", "Time to first token", status.ttft], ["itl", "Inter-token latency", status.itl], ["step", "Step time", status.step_time],
  ]) {
    drawLatency(byId(id), latency, name);
    const { summary } = latency;
    const words = summary ? [element("span", { class: "key median" }), "p50 ", element("b", {}, duration(summary.p50)), element("span", { class: "key tail" }), "p99 ", element("b", {}, duration(summary.p99))] : ["–"];
    byId(`${id}-now`).replaceChildren(...words);
  }
  drawRate(byId("prompts-rate"), status.prompt_rate, "Prompt tokens per second", "prompt");
  drawRate(byId("tokens-rate"), status.token_rate, "Generated tokens per second", "token");
}

function draw(status) {
  setHealth(status.healthy ? "good" : "bad", status.healthy ? `Healthy, up ${ago(status.uptime)}` : status.reason ?? "Not healthy");
  drawCompiling(status.compiling);
  drawTiles(status);
  drawPages(status.pages);
  drawProcesses(status.processes);
  drawPrefill(status);
  drawLatencies(status);
}

async function poll() {
  if (!document.hidden) {
    try {
      const status = await (await call("status", { signal: AbortSignal.timeout(PATIENCE) })).json();
      if (!last || status.uptime < last.uptime) { // the first response, or the server was restarted
        drawOnce(status);
        drawMeshCard(status.mesh);
      }
      last = status;
      draw(status);
    } catch (error) {
      setHealth("bad", error.status === 401 ? "Needs an API key (see Settings)" : "Not answering");
    }
  }
  setTimeout(poll, EVERY);
}

function redraw() {
  if (!last) return;
  drawMeshCard(last.mesh);
  draw(last);
}

startTheme(byId("theme"), redraw);
addEventListener("resize", redraw);
poll();
