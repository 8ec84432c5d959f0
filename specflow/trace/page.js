"use strict";
// Whatever is shown of a text is set as text, never as markup.
for (const trace of document.querySelectorAll(".trace")) {
  const data = JSON.parse(trace.querySelector("script[type='application/json']").textContent);
  const out = trace.querySelector(".out"), panel = trace.querySelector(".panel");
  const tokens = [...out.querySelectorAll(".t")];
  const [ACCEPTED, REJECTED] = [0, 1], TARGET = -2, ROW = 28, LANE = 14;
  const stepOf = [], firstOf = [];
  data.steps.forEach(([added], step) => {
    firstOf.push(stepOf.length);
    added.forEach(() => stepOf.push(step));
  });
  let focused = 0, pinned = 0, lit = [];

  const make = (name, attributes = {}, ...children) => {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children.filter((child) => child !== null));
    return element;
  };
  const draw = (name, attributes = {}) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    return element;
  };
  const number = (value) => (value === null ? "?" : value === 0 || value >= 0.001 ? String(+value.toPrecision(3)) : value.toExponential(1));
  const ms = (seconds) => `${(1e3 * seconds).toFixed(1)} ms`;
  const word = (token) => data.words[token].replaceAll("\n", "↵") || "∅";
  const short = (text) => { const signs = [...text.replaceAll("\n", "↵")]; return signs.length > 40 ? `${signs.slice(0, 40).join("")}…` : signs.join(""); };
  const plural = (count, name) => `${count} ${name}${count === 1 ? "" : "s"}`;

  // The drafts as rows: each below its parent, and the target's own token behind the path that stands.
  function rows(step) {
    const [added, origins, margins, , drafts] = step;
    const path = drafts.flatMap((draft, i) => (draft[4] === ACCEPTED ? [i] : []));
    const nodes = drafts.map(([token, parent, q, p, fate, source], i) => ({ i, token, parent, q, p, fate, source }));
    path.forEach((i, k) => { nodes[i].margin = margins[k] ?? null; nodes[i].at = k; });
    if (added.length > path.length) {
      const k = path.length;
      nodes.push({ i: TARGET, token: added[k], parent: path.length ? path[k - 1] : -1, origin: origins[k], margin: margins[k] ?? null, at: k });
    }
    const below = new Map();
    for (const node of nodes) below.set(node.parent, [...(below.get(node.parent) ?? []), node]);
    const ordered = [], waiting = [...(below.get(-1) ?? [])].reverse();
    while (waiting.length) {
      const node = waiting.pop();
      ordered.push(node);
      waiting.push(...[...(below.get(node.i) ?? [])].reverse());
    }
    return ordered;
  }

  // The tree, drawn beside the rows: a first child goes on below its parent, its siblings get lanes of their own.
  function tree(ordered) {
    const place = new Map([[-1, { lane: 0, y: -ROW / 2 }]]), taken = new Set(), edges = [], dots = [];
    let lanes = 1;
    ordered.forEach((node, row) => {
      const from = place.get(node.parent), lane = taken.has(node.parent) ? lanes++ : from.lane;
      taken.add(node.parent);
      const at = { lane, y: row * ROW + ROW / 2 };
      place.set(node.i, at);
      const [x0, x1] = [from.lane, lane].map((l) => l * LANE + 9), on = node.i === TARGET || node.fate === ACCEPTED;
      const turn = Math.min(ROW / 2, at.y - from.y);
      const d = x0 === x1 ? `M${x0} ${from.y}V${at.y}` : `M${x0} ${from.y}V${at.y - turn}Q${x0} ${at.y} ${x1} ${at.y}`;
      edges.push([on, draw("path", { class: on ? "edge on" : "edge", d })]);
      if (node.i === TARGET) dots.push(draw("rect", { class: "node on", x: x1 - 4, y: at.y - 4, width: 8, height: 8, transform: `rotate(45 ${x1} ${at.y})` }));
      else if (node.fate === REJECTED) dots.push(draw("circle", { class: "node", cx: x1, cy: at.y, r: 6.5 }), draw("path", { class: "cross", d: `M${x1 - 3} ${at.y - 3}l6 6m0 -6l-6 6` }));
      else dots.push(draw("circle", { class: on ? "node on" : "node", cx: x1, cy: at.y, r: on ? 5 : 4 }));
    });
    const width = lanes * LANE + 6, svg = draw("svg", { width, height: ordered.length * ROW, "aria-hidden": "true" });
    svg.style.width = `${width}px`;
    svg.append(...edges.sort(([a], [b]) => a - b).map(([, edge]) => edge), ...dots);
    return svg;
  }

  function table(step, chosen) {
    const ordered = rows(step), body = make("tbody"), sourced = new Set(step[4].map((draft) => draft[5])).size > 1;
    ordered.forEach((node, row) => {
      const own = node.i === TARGET, accepted = own || node.fate === ACCEPTED;
      const name = [accepted ? "yes" : node.fate === REJECTED ? "no" : "off", own || accepted ? (node.at === chosen ? "it" : "") : ""].join(" ").trim();
      const hue = own ? data.origins[node.origin] : data.hues[node.source];
      const line = make("tr", { class: name });
      if (row === 0) line.append(make("td", { class: "g", rowspan: ordered.length }, tree(ordered)));
      const ratio = own || node.p === null || node.q === null ? null : node.q > 0 ? node.p / node.q : Infinity;
      line.append(
        make("td", { class: "w" }, make("span", { class: `t ${hue}`, title: own ? `token ${node.token}` : `token ${node.token}, drafted by ${data.sources[node.source]}` }, word(node.token))),
        make("td", { class: "v" }, own ? data.origins[node.origin] : data.fates[node.fate]),
        make("td", {}, own ? "" : number(node.q)),
        make("td", {}, own ? "" : number(node.p)),
        make("td", {}, own ? "" : ratio === Infinity ? "∞" : number(ratio)),
        make("td", {}, node.margin === undefined ? "" : node.margin === null ? "–" : number(node.margin)),
        ...(sourced ? [make("td", { class: "v" }, own ? "target" : data.sources[node.source])] : []),
      );
      body.append(line);
    });
    const titles = ["", "token", "verdict", "q", "p", "p/q", "margin", ...(sourced ? ["source"] : [])];
    const about = { q: "probability that the drafter gave to it", p: "probability that the target gives to it", margin: "how far the target's best logit was ahead of the second", "p/q": "p divided by q" };
    const head = make("tr", {}, ...titles.map((title) => make("th", { scope: "col", class: title === "token" ? "w" : title === "verdict" || title === "source" ? "v" : "", title: about[title] ?? "" }, title)));
    return make("div", { class: "scroll" }, make("table", { class: "drafts" }, make("thead", {}, head), body));
  }

  function times([seconds, drafting, reading]) {
    if (seconds === null) return null;
    if (reading === null) return make("p", { class: "one" }, `This step took ${ms(seconds)}.`);
    const rest = Math.max(0, seconds - (drafting ?? 0) - reading), whole = (drafting ?? 0) + reading + rest || 1;
    const bar = make("div", { class: "times", "aria-hidden": "true" });
    [drafting ?? 0, reading, rest].forEach((part, i) => {
      const piece = make("span", { class: `part${i}` });
      piece.style.width = `${(100 * part) / whole}%`;
      bar.append(piece);
    });
    const said = `${ms(seconds)}: drafting ${ms(drafting ?? 0)}, the target's pass ${ms(reading)}, the rest ${ms(rest)}`;
    return make("div", {}, bar, make("p", { class: "one muted" }, said));
  }

  function show(i) {
    const number = stepOf[i], step = data.steps[number], [added, origins, , spent, drafts] = step;
    for (const token of lit) token.classList.remove("now", "it");
    lit = tokens.slice(firstOf[number], firstOf[number] + added.length);
    for (const token of lit) token.classList.add("now");
    tokens[i].classList.add("it");
    const go = (to, name, text) => {
      const button = make("button", { type: "button", "aria-label": name, title: name }, text);
      button.disabled = to < 0 || to >= data.steps.length;
      button.addEventListener("click", () => { pin(firstOf[to], false); panel.querySelectorAll(".go button")[text === "‹" ? 0 : 1].focus(); });
      return button;
    };
    const away = () => {
      const button = make("button", { type: "button", "aria-label": "close", title: "close" }, "×");
      button.addEventListener("click", () => { panel.hidden = true; });
      return button;
    };
    const taken = drafts.filter((draft) => draft[4] === ACCEPTED).length;
    const last = added.length > taken ? `, then ${data.origins[origins[taken]] === "drawn" ? "a drawn token" : `a ${data.origins[origins[taken]]} token`}` : "";
    const said = drafts.length ? `${taken} of ${plural(drafts.length, "draft")} accepted${last}.` : "Nothing was drafted: the target's own token.";
    panel.replaceChildren(
      make("div", { class: "head" }, make("h3", {}, `Step ${number + 1} of ${data.steps.length}`), make("div", { class: "go" }, go(number - 1, "the step before", "‹"), go(number + 1, "the next step", "›"), away())),
      make("p", { class: "one" }, `${plural(added.length, "token")} in one pass. ${said}`),
      times(spent),
      table(step, i - firstOf[number]),
    );
    panel.hidden = false;
    const here = trace.querySelector(".here");
    if (here) for (const x of ["x1", "x2"]) here.setAttribute(x, ((number + 0.5) * 400) / data.steps.length);
  }

  function pin(i, focus) {
    tokens[focused].tabIndex = -1;
    focused = pinned = i;
    tokens[i].tabIndex = 0;
    if (focus) tokens[i].focus();
    else tokens[i].scrollIntoView({ block: "nearest" });
    show(i);
  }

  const index = (target) => { const token = target.closest?.(".t"); return token && out.contains(token) ? Number(token.dataset.i) : null; };
  out.addEventListener("mouseover", (event) => { const i = index(event.target); if (i !== null) show(i); });
  out.addEventListener("mouseleave", () => { if (tokens.length) show(pinned); });
  out.addEventListener("click", (event) => { const i = index(event.target); if (i !== null) pin(i, true); });
  out.addEventListener("focusin", (event) => { const i = index(event.target); if (i !== null && i !== pinned) pin(i, false); });
  out.addEventListener("keydown", (event) => {
    const last = tokens.length - 1, i = index(event.target), number = i === null ? 0 : stepOf[i];
    const to = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: last, ArrowDown: firstOf[Math.min(number + 1, data.steps.length - 1)], ArrowUp: firstOf[Math.max(number - 1, 0)] }[event.key];
    if (i === null || to === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    pin(Math.max(0, Math.min(last, to)), true);
  });

  for (const button of trace.querySelectorAll(".legend button")) {
    button.addEventListener("click", () => {
      const on = button.getAttribute("aria-pressed") !== "true";
      for (const other of trace.querySelectorAll(".legend button")) other.setAttribute("aria-pressed", String(on && other === button));
      out.classList.toggle("only", on);
      for (const token of tokens) token.classList.toggle("kept", on && token.classList.contains(button.dataset.kind));
    });
  }

  trace.querySelector(".ghosts input").addEventListener("change", (event) => {
    for (const ghost of out.querySelectorAll(".ghost")) ghost.remove();
    if (!event.target.checked) return;
    data.steps.forEach(([added, , , , drafts, instead], step) => {
      const taken = drafts.filter((draft) => draft[4] === ACCEPTED).length;
      if (instead) tokens[firstOf[step] + Math.min(taken, added.length - 1)]?.before(make("span", { class: "ghost", "aria-hidden": "true" }, short(instead)));
    });
  });

  trace.querySelector(".progress svg")?.addEventListener("click", (event) => {
    const box = event.currentTarget.getBoundingClientRect(), share = (event.clientX - box.left) / box.width;
    pin(firstOf[Math.max(0, Math.min(data.steps.length - 1, Math.floor(share * data.steps.length)))], false);
  });

  // Begin with a step that has something to tell, where the panel hides nothing.
  if (tokens.length && matchMedia("(min-width: 60rem)").matches && document.body.classList.contains("one")) {
    const telling = data.steps.findIndex(([, , , , drafts]) => drafts.some((draft) => draft[4] === ACCEPTED) && drafts.some((draft) => draft[4] === REJECTED));
    pinned = firstOf[Math.max(0, telling)];
    show(pinned);
  }
}
