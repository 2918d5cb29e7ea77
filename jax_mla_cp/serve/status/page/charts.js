// Small charts of the last two minutes, newest at the right.

import { count, duration, svg } from "./draw.js";

const SECONDS = 120;
const HEIGHT = 110;
const TOP = 6;
const BOTTOM = HEIGHT - 18;

export function drawLatency(target, { series, summary }, name) {
  const frame = newFrame(target, niceMax(Math.max(0, ...series.map(([, , tail]) => tail))), duration);
  frame.picture.setAttribute("aria-label", summary
    ? `${name}: median ${duration(summary.p50)}, 99th percentile ${duration(summary.p99)} over the last two minutes`
    : `${name}: no data in the last two minutes`);
  for (const [kind, column] of [["tail", 2], ["median", 1]]) {
    const points = series.map((point) => [frame.x(point[0]), frame.y(point[column])]);
    if (points.length === 1) frame.picture.append(svg("circle", { class: `lone ${kind}`, cx: points[0][0], cy: points[0][1], r: 3 }));
    else frame.picture.append(svg("path", { class: kind, d: path(points) }));
  }
}

export function drawRate(target, series, name, kind) {
  const most = Math.max(0, ...series.map(([, amount]) => amount));
  const frame = newFrame(target, niceMax(most), count);
  frame.picture.setAttribute("aria-label", `${name}: peak of ${count(most)} in one second over the last two minutes`);
  const wide = Math.max(frame.x(0) - frame.x(1) - 1, 1);
  for (const [age, amount] of series) {
    const y = frame.y(amount);
    frame.picture.append(svg("rect", { class: kind, x: frame.x(age), y, width: wide, height: BOTTOM - y }));
  }
}

function newFrame(target, most, say) {
  const width = Math.max(target.clientWidth, 120);
  const picture = svg("svg", { width, height: HEIGHT, viewBox: `0 0 ${width} ${HEIGHT}`, role: "img" });
  const left = 44;
  const x = (age) => left + (width - left) * (1 - age / SECONDS);
  const y = (value) => BOTTOM - ((BOTTOM - TOP) * value) / most;
  for (const value of [0, most / 2, most]) {
    picture.append(svg("line", { class: "grid", x1: left, x2: width, y1: y(value), y2: y(value) }));
    picture.append(svg("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, value ? say(value) : "0"));
  }
  picture.append(svg("text", { x: left, y: HEIGHT - 3 }, "2 min ago"));
  picture.append(svg("text", { x: width, y: HEIGHT - 3, "text-anchor": "end" }, "now"));
  target.replaceChildren(picture);
  return { picture, x, y };
}

function niceMax(value) {
  if (value <= 0) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 4, 10].find((step) => step * power >= value) * power;
}

function path(points) {
  return points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");
}
