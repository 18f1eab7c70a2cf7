// Drawing relevance: heat maps, tokens, bars; and the controls that change how.
"use strict";

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));

function look() {
  const value = (id, other) => document.getElementById(id)?.value ?? other;
  return {
    opacity: value("opacity", 80) / 100,
    gain: 10 ** (value("contrast", 0) / 20),
    sign: value("sign", "both"),
    scale: value("scale", "own"),
    cells: Number(value("grain", 1000)),
    forColour: rgb(css("--for")),
    againstColour: rgb(css("--against")),
    paper: rgb(css("--card")),
  };
}

// How strongly a value is coloured: 0 to 1.
function strength(value, saturated, how) {
  if ((how.sign === "for" && value < 0) || (how.sign === "against" && value > 0)) return 0;
  return Math.min(1, (Math.abs(value) / (saturated || 1)) * how.gain);
}

const pixelsOf = new Map(); // data URI → promise of its pixels
function decoded(uri) {
  if (!pixelsOf.has(uri)) {
    if (pixelsOf.size > 600) pixelsOf.delete(pixelsOf.keys().next().value);
    const image = new Image();
    image.src = uri;
    pixelsOf.set(uri, image.decode().then(() => {
      const canvas = document.createElement("canvas");
      canvas.width = image.naturalWidth;
      canvas.height = image.naturalHeight;
      const context = canvas.getContext("2d", { willReadFrequently: true });
      context.drawImage(image, 0, 0);
      return context.getImageData(0, 0, canvas.width, canvas.height);
    }));
  }
  return pixelsOf.get(uri);
}

// A heat map (data URI, largest value, where colours saturate) as relevance per unit of the picture's
// area, averaged over cells if they are asked to be few.
async function values(heat, cells = 1000) {
  const { data, width, height } = await decoded(heat[0]);
  const numbers = new Float32Array(width * height);
  for (let i = 0; i < numbers.length; i++) {
    const level = (data[4 * i] - 128) / 127;
    numbers[i] = Math.sign(level) * level * level * heat[1] * width * height;
  }
  const side = Math.max(1, Math.round(Math.max(width, height) / cells));
  const fine = { numbers, width, height, saturated: heat[2] * width * height };
  return side > 1 ? averaged(fine, side) : fine;
}

function averaged({ numbers, width, height }, side) {
  const columns = Math.ceil(width / side), lines = Math.ceil(height / side);
  const sums = new Float32Array(columns * lines), counts = new Float32Array(columns * lines);
  for (let y = 0, i = 0; y < height; y++) {
    for (let x = 0; x < width; x++, i++) {
      const cell = Math.floor(y / side) * columns + Math.floor(x / side);
      sums[cell] += numbers[i];
      counts[cell]++;
    }
  }
  const means = sums.map((sum, cell) => sum / counts[cell]);
  const sizes = means.map(Math.abs).sort();
  const saturated = sizes[Math.floor(0.99 * (sizes.length - 1))] || sizes[sizes.length - 1];
  return { numbers: means, width: columns, height: lines, saturated, side };
}

// The heat map over the picture, or on the page's colour where there is none.
async function paint(canvas, picture, heat, common) {
  const how = look();
  const [map, under] = await Promise.all([values(heat, how.cells), picture ? decoded(picture) : null]);
  const size = under ?? map;
  canvas.width = size.width;
  canvas.height = size.height;
  canvas.classList.toggle("coarse", size.width <= 64);
  const context = canvas.getContext("2d");
  const out = context.createImageData(size.width, size.height);
  const saturated = how.scale === "all" && common ? common : map.saturated;
  const opacity = picture ? how.opacity : 1;
  for (let y = 0, i = 0; y < size.height; y++) {
    const row = Math.floor((y * map.height) / size.height) * map.width;
    for (let x = 0; x < size.width; x++, i += 4) {
      const value = map.numbers[row + Math.floor((x * map.width) / size.width)];
      const share = strength(value, saturated, how) * opacity;
      const colour = value > 0 ? how.forColour : how.againstColour;
      // Grey under the colours: they mean relevance, not the picture's own. Without overlay, the picture.
      const grey = under && 0.3 * under.data[i] + 0.59 * under.data[i + 1] + 0.11 * under.data[i + 2];
      for (let c = 0; c < 3; c++) {
        const ground = under ? (opacity ? grey : under.data[i + c]) : how.paper[c];
        out.data[i + c] = ground * (1 - share) + colour[c] * share;
      }
      out.data[i + 3] = 255;
    }
  }
  context.putImageData(out, 0, 0);
}

// Canvases are drawn again when a control moves or the page turns dark.
function heatCanvas(picture, heat, label, common) {
  const canvas = element("canvas", { role: "img", "aria-label": label });
  canvas.redraw = () => paint(canvas, picture, heat, common);
  canvas.redraw();
  return canvas;
}

function tokenLine(pairs, common) {
  const line = element("p", { class: "tokens" });
  line.redraw = () => {
    const how = look();
    const largest = how.scale === "all" && common ? common : Math.max(...pairs.map(([, r]) => Math.abs(r)));
    line.replaceChildren(...pairs.flatMap(([word, r]) => {
      const share = strength(r, largest, how);
      const side = share < 0.05 ? "" : r > 0 ? "for" : "against";
      const colour = r > 0 ? how.forColour : how.againstColour;
      return [element("span", { class: side, title: r.toPrecision(3),
        style: `background: rgba(${colour},${(0.55 * share).toFixed(3)})` }, word), " "];
    }));
  };
  line.redraw();
  return line;
}

// Rows of name, bar and number; bars are as long as the values are large.
function barRows(rows, signed = true) {
  const box = element("div", { class: "bars" });
  box.redraw = () => {
    const how = look();
    const largest = Math.max(...rows.map(([, r]) => Math.abs(r)), 1e-12);
    box.replaceChildren(...rows.flatMap(([name, r, text]) => {
      const length = signed ? strength(r, largest, { ...how, gain: 1 }) : r / largest;
      return [element("span", {}, name),
        element("i", { class: signed ? (r > 0 ? "for" : "against") : "", style: `width: ${100 * length}%` }),
        element("b", {}, text ?? r.toPrecision(3))];
    }));
  };
  box.redraw();
  return box;
}

function element(kind, attributes = {}, ...children) {
  const made = document.createElement(kind);
  for (const [name, value] of Object.entries(attributes)) if (value !== "") made.setAttribute(name, value);
  made.append(...children);
  return made;
}
