"use strict";
// Tables that sort, and curves of chosen members. Whatever comes from the run is set as text, never as markup.

const COLOURS = ["#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999"];
const BOX = { left: 62, right: 890, top: 12, bottom: 300 };

function numberIn(text) {
  // The first number of a cell: 3.04 of "3.04 (3.02 to 3.07)"; NaN where there is none.
  const found = /^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?/i.exec(text.trim());
  return found ? Number(found[0]) : NaN;
}

function sortBy(button) {
  const header = button.closest("th");
  const place = [...header.parentNode.children].indexOf(header);
  const body = header.closest("table").tBodies[0];
  const up = header.getAttribute("aria-sort") !== "ascending";
  for (const other of header.parentNode.children) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", up ? "ascending" : "descending");
  const rows = [...body.rows].map((row) => {
    const text = row.cells[place].textContent;
    return { row, text, number: numberIn(text) };
  });
  const numeric = rows.some((each) => !Number.isNaN(each.number));
  rows.sort((a, b) => {
    if (!numeric) return (up ? 1 : -1) * a.text.localeCompare(b.text, "en");
    // What is no number stands last either way.
    if (Number.isNaN(a.number) || Number.isNaN(b.number)) return Number.isNaN(a.number) - Number.isNaN(b.number);
    return (up ? 1 : -1) * (a.number - b.number);
  });
  body.append(...rows.map((each) => each.row));
}

for (const button of document.querySelectorAll("button.sort")) {
  button.addEventListener("click", () => sortBy(button));
}

const holder = document.getElementById("curves");
if (holder) explore(JSON.parse(holder.textContent));

function explore(data) {
  const at = (id) => document.getElementById(id);
  const [quantity, head, log, plot, reading] = ["quantity", "head", "log", "plot", "reading"].map(at);
  const option = (list, value, text) => {
    const made = document.createElement("option");
    made.value = value;
    made.textContent = text;
    list.append(made);
  };
  data.quantities.forEach((each, i) => option(quantity, i, each.unit ? `${each.name} (${each.unit})` : each.name));
  option(head, -1, "mean of all");
  data.heads.forEach((label, i) => option(head, i, label));
  const boxes = data.members.map((member, i) => {
    const label = document.createElement("label");
    const box = document.createElement("input");
    box.type = "checkbox";
    box.checked = i < 4;
    label.append(box, ` ${member.name} (${member.status})`);
    at("picked").append(label);
    return box;
  });
  let cursor = null;
  let shown = [];

  function curveOf(member, q) {
    const found = data.curves[q][member];
    if (!data.quantities[q].per_head) return found;
    if (Number(head.value) >= 0) return found[Number(head.value)] || [];
    return found.length ? found[0].map((_, i) => {
      const known = found.map((each) => each[i]).filter((value) => value !== null);
      return known.length ? known.reduce((a, b) => a + b) / known.length : null;
    }) : [];
  }

  function draw() {
    const q = Number(quantity.value);
    head.disabled = !data.quantities[q].per_head;
    const usable = (value) => value !== null && (!log.checked || value > 0);
    shown = boxes.flatMap((box, m) => (box.checked ? [{ m, colour: COLOURS[m % COLOURS.length], values: curveOf(m, q),
      steps: data.quantities[q].per_head ? data.head_steps[m] : data.steps[m] }] : []));
    const values = shown.flatMap((each) => each.values.filter(usable));
    const lastStep = Math.max(1, ...shown.map((each) => each.steps[each.steps.length - 1] || 0));
    let low = values.reduce((a, b) => Math.min(a, b), Infinity);
    let high = values.reduce((a, b) => Math.max(a, b), -Infinity);
    if (!values.length) { low = 0; high = 1; }
    const height = log.checked ? Math.log10 : (value) => value;
    [low, high] = [height(low), height(high)];
    if (high - low < 1e-9) { low -= 0.5; high += 0.5; }
    const x = (step) => BOX.left + (step / lastStep) * (BOX.right - BOX.left);
    const y = (value) => BOX.bottom - ((height(value) - low) / (high - low)) * (BOX.bottom - BOX.top);
    plot.querySelectorAll(":scope > :not(title)").forEach((each) => each.remove());
    const add = (name, attributes, text) => {
      const made = document.createElementNS("http://www.w3.org/2000/svg", name);
      for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
      if (text !== undefined) made.textContent = text;
      plot.append(made);
    };
    for (let i = 0; i <= 4; i += 1) {
      const level = low + ((high - low) * i) / 4;
      const where = BOX.bottom - ((BOX.bottom - BOX.top) * i) / 4;
      add("line", { class: "axis", x1: BOX.left, x2: BOX.right, y1: where, y2: where });
      add("text", { x: BOX.left - 6, y: where + 4, "text-anchor": "end" }, short(log.checked ? 10 ** level : level));
      add("text", { x: x((lastStep * i) / 4), y: BOX.bottom + 18, "text-anchor": i ? (i < 4 ? "middle" : "end") : "start" },
        Math.round((lastStep * i) / 4));
    }
    add("text", { x: (BOX.left + BOX.right) / 2, y: BOX.bottom + 34, "text-anchor": "middle" }, "step");
    for (const each of shown) {
      let path = "";
      let pen = "M";
      each.values.forEach((value, i) => {
        if (!usable(value)) { pen = "M"; return; }
        path += `${pen}${x(each.steps[i]).toFixed(1)} ${y(value).toFixed(1)}`;
        pen = "L";
      });
      add("path", { class: "curve", d: path, stroke: each.colour });
    }
    if (cursor !== null) {
      add("line", { class: "cursor", x1: x(cursor), x2: x(cursor), y1: BOX.top, y2: BOX.bottom });
      read();
    }
    plot.dataset.lastStep = lastStep;
  }

  function read() {
    reading.replaceChildren();
    const step = document.createElement("b");
    step.textContent = `step ${Math.round(cursor)} `;
    reading.append(step);
    for (const each of shown) {
      const i = nearest(each.steps, cursor);
      const mark = document.createElement("span");
      mark.style.color = each.colour;
      mark.textContent = " ■ ";
      const value = each.values[i];
      const ended = cursor > (each.steps[each.steps.length - 1] || 0) + 1;
      const said = ended ? "ended" : value === null || value === undefined ? "not finite" : short(value);
      reading.append(mark, `${data.members[each.m].name}: ${said} `);
    }
  }

  const nearest = (steps, step) => steps.reduce((best, each, i) => (Math.abs(each - step) < Math.abs(steps[best] - step) ? i : best), 0);
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    const share = (((event.clientX - box.left) / box.width) * 900 - BOX.left) / (BOX.right - BOX.left);
    cursor = Math.max(0, Math.min(1, share)) * Number(plot.dataset.lastStep);
    draw();
  });
  plot.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1, Home: -1e9, End: 1e9 }[event.key];
    if (!move) return;
    event.preventDefault();
    const last = Number(plot.dataset.lastStep);
    cursor = Math.max(0, Math.min(last, (cursor ?? 0) + move * Math.max(1, last / 100)));
    draw();
  });
  for (const each of [head, log, ...boxes]) each.addEventListener("change", draw);
  quantity.addEventListener("change", () => {
    log.checked = data.quantities[Number(quantity.value)].log;
    draw();
  });
  log.checked = data.quantities[0].log;
  draw();
}

function short(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  return size >= 1e4 || size < 1e-2 ? value.toExponential(1).replace("e+", "e") : String(Number(value.toPrecision(3)));
}
