"use strict";
(() => {
  // Tables: a click or Enter on a header sorts; rows without a value come last either way.
  function keyOf(row, column, isNumeric) {
    const cell = row.cells[column];
    if (cell.dataset.value !== undefined) return Number(cell.dataset.value);
    return isNumeric ? undefined : cell.textContent.trim();
  }

  function compare(one, other) {
    return typeof one === "number" ? one - other : one.localeCompare(other, undefined, { numeric: true });
  }

  function sortBy(table, header) {
    const up = header.getAttribute("aria-sort") !== "ascending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", up ? "ascending" : "descending");
    const isNumeric = header.classList.contains("number");
    const rows = [...table.tBodies[0].rows].map((row) => ({ row, key: keyOf(row, header.cellIndex, isNumeric) }));
    const known = rows.filter(({ key }) => key !== undefined);
    known.sort((one, other) => (up ? 1 : -1) * compare(one.key, other.key));
    table.tBodies[0].append(...[...known, ...rows.filter(({ key }) => key === undefined)].map(({ row }) => row));
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

  // Heat maps are tables; words(row, column, cell) reads the cell that is pointed at.
  function read(figure, words) {
    figure.querySelector(".heat").addEventListener("pointerover", ({ target }) => {
      const cell = target.closest("td");
      if (cell) figure.querySelector(".readout").textContent = words(cell.parentNode.cells[0], cell.cellIndex - 1, cell);
    });
  }

  for (const figure of document.querySelectorAll("figure.load")) {
    read(figure, (layer, expert, cell) => {
      const even = ((cell.textContent * (cell.parentNode.cells.length - 1)) / 100).toFixed(2);
      return `Layer ${layer.textContent}, expert ${expert}: ${cell.textContent} % of all choices, ${even} times an even share`;
    });
  }

  // Pairs of experts: one letter a pair, a step of log2(observed / independent).
  const { letters, middle, step } = JSON.parse(document.getElementById("letters").textContent);
  // Four times more often, or more seldom, has the full colour.
  const FULL = 2;

  function chance(log2) {
    if (log2 <= -middle * step) return "almost never together";
    const times = 2 ** Math.abs(log2);
    if (times < 1.04) return "as often as chance";
    return `${times.toFixed(1)} times ${log2 > 0 ? "as often as chance" : "more seldom than chance"}`;
  }

  function color(log2) {
    if (Math.abs(log2) < step / 2) return "";
    const share = Math.min(100, 6 + (94 * Math.abs(log2)) / FULL);
    return `color-mix(in srgb, var(--${log2 > 0 ? "accent" : "second"}) ${share.toFixed(0)}%, transparent)`;
  }

  function head(expert, experts) {
    const cell = document.createElement("th");
    cell.textContent = expert % Math.max(1, Math.floor(experts / 8)) ? "" : expert;
    return cell;
  }

  function draw(table, experts, levelOf) {
    const indices = [...Array(experts).keys()];
    table.replaceChildren();
    table.width = Math.min(30 + 36 * experts, 390);
    table.insertRow().append(document.createElement("th"), ...indices.map((i) => head(i, experts)));
    for (const i of indices) {
      const row = table.insertRow();
      row.style.height = `${Math.min(36, 360 / experts)}px`;
      row.append(head(i, experts));
      for (const j of indices) {
        const cell = row.insertCell();
        if (i === j) continue;
        cell.className = "neutral";
        cell.style.background = color(levelOf(i, j));
      }
    }
  }

  function strongest(pairs) {
    const sorted = [...pairs].sort((one, other) => other.log2 - one.log2);
    const words = ({ i, j, log2 }) => `${i} and ${j} (${chance(log2)})`;
    const lines = [
      ["Most often together: ", sorted.slice(0, 3).filter(({ log2 }) => log2 > 0)],
      ["Most seldom: ", sorted.slice(-3).reverse().filter(({ log2 }) => log2 < 0)],
    ];
    return lines.filter(([, some]) => some.length).map(([label, some]) => {
      const line = document.createElement("p");
      line.textContent = `${label}${some.map(words).join("; ")}.`;
      return line;
    });
  }

  for (const figure of document.querySelectorAll("figure.pairs")) {
    const data = JSON.parse(figure.querySelector("script").textContent);
    const experts = Number(figure.dataset.experts);
    const select = figure.querySelector("select");
    const upper = [...Array(experts).keys()].flatMap((i) => [...Array(experts - i - 1).keys()].map((k) => [i, i + 1 + k]));
    let levels = new Map();
    const levelOf = (i, j) => levels.get(Math.min(i, j) * experts + Math.max(i, j));
    const show = () => {
      const pairs = upper.map(([i, j], at) => ({ i, j, log2: (letters.indexOf(data[select.value][at]) - middle) * step }));
      levels = new Map(pairs.map(({ i, j, log2 }) => [i * experts + j, log2]));
      draw(figure.querySelector(".heat"), experts, levelOf);
      figure.querySelector(".strongest").replaceChildren(...strongest(pairs));
    };
    select.addEventListener("change", show);
    read(figure, (_, j, cell) => {
      const i = cell.parentNode.rowIndex - 1;
      return i === j ? "" : `Experts ${i} and ${j}: ${chance(levelOf(i, j))}`;
    });
    show();
  }
})();
