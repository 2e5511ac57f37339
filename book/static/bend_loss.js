/* A loss one can bend: Huber's loss on the left, the line that it fits on the right.
   No dependency; draws into <div id="bend-loss"> and works from a file, with no network. */
(function () {
  "use strict";
  const box = document.getElementById("bend-loss");
  if (!box) return;

  const TRUE = { slope: 0.8, start: 0.5 };
  const NOISE = [0.1, -0.2, 0.15, 0.05, -0.1, 0.2, -0.15, -0.05, 0.1, 0, -0.1, 0.05];
  const ODD = 9; // the point that the reader moves
  const xs = NOISE.map((_, i) => (4 * i) / (NOISE.length - 1));
  const ys = xs.map((x, i) => TRUE.start + TRUE.slope * x + NOISE[i]);

  const TOP = 6.5; // what fits into the chart
  const huber = (e, d) => (Math.abs(e) <= d ? (e * e) / 2 : d * (Math.abs(e) - d / 2));
  const pull = (e, d) => Math.max(-d, Math.min(d, e));

  // Weighted least squares again and again: an error beyond d counts d/|e|. The loss is convex.
  function fit(d) {
    let a = 0, b = 0;
    for (let round = 0; round < 400; round++) {
      let s = 0, sx = 0, sy = 0, sxx = 0, sxy = 0;
      xs.forEach((x, i) => {
        const w = Math.min(1, d / Math.max(Math.abs(ys[i] - a - b * x), 1e-6));
        s += w; sx += w * x; sy += w * ys[i]; sxx += w * x * x; sxy += w * x * ys[i];
      });
      b = (s * sxy - sx * sy) / (s * sxx - sx * sx);
      a = (sy - b * sx) / s;
    }
    return { a, b };
  }

  box.innerHTML = `
<style>
#bend-loss { --bl-line: #2f5fe0; --bl-odd: #c4266e; --bl-faint: #767676; margin: 1.5rem 0; }
html[data-theme="dark"] #bend-loss { --bl-line: #8fb0ff; --bl-odd: #ff8fbf; --bl-faint: #a3a3a3; }
#bend-loss .bl-row { display: flex; flex-wrap: wrap; gap: 0.5rem 1.5rem; }
#bend-loss svg { flex: 1 1 17rem; min-width: 0; max-width: 100%; height: auto; }
#bend-loss text { fill: currentColor; font: 13px sans-serif; }
#bend-loss .bl-axis { stroke: var(--bl-faint); stroke-width: 1; fill: none; }
#bend-loss .bl-curve { stroke: var(--bl-line); stroke-width: 2.5; fill: none; }
#bend-loss .bl-pull { stroke: currentColor; stroke-width: 1.5; stroke-dasharray: 5 4; fill: none; }
#bend-loss .bl-truth { stroke: var(--bl-faint); stroke-width: 1.5; stroke-dasharray: 2 4; }
#bend-loss .bl-error { stroke: var(--bl-faint); stroke-width: 1; }
#bend-loss .bl-point { fill: currentColor; }
#bend-loss .bl-odd { fill: var(--bl-odd); }
#bend-loss .bl-grip { cursor: ns-resize; touch-action: none; }
#bend-loss label { flex: 1 1 17rem; display: block; }
#bend-loss input { width: 100%; accent-color: var(--bl-line); }
#bend-loss button { font: inherit; color: inherit; background: none; padding: 0.15rem 0.7rem;
  border: 1px solid var(--bl-faint); border-radius: 0.4rem; cursor: pointer; }
#bend-loss button:hover { border-color: var(--bl-line); }
#bend-loss :is(input, button):focus-visible { outline: 2px solid var(--bl-line); outline-offset: 2px; }
#bend-loss p { margin: 0.5rem 0; min-height: 3.2em; }
</style>
<div class="bl-row" role="group" aria-label="A loss to bend">
  <svg class="bl-loss" viewBox="0 0 320 230" role="img" aria-label="The loss by the size of the error"></svg>
  <svg class="bl-fit" viewBox="0 0 320 230" role="img" aria-label="Points and the line fitted to them"></svg>
</div>
<div class="bl-row">
  <label>Where the loss turns straight: δ = <output class="bl-d"></output>
    <input class="bl-delta" type="range" min="-1.7" max="0.8" step="0.05" value="0.8"></label>
  <label>Height of the odd point: <output class="bl-h"></output>
    <input class="bl-height" type="range" min="-1.5" max="5" step="0.1" value="-0.5"></label>
</div>
<div class="bl-row" role="group" aria-label="Set the loss to">
  <button type="button" data-delta="0.8">squared error</button>
  <button type="button" data-delta="-0.5">Huber</button>
  <button type="button" data-delta="-1.7">almost absolute error</button>
</div>
<p role="status"></p>`;

  const get = (name) => box.querySelector(name);
  const delta = get(".bl-delta"), height = get(".bl-height"), chart = get(".bl-fit");
  const px = (x) => 30 + 68 * x; // 0 … 4 of the points
  const py = (y) => 160 - 30 * y; // -1.5 … 5
  const ex = (e) => 160 + 30 * e; // errors, -4.7 … 4.7
  const ey = (v) => 140 - 20 * v; // loss and pull
  const line = (kind, x1, y1, x2, y2) =>
    `<line class="${kind}" x1="${x1}" y1="${y1}" x2="${x2}" y2="${y2}"/>`;
  const dot = (kind, x, y, r) => `<circle class="${kind}" cx="${x}" cy="${y}" r="${r}"/>`;
  const curve = (kind, f) => {
    const steps = Array.from({ length: 189 }, (_, i) => -4.7 + i / 20);
    const points = steps.filter((e) => Math.abs(f(e)) < TOP).map((e) => `${ex(e)},${ey(f(e))}`);
    return `<polyline class="${kind}" points="${points.join(" ")}"/>`;
  };

  function draw() {
    const d = 10 ** delta.value;
    ys[ODD] = Number(height.value);
    const { a, b } = fit(d);
    const errors = xs.map((x, i) => ys[i] - a - b * x);
    const kind = (i) => (i === ODD ? "bl-odd" : "bl-point");
    const scale = Math.min(d, 1); // drawn divided by a small δ, or it would look flat
    const loss = (e) => huber(e, d) / scale;

    get(".bl-loss").innerHTML =
      line("bl-axis", 18, ey(0), 302, ey(0)) + line("bl-axis", ex(0), 8, ex(0), 186) +
      curve("bl-pull", (e) => pull(e, d) / scale) + curve("bl-curve", loss) +
      errors.map((e, i) => (loss(e) < TOP ? dot(kind(i), ex(e), ey(loss(e)), i === ODD ? 6 : 3.5) : "")).join("") +
      `<g text-anchor="end"><text x="302" y="${ey(0) + 17}">error</text>` +
      `<text x="302" y="202">line: loss</text><text x="302" y="220">dashes: its slope, the pull</text></g>`;

    chart.innerHTML =
      line("bl-axis", 22, py(-1.7), 306, py(-1.7)) + line("bl-axis", 22, py(-1.7), 22, 8) +
      line("bl-truth", px(0), py(TRUE.start), px(4), py(TRUE.start + 4 * TRUE.slope)) +
      xs.map((x, i) => line("bl-error", px(x), py(ys[i]), px(x), py(a + b * x))).join("") +
      line("bl-curve", px(0), py(a), px(4), py(a + 4 * b)) +
      xs.map((x, i) => (i === ODD ? "" : dot("bl-point", px(x), py(ys[i]), 4))).join("") +
      dot("bl-odd bl-grip", px(xs[ODD]), py(ys[ODD]), 8) +
      `<text x="30" y="18">line: the fit; dots: the truth</text>`;

    const far = Math.abs(errors[ODD]);
    get(".bl-d").textContent = d.toFixed(2);
    get(".bl-h").textContent = ys[ODD].toFixed(1);
    height.setAttribute("aria-valuetext", ys[ODD].toFixed(1));
    delta.setAttribute("aria-valuetext", d.toFixed(2));
    get("p").textContent =
      `The fitted line has the slope ${b.toFixed(2)}; the truth is ${TRUE.slope.toFixed(2)}. The odd point lies ` +
      `${far.toFixed(2)} away from the line and pulls as hard as an error of ${Math.abs(pull(errors[ODD], d)).toFixed(2)}.`;
  }

  delta.addEventListener("input", draw);
  height.addEventListener("input", draw);
  box.querySelectorAll("button").forEach((button) =>
    button.addEventListener("click", () => { delta.value = button.dataset.delta; draw(); }));

  // The odd point can be dragged, too; the slider does the same for the keyboard.
  let held = false;
  chart.addEventListener("pointerdown", (event) => {
    if (!event.target.classList.contains("bl-grip")) return;
    held = true;
    chart.setPointerCapture(event.pointerId);
    event.preventDefault();
  });
  chart.addEventListener("pointermove", (event) => {
    if (!held) return;
    const frame = chart.getBoundingClientRect();
    height.value = (160 - ((event.clientY - frame.top) * 230) / frame.height) / 30;
    draw();
  });
  for (const end of ["pointerup", "pointercancel"]) chart.addEventListener(end, () => { held = false; });
  draw();
})();
