(function (data) {
  const roots = [...document.querySelectorAll('[data-cuda-steps="' + data.id + '"]')];
  const root = roots.find((e) => !e.dataset.ready);      // the same view can stand on a page twice
  if (!root) return;
  root.dataset.ready = "1";
  const make = (tag, parent, text) => {
    const e = document.createElement(tag);
    if (text !== undefined) e.textContent = text;
    parent.append(e);
    return e;
  };
  // A list is kept as [first, count, stride] where it is regular.
  const unpack = (list) => list.r ? Array.from({length: list.r[1]}, (_, i) => list.r[0] + i * list.r[2]) : list;
  const steps = data.steps.map(([line, kind, array, threads, cells, width, values]) =>
    ({line, kind, array, threads: unpack(threads), cells: unpack(cells), width, values: values && unpack(values)}));
  const shown = data.arrays.map((a, i) => i).filter((i) => data.arrays[i].columns);
  const verbs = ["load from", "store to", "update", "", "receive in", "update"];

  root.textContent = "";
  root.tabIndex = 0;
  const bar = make("div", root);
  const button = (text, name, act) => {
    const b = make("button", bar, text);
    b.type = "button";
    b.setAttribute("aria-label", name);
    b.addEventListener("click", act);
  };
  button("|<", "first step", () => go(0));
  button("<", "step back", () => go(at - 1));
  button(">", "step on", () => go(at + 1));
  button(">|", "last step", () => go(steps.length - 1));
  button("barrier", "on to the next barrier", () => barrier());
  const slider = make("input", bar);
  Object.assign(slider, {type: "range", min: 0, max: steps.length - 1, value: 0});
  slider.setAttribute("aria-label", "step");
  slider.addEventListener("input", () => go(+slider.value));
  const said = make("p", root);
  said.setAttribute("aria-live", "polite");
  const both = make("div", root);
  both.className = "both";
  const code = make("ol", both);
  const lines = data.source.map((text) => make("li", code, text || " "));
  const side = make("div", both);
  const canvases = shown.map((i) => {
    make("div", side, data.arrays[i].name);
    const c = make("canvas", side);
    c.setAttribute("role", "img");
    c.setAttribute("aria-label", "cells of " + data.arrays[i].name);
    return c;
  });

  const ranges = (numbers) => {
    const out = [];
    for (const n of [...new Set(numbers)].sort((a, b) => a - b)) {
      const last = out[out.length - 1];
      if (last && n === last[1] + 1) last[1] = n; else out.push([n, n]);
    }
    const text = out.slice(0, 6).map(([a, b]) => a === b ? "" + a : a + " to " + b).join(", ");
    return out.length > 6 ? text + ", ..." : text;
  };
  const sentence = (s) => {
    const begin = "Step " + (at + 1) + " of " + steps.length + (data.cut && at + 1 === steps.length ? " shown" : "") + ": ";
    if (s.kind === 15) return begin + "all threads have reached the barrier in line " + s.line + " and go on.";
    const plural = s.threads.length > 1;
    const cells = s.cells.flatMap((c) => Array.from({length: s.width}, (_, i) => c + i));
    return begin + "thread" + (plural ? "s " : " ") + ranges(s.threads) + " of warp " + (s.threads[0] >> 5) + " " +
      (plural ? verbs[s.kind] : verbs[s.kind].replace(/^(\w+)/, "$1s")) + " " + data.arrays[s.array].name +
      "[" + ranges(cells) + "], line " + s.line + ".";
  };
  const short = (v, digits) => v === null ? "nan" : Number.isInteger(v) && Math.abs(v) < 1e4 ? "" + v :
    (+v).toPrecision(digits).replace(/(\.\d*?)0+(e|$)/, "$1$2").replace(/\.(e|$)/, "$1").replace(/^(-?)0\./, "$1.");

  function draw(canvas, index, state, step) {
    const a = data.arrays[index], columns = Math.min(a.columns, 64), rows = Math.ceil(a.cells / columns);
    const w = Math.max(7, Math.min(44, Math.floor(528 / columns))), h = w >= 30 ? 18 : Math.max(7, Math.min(w, Math.floor(360 / rows) || 7));
    canvas.width = columns * w + 1;
    canvas.height = rows * h + 1;
    const g = canvas.getContext("2d"), ink = getComputedStyle(root).color;
    g.font = "11px system-ui,sans-serif";
    g.textAlign = "center";
    g.textBaseline = "middle";
    const now = step.array === index && step.kind !== 15 ? new Set(step.cells.flatMap((c) => Array.from({length: step.width}, (_, i) => c + i))) : new Set();
    for (let c = 0; c < a.cells; ++c) {
      const x = c % columns * w, y = Math.floor(c / columns) * h, written = state.has(c);
      if (now.has(c)) {
        g.fillStyle = step.kind === 0 ? "rgba(86,180,233,.75)" : "rgba(230,159,0,.85)";
        g.fillRect(x, y, w, h);
      } else if (written) {
        g.fillStyle = "rgba(128,128,128,.22)";
        g.fillRect(x, y, w, h);
      }
      g.strokeStyle = "rgba(128,128,128,.5)";
      g.strokeRect(x + .5, y + .5, w, h);
      if (written && w >= 30) {
        g.fillStyle = ink;
        g.fillText(short(state.get(c), w < 40 ? 2 : 3), x + w / 2, y + h / 2 + 1);
      }
    }
  }

  let at = 0;
  function go(to) {
    at = Math.max(0, Math.min(steps.length - 1, to));
    const step = steps[at];
    slider.value = at;
    lines.forEach((li, i) => li.classList.toggle("now", i + 1 === step.line));
    const line = lines[step.line - 1];
    if (line) code.scrollTop = line.offsetTop - code.offsetTop - code.clientHeight / 2;
    said.textContent = sentence(step);
    shown.forEach((index, k) => {
      const state = new Map();
      for (let i = 0; i <= at; ++i) {
        const s = steps[i];
        if (s.array === index && s.values) s.cells.forEach((c, n) => {
          for (let j = 0; j < s.width; ++j) state.set(c + j, s.values[n * s.width + j]);
        });
      }
      draw(canvases[k], index, state, step);
    });
  }
  function barrier() {
    const next = steps.findIndex((s, i) => i > at && s.kind === 15);
    go(next < 0 ? steps.length - 1 : next);
  }
  root.addEventListener("keydown", (e) => {
    const keys = {ArrowRight: () => go(at + 1), ArrowLeft: () => go(at - 1), Home: () => go(0),
                  End: () => go(steps.length - 1), b: barrier, PageDown: () => go(at + 10), PageUp: () => go(at - 10)};
    if (!keys[e.key] || e.target === slider && e.key !== "b") return;
    e.preventDefault();
    e.stopPropagation();
    keys[e.key]();
  });
  go(0);
})
