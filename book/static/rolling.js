/* A point that rolls into a valley: the rule and its learning rate are the reader's.
   No dependency; draws into <div id="rolling"> and works from a file, with no network. */
(function () {
  "use strict";
  const box = document.getElementById("rolling");
  if (!box) return;

  const FLAT = 0.04, STEEP = 1, STEPS = 40, START = [-9, 1.6];
  const height = (x, y) => (FLAT * x * x + STEEP * y * y) / 2;
  const slope = ([x, y]) => [FLAT * x, STEEP * y];

  // Each rule: from the gradient and its own memory to a direction. Limits of the slider: powers of 10.
  const each = (make) => () => { const parts = [make(), make()]; return (g) => g.map((gi, i) => parts[i](gi)); };
  const RULES = {
    "gradient descent": { from: -1.5, to: 0.4, start: 0.25, make: each(() => (g) => g) },
    momentum: { from: -1.5, to: 0.6, start: 0, make: each((v = 0) => (g) => (v = 0.6 * v + g)) },
    Nesterov: { from: -1.5, to: 0.6, start: 0, make: each((v = 0) => (g) => g + 0.6 * (v = 0.6 * v + g)) },
    RMSProp: { from: -2, to: 0.3, start: -0.6, make: each((s = 0) => (g) => {
      s = 0.9 * s + 0.1 * g * g;
      return g / (Math.sqrt(s) + 1e-8);
    }) },
    Adam: { from: -1.5, to: 0.6, start: 0, make: each((m = 0, s = 0, t = 0) => (g) => {
      t += 1;
      m = 0.9 * m + 0.1 * g;
      s = 0.999 * s + 0.001 * g * g;
      return m / (1 - 0.9 ** t) / (Math.sqrt(s / (1 - 0.999 ** t)) + 1e-8);
    }) },
    Lion: { from: -2, to: 0.3, start: -0.5, make: each((m = 0) => (g) => {
      const d = Math.sign(0.9 * m + 0.1 * g);
      m = 0.99 * m + 0.01 * g;
      return d;
    }) },
  };

  function walk(rule, rate) {
    const points = [START], direction = RULES[rule].make();
    for (let step = 0; step < STEPS; step++) {
      const here = points[points.length - 1], d = direction(slope(here));
      points.push(here.map((value, i) => value - rate * d[i]));
    }
    return points;
  }

  const px = (x) => 30 + 28 * (x + 10), py = (y) => 110 - 28 * y; // x: -10 … 10, y: -3.5 … 3.5
  const rings = [0.02, 0.1, 0.3, 0.7, 1.3, 2.2, 3.5].map((h) =>
    `<ellipse class="ro-ring" cx="${px(0)}" cy="${py(0)}" rx="${28 * Math.sqrt(2 * h / FLAT)}" ry="${28 * Math.sqrt(2 * h / STEEP)}"/>`);

  box.innerHTML = `
<style>
#rolling { --ro-line: #2f5fe0; --ro-faint: #767676; margin: 1.5rem 0; }
html[data-theme="dark"] #rolling { --ro-line: #8fb0ff; --ro-faint: #a3a3a3; }
#rolling svg { width: 100%; height: auto; border: 1px solid var(--ro-faint); border-radius: 0.4rem; }
#rolling .ro-ring { fill: currentColor; fill-opacity: 0.03; stroke: var(--ro-faint); stroke-width: 1; stroke-opacity: 0.6; }
#rolling .ro-path { fill: none; stroke: var(--ro-line); stroke-width: 2; }
#rolling .ro-dot { fill: var(--ro-line); }
#rolling .ro-start { fill: none; stroke: var(--ro-line); stroke-width: 2; }
#rolling .ro-low { stroke: currentColor; stroke-width: 2; }
#rolling .ro-row { display: flex; flex-wrap: wrap; gap: 0.5rem 1.5rem; align-items: end; margin-top: 0.5rem; }
#rolling label { flex: 1 1 14rem; max-width: 26rem; }
#rolling label:has(select) { flex: 0 1 auto; }
#rolling input { width: 100%; accent-color: var(--ro-line); }
#rolling select { font: inherit; color: inherit; background: transparent; border: 1px solid var(--ro-faint);
  border-radius: 0.4rem; padding: 0.15rem 0.4rem; }
#rolling option { color: #000; background: #fff; }
#rolling :is(input, select):focus-visible { outline: 2px solid var(--ro-line); outline-offset: 2px; }
#rolling p { margin: 0.5rem 0; min-height: 3.2em; }
</style>
<svg viewBox="0 0 620 220" role="img" aria-label="Level lines of a valley and the path of ${STEPS} steps"></svg>
<div class="ro-row">
  <label>Rule <select>${Object.keys(RULES).map((name) => `<option>${name}</option>`).join("")}</select></label>
  <label>Learning rate: <output></output> <input type="range" step="0.01"></label>
</div>
<p role="status"></p>`;

  const select = box.querySelector("select"), slider = box.querySelector("input");

  function draw() {
    const rate = 10 ** slider.value, points = walk(select.value, rate);
    const end = points[STEPS], left = height(...end), far = points.findIndex(([x, y]) => Math.abs(x) > 40 || Math.abs(y) > 40);
    const shown = far < 0 ? points : points.slice(0, far + 1);
    const at = ([x, y]) => `${px(x).toFixed(1)},${py(y).toFixed(1)}`;
    box.querySelector("svg").innerHTML = rings.join("") +
      `<path class="ro-low" d="M${px(0) - 6},${py(0)}h12M${px(0)},${py(0) - 6}v12"/>` +
      `<polyline class="ro-path" points="${shown.map(at).join(" ")}"/>` +
      shown.slice(1).map(([x, y]) => `<circle class="ro-dot" cx="${px(x).toFixed(1)}" cy="${py(y).toFixed(1)}" r="3"/>`).join("") +
      `<circle class="ro-start" cx="${px(START[0])}" cy="${py(START[1])}" r="6"/>`;
    box.querySelector("output").textContent = rate.toFixed(2);
    slider.setAttribute("aria-valuetext", rate.toFixed(2));
    box.querySelector("p").textContent = far >= 0
      ? `With ${select.value} and a learning rate of ${rate.toFixed(2)} the path flies off: each step lands further up the other side.`
      : `With ${select.value} and a learning rate of ${rate.toFixed(2)}, ${STEPS} steps lead from height ${height(...START).toFixed(2)} to ` +
        `${left < 0.001 ? left.toExponential(1) : left.toFixed(3)}. The cross marks the lowest point.`;
  }

  function choose() {
    const rule = RULES[select.value];
    slider.min = rule.from;
    slider.max = rule.to;
    slider.value = rule.start;
    draw();
  }

  select.addEventListener("change", choose);
  slider.addEventListener("input", draw);
  choose();
})();
