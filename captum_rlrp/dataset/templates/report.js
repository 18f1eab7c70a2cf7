// The views of the report. The address after # says which, so that links and "back" work.
const report = JSON.parse(document.getElementById("report").textContent);
const rows = report.rows;
const $ = (id) => document.getElementById(id);
const PAGE = 48;
const percent = (x) => `${(100 * x).toFixed(1)} %`;
const className = (i) => report.classes[i] ?? `class ${i}`;
const filterIds = ["class", "by", "judged", "least", "most", "search", "order"];
let found = []; // the rows that pass the filters, in order
let galleryLink = "#gallery";

// ---- data that is loaded as needed -------------------------------------------------------------

const chunks = new Map();
const waiting = new Map();
function receive(name, content) { waiting.get(name)?.(content); }

function chunk(name) {
  if (!chunks.has(name)) {
    const inline = $(`chunk-${name}`);
    chunks.set(name, inline ? Promise.resolve(JSON.parse(inline.textContent)) : new Promise((done, fail) => {
      waiting.set(name, done);
      document.head.append(Object.assign(document.createElement("script"), { src: `data/${name}.js`, onerror: fail }));
    }));
    if (chunks.size > 24) chunks.delete(chunks.keys().next().value);
  }
  return chunks.get(name);
}

async function stored(kind, row) {
  const size = report.chunk[kind];
  return (await chunk(`${kind}-${String(Math.floor(row / size)).padStart(5, "0")}`))[row % size];
}

// ---- gallery -----------------------------------------------------------------------------------

function isRight(row) { return rows.label[row] < 0 ? null : rows.label[row] === rows.predicted[row]; }

function applyFilters() {
  const wanted = Object.fromEntries(filterIds.map((id) => [id, $(id).value]));
  const part = wanted.search.toLowerCase();
  found = rows.name.map((_, row) => row).filter((row) =>
    (wanted.class === "" || rows[wanted.by][row] === Number(wanted.class)) &&
    (wanted.judged === "" || isRight(row) === (wanted.judged === "right")) &&
    100 * rows.confidence[row] >= Number(wanted.least) &&
    100 * rows.confidence[row] <= Number(wanted.most || 100) &&
    (part === "" || rows.name[row].toLowerCase().includes(part)));
  const key = { sure: (r) => -rows.confidence[r], unsure: (r) => rows.confidence[r], mass: (r) => -rows.mass[r] }[wanted.order];
  if (key) found.sort((a, b) => key(a) - key(b) || a - b);
}

function card(row) {
  const verdict = isRight(row);
  const link = element("a", { href: `#sample=${row}` });
  const picture = element("div");
  link.append(picture, element("small", { class: verdict === false ? "wrong" : "" },
    `${className(rows.predicted[row])} ${percent(rows.confidence[row])}`,
    verdict === false ? `, wrong: is ${className(rows.label[row])}` : "",
    rows.target[row] !== rows.predicted[row] ? `; explained: ${className(rows.target[row])}` : ""));
  stored("thumbs", row).then((thumb) => picture.append(thumbnail(row, thumb)));
  return element("li", {}, link);
}

function thumbnail(row, thumb) {
  if (report.kind === "image") {
    const label = `${rows.name[row]}: what speaks for ${className(rows.target[row])}`;
    return heatCanvas(thumb[0], thumb.slice(1), label, report.saturated);
  }
  if (report.kind === "text") return tokenLine(thumb, report.saturated);
  return barRows(thumb.map(([k, r]) => [featureName(k), r]));
}

const featureName = (k) => report.features[k] ?? `feature ${k}`;

function showGallery(page) {
  applyFilters();
  const pages = Math.max(1, Math.ceil(found.length / PAGE));
  page = Math.min(Math.max(0, page), pages - 1);
  $("found").textContent = `${found.length} of ${rows.name.length}` + (pages > 1 ? `, page ${page + 1} of ${pages}` : "");
  $("grid").classList.toggle("wide", report.kind !== "image");
  $("grid").replaceChildren(...found.slice(page * PAGE, (page + 1) * PAGE).map(card));
  const link = (text, to, name) => to < 0 || to >= pages ? "" :
    element("a", { href: address(to), id: name }, text);
  $("pages").replaceChildren(link("← previous page", page - 1, "page-before"), link("next page →", page + 1, "page-after"));
  galleryLink = address(page);
}

function address(page) {
  const query = new URLSearchParams();
  for (const id of filterIds) if ($(id).value !== $(id).dataset.usual) query.set(id, $(id).value);
  if (page) query.set("page", page);
  return `#gallery${query.size ? `?${query}` : ""}`;
}

// ---- one sample --------------------------------------------------------------------------------

async function showSample(row) {
  row = Math.min(Math.max(0, row || 0), rows.name.length - 1);
  if (!found.includes(row)) { found = rows.name.map((_, i) => i); }
  const place = found.indexOf(row);
  $("sample-name").textContent = rows.name[row];
  for (const [id, other] of [["previous", found[place - 1]], ["next", found[place + 1]]]) {
    $(id).hidden = other === undefined;
    $(id).href = `#sample=${other}`;
  }
  $("back").href = galleryLink;
  const detail = await stored("detail", row);
  if (current() !== `sample=${row}`) return; // another one was asked for meanwhile
  const verdict = isRight(row);
  $("sample").replaceChildren(
    element("p", {}, `Predicted: ${className(rows.predicted[row])} (${percent(rows.confidence[row])})` +
      (verdict === null ? ". " : verdict ? ", right. " : `, wrong: it is ${className(rows.label[row])}. `) +
      ` Explained: ${className(rows.target[row])}. Σ|R| = ${rows.mass[row]}, conservation error ${rows.delta[row].toExponential(1)}.`),
    relevanceOf(row, detail),
    element("div", { class: "columns" },
      section("Likeliest classes", barRows(detail.likeliest.map(([c, p]) => [className(c), p, percent(p)]), false)),
      detail.flow.length > 1 ? section("Flow through the network (Σ|R|)", barRows(detail.flow, false)) : ""));
}

function section(title, ...content) { return element("section", {}, element("h3", {}, title), ...content); }

function figure(title, content) { return element("figure", {}, element("figcaption", {}, title), content); }

function relevanceOf(row, detail) {
  if (report.kind === "text") return tokenLine(detail.tokens, report.saturated);
  if (report.kind === "table") {
    return section("Features, the most relevant first", barRows(detail.features.map(([k, r, x]) =>
      [x === null ? featureName(k) : `${featureName(k)} = ${x}`, r])));
  }
  const box = element("div", { class: "maps" });
  if (detail.picture) box.append(figure("picture", element("img", { src: detail.picture, alt: rows.name[row], style: "width: 100%; border-radius: 4px" + (detail.picture.startsWith("data:image/png") ? "; image-rendering: pixelated" : "") })));
  box.append(figure("relevance of the input", heatCanvas(detail.picture, detail.heat, "heat map of the input", report.saturated)));
  for (const [name, ...heat] of detail.layers) box.append(figure(name, heatCanvas(null, heat, `heat map of ${name}`)));
  return box;
}

// ---- classes -----------------------------------------------------------------------------------

async function showClasses() {
  const pick = (id) => report.summaries[$(id).value];
  const [a, b] = [pick("first"), pick("second")];
  const parts = [a, b].map((summary) => {
    const part = element("div", {}, element("h3", {}, `${className(summary.class)} (${summary.count})`));
    if (summary.heat) part.append(figure("mean relevance", heatCanvas(null, summary.heat, "mean relevance")));
    for (const [layer, units] of summary.units) {
      if (layer !== $("layer").value) continue;
      const name = (u) => (layer === "input" && report.kind === "table" ? featureName(u) : `channel ${u}`);
      part.append(section(`Apart from all others: ${layer}`,
        barRows(units.map(([u, d, p]) => [`${name(u)}, p ${p < 1e-4 ? "< 0.0001" : `= ${p}`}`, d]))));
    }
    return part;
  });
  $("compared").replaceChildren(...parts);
  if (a.heat && b.heat) {
    const [first, second] = await Promise.all([values(a.heat), values(b.heat)]);
    const canvas = element("canvas", { role: "img", "aria-label": "difference of the mean relevance" });
    canvas.redraw = () => {
      const how = look();
      const differences = first.numbers.map((v, i) => v - second.numbers[i]);
      const largest = differences.reduce((most, d) => Math.max(most, Math.abs(d)), 1e-12);
      canvas.width = first.width; canvas.height = first.height;
      canvas.classList.toggle("coarse", first.width <= 64);
      const context = canvas.getContext("2d");
      const out = context.createImageData(first.width, first.height);
      differences.forEach((d, i) => {
        const share = strength(d, largest / 2, how), colour = d > 0 ? how.forColour : how.againstColour;
        for (let c = 0; c < 3; c++) out.data[4 * i + c] = how.paper[c] * (1 - share) + colour[c] * share;
        out.data[4 * i + 3] = 255;
      });
      context.putImageData(out, 0, 0);
    };
    canvas.redraw();
    $("compared").append(element("div", {}, element("h3", {}, "Difference"),
      figure(`more in ${className(a.class)} (first colour) or in ${className(b.class)}`, canvas)));
  }
}

function fillClasses() {
  const options = (list) => list.map(([value, name]) => element("option", { value }, name));
  const used = [...new Set([...rows.target, ...rows.predicted, ...rows.label])].filter((c) => c >= 0).sort((a, b) => a - b);
  $("class").append(...options(used.map((c) => [String(c), className(c)])));
  for (const id of ["first", "second"]) $(id).append(...options(report.summaries.map((s, i) => [String(i), className(s.class)])));
  if (report.summaries.length > 1) $("second").value = "1";
  const layers = report.summaries[0].units.map(([layer]) => layer);
  $("layer").append(...options(layers.map((name) => [name, name])));
  $("layers").hidden = layers.length < 2;
  if (layers.length) $("layer").value = layers[Math.max(0, layers.length - 2)]; // the last one's are the classes
  const cell = (text) => element("td", { class: "number" }, text);
  $("class-table").append(
    element("tr", {}, ...["Class", "samples", "accuracy", "confidence", "Σ|R|"].map((t) => element("th", { scope: "col" }, t))),
    ...report.summaries.map((s) => element("tr", {},
      element("td", {}, element("a", { href: `#gallery?class=${s.class}` }, className(s.class))),
      cell(String(s.count)), cell(s.accuracy === null ? "–" : percent(s.accuracy)), cell(percent(s.confidence)), cell(s.mass.toFixed(3)))));
}

// ---- going about -------------------------------------------------------------------------------

const current = () => location.hash.slice(1);

function go() {
  const [view, query] = (current() || "overview").split("?");
  const name = view.split("=")[0];
  const known = ["overview", "gallery", "sample", "classes"].includes(name) ? name : "overview";
  for (const part of document.querySelectorAll("main > section")) part.hidden = part.id !== `view-${known}`;
  for (const link of document.querySelectorAll("header nav a")) {
    if (link.hash === `#${known}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  $("controls").hidden = known === "overview";
  if (known === "gallery") {
    const wanted = new URLSearchParams(query);
    for (const id of filterIds) $(id).value = wanted.get(id) ?? $(id).dataset.usual;
    showGallery(Number(wanted.get("page") ?? 0));
  }
  if (known === "sample") showSample(Number(view.split("=")[1]));
  if (known === "classes") showClasses();
}

function redraw() {
  for (const part of document.querySelectorAll("canvas, .tokens, .bars")) part.redraw?.();
}

let asked = 0;
$("controls").addEventListener("input", () => { cancelAnimationFrame(asked); asked = requestAnimationFrame(redraw); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
for (const id of filterIds) $(id).dataset.usual = $(id).value;
$("filters").addEventListener("input", () => { history.replaceState(null, "", address(0)); showGallery(0); });
$("filters").addEventListener("reset", () => setTimeout(() => { location.hash = "#gallery"; go(); }));
$("pair").addEventListener("input", showClasses);
for (const form of document.forms) form.addEventListener("submit", (event) => event.preventDefault());
document.querySelector(".skip").addEventListener("click", (event) => { event.preventDefault(); $("main").focus(); });

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.matches("input, select")) { if (event.key === "Escape") event.target.blur(); return; }
  const sample = current().startsWith("sample");
  const target = { ArrowLeft: sample ? "previous" : "page-before", ArrowRight: sample ? "next" : "page-after" }[event.key];
  if (target) { const link = $(target); if (link && !link.hidden) link.click(); }
  else if (event.key === "Escape" && sample) location.hash = galleryLink;
  else if (event.key === "g") location.hash = galleryLink;
  else if (event.key === "o") location.hash = "#overview";
  else if (event.key === "c") location.hash = "#classes";
  else if (event.key === "/") { event.preventDefault(); location.hash = galleryLink; setTimeout(() => $("search").focus()); }
});

window.addEventListener("hashchange", go);
fillClasses();
go();
