// Draws the head viewers of this page: finds their empty boxes by the id that viewer.py gave them and fills each once.
(function (spec) {
  const SVG = "http://www.w3.org/2000/svg", ROW = 23, GAP = 170, SIDE = 12 + 7.6 * spec.longest;
  const [nLayers, nHeads, nQueries, nKeys] = spec.shape;

  // Two base-36 digits a weight, in thousandths. Head nHeads is the mean of the layer's heads.
  function weight(layer, head, i, j) {
    if (head < nHeads) {
      const at = 2 * (((layer * nHeads + head) * nQueries + i) * nKeys + j);
      return parseInt(spec.weights.slice(at, at + 2), 36) / 1000;
    }
    let sum = 0;
    for (let h = 0; h < nHeads; h++) sum += weight(layer, h, i, j);
    return sum / nHeads;
  }

  function element(parent, name, attributes, text) {
    const svg = ["svg", "g", "text", "line", "rect"].includes(name);
    const node = svg ? document.createElementNS(SVG, name) : document.createElement(name);
    for (const key in attributes) node.setAttribute(key, attributes[key]);
    if (text !== undefined) node.textContent = text;
    return parent.appendChild(node);
  }

  function chooser(parent, title, names) {
    const label = element(parent, "label", {}, title + " ");
    const select = element(label, "select", {});
    names.forEach((name, value) => element(select, "option", { value: value }, name));
    return select;
  }

  function build(box) {
    box.textContent = "";
    const bar = element(box, "div", { class: "bar" });
    const numbers = n => Array.from({ length: n }, (_, k) => String(k));
    const layer = chooser(bar, "Layer", numbers(nLayers));
    const head = chooser(bar, "Head", numbers(nHeads).concat(nHeads > 1 ? ["mean of all heads"] : []));
    const said = element(box, "p", { "aria-live": "polite" });
    const width = 2 * SIDE + GAP, height = ROW * Math.max(nQueries, nKeys) + 26;
    const svg = element(box, "svg", { viewBox: `0 0 ${width} ${height}`, width: width, role: "group",
                                      "aria-label": "attention from queries, left, to keys, right" });
    element(svg, "text", { x: SIDE - 8, y: 14, "text-anchor": "end", class: "dim" }, "queries");
    element(svg, "text", { x: SIDE + GAP + 8, y: 14, class: "dim" }, "keys");
    const lines = element(svg, "g", {});
    let chosen = null, pinned = null;                     // [side, index]: side 0 is a query, side 1 a key

    const middle = (side, index) => 26 + ROW * (index + 0.5);
    const tokens = [spec.queries, spec.keys].map((words, side) => words.map((word, index) => {
      const token = element(svg, "g", { class: "token", role: "button", tabindex: index || side ? -1 : 0 });
      const left = side ? SIDE + GAP : 0;
      token.shade = element(token, "rect", { x: left + 1, y: middle(side, index) - ROW / 2 + 1, width: SIDE - 2,
                                             height: ROW - 2, rx: 3 });
      element(token, "text", { x: side ? left + 8 : SIDE - 8, y: middle(side, index) + 5,
                               "text-anchor": side ? "start" : "end" }, word);
      token.addEventListener("mouseenter", () => choose([side, index]));
      token.addEventListener("mouseleave", () => choose(pinned));
      token.addEventListener("focus", () => choose([side, index]));
      token.addEventListener("click", () => { pin([side, index]); token.focus(); });
      token.addEventListener("keydown", event => move(event, side, index));
      return token;
    }));

    function move(event, side, index) {
      const steps = { ArrowDown: [side, index + 1], ArrowUp: [side, index - 1], ArrowLeft: [0, index],
                      ArrowRight: [1, index], Home: [side, 0], End: [side, tokens[side].length - 1] };
      if (event.key in steps) {
        const [s, k] = steps[event.key];
        tokens[s][Math.min(Math.max(k, 0), tokens[s].length - 1)].focus();
      } else if (event.key === "Enter" || event.key === " ") pin([side, index]);
      else if (event.key === "Escape") { pinned = null; choose(null); }
      else return;
      event.preventDefault();
    }

    function pin(place) {
      pinned = pinned && pinned.join() === place.join() ? null : place;
      choose(pinned || place);
    }

    function choose(place) {
      chosen = place;
      draw();
    }

    function draw() {
      lines.textContent = "";
      const of = (i, j) => weight(+layer.value, +head.value, i, j);
      const ends = [];
      for (let i = 0; i < nQueries; i++) for (let j = 0; j < nKeys; j++) {
        if (chosen && chosen[1] !== [i, j][chosen[0]]) continue;
        const w = of(i, j);
        ends.push([w, [i, j]]);
        if (w >= 0.01) element(lines, "line", { x1: SIDE, y1: middle(0, i), x2: SIDE + GAP, y2: middle(1, j),
                                                "stroke-width": 0.5 + 6 * w, "stroke-opacity": Math.min(1, 0.12 + w) });
      }
      tokens.forEach((row, side) => row.forEach((token, index) => {
        const mine = chosen && chosen[0] === side && chosen[1] === index;
        const other = chosen && chosen[0] !== side;
        token.shade.setAttribute("fill-opacity", mine ? 0.35 : other ? ends[index][0] * 0.85 : 0);
        token.setAttribute("tabindex", (chosen ? mine : !side && !index) ? 0 : -1);
        token.setAttribute("aria-pressed", String(Boolean(pinned && pinned[0] === side && pinned[1] === index)));
        token.setAttribute("aria-label", (side ? "key " : "query ") + row.words[index]);
      }));
      if (!chosen) {
        said.textContent = "Point at a token, or reach it with Tab and the arrow keys. Enter keeps it, Escape lets it go.";
        return;
      }
      const [side, index] = chosen, other = tokens[1 - side].words;
      const best = ends.slice().sort((a, b) => b[0] - a[0]).slice(0, 3).filter(e => e[0] > 0)
        .map(([w, place]) => `${other[place[1 - side]]} ${(100 * w).toFixed(1)} %`);
      said.textContent = `${side ? "key" : "query"} ${tokens[side].words[index]} ${side ? "is attended by" : "attends to"} `
        + (best.join(", ") || "nothing");
    }

    tokens[0].words = spec.queries;
    tokens[1].words = spec.keys;
    box.addEventListener("keydown", event => event.stopPropagation());      // or JupyterLab takes the arrow keys
    layer.addEventListener("change", draw);
    head.addEventListener("change", draw);
    draw();
  }

  document.querySelectorAll(`[data-head-viewer="${spec.id}"]:not([data-drawn])`).forEach(box => {
    box.setAttribute("data-drawn", "");
    build(box);
  });
})
