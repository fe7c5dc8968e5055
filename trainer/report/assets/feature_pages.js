"use strict";
// The page of one SAE, of what follows # in the address: /name of the run, or /name/latent. Every string of a file goes
// in as text, never as HTML.
const sweepPage = document.getElementById("sweep"), saePage = document.getElementById("sae");
const tip = document.getElementById("tip");
const SHOWN_BEFORE = 12, SHOWN_AFTER = 12;  // characters around the peak in the list of features
const parsed = new Map();                   // index of a run -> its features, once they were looked at
const canUnpack = "DecompressionStream" in window;
let shown = {index: -1, latent: -1};

function element(name, attributes, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) if (value !== null) made.setAttribute(key, value);
  made.append(...children.filter(child => child !== null));
  return made;
}

const count = number => number.toLocaleString("en");
const readable = text => text.replace(/\n/g, "\u23ce").replace(/\t/g, "\u21e5").replace(/\r/g, "\u240d");
const isNumber = query => /^\s*\d+\s*$/.test(query);
const elsewhere = latent =>
  `Latent ${latent} is not among those shown: actcache features RUN --feature ${latent} prints it.`;

function percent(share) {
  if (share < 0.001) return (1e6 * share).toFixed(0) + " of a million";
  return (100 * share).toFixed(share < 0.1 ? 2 : 1) + " %";
}

function facts(pairs, id) {
  const items = pairs.map(([term, value]) => element("div", {}, element("dt", {}, term), element("dd", {}, value)));
  return element("dl", {class: "facts", id}, ...items);
}

async function featuresOf(index) {
  if (!parsed.has(index)) {
    const packed = document.getElementById("features-" + index);
    parsed.set(index, packed && canUnpack ? await unpacked(packed.textContent) : null);
  }
  return parsed.get(index);
}

function unpacked(text) {
  const bytes = Uint8Array.from(atob(text), character => character.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
}

// --- contexts ---

// The stronger the latent is on a token, the stronger its colour; its tooltip says how strong.
function token(text, act, strongest, isPeak) {
  if (!act) return document.createTextNode(readable(text));
  const kind = "token" + (isPeak ? " peak" : "") + (act < 0 ? " negative" : "");
  const mark = element("span", {class: kind, "data-tip": `${readable(text)}  ${act}`}, readable(text));
  mark.style.setProperty("--share", Math.min(1, Math.abs(act) / strongest).toFixed(3));
  return mark;
}

function contextLine(context, page, strings) {
  const tokens = context.tokens.map((place, i) =>
    token(strings[place], context.acts[i], page.max_act, i === context.peak));
  const where = `sequence ${context.at[0]}, position ${context.at[1]}`;
  return element("li", {class: "context"},
    element("span", {class: "act", title: where}, String(context.acts[context.peak])),
    element("span", {class: "text"}, ...tokens));
}

const contexts = (list, page, strings) =>
  element("ol", {class: "contexts"}, ...list.map(context => contextLine(context, page, strings)));

function snippet(page, strings) {
  const {tokens, peak} = page.top[0];
  const text = (from, to) => tokens.slice(from, to).map(place => readable(strings[place])).join("");
  return element("span", {class: "snippet"}, text(0, peak).slice(-SHOWN_BEFORE),
    element("mark", {}, text(peak, peak + 1)), text(peak + 1).slice(0, SHOWN_AFTER));
}

function showTip(target) {
  const mark = target.closest?.("[data-tip]");
  tip.hidden = !mark;
  if (!mark) return;
  tip.textContent = mark.dataset.tip;
  const box = mark.getClientRects()[0], above = box.top - tip.offsetHeight - 6;
  tip.style.left = Math.max(4, Math.min(box.left, innerWidth - tip.offsetWidth - 4)) + "px";
  tip.style.top = (above > 0 ? above : box.bottom + 6) + "px";
}

// --- search ---

// How strong a latent is at most, in the contexts shown, on one of the tokens at these places; 1 is its maximum.
function strengthOn(places, page) {
  let most = 0;
  for (const list of [page.top, ...page.bands.map(band => band.contexts)])
    for (const context of list)
      context.tokens.forEach((place, i) => {
        if (places.has(place)) most = Math.max(most, Math.abs(context.acts[i]) / page.max_act);
      });
  return most;
}

// Those whose number begins with the query, then those that fire on a token that holds it, the strongest first.
function found(query, data) {
  const wanted = query.toLowerCase(), id = wanted.trim();
  if (!id) return data.latents;
  const holds = text => text.toLowerCase().includes(wanted) || readable(text).toLowerCase().includes(wanted);
  const places = new Set(data.tokens.flatMap((text, place) => holds(text) ? [place] : []));
  const byId = isNumber(query) ? data.latents.filter(page => String(page.latent).startsWith(id)) : [];
  byId.sort((a, b) => a.latent - b.latent);
  const others = data.latents.filter(page => !byId.includes(page)).map(page => [strengthOn(places, page), page]);
  const byToken = others.filter(([strength]) => strength > 0).sort((a, b) => b[0] - a[0]);
  return [...byId, ...byToken.map(([, page]) => page)];
}

function listed(index, data, query) {
  const pages = found(query, data), id = Number(query);
  const link = page => element("a", {href: `#${runs[index].address}/${page.latent}`},
    element("b", {}, String(page.latent)), snippet(page, data.tokens));
  document.getElementById("feature-list").replaceChildren(...pages.map(page => element("li", {}, link(page))));
  const isAbsent = isNumber(query) && !data.latents.some(page => page.latent === id);
  const how = query.trim() ? `${pages.length} of ${data.latents.length} found. ` : "";
  document.getElementById("found").value = how + (isAbsent ? elsewhere(id) : "");
  markCurrent();
}

function markCurrent() {
  for (const link of document.querySelectorAll("#feature-list a"))
    if (link.hash.endsWith("/" + shown.latent)) link.setAttribute("aria-current", "true");
    else link.removeAttribute("aria-current");
}

// Only the list scrolls: where the page stands is for who pressed.
function revealCurrent() {
  const current = document.querySelector("#feature-list a[aria-current]");
  if (!current) return;
  const list = current.closest("nav"), box = list.getBoundingClientRect();
  const {top, bottom} = current.getBoundingClientRect();
  if (top < box.top || bottom > box.bottom) list.scrollTop += top - box.top - list.clientHeight / 2;
}

// --- one latent ---

function lensTable(title, rows) {
  const most = Math.max(...rows.map(([, logit]) => Math.abs(logit)), Number.MIN_VALUE);
  const row = ([text, logit]) => {
    const cell = element("td", {class: "number"}, logit.toPrecision(3));
    cell.style.setProperty("--share", (Math.abs(logit) / most).toFixed(3));
    return element("tr", {}, element("th", {scope: "row"}, readable(text)), cell);
  };
  return element("table", {class: "lens"}, element("caption", {}, title), element("tbody", {}, ...rows.map(row)));
}

function lensFigure(lens) {
  const meaning = "Tokens that its direction makes likelier and less likely: logits for one unit of activation, " +
    "before the final norm's scale.";
  return element("figure", {}, element("figcaption", {}, element("h3", {}, "Logit lens"), element("p", {}, meaning)),
    element("div", {class: "pair"}, lensTable("Promotes", lens.promoted), lensTable("Suppresses", lens.suppressed)));
}

function histogramFigure() {
  const plot = {class: "plot small", id: "plot-histogram", role: "img", "aria-label": "Histogram of activations"};
  const caption = [element("h3", {}, "Activations"), element("p", {}, "On the tokens where it fires.")];
  return element("figure", {}, element("figcaption", {}, ...caption), element("div", plot));
}

function drawHistogram(page) {
  const {counts, edges} = page.histogram;
  const middles = counts.map((_, i) => (edges[i] + edges[i + 1]) / 2);
  const bars = {type: "bar", x: middles, y: counts, width: counts.map((_, i) => edges[i + 1] - edges[i]),
                marker: {color: colour("fire"), line: {width: 0}},
                hovertemplate: "around %{x:.3g}: %{y:,} tokens<extra></extra>"};
  const drawnOn = layout(axis("Activation"), axis("Tokens (log)", {type: "log", dtick: "D2"}));
  Plotly.react(document.getElementById("plot-histogram"), [bars], drawnOn, plotOptions);
}

function companions(index, data, page) {
  const pages = new Set(data.latents.map(other => other.latent));
  const name = latent => pages.has(latent)
    ? element("a", {href: `#${runs[index].address}/${latent}`}, String(latent)) : String(latent);
  const items = page.coactive.map(([latent, both]) => element("li", {}, name(latent), ` on ${count(both)} tokens`));
  return items.length ? element("ul", {class: "coactive"}, ...items) : element("p", {}, "No other latent.");
}

function featurePage(index, data, page) {
  const band = each => [element("h4", {}, `${each.from} to ${each.to}`), contexts(each.contexts, page, data.tokens)];
  return [
    element("h2", {id: "feature-title"}, `Latent ${page.latent}`),
    facts([["Fires on", `${percent(page.n_fired / data.n_tokens)} (${count(page.n_fired)} tokens)`],
           ["Largest activation", String(page.max_act)]], null),
    element("div", {class: "figures"}, histogramFigure(), page.lens && lensFigure(page.lens)),
    element("h3", {}, "Where it fires most"), contexts(page.top, page, data.tokens),
    element("h3", {}, "Weaker, from bands of its range"), ...page.bands.flatMap(band),
    element("h3", {}, "Fires together with"), companions(index, data, page),
  ];
}

function showFeature(index, data, latent) {
  const page = data.latents.find(each => each.latent === latent), view = document.getElementById("feature");
  shown = {index, latent};
  markCurrent();
  revealCurrent();
  view.replaceChildren(...(page ? featurePage(index, data, page) : [element("p", {}, elsewhere(latent))]));
  if (page) drawHistogram(page);
}

// --- one SAE ---

function featureBrowser(data) {
  const chosen = `${count(data.latents.length)} of ${count(data.d_sae)} latents (${count(data.n_dead)} never fired ` +
    `on ${count(data.n_tokens)} held-out tokens): those with the largest product of their strongest activation and ` +
    "the bits that their firing tells, log2(1 / share of tokens).";
  const search = element("input", {type: "search", id: "search", autocomplete: "off",
                                   placeholder: "a latent's number, or a token"});
  return [
    element("h2", {}, "Features"), element("p", {}, chosen),
    element("p", {class: "filter"},
      element("label", {}, "Search ", search), element("output", {id: "found", for: "search"})),
    element("div", {class: "browser"},
      element("nav", {"aria-label": "Features"}, element("ol", {id: "feature-list"})),
      element("article", {id: "feature"})),
  ];
}

function absence(run, data) {
  if (run.baseline) return "A baseline has no features.";
  if (data) return "None of its latents fires on enough held-out tokens to be shown.";
  if (!canUnpack) return "This browser cannot unpack features: open the page in one of May 2023 or later.";
  return "Its features are not here: actcache features RUN finds them; then write the report again.";
}

function showSae(index, data) {
  const run = runs[index], hasFeatures = data !== null && data.latents.length > 0;
  saePage.replaceChildren(
    element("p", {}, element("a", {href: "#"}, "\u2190 all SAEs")),
    element("h1", {}, run.about.name),
    element("p", {class: "lead"}, run.about.error || run.architecture),
    facts(run.about.metrics, "metrics"),
    element("details", {}, element("summary", {}, "Settings"), facts(run.about.settings, "settings")),
    ...(hasFeatures ? featureBrowser(data) : [element("p", {id: "no-features"}, absence(run, data))]));
  if (!hasFeatures) return;
  const search = document.getElementById("search");
  search.addEventListener("input", () => listed(index, data, search.value));
  listed(index, data, "");
}

async function route() {
  const address = location.hash, [, name, latent] = address.slice(1).split("/");
  const index = name ? runs.findIndex(run => run.address === "/" + name) : -1;
  const data = index < 0 ? null : await featuresOf(index);
  if (location.hash !== address) return;  // somebody was faster than the unpacking
  const isNew = shown.index !== index, title = sweepPage.querySelector("h1").textContent;
  tip.hidden = true;
  sweepPage.hidden = index >= 0;
  saePage.hidden = index < 0;
  document.title = index < 0 ? title : `${runs[index].about.name} - ${title}`;
  if (isNew) shown = {index, latent: -1};
  if (index < 0) return sweepPage.querySelectorAll(".plot").forEach(plot => Plotly.Plots.resize(plot));
  if (isNew) showSae(index, data);
  if (data && data.latents.length) showFeature(index, data, latent ? Number(latent) : data.latents[0].latent);
  if (latent) document.getElementById("feature")?.scrollIntoView();
  else scrollTo(0, 0);
}

for (const event of ["pointerover", "click"]) document.addEventListener(event, ({target}) => showTip(target));
addEventListener("scroll", () => { tip.hidden = true; }, {passive: true});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  const page = shown.index >= 0 && parsed.get(shown.index)?.latents.find(each => each.latent === shown.latent);
  if (page) drawHistogram(page);
});
addEventListener("hashchange", route);
route();
