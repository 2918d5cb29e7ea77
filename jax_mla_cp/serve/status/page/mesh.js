// Draws the mesh: a box per dp group, a row per cp rank (the zigzag's lanes), a column per tp rank, a square per device.

import { element, rankColor, svg } from "./draw.js";

const CELL = 30;
const GAP = 4;
const LABEL = 34;
const TOP = 20;

export function drawMesh(target, { dp, cp, tp }) {
  const groups = [];
  for (let group = 0; group < dp; group++) groups.push(element("div", {}, drawGroup(group, dp, cp, tp)));
  target.replaceChildren(...groups);
}

function drawGroup(group, dp, cp, tp) {
  const width = LABEL + tp * CELL;
  const height = TOP + cp * CELL;
  const name = dp > 1 ? `dp ${group}: ` : "";
  const picture = svg("svg", {
    width, viewBox: `0 0 ${width} ${height}`, role: "img",
    "aria-label": `${name}${cp * tp} devices, ${cp} cp ranks by ${tp} tp ranks`,
  });
  for (let rank = 0; rank < cp; rank++) {
    picture.append(label(LABEL - 8, TOP + rank * CELL + 17, `cp${rank}`, "end"));
    for (let column = 0; column < tp; column++) {
      const square = svg("rect", {
        x: LABEL + column * CELL, y: TOP + rank * CELL, width: CELL - GAP, height: CELL - GAP, rx: 5, fill: rankColor(rank, cp),
      });
      const device = (group * cp + rank) * tp + column;
      square.append(svg("title", {}, `device ${device}: ${dp > 1 ? `dp ${group}, ` : ""}cp ${rank}, tp ${column}`));
      picture.append(square);
    }
  }
  for (let column = 0; column < tp; column++) picture.append(label(LABEL + column * CELL + (CELL - GAP) / 2, 12, `tp${column}`, "middle"));
  if (dp > 1) picture.append(label(0, 12, `dp${group}`, "start"));
  return picture;
}

function label(x, y, text, anchor) {
  return svg("text", { x, y, "text-anchor": anchor }, text);
}
