"use strict";
(() => {
  const SVG = "http://www.w3.org/2000/svg";

  // Tables: a click or Enter on a header sorts; rows without a value come last either way.
  function keyOf(row, column) {
    const cell = row.cells[column];
    return cell.dataset.value === undefined ? cell.textContent.trim() : Number(cell.dataset.value);
  }

  function compare(one, other) {
    if (typeof one === "number" && typeof other === "number") return one - other;
    return String(one).localeCompare(String(other), undefined, { numeric: true });
  }

  function sortBy(table, header) {
    const column = header.cellIndex;
    const up = header.getAttribute("aria-sort") !== "ascending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", up ? "ascending" : "descending");
    const body = table.tBodies[0];
    const isNumeric = header.classList.contains("number");
    const rows = [...body.rows].map((row) => ({ row, key: keyOf(row, column) }));
    const missing = ({ key }) => isNumeric && typeof key !== "number";
    const sorted = rows.filter((entry) => !missing(entry));
    sorted.sort((one, other) => (up ? 1 : -1) * compare(one.key, other.key));
    body.append(...[...sorted, ...rows.filter(missing)].map(({ row }) => row));
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    for (const header of table.tHead.rows[0].cells) {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...header.childNodes);
      header.append(button);
      button.addEventListener("click", () => sortBy(table, header));
    }
  }

  // Where the pointer is, in the drawing's units.
  function place(svg, event) {
    return new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
  }

  for (const svg of document.querySelectorAll("svg.heat[data-table]")) {
    const rows = document.getElementById(svg.dataset.table).tBodies[0].rows;
    const [width, height] = svg.dataset.cell.split(" ").map(Number);
    const readout = svg.parentNode.querySelector(".readout");
    svg.addEventListener("pointermove", (event) => {
      const at = place(svg, event);
      const cells = rows[Math.floor(at.y / height)]?.cells;
      const expert = Math.floor(at.x / width);
      if (!cells || expert < 0 || expert + 1 >= cells.length) return;
      const share = Number(cells[expert + 1].textContent);
      const even = ((share * (cells.length - 1)) / 100).toFixed(2);
      readout.textContent = `Layer ${cells[0].textContent}, expert ${expert}: ${share.toFixed(1)} % of all choices, ${even} times an even share`;
    });
  }

  // Pairs of experts: one letter a pair, a step of log2(observed / independent).
  const { letters, middle, step } = JSON.parse(document.getElementById("letters").textContent);
  const SIDE = 360;
  const MARGIN = 28;
  // Four times more often, or more seldom, has the full colour.
  const FULL = 2;

  function chance(log2) {
    if (log2 <= -middle * step) return "almost never together";
    const times = 2 ** Math.abs(log2);
    if (times < 1.04) return "as often as chance";
    return `${times.toFixed(1)} times ${log2 > 0 ? "as often as chance" : "more seldom than chance"}`;
  }

  function element(name, attributes, text) {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function decode(text, experts) {
    const levels = Array.from({ length: experts }, () => new Array(experts).fill(0));
    const pairs = [];
    let index = 0;
    for (let i = 0; i < experts; i += 1) {
      for (let j = i + 1; j < experts; j += 1, index += 1) {
        const log2 = (letters.indexOf(text[index]) - middle) * step;
        levels[i][j] = levels[j][i] = log2;
        pairs.push({ i, j, log2 });
      }
    }
    return { levels, pairs };
  }

  function draw(svg, levels) {
    const experts = levels.length;
    const cell = Math.min(SIDE / experts, 36);
    const side = cell * experts;
    const paths = new Map();
    levels.forEach((row, i) => row.forEach((log2, j) => {
      const key = i === j ? "self" : log2.toFixed(1);
      const path = `M${(j * cell).toFixed(2)} ${(i * cell).toFixed(2)}h${cell.toFixed(2)}v${cell.toFixed(2)}h${-cell.toFixed(2)}z`;
      paths.set(key, (paths.get(key) || "") + path);
    }));
    const drawn = [...paths].filter(([key]) => key !== "self").map(([key, path]) => {
      const log2 = Number(key);
      const name = Math.abs(log2) < step / 2 ? "neutral" : log2 > 0 ? "together" : "apart";
      const attributes = { class: name, d: path };
      if (name !== "neutral") attributes["fill-opacity"] = Math.min(1, 0.06 + (0.94 * Math.abs(log2)) / FULL).toFixed(2);
      return element("path", attributes);
    });
    const every = Math.max(1, Math.floor(experts / 8));
    for (let expert = 0; expert < experts; expert += every) {
      const at = (expert + 0.5) * cell;
      drawn.push(element("text", { x: at, y: -6, "text-anchor": "middle" }, expert));
      drawn.push(element("text", { x: -6, y: at + 4, "text-anchor": "end" }, expert));
    }
    svg.setAttribute("width", Math.round(1.1 * (side + MARGIN + 2)));
    svg.setAttribute("viewBox", `${-MARGIN} -20 ${side + MARGIN + 2} ${side + 22}`);
    svg.replaceChildren(...drawn);
    return cell;
  }

  function strongest(pairs) {
    const sorted = [...pairs].sort((one, other) => other.log2 - one.log2);
    const words = ({ i, j, log2 }) => `${i} and ${j} (${chance(log2)})`;
    const lines = [
      ["Most often together: ", sorted.slice(0, 3).filter(({ log2 }) => log2 > 0)],
      ["Most seldom: ", sorted.slice(-3).reverse().filter(({ log2 }) => log2 < 0)],
    ];
    return lines.filter(([, found]) => found.length).map(([label, found]) => {
      const line = document.createElement("p");
      line.textContent = `${label}${found.map(words).join("; ")}.`;
      return line;
    });
  }

  for (const figure of document.querySelectorAll("figure.pairs")) {
    const data = JSON.parse(figure.querySelector("script").textContent);
    const experts = Number(figure.dataset.experts);
    const [svg, select] = [figure.querySelector("svg.heat"), figure.querySelector("select")];
    const readout = figure.querySelector(".readout");
    let shown;
    const show = () => {
      shown = decode(data[select.value], experts);
      shown.cell = draw(svg, shown.levels);
      figure.querySelector(".strongest").replaceChildren(...strongest(shown.pairs));
    };
    select.addEventListener("change", show);
    svg.addEventListener("pointermove", (event) => {
      const at = place(svg, event);
      const [i, j] = [Math.floor(at.y / shown.cell), Math.floor(at.x / shown.cell)];
      if (i === j || shown.levels[i]?.[j] === undefined) return;
      readout.textContent = `Experts ${i} and ${j}: ${chance(shown.levels[i][j])}`;
    });
    show();
  }
})();
