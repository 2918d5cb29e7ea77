// The tokens of a prompt that each cp rank computed: a lane per rank, the prompt from left to right. A step's chunks go down
// the lanes and up again; the last step is highlighted.

import { ago, count, duration, element, percent, rankColor, svg } from "./draw.js";

const LABEL = 34;

export function drawPrompts(target, prefill, cp) {
  if (!prefill) {
    target.replaceChildren(element("p", { class: "empty" }, "No prompt has been prefilled yet. Send one below and watch it here."));
    return;
  }
  const shown = prefill.prompts.filter((prompt) => prompt.active).slice(0, 4);
  target.replaceChildren(...shown.map((prompt) => drawPrompt(prompt, cp, target.clientWidth)));
}

function drawPrompt(prompt, cp, width) {
  const done = percent(prompt.done, prompt.total);
  const text = `${count(prompt.done)} of ${count(prompt.total)} tokens, ${done}`;
  const reused = prompt.reused ? `, ${count(prompt.reused)} reused from the cache` : "";
  return element("div", { class: "prompt" },
    element("div", { class: "prompt-head" }, element("code", {}, prompt.id), element("span", {}, text + reused)),
    lanes(prompt, cp, width, `${text}${reused}`));
}

function lanes(prompt, cp, width, text) {
  const lane = Math.max(6, Math.min(20, 240 / cp));
  const height = cp * lane;
  const x = (token) => LABEL + ((width - LABEL) * token) / prompt.total;
  const picture = svg("svg", { width, height: height + 18, viewBox: `0 0 ${width} ${height + 18}`, role: "img", "aria-label": `Prompt over ${cp} cp ranks: ${text}` });
  const box = (start, end, top, tall, attributes, title) => {
    const drawn = svg("rect", { x: x(start), y: top, width: Math.max(x(end) - x(start), 0.5), height: tall, ...attributes });
    if (title) drawn.append(svg("title", {}, title));
    picture.append(drawn);
  };
  for (let rank = 0; rank < cp; rank++) {
    box(0, prompt.total, rank * lane, lane - 2, { class: "lane", rx: 3 });
    if (lane >= 11 || rank % Math.ceil(11 / lane) === 0) {
      picture.append(svg("text", { x: LABEL - 8, y: rank * lane + lane / 2 + 3, "text-anchor": "end" }, `cp${rank}`));
    }
  }
  const first = prompt.steps[0].start;
  if (prompt.reused) hatch(picture, x(0), x(prompt.reused), height - 2);
  if (first > prompt.reused) box(prompt.reused, first, 0, height - 2, { class: "done" }, "earlier steps");
  prompt.steps.forEach((step, index) => {
    const last = index === prompt.steps.length - 1;
    for (const { rank, start, end } of step.chunks) {
      const where = `tokens ${start} to ${end - 1}`;
      const look = last ? "edge" : "edge earlier";
      if (rank === null) box(start, end, 0, height - 2, { class: `done ${look}` }, `${where}: not split, on one rank`);
      else box(start, end, rank * lane, lane - 2, { class: look, fill: rankColor(rank, cp) }, `${where} on cp rank ${rank}`);
    }
  });
  picture.append(svg("text", { x: LABEL, y: height + 13 }, "0"));
  picture.append(svg("text", { x: width, y: height + 13, "text-anchor": "end" }, count(prompt.total)));
  return picture;
}

function hatch(picture, from, to, height) {
  const lines = svg("g", { class: "hatch" });
  const step = 6;
  for (let at = from; at < to; at += step) {
    const long = Math.min(height, to - at);
    lines.append(svg("line", { x1: at, y1: height, x2: at + long, y2: height - long }));
  }
  lines.append(svg("title", {}, "reused from the cache"));
  picture.append(lines);
}

export function drawBars(target, values, unit) {
  const most = Math.max(...values, 1);
  target.replaceChildren(...values.map((value, rank) => {
    const bar = element("i");
    bar.style.width = `${(100 * value) / most}%`;
    bar.style.background = rankColor(rank % values.length, values.length);
    return element("li", { "aria-label": `cp rank ${rank}: ${value} ${unit}` },
      element("span", {}, `${rank}`), element("span", { class: "bar" }, bar), element("span", {}, count(value)));
  }));
}

export function describe(prefill) {
  const spread = Math.max(...prefill.tokens) - Math.min(...prefill.tokens);
  return `Balance ${prefill.balance.toFixed(4)} (mean divided by maximum of the pairs; 1 is perfect). Tokens per rank differ by at most ${spread}. ` +
    `The step took ${duration(prefill.seconds)}.`;
}

// A prompt's next report only comes at the end of its next step.
export function stateOf(prefill, running) {
  if (!prefill) return { live: false, text: "idle" };
  const unfinished = running > 0 && prefill.prompts.some((prompt) => prompt.active && prompt.done < prompt.total);
  const live = prefill.age < (unfinished ? Math.max(2, 3 * prefill.seconds) : 1.5);
  return { live, text: live ? "prefilling" : `last prefill ${ago(prefill.age)} ago` };
}
