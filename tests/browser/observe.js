// What a reader would see on this page, as data. tests/browser/visit.py loads this and asks.
document.head.insertAdjacentHTML("beforeend", "<style>* { transition: none !important }</style>");

window.observe = {
  describe(element) {
    const label = element.id ? "#" + element.id : element.className || "";
    const text = (element.textContent || "").trim().replace(/\s+/g, " ").slice(0, 40);
    return `<${element.tagName.toLowerCase()} ${label}> ${text}`;
  },

  brokenImages() {
    return [...document.images].filter((image) => !(image.complete && image.naturalWidth > 0)).map((i) => i.src);
  },

  // Sphinx wraps each formula in .math; MathJax puts a container with an SVG into it, and sets a
  // command that it does not know in red.
  formulaProblems() {
    const formulas = [...document.querySelectorAll(".math")];
    const bare = formulas.filter((formula) => !formula.querySelector("mjx-container svg"));
    const wrong = [...document.querySelectorAll('[data-mml-node="merror"], mjx-assistive-mml mtext[mathcolor="red"]')];
    return [...bare.map((e) => "not typeset: " + this.describe(e)), ...wrong.map((e) => "error: " + this.describe(e))];
  },

  // What sticks out on the right, where neither the page nor an element around it should be wider
  // than the screen. Code, formulas and tables may, inside an element that scrolls.
  overflowing() {
    const width = document.documentElement.clientWidth;
    const page = document.documentElement.scrollWidth > width ? [`page is wider than ${width}`] : [];
    const right = (element) => element.getBoundingClientRect().right;
    const cutBy = (element) => {
      for (let e = element.parentElement; e && e !== document.body; e = e.parentElement)
        if (right(e) < right(element) - 1 && getComputedStyle(e).overflowX !== "visible")
          return getComputedStyle(e).overflowX;
      return "nothing";
    };
    const wide = [...document.querySelectorAll("article *:not(svg *, mjx-assistive-mml, mjx-assistive-mml *)")].filter(
      (e) => e.getClientRects().length && right(e) > width + 1 && !["auto", "scroll"].includes(cutBy(e)));
    return [...page, ...wide.slice(0, 5).map((e) => this.describe(e))];
  },

  // Moves each slider and chooses each option; the drawing beside it must change.
  async idleControls() {
    const frame = () => new Promise((done) => requestAnimationFrame(() => setTimeout(done, 30)));
    const idle = [];
    for (const control of document.querySelectorAll("article input[type=range], article figure select")) {
      let home = control.parentElement;
      while (home && !home.querySelector("svg:not(mjx-container svg)")) home = home.parentElement;
      const drawing = () => [...(home?.querySelectorAll("svg") ?? [])].map((svg) => svg.outerHTML).join();
      const before = drawing();
      if (control.tagName === "SELECT") control.selectedIndex = (control.selectedIndex + 1) % control.options.length;
      else control.value = Number(control.value) - control.min > control.max - control.value ? control.min : control.max;
      control.dispatchEvent(new Event("input", { bubbles: true }));
      control.dispatchEvent(new Event("change", { bubbles: true }));
      await frame();
      if (before === drawing()) idle.push(this.describe(control));
    }
    return idle;
  },

  controls() {
    return document.querySelectorAll("article input[type=range]").length;
  },

  background() {
    return getComputedStyle(document.body).backgroundColor;
  },

  async barriers(rules) {
    const only = rules ? { runOnly: rules } : {};
    const report = await axe.run(document, { resultTypes: ["violations"], preload: false, ...only });
    return report.violations
      .filter((rule) => ["serious", "critical"].includes(rule.impact))
      .flatMap((rule) => rule.nodes.slice(0, 4).map((node) => `${rule.id}: ${node.html.slice(0, 120)} (${(node.any[0] || node.all[0] || node.none[0] || {}).message})`));
  },
};
