"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const namespace = document.querySelector("svg").namespaceURI;
  const listeners = []; // called with every step
  const last = data.epochs.length - 1;
  const byId = (id) => document.getElementById(id);
  const family = (operation) => data.looks[operation][1];
  const label = (operation) => data.looks[operation][0];
  const isSecond = (operation) =>
    Object.keys(data.looks).find((other) => family(other) === family(operation)) !== operation;

  function add(parent, tag, attributes = {}, text = null) {
    const svg = parent.namespaceURI === namespace || tag === "svg";
    const element = svg ? document.createElementNS(namespace, tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    if (text !== null) element.textContent = text;
    parent.append(element);
    return element;
  }

  // --- steps ---------------------------------------------------------------------------------------------------------

  let current = -1;

  function select(step) {
    const next = Math.min(last, Math.max(0, step));
    if (next === current) return;
    current = next;
    byId("step").value = current;
    byId("epoch").textContent = data.epochs[current];
    document.body.dataset.epoch = data.epochs[current];
    for (const listener of listeners) listener(current);
  }

  function choose(step) {
    select(step);
    history.replaceState(null, "", `#epoch=${data.epochs[current]}`);
  }

  const nearest = (epoch) =>
    data.epochs.reduce((best, e, i) => (Math.abs(e - epoch) < Math.abs(data.epochs[best] - epoch) ? i : best), 0);

  function fromAddress() {
    const match = /^#epoch=(\d{1,9})$/.exec(location.hash);
    return match ? nearest(Number(match[1])) : null;
  }

  function listen() {
    byId("step").addEventListener("input", (event) => choose(Number(event.target.value)));
    byId("back").addEventListener("click", () => choose(current - 1));
    byId("forth").addEventListener("click", () => choose(current + 1));
    addEventListener("hashchange", () => {
      const step = fromAddress();
      if (step !== null) select(step);
    });
    addEventListener("keydown", (event) => {
      const steps = { ArrowLeft: current - 1, ArrowRight: current + 1, Home: 0, End: last };
      const busy = event.ctrlKey || event.altKey || event.metaKey || event.target.matches("input, select");
      if (busy || !(event.key in steps) || event.shiftKey) return;
      event.preventDefault();
      choose(steps[event.key]);
    });
  }

  async function copy({ currentTarget: button }) {
    const command = button.previousElementSibling;
    try {
      await navigator.clipboard.writeText(command.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(command); // no permission: one key is left to press
      button.textContent = "Press Ctrl+C";
    }
  }

  // --- cells and genotypes -------------------------------------------------------------------------------------------

  function showCells(step) {
    for (const drawing of document.querySelectorAll("[data-drawing]")) {
      const cell = data.drawings[step].indexOf(Number(drawing.dataset.drawing));
      drawing.hidden = cell < 0;
      if (cell < 0) continue;
      const kinds = data.drawn[step][cell];
      drawing.querySelectorAll("g").forEach((edge, i) => {
        if (kinds.length) edge.dataset.kind = kinds[i];
        else delete edge.dataset.kind;
      });
    }
    for (const row of document.querySelectorAll("#history tr")) {
      const epoch = data.epochs[step];
      row.classList.toggle("current", row.dataset.first <= epoch && epoch <= row.dataset.last);
    }
  }

  // --- α -------------------------------------------------------------------------------------------------------------

  const edgesOf = (cell) => data.edges.map((edge, i) => [edge, i]).filter(([edge]) => edge.cell === cell);
  const percent = (p) => (100 * p).toFixed(1);
  const columnWidth = Math.max(8, Math.min(40, 396 / data.epochs.length));

  function heatTable(cell) {
    const table = add(byId(`alpha-${cell}`), "table");
    const head = add(add(table, "thead"), "tr");
    add(head, "th", {}, "edge");
    for (const operation of data.operations) add(head, "th", { title: operation }, label(operation));
    const known = data.kinds.some((kinds) => kinds.length);
    const extra = ["entropy", "margin", ...(data.beta.length ? ["β %"] : []), ...(known ? ["moved", "kind"] : [])];
    extra.forEach((name, i) => add(head, "th", i ? {} : { class: "apart" }, name));
    const body = add(table, "tbody");
    const rows = edgesOf(cell).map(([edge, i]) => {
      const row = add(body, "tr");
      add(row, "th", { scope: "row" }, edge.name);
      const cells = data.operations.map(() => add(row, "td", { class: "p" }));
      return [i, cells, extra.map((_, k) => add(row, "td", k ? {} : { class: "apart" }))];
    });
    listeners.push((step) => rows.forEach(([i, cells, more]) => fillRow(step, i, cells, more)));
  }

  function fillRow(step, i, cells, more) {
    data.operations.forEach((operation, k) => {
      const p = data.alpha[step][i][k];
      cells[k].textContent = p === null ? "" : percent(p);
      cells[k].style.setProperty("--p", p ?? 0);
      cells[k].classList.toggle("high", p > 0.55);
      cells[k].classList.toggle("chosen", data.chosen[step][i].includes(operation));
    });
    more[0].textContent = data.entropy[step][i].toFixed(3);
    more[1].textContent = data.margin[step][i].toFixed(4);
    const rest = more.slice(2);
    if (data.beta.length) rest.shift().textContent = percent(data.beta[step][i]);
    if (!rest.length) return;
    rest[0].textContent = data.moved[step][i]?.toFixed(3) ?? "";
    rest[1].textContent = data.kind_words[data.kinds[step][i]] ?? "";
  }

  // What colour can show: the value of edge i in a step, from 0 to 1, and the class that gives the colour.
  function modes() {
    const found = {
      "strongest operation": (step, i) => {
        const k = data.strongest[step][i];
        return [data.alpha[step][i][k], family(data.operations[k]), label(data.operations[k])];
      },
      entropy: (step, i) => [data.entropy[step][i] / data.greatest_entropy, "heat", data.entropy[step][i].toFixed(4)],
      margin: (step, i) => [data.margin[step][i], "heat", data.margin[step][i].toFixed(4)],
    };
    if (data.beta.length) found.β = (step, i) => [data.beta[step][i], "heat", `${percent(data.beta[step][i])} %`];
    data.operations.forEach((operation, k) => {
      found[operation] = (step, i) => {
        const p = data.alpha[step][i][k] ?? 0;
        return [p, family(operation), `${percent(p)} %`];
      };
    });
    return found;
  }

  function maps() {
    const found = modes();
    const picker = byId("mode");
    for (const name of Object.keys(found)) add(picker, "option", {}, name);
    const paints = ["normal", "reduction"].map(map);
    const paint = () => {
      paints.forEach((each) => each(found[picker.value]));
      const legend = document.querySelector("#map .legend");
      legend.replaceChildren();
      if (picker.value !== "strongest operation") return;
      const families = new Map();
      for (const name of data.operations.filter((name) => name !== "none"))
        families.set(family(name), [...(families.get(family(name)) ?? []), label(name)]);
      for (const [name, labels] of families) add(legend, "span", { class: name }, labels.join(", "));
      add(legend, "i", {}, "the fuller, the more probable");
    };
    picker.addEventListener("input", paint);
    paint();
  }

  function map(cell) {
    const edges = edgesOf(cell);
    const [left, high] = [84, 17];
    const wide = columnWidth;
    const [width, height] = [left + wide * data.epochs.length + 2, high * edges.length + 20];
    const size = { viewBox: `0 0 ${width} ${height}`, style: `width:${width}px` };
    const svg = add(byId(`map-${cell}`), "svg", { ...size, class: "chart" });
    const squares = edges.map(([edge, i], row) => {
      add(svg, "text", { x: left - 8, y: row * high + 13, "text-anchor": "end" }, edge.name);
      return data.epochs.map((epoch, step) => {
        const place = { x: left + step * wide, y: row * high + 1, width: wide - 1, height: high - 2 };
        const square = add(svg, "rect", place);
        square.addEventListener("click", () => choose(step));
        return [step, i, square, add(square, "title")];
      });
    });
    ticks(data.epochs).forEach((epoch) => {
      const x = left + (data.epochs.indexOf(epoch) + 0.5) * wide;
      add(svg, "text", { x, y: height - 6, "text-anchor": "middle" }, epoch);
    });
    const cursor = add(svg, "rect", { class: "cursor", y: 0, width: wide + 1, height: high * edges.length });
    listeners.push((step) => cursor.setAttribute("x", left + step * wide - 1));
    return (mode) => {
      for (const [step, i, square, title] of squares.flat()) {
        const [value, colour, text] = mode(step, i);
        square.setAttribute("class", `cell ${colour}`);
        square.setAttribute("fill-opacity", (0.06 + 0.94 * Math.min(1, value)).toFixed(3));
        title.textContent = `${data.edges[i].name}, epoch ${data.epochs[step]}: ${text}`;
      }
    };
  }

  // At most ten of the epochs.
  function ticks(epochs) {
    const every = Math.ceil(epochs.length / 10);
    return epochs.filter((_, i) => i % every === 0);
  }

  // --- counts --------------------------------------------------------------------------------------------------------

  function bars(cell) {
    const counts = data.counts[cell];
    const operations = Object.keys(data.looks).filter((name) => counts.some((count) => count[name]));
    const total = Math.max(...counts.map((count) => Object.values(count).reduce((a, b) => a + b, 0)));
    const figure = byId(`counts-${cell}`);
    const legend = add(figure, "div", { class: "legend" });
    const classes = (name) => `${family(name)}${isSecond(name) ? " second" : ""}`;
    for (const name of operations) add(legend, "span", { class: classes(name) }, label(name));
    const [left, tall] = [30, 120];
    const wide = columnWidth;
    const width = left + wide * data.epochs.length + 2;
    const svg = add(figure, "svg", { viewBox: `0 0 ${width} ${tall + 26}`, class: "chart", style: `width:${width}px` });
    for (const value of [0, total]) {
      const y = 6 + tall * (1 - value / total);
      add(svg, "text", { x: left - 6, y: y + 4, "text-anchor": "end" }, value);
    }
    counts.forEach((count, step) => {
      let base = 0;
      for (const name of operations.filter((each) => count[each])) {
        const [y, height] = [6 + tall * (1 - (base + count[name]) / total), (tall * count[name]) / total - 1];
        const shape = { x: left + step * wide, y, width: wide - 1, height, class: `cell ${family(name)}` };
        const bar = add(svg, "rect", { ...shape, "fill-opacity": isSecond(name) ? 0.5 : 1 });
        bar.addEventListener("click", () => choose(step));
        add(bar, "title", {}, `epoch ${data.epochs[step]}: ${count[name]} × ${name}`);
        base += count[name];
      }
    });
    for (const epoch of ticks(data.epochs)) {
      const x = left + (data.epochs.indexOf(epoch) + 0.5) * wide;
      add(svg, "text", { x, y: tall + 20, "text-anchor": "middle" }, epoch);
    }
    const cursor = add(svg, "rect", { class: "cursor", y: 5, width: wide + 1, height: tall + 1 });
    listeners.push((step) => cursor.setAttribute("x", left + step * wide - 1));
  }

  // --- lines ---------------------------------------------------------------------------------------------------------

  // About four round numbers from low to high.
  function roundNumbers(low, high) {
    const rough = (high - low) / 4 || 1;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
    const first = Math.ceil(low / step - 1e-9);
    const count = Math.floor(high / step + 1e-9) - first + 1;
    return Array.from({ length: count }, (_, i) => Number(((first + i) * step).toPrecision(6)));
  }

  // series: [name, classes, values]; a null is a gap. The axis spans at least `least`, so that noise stays flat.
  function lineChart(parent, title, epochs, series, { resumed = [], steps = false, least = 1e-6 }) {
    const known = series.flatMap(([, , values]) => values).filter((value) => value !== null);
    if (!known.length) return;
    const figure = add(parent, "figure");
    add(figure, "figcaption", {}, title);
    const legend = add(figure, "div", { class: "legend" });
    for (const [name, classes] of series) add(legend, "span", { class: classes }, name);
    if (resumed.length) add(legend, "span", { class: "resume" }, "resumed");
    const box = { left: 50, top: 8, width: 436, height: 170 };
    const svg = add(figure, "svg", { viewBox: "0 0 500 206", class: "chart", role: "img", "aria-label": title });
    let [low, high] = [Math.min(...known), Math.max(...known)];
    const missing = Math.max(0, least - (high - low)) / 2;
    [low, high] = [low - missing, high + missing];
    if (low < 0 && Math.min(...known) >= 0) [low, high] = [0, high - low];
    const [first, end] = [epochs[0], Math.max(epochs.at(-1), epochs[0] + 1)];
    const x = (epoch) => box.left + (box.width * (epoch - first)) / (end - first);
    const y = (value) => box.top + (box.height * (high - value)) / (high - low);
    for (const value of roundNumbers(low, high)) {
      add(svg, "path", { class: "axis", d: `M${box.left} ${y(value)}h${box.width}` });
      const text = value < 1e5 ? value : value.toExponential();
      add(svg, "text", { x: box.left - 6, y: y(value) + 4, "text-anchor": "end" }, text);
    }
    for (const epoch of ticks(epochs)) add(svg, "text", { x: x(epoch), y: 196, "text-anchor": "middle" }, epoch);
    for (const epoch of resumed) {
      const mark = add(svg, "path", { class: "resume", d: `M${x(epoch)} ${box.top}v${box.height}` });
      add(mark, "title", {}, `resumed with epoch ${epoch}`);
    }
    for (const [name, classes, values] of series) drawLine(svg, epochs, values, name, classes, x, y);
    if (!steps) return;
    const cursor = add(svg, "path", { class: "cursor" });
    listeners.push((step) => cursor.setAttribute("d", `M${x(data.epochs[step])} ${box.top}v${box.height}`));
  }

  function drawLine(svg, epochs, values, name, classes, x, y) {
    let [path, pen] = ["", "M"];
    values.forEach((value, i) => {
      if (value !== null) path += `${pen}${x(epochs[i]).toFixed(1)} ${y(value).toFixed(1)}`;
      pen = value === null ? "M" : "L";
    });
    add(svg, "path", { class: `trace ${classes}`, d: path });
    values.forEach((value, i) => {
      if (value === null || epochs.length > 60) return;
      const dot = add(svg, "circle", { class: `dot ${classes}`, cx: x(epochs[i]), cy: y(value), r: 2.5 });
      add(dot, "title", {}, `${name}, epoch ${epochs[i]}: ${value}`);
    });
  }

  function certainty() {
    const parent = document.querySelector("#certainty .charts");
    const means = (rows, picked) =>
      rows.map((row) => Number((picked.reduce((sum, i) => sum + row[i], 0) / picked.length).toFixed(6)));
    const groups = [];
    for (const [cell, colour] of [["normal", "sep"], ["reduction", "neg dashed"]]) {
      const edges = edgesOf(cell).map(([, i]) => i);
      const [searched, decided] = [false, true].map((start) => edges.filter((i) => data.decided[i] === start));
      if (searched.length) groups.push([`${cell} cell`, colour, searched]);
      if (decided.length) groups.push([`${cell} cell, as at the start`, `${colour} faint`, decided]);
    }
    const parts = [
      ["entropy of softmax(α)", data.entropy, 0.1 * data.greatest_entropy],
      ["margin, top-1 minus top-2", data.margin, 0.1],
    ];
    for (const [title, rows, least] of parts) {
      const series = groups.map(([name, look, picked]) => [name, look, means(rows, picked)]);
      lineChart(parent, title, data.epochs, series, { resumed: data.curves.search.resumed, steps: true, least });
    }
  }

  function curves() {
    const parent = document.querySelector("#curves .charts");
    const parts = [
      ["search", "Search", "alpha", "α's half", true],
      ["retrain", "Retraining", "test", "test images", false],
    ];
    for (const [key, title, other, name, steps] of parts) {
      const curve = data.curves[key];
      if (!curve.epochs.length) continue;
      for (const [metric, unit] of [["loss", "loss"], ["top1", "top-1, %"]]) {
        const series = [
          [key === "search" ? "weights' half" : "training images", "sep", curve[`train_${metric}`]],
          [name, "neg dashed", curve[`${other}_${metric}`]],
        ];
        lineChart(parent, `${title}: ${unit}`, curve.epochs, series, { resumed: curve.resumed, steps });
      }
    }
  }

  // --- files ---------------------------------------------------------------------------------------------------------

  const properties = ["fill", "fill-opacity", "stroke", "stroke-width", "stroke-dasharray", "stroke-linejoin", "opacity"];
  const ofText = ["font-size", "font-family", "text-anchor"];

  // A figure as a file: with the colours of the page as attributes, and its title and legend as text.
  function asFile(figure) {
    const svg = [...figure.querySelectorAll("svg")].find((each) => !each.closest("[hidden]"));
    const copy = svg.cloneNode(true);
    const copies = [...copy.querySelectorAll("*")];
    [...svg.querySelectorAll("*")].forEach((element, i) => {
      const style = getComputedStyle(element);
      for (const name of element.matches("text, tspan") ? [...properties, ...ofText] : properties)
        copies[i].setAttribute(name, style.getPropertyValue(name));
      copies[i].removeAttribute("class");
    });
    const [, , width, height] = svg.getAttribute("viewBox").split(" ").map(Number);
    const page = getComputedStyle(document.body);
    const font = { "font-size": 12, "font-family": "sans-serif", fill: page.color };
    const lines = [[figure.querySelector("figcaption").firstChild.textContent.trim(), page, ""]];
    const legend = figure.querySelector(".legend") ?? figure.closest("section").querySelector(".legend");
    for (const item of legend?.querySelectorAll("span") ?? [])
      lines.push([item.textContent, getComputedStyle(item), item.className]);
    const top = 16 * lines.length + 8;
    const whole = { x: 0, y: -top, width, height: height + top };
    for (const name of copy.getAttributeNames()) if (name !== "xmlns") copy.removeAttribute(name);
    for (const [name, value] of Object.entries({ width, height: height + top, viewBox: `0 ${-top} ${width} ${height + top}` }))
      copy.setAttribute(name, value);
    const paper = add(copy, "rect", { ...whole, fill: page.backgroundColor });
    copy.prepend(paper);
    const dashes = { start: "7 4", open: "2 3" }; // of the kinds of edges, which have no colour
    lines.forEach(([text, style, name], i) => {
      const y = 16 * (i + 1) - top;
      const dash = name.includes("dashed") ? "4 2" : (dashes[name] ?? "none");
      const [stroke, faint] = ["--c", "--faint"].map((each) => style.getPropertyValue(each));
      const line = { stroke: stroke || page.color, "stroke-width": 3, "stroke-dasharray": dash, opacity: faint || 1 };
      if (i) add(copy, "path", { d: `M4 ${y - 4}h14`, ...line });
      add(copy, "text", { ...font, x: i ? 22 : 4, y, "font-weight": i ? 400 : 600 }, text);
    });
    return `data:image/svg+xml,${encodeURIComponent(new XMLSerializer().serializeToString(copy))}`;
  }

  function offerFiles() {
    for (const figure of document.querySelectorAll("figure")) {
      if (!figure.querySelector("svg")) continue;
      const caption = figure.querySelector("figcaption");
      const words = `${figure.closest("section").id} ${caption.textContent}`;
      const name = words.replace(/[^\wα]+/g, "-").replace(/-$/, "");
      const given = figure.querySelector(".download");
      const link = given ?? add(caption, "a", { class: "download", download: `${name}.svg`, href: "#" }, "SVG");
      link.addEventListener("click", () => link.setAttribute("href", asFile(figure)));
    }
  }

  function searched() {
    listeners.push(showCells);
    if (data.alpha.length) {
      ["normal", "reduction"].forEach(heatTable);
      maps();
      certainty();
    }
    ["normal", "reduction"].forEach(bars);
    listen();
  }

  if (data.epochs.length) searched(); // a retraining has no epochs to step through
  curves();
  if (data.epochs.length) select(fromAddress() ?? last);
  offerFiles();
  for (const button of document.querySelectorAll(".copy")) button.addEventListener("click", copy);
  document.body.dataset.ready = "yes";
})();
