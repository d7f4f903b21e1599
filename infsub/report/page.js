"use strict";
// The datapoints' table: sorted, filtered, a page of rows at a time, so that ten thousand stay quick.
// Names come from users: they become text nodes and attributes, never markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const columns = data.columns, count = columns[0].values.length;
  const column = Object.fromEntries(columns.map((c) => [c.key, c]));
  const $ = (id) => document.getElementById(id);
  const worst = columns.find((c) => c.group === "gaps");
  const state = { sort: worst ? worst.key : "index", down: Boolean(worst), start: 0, chosen: null };
  let order = []; // the rows that pass the filters, sorted

  const make = (tag, className, text) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const number = (value, digits) =>
    value === null ? "–" : value.toFixed(digits).replace("-", "−");
  const flagsOf = (row) => column.flags.values[row].map((flag) => data.flags[flag]);
  const text = Array.from({ length: count }, (_, row) =>
    [
      column.index.values[row],
      column.label ? column.label.values[row] : "",
      column.verdict ? column.verdict.values[row] : "",
      ...flagsOf(row),
      data.words ? data.words[row] : "",
    ].join(" ").toLowerCase(),
  );

  function picture(row) {
    if (!data.pictures || !data.pictures[row]) return null;
    const image = make("img");
    image.src = "data:image/png;base64," + data.pictures[row];
    image.alt = "";
    return image;
  }

  // What a value is compared by: of flags, how many there are; numbers in text as numbers.
  const collator = new Intl.Collator(undefined, { numeric: true });
  function compare(a, b) {
    const { values, digits, key } = column[state.sort];
    let x = values[a], y = values[b];
    if (key === "flags") [x, y] = [x.length, y.length];
    if (x === null || y === null) return (x === null) - (y === null); // last, whichever the direction
    const way = typeof x === "string" && digits === null ? collator.compare(x, y) : x - y;
    return state.down ? -way : way;
  }

  function passes(row) {
    const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const flags = column.flags.values[row], flag = $("flag").value;
    return (
      words.every((word) => text[row].includes(word)) &&
      ["label", "verdict"].every((key) => {
        const chosen = $(key).value;
        return !chosen || column[key].values[row] === chosen.slice(1);
      }) &&
      (!flag || (flag === "any" ? flags.length : flag === "none" ? !flags.length : flags.includes(+flag)))
    );
  }

  const shownColumns = () => {
    const groups = [...document.getElementsByName("group")].filter((g) => g.checked).map((g) => g.value);
    return columns.filter((c) => c.key !== "index" && (!c.group || groups.includes(c.group)));
  };
  const size = () => Number($("size").value);

  function drawHead() {
    const head = make("tr");
    for (const c of [column.index, ...shownColumns()]) {
      const cell = make("th", c.digits === null && c.key !== "index" ? "text" : "");
      cell.scope = "col";
      if (c.key === state.sort) cell.setAttribute("aria-sort", state.down ? "descending" : "ascending");
      const button = make("button", "", c.name);
      button.type = "button";
      button.dataset.key = c.key;
      cell.append(button);
      head.append(cell);
    }
    const focused = document.activeElement && document.activeElement.dataset.key;
    document.querySelector("#rows thead").replaceChildren(head);
    if (focused) head.querySelector(`[data-key="${CSS.escape(focused)}"]`)?.focus();
  }

  const largest = {};
  function cellOf(c, row) {
    const cell = make("td", c.digits === null ? "text" : "");
    if (c.key === "flags") {
      cell.classList.add("flags");
      for (const flag of flagsOf(row)) cell.append(make("span", "flag", flag));
    } else if (c.digits === null) {
      cell.textContent = c.values[row];
    } else {
      cell.textContent = number(c.values[row], c.digits);
      if (c.errors && c.errors[row] !== null) cell.append(make("small", "", ` ± ${number(c.errors[row], 2)}`));
      if (c.group === "gaps" && c.values[row] > 0) {
        largest[c.key] ??= c.values.reduce((a, b) => Math.max(a, b ?? 0), 0);
        const bar = make("span", `size ${c.kind}`);
        bar.style.width = `${(100 * c.values[row]) / largest[c.key]}%`;
        cell.append(bar);
      }
    }
    return cell;
  }

  function drawRows() {
    state.start = Math.max(0, Math.min(state.start, order.length - 1));
    state.start -= state.start % size();
    const shown = shownColumns();
    const lines = order.slice(state.start, state.start + size()).map((row) => {
      const line = make("tr", row === state.chosen ? "chosen" : "");
      const head = make("th"), point = make("div", "point");
      head.scope = "row";
      const image = picture(row);
      if (image) point.append(image);
      point.append(make("span", "", column.index.values[row]));
      if (data.words) point.append(make("span", "words", data.words[row]));
      head.append(point);
      line.append(head, ...shown.map((c) => cellOf(c, row)));
      return line;
    });
    document.querySelector("#rows tbody").replaceChildren(...lines);
    const last = Math.min(state.start + size(), order.length);
    $("shown").textContent = order.length ? `${state.start + 1}–${last} of ${order.length}` : "none";
    $("previous").disabled = state.start === 0;
    $("next").disabled = last >= order.length;
    $("save").disabled = !order.length;
  }

  function refresh() {
    order = [];
    for (let row = 0; row < count; row++) if (passes(row)) order.push(row);
    order.sort((a, b) => compare(a, b) || a - b);
    let means = "";
    if (worst && order.length) {
      const finite = order.map((row) => worst.values[row]).filter((value) => value !== null);
      if (finite.length) {
        const mean = finite.reduce((a, b) => a + b, 0) / finite.length;
        means = `; their mean ${worst.name} is ${number(mean, 2)} nats`;
      }
    }
    $("status").textContent = `${order.length} of ${count} datapoints${means}.`;
    drawHead();
    drawRows();
  }

  function filter(changes) {
    for (const [id, value] of Object.entries(changes)) $(id).value = value;
    state.start = 0;
    refresh();
    $("datapoints").scrollIntoView();
  }

  // Shows a row wherever it stands, with all filters off.
  function show(row) {
    $("controls").reset();
    [state.sort, state.down, state.chosen] = [worst.key, true, row];
    refresh();
    state.start = order.indexOf(row);
    drawRows();
    document.querySelector("#rows .chosen").scrollIntoView({ block: "center" });
  }

  function addOptions() {
    for (const key of ["label", "verdict"]) {
      if (!column[key]) {
        document.querySelector(`.for-${key}`).hidden = true;
        continue;
      }
      const counts = new Map();
      for (const value of column[key].values) counts.set(value, (counts.get(value) || 0) + 1);
      for (const value of [...counts.keys()].sort(collator.compare)) {
        $(key).append(new Option(`${value || "(none)"} (${counts.get(value)})`, "=" + value));
      }
    }
    const counts = data.flags.map(() => 0);
    for (const flags of column.flags.values) for (const flag of flags) counts[flag]++;
    data.flags.forEach((flag, i) => counts[i] && $("flag").append(new Option(`${flag} (${counts[i]})`, i)));
  }

  function followStairs() {
    const stairs = $("stairs");
    if (!stairs) return;
    // The figure's datapoints: those that have the gap, the largest first.
    const drawn = [...Array(count).keys()].filter((row) => worst.values[row] !== null);
    drawn.sort((a, b) => worst.values[b] - worst.values[a] || a - b);
    const at = (event) => {
      const box = stairs.getBoundingClientRect();
      const place = Math.floor(((event.clientX - box.left) / box.width) * drawn.length);
      return drawn[Math.max(0, Math.min(place, drawn.length - 1))];
    };
    const tip = make("div");
    tip.id = "tip";
    tip.hidden = true;
    stairs.parentElement.append(tip);
    stairs.addEventListener("pointermove", (event) => {
      const row = at(event), box = stairs.getBoundingClientRect();
      const label = column.label ? `, label ${column.label.values[row]}` : "";
      tip.textContent = `datapoint ${column.index.values[row]}${label}: ${number(worst.values[row], 2)} nats`;
      const image = picture(row);
      if (image) tip.append(image);
      tip.hidden = false;
      const left = event.clientX - box.left;
      tip.style.left = `${Math.max(0, Math.min(left + 12, box.width - tip.offsetWidth))}px`;
      tip.style.top = "1.5rem";
    });
    stairs.addEventListener("pointerleave", () => (tip.hidden = true));
    stairs.addEventListener("click", (event) => show(at(event)));
  }

  document.querySelector("#rows thead").addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    const { key } = button.dataset;
    // Gaps and flags: the worst first; all else from the smallest.
    state.down = state.sort === key ? !state.down : column[key].group === "gaps" || key === "flags";
    state.sort = key;
    state.start = 0;
    refresh();
  });
  $("controls").addEventListener("input", () => { state.start = 0; refresh(); });
  $("all").addEventListener("click", () => {
    $("controls").reset();
    [state.start, state.chosen] = [0, null];
    refresh();
  });
  $("controls").addEventListener("submit", (event) => event.preventDefault());
  $("size").addEventListener("input", drawRows);
  $("previous").addEventListener("click", () => { state.start -= size(); drawRows(); });
  $("next").addEventListener("click", () => { state.start += size(); drawRows(); });
  $("save").addEventListener("click", () => {
    const link = make("a");
    link.href = URL.createObjectURL(new Blob([order.map((row) => column.index.values[row]).join("\n") + "\n"]));
    link.download = "indices.txt"; // for config.evaluate.indices_file
    link.click();
    URL.revokeObjectURL(link.href);
  });
  document.addEventListener("click", (event) => {
    const { label, flag } = event.target.dataset || {};
    if (label !== undefined) filter({ label: "=" + label });
    if (flag !== undefined) filter({ flag });
  });

  addOptions();
  followStairs();
  $("controls").hidden = $("pages").hidden = false;
  refresh();
})();
