"use strict";
const runs = JSON.parse(document.getElementById("figures").textContent).runs;
const symbols = {standard: "triangle-up", topk: "circle", abstopk: "hexagon", batchtopk: "square",
                 matryoshka_batchtopk: "pentagon", jumprelu: "diamond", gated: "star", pca: "x-thin", random: "cross-thin"};
const LOWEST = -0.5;
const dashes = ["solid", "dash", "dot"];
const hidden = new Set();    // indices of runs whose name was pressed
const filtered = new Set();  // and of those that the table's filter leaves out
const plotOptions = {responsive: true, displaylogo: false, displayModeBar: false};
const colour = name => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
const drawn = run => run.baseline ? colour("quiet") : colour("c" + run.colour);

function axis(title, more) {
  return {title: {text: title, standoff: 8, font: {size: 13}}, tickfont: {size: 12, color: colour("quiet")},
          gridcolor: colour("line"), linecolor: colour("line"), tickcolor: colour("line"), zeroline: false,
          exponentformat: "power", ...more};
}

function layout(x, y) {
  return {paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, hovermode: "closest",
          font: {family: "system-ui, sans-serif", size: 13, color: colour("ink")},
          hoverlabel: {bgcolor: colour("panel"), bordercolor: colour("line"), align: "left",
                       font: {color: colour("ink")}},
          margin: {l: 48, r: 14, t: 12, b: 48}, xaxis: x, yaxis: {...y, automargin: "left"}};
}

// Where a score may be drawn: one SAE that is far worse than nothing must not flatten all the others.
function sensible(values) {
  const kept = values.filter(value => value !== null && value >= LOWEST);
  if (!kept.length) return undefined;
  const low = Math.min(...kept), high = Math.max(...kept), room = 0.06 * (high - low || 1);
  return [low - room, high + room];
}

function tradeOff(key, title) {
  const shown = runs.filter((run, index) => run.l0 > 0 && run[key] !== null && !filtered.has(index));
  const groups = new Map();
  for (const run of shown) groups.set(run.group, [...(groups.get(run.group) || []), run]);
  const lines = [...groups.values()].filter(group => group.length > 1).map(group => {
    group.sort((a, b) => a.l0 - b.l0);
    return {x: group.map(run => run.l0), y: group.map(run => run[key]), mode: "lines", hoverinfo: "skip",
            line: {color: colour("quiet"), width: 1, dash: group[0].baseline ? "dot" : "solid"}, opacity: 0.6};
  });
  const marks = shown.map(run => ({
    x: [run.l0], y: [run[key]], mode: "markers", text: [run.hover], customdata: [run.address],
    hovertemplate: "%{text}<br>L0 %{x:.1f}<br>" + title.toLowerCase() + " %{y:.4f}<extra></extra>",
    marker: {color: drawn(run), size: 11, symbol: symbols[run.architecture] || "circle",
             line: {width: run.baseline ? 2 : 0, color: drawn(run)}}}));
  const x = axis("L0 (log)", {type: "log", tickvals: Array.from({length: 21}, (_, i) => 2 ** i)});
  return [[...lines, ...marks], layout(x, axis(title, {range: sensible(shown.map(run => run[key]))}))];
}

function lines(points, x, y, hover) {
  const traces = runs.flatMap((run, index) => {
    if (run.baseline) return [];
    const [xs, ys] = points(run);
    return {x: xs, y: ys, mode: xs.length === 1 ? "markers" : "lines", text: run.name,
            visible: !hidden.has(index) && !filtered.has(index),
            hovertemplate: "%{text}<br>" + hover + "<extra></extra>",
            line: {color: drawn(run), width: 2, dash: dashes[run.dash % 3]}};
  });
  return [traces, layout(x, y)];
}

const explained = runs.flatMap(run => run.curves.explained_variance);
const tokens = () => axis("Tokens", {tickformat: "~s", rangemode: "tozero"});
const figures = {
  ev: () => tradeOff("explained_variance", "Explained variance"),
  ce: () => tradeOff("ce_loss_score", "CE score"),
  loss: () => lines(run => [run.curves.tokens, run.curves.loss], tokens(), axis("Loss (log)", {type: "log"}),
                    "%{x:,} tokens, loss %{y:.4g}"),
  explained: () => lines(run => [run.curves.tokens, run.curves.explained_variance], tokens(),
                         axis("Explained variance", {range: sensible(explained)}), "%{x:,} tokens, %{y:.4f}"),
  dead: () => lines(run => [run.curves.tokens, run.curves.dead], tokens(),
                    axis("Dead", {tickformat: ".0%", rangemode: "tozero"}), "%{x:,} tokens, %{y:.1%} dead"),
  density: () => lines(run => [run.density.log10, run.density.latents],
                       axis("log10 of the share of tokens", {range: [null, 0]}), axis("Latents", {rangemode: "tozero"}),
                       "10^%{x:.2f} of tokens, %{y:,} latents"),
  position: () => lines(run => [run.added_loss.position, run.added_loss.nats],
                        axis("Position in the sequence"), axis("Nats", {rangemode: "tozero"}),
                        "position %{x}: %{y:.4f} nats more"),
  speed: () => lines(run => [run.speed.tokens, run.speed.rate], tokens(),
                     axis("Tokens a second", {tickformat: "~s", rangemode: "tozero"}), "%{x:,} tokens, %{y:,.0f}/s"),
};

function draw() {
  for (const [name, figure] of Object.entries(figures)) {
    const plot = document.getElementById("plot-" + name);
    if (plot) Plotly.react(plot, ...figure(), plotOptions);
  }
}

function sort(heading) {
  const column = heading.cellIndex, body = heading.closest("table").tBodies[0];
  const descending = heading.getAttribute("aria-sort") === "ascending";
  const value = row => {
    const cell = row.cells[column];
    return cell.dataset.value === undefined ? cell.textContent : Number(cell.dataset.value);
  };
  const blank = row => row.cells[column].classList.contains("none");
  const order = (a, b) => typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
  const rows = [...body.rows].sort((a, b) =>
    blank(a) - blank(b) || order(value(a), value(b)) * (descending ? -1 : 1));
  for (const other of heading.parentElement.cells) other.setAttribute("aria-sort", "none");
  heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
  body.append(...rows);
}

function filter(query) {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  const rows = [...document.querySelectorAll("#runs tbody tr")];
  filtered.clear();
  for (const row of rows) {
    const text = (row.cells[0].textContent + " " + row.cells[1].textContent).toLowerCase();
    row.hidden = !words.every(word => text.includes(word));
    if (row.hidden) filtered.add(Number(row.dataset.run));
  }
  for (const button of document.querySelectorAll(".key button"))
    button.hidden = filtered.has(Number(button.dataset.run));
  document.getElementById("filtered").value = words.length ? `${rows.length - filtered.size} of ${rows.length}` : "";
  draw();
}

for (const button of document.querySelectorAll("thead button"))
  button.addEventListener("click", () => sort(button.closest("th")));
document.getElementById("filter").addEventListener("input", event => filter(event.target.value));
for (const button of document.querySelectorAll(".key button"))
  button.addEventListener("click", () => {
    const index = Number(button.dataset.run), pressed = button.getAttribute("aria-pressed") === "true";
    button.setAttribute("aria-pressed", String(!pressed));
    if (pressed) hidden.add(index); else hidden.delete(index);
    draw();
  });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
draw();
for (const name of ["ev", "ce"])
  document.getElementById("plot-" + name)?.on("plotly_click", event => {
    const address = event.points[0].customdata;
    if (address) location.hash = address;
  });
