// Hovering and zooming. The figures are there without it: this adds a cross-hair with values, and draws the curves anew
// over the part that was dragged. Figures with the same x axis are zoomed together.
"use strict";
(() => {
  const NS = "http://www.w3.org/2000/svg";
  const make = (parent, name, attributes) => {
    const node = document.createElementNS(NS, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    return parent.appendChild(node);
  };
  const short = value => {
    if (value === 0 || Number.isInteger(value)) return value.toLocaleString("en");
    const size = Math.abs(value);
    return size >= 1e5 || size < 1e-3 ? value.toExponential(2) : String(+value.toPrecision(4));
  };
  const runningMean = (values, window) => {
    let sum = 0;
    return values.map((value, i) => {
      sum += value - (i >= window ? values[i - window] : 0);
      return sum / Math.min(i + 1, window);
    });
  };
  const panels = [];

  class Panel {
    constructor(figure) {
      this.figure = figure;
      this.svg = figure.querySelector("svg");
      Object.assign(this, JSON.parse(figure.querySelector("script").textContent));
      this.whole = this.x;
      this.before = new Map();  // attributes as they were drawn, by node
      this.byPoint = this.categories.length > 0 || this.series.some(s => s.kind === "points");
      this.canZoom = !this.byPoint && !this.log2 && this.series.every(s => !["area", "steps"].includes(s.kind));
      const [left, top, right, bottom] = this.box;
      this.cross = make(this.svg, "line", { y1: top, y2: bottom, stroke: "var(--soft)", "stroke-width": 0.8, visibility: "hidden" });
      this.dot = make(this.svg, "circle", { r: 5, fill: "none", stroke: "var(--ink)", "stroke-width": 1.4, visibility: "hidden" });
      this.brush = make(this.svg, "rect", { y: top, height: bottom - top, fill: "#0072B2", opacity: 0.15, visibility: "hidden" });
      this.tip = document.createElement("div");
      this.tip.className = "tip";
      this.tip.hidden = true;
      figure.appendChild(this.tip);
      make(this.svg, "rect", { x: left, y: top, width: right - left, height: bottom - top, fill: "transparent" });
      this.svg.addEventListener("pointermove", event => this.move(event));
      // A finger leaves as soon as it is lifted: its values stay until it touches something else.
      this.svg.addEventListener("pointerleave", event => { if (event.pointerType === "mouse") this.hide(); });
      this.svg.addEventListener("pointerdown", event => this.down(event));
      this.svg.addEventListener("pointerup", event => this.up(event));
      this.svg.addEventListener("dblclick", () => zoom(this.xlabel, null));
    }
    scale(value) { return this.log2 ? Math.log2(value) : value; }
    px(value) {
      const [left, , right] = this.box, [low, high] = this.x.map(end => this.scale(end));
      return left + (right - left) * (this.scale(value) - low) / (high - low);
    }
    py(value) {
      const [, top, , bottom] = this.box, [low, high] = this.y;
      return bottom - (bottom - top) * (value - low) / (high - low);
    }
    at(event) {
      const frame = this.svg.getBoundingClientRect(), view = this.svg.viewBox.baseVal;
      return [(event.clientX - frame.left) * view.width / frame.width, (event.clientY - frame.top) * view.height / frame.height];
    }
    value(x) {
      const [left, , right] = this.box, [low, high] = this.x.map(end => this.scale(end));
      const found = low + (high - low) * (x - left) / (right - left);
      return this.log2 ? 2 ** found : found;
    }
    inside([x, y]) {
      const [left, top, right, bottom] = this.box;
      return x >= left && x <= right && y >= top - 4 && y <= bottom + 4;
    }
    move(event) {
      const place = this.at(event);
      if (this.from !== undefined) this.drawBrush(place[0]);
      if (!this.inside(place)) return this.hide();
      if (this.byPoint) this.showPoint(place); else this.showColumn(place[0]);
    }
    hide() {
      this.tip.hidden = true;
      for (const node of [this.cross, this.dot]) node.setAttribute("visibility", "hidden");
    }
    showColumn(x) {
      const wanted = this.value(x);
      let column = null;
      for (const values of this.xs) for (const value of values)
        if (column === null || Math.abs(this.px(value) - x) < Math.abs(this.px(column) - x)) column = value;
      if (column === null || wanted === null) return;
      const lines = [];
      for (const series of this.series) {
        const place = this.xs[series.x].indexOf(column);
        if (place < 0) continue;
        let text = short(series.y[place]);
        if (series.low) text += ` (${short(series.low[place])} to ${short(series.high[place])})`;
        lines.push([series.colour, (series.label ? series.label + ": " : "") + text]);
      }
      this.cross.setAttribute("x1", this.px(column));
      this.cross.setAttribute("x2", this.px(column));
      this.cross.setAttribute("visibility", "visible");
      this.show(`${this.xlabel} ${short(column)}`, lines, this.px(column), this.box[1]);
    }
    showPoint([x, y]) {
      let best = null;
      for (const series of this.series) series.y.forEach((value, i) => {
        const a = this.px(this.xs[series.x][i]), b = this.py(value), far = Math.hypot(a - x, b - y);
        if (best === null || far < best.far) best = { far, series, i, a, b };
      });
      if (best === null || best.far > 30) return this.hide();
      const { series, i, a, b } = best;
      this.dot.setAttribute("cx", a);
      this.dot.setAttribute("cy", b);
      this.dot.setAttribute("visibility", "visible");
      const value = this.xs[series.x][i];
      const name = (series.names && series.names[i]) || this.categories[Math.round(series.y[i])] || "";
      let text = `${this.xlabel}: ${short(value)}`;
      if (series.low) text += ` (${short(series.low[i])} to ${short(series.high[i])})`;
      const lines = [[series.colour, (series.label ? series.label + ", " : "") + text]];
      if (!this.categories.length) lines.push([null, `${this.ylabel}: ${short(series.y[i])}`]);
      this.show(name, lines, a, b - 12);
    }
    show(head, lines, x, y) {
      this.tip.replaceChildren();
      const add = (colour, text, tag = "div") => {
        const row = document.createElement(tag);
        if (colour) row.appendChild(document.createElement("i")).style.background = colour;
        row.append(text);
        this.tip.appendChild(row);
      };
      if (head) add(null, head, "b");
      for (const [colour, text] of lines) add(colour, text);
      this.tip.hidden = false;
      const frame = this.svg.getBoundingClientRect(), outer = this.figure.getBoundingClientRect();
      const ratio = frame.width / this.svg.viewBox.baseVal.width, width = this.tip.offsetWidth;
      const left = x * ratio + (x > 180 ? -width - 12 : 12);
      this.tip.style.left = `${Math.max(0, Math.min(left, outer.width - width))}px`;
      this.tip.style.top = `${y * ratio}px`;
    }
    down(event) {
      const place = this.at(event);
      if (event.pointerType !== "mouse") return this.move(event);
      if (!this.canZoom || !this.inside(place)) return;
      this.from = place[0];
      this.svg.setPointerCapture(event.pointerId);
      event.preventDefault();
    }
    drawBrush(x) {
      const [left, , right] = this.box, to = Math.max(left, Math.min(right, x));
      this.brush.setAttribute("x", Math.min(this.from, to));
      this.brush.setAttribute("width", Math.abs(this.from - to));
      this.brush.setAttribute("visibility", "visible");
    }
    up(event) {
      if (this.from === undefined) return;
      const from = this.from, [to] = this.at(event);
      this.from = undefined;
      this.brush.setAttribute("visibility", "hidden");
      if (Math.abs(to - from) > 8) zoom(this.xlabel, [from, to].map(x => this.value(x)).sort((a, b) => a - b));
    }
    draw(range) {
      this.hide();
      this.x = range || this.whole;
      const write = (node, name, value) => {
        if (!this.before.has(node)) this.before.set(node, {});
        const old = this.before.get(node);
        if (!(name in old)) old[name] = node.getAttribute(name);
        if (value === null) { if (old[name] === null) node.removeAttribute(name); else node.setAttribute(name, old[name]); }
        else node.setAttribute(name, value);
      };
      const find = suffix => this.svg.querySelector(`[id="${this.name}:${suffix}"]`);
      const path = (xs, ys) => {
        const first = Math.max(0, xs.findIndex(x => x >= this.x[0]) - 1);
        const inside = [];
        for (let i = first; i < xs.length; i++) {
          inside.push(`${this.px(xs[i]).toFixed(1)} ${this.py(ys[i]).toFixed(1)}`);
          if (xs[i] > this.x[1]) break;
        }
        return inside.length ? "M " + inside.join(" L ") : "M 0 0";
      };
      this.series.forEach((series, i) => {
        const xs = this.xs[series.x];
        const line = (node, ys) => {
          if (!node) return;
          const own = node.querySelector(":scope > path");
          if (own) write(own, "d", range ? path(xs, ys) : null);
          node.querySelectorAll("use").forEach((use, place) => {
            const x = this.px(xs[place]), shown = x >= this.box[0] - 3 && x <= this.box[2] + 3;
            write(use, "x", range ? x : null);
            write(use, "visibility", range && !shown ? "hidden" : "visible");
          });
        };
        line(find(i), series.y);
        if (series.window) line(find(`${i}:mean`), runningMean(series.y, series.window));
        const band = find(`${i}:band`);
        if (band) write(band, "visibility", range ? "hidden" : "visible");
      });
      this.marks.forEach((value, i) => {
        const own = find(`mark${i}`), text = find(`mark${i}:text`), x = this.px(value);
        const shown = x >= this.box[0] && x <= this.box[2];
        for (const node of own ? own.querySelectorAll("path") : [])
          write(node, "d", range ? (shown ? `M ${x} ${this.box[1]} L ${x} ${this.box[3]}` : "M 0 0") : null);
        if (text) write(text, "visibility", range ? "hidden" : "visible");
      });
      this.ticks(range);
    }
    ticks(range) {
      this.svg.querySelectorAll(".zoomed").forEach(node => node.remove());
      const axis = this.svg.querySelector(`[id="${this.name}:ticks"]`);
      if (axis) axis.setAttribute("visibility", range ? "hidden" : "visible");
      if (!range) return;
      const rough = (range[1] - range[0]) / 5, power = 10 ** Math.floor(Math.log10(rough));
      const step = Math.max(1, power * [1, 2, 5, 10].find(factor => power * factor >= rough));
      for (let value = Math.ceil(range[0] / step) * step; value <= range[1]; value += step) {
        const text = make(this.svg, "text", { x: this.px(value), y: this.box[3] + 12, "text-anchor": "middle",
          "font-size": 9.5, fill: "var(--soft)", class: "zoomed" });
        text.textContent = short(value);
      }
      const label = make(this.svg, "text", { x: (this.box[0] + this.box[2]) / 2, y: this.box[3] + 25,
        "text-anchor": "middle", "font-size": 9.5, fill: "var(--soft)", class: "zoomed" });
      label.textContent = this.xlabel;
    }
  }
  const zoom = (xlabel, range) => {
    for (const panel of panels) if (panel.canZoom && panel.xlabel === xlabel) panel.draw(range);
  };
  for (const figure of document.querySelectorAll("figure")) panels.push(new Panel(figure));
  document.querySelector(".hint").hidden = !matchMedia("(hover: hover)").matches;
  addEventListener("pointerdown", event => {
    for (const panel of panels) if (!panel.figure.contains(event.target)) panel.hide();
  });
  const opened = [];
  addEventListener("beforeprint", () => document.querySelectorAll("details:not([open])").forEach(node => { node.open = true; opened.push(node); }));
  addEventListener("afterprint", () => opened.splice(0).forEach(node => { node.open = false; }));
})();
