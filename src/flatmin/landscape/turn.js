(function () {
  "use strict";
  const figure = document.currentScript.closest("figure");
  const data = JSON.parse(figure.querySelector('script[type="application/json"]').textContent);
  const canvas = figure.querySelector("canvas"), pen = canvas.getContext("2d");
  const box = figure.querySelector("input"), out = figure.querySelector("output");
  const n = data.x.length, m = data.y.length, W = 760, H = 520, sharp = window.devicePixelRatio || 1;
  canvas.width = W * sharp; canvas.height = H * sharp;
  let size = 1, wordy = true, turn = -0.7, tilt = 0.55, zoom = 1, log = data.log, held = null;
  box.checked = log; box.disabled = !data.positive;

  const colours = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
  function colour(t, shade) {
    const s = Math.min(Math.max(t, 0), 1) * 4, k = Math.min(Math.floor(s), 3), f = s - k;
    return "rgb(" + colours[k].map((c, i) => Math.round(shade * (c + f * (colours[k + 1][i] - c)))).join(",") + ")";
  }
  const height = v => v === null ? null : log ? Math.log10(v) : v;
  let low, high;
  function range() {
    low = Infinity; high = -Infinity;
    for (const row of data.v) for (const v of row) {
      const h = height(v);
      if (h !== null) { low = Math.min(low, h); high = Math.max(high, h); }
    }
    if (!(high > low)) { low = (isFinite(low) ? low : 0) - 0.5; high = low + 1; }
  }
  const unit = (v, axis) => axis.length > 1 ? 2 * (v - axis[0]) / (axis[axis.length - 1] - axis[0]) - 1 : 0;
  const lift = h => 1.3 * (h - low) / (high - low) - 0.65;

  function project(a, b, c) {                 // the unit box, seen from far away with a little perspective
    const s = Math.sin(turn), k = Math.cos(turn), u = a * k - b * s, v = a * s + b * k;
    const q = Math.sin(tilt), r = Math.cos(tilt), depth = v * r - c * q, up = v * q + c * r;
    const f = 165 * zoom * 6 / (6 + depth);
    return [W / 2 + u * f, H / 2 - 12 - up * f, depth];
  }
  function at(p, q) {                         // the surface's own height at a point, between its grid values
    const find = (v, axis) => {
      let i = 0;
      while (i < axis.length - 2 && axis[i + 1] <= v) i++;
      return [i, axis.length > 1 ? (v - axis[i]) / (axis[i + 1] - axis[i]) : 0];
    };
    const [i, s] = find(p, data.x), [j, t] = find(q, data.y);
    if (s < -1e-9 || s > 1 + 1e-9 || t < -1e-9 || t > 1 + 1e-9) return null;
    const i2 = Math.min(i + 1, n - 1), j2 = Math.min(j + 1, m - 1);
    let sum = 0;
    for (const [a, b, w] of [[i, j, (1 - s) * (1 - t)], [i2, j, s * (1 - t)], [i, j2, (1 - s) * t], [i2, j2, s * t]]) {
      if (w < 1e-9) continue;
      const h = height(data.v[a][b]);
      if (h === null) return null;
      sum += w * h;
    }
    return sum;
  }
  function line(a, b, style, width) {
    pen.strokeStyle = style; pen.lineWidth = width;
    pen.beginPath(); pen.moveTo(a[0], a[1]); pen.lineTo(b[0], b[1]); pen.stroke();
  }
  function text(words, p, align) {
    if (!wordy) return;
    pen.fillStyle = "#333"; pen.font = 12 * size + "px system-ui, sans-serif"; pen.textAlign = align || "center";
    pen.fillText(words, p[0], p[1]);
  }
  const short = v => Math.abs(v) >= 1e4 || (v !== 0 && Math.abs(v) < 1e-3) ? v.toExponential(1) : String(+v.toPrecision(3));

  function round(axis) {                      // about five round numbers within an axis
    const a = axis[0], b = axis[axis.length - 1], found = [];
    if (!(b > a)) return [a];
    const ten = Math.pow(10, Math.floor(Math.log10((b - a) / 4)));
    const step = ten * [1, 2, 5, 10].find(k => (b - a) / (k * ten) <= 5);
    for (let k = Math.ceil(a / step); k * step <= b * (1 + 1e-9); k++) found.push(+(k * step).toPrecision(12));
    return found;
  }
  function frame(words) {                     // its lines below the surface, its words above
    const floor = -0.65, near = (a, b) => project(a, b, floor)[2];
    const by = near(0, -1) < near(0, 1) ? -1 : 1, bx = near(-1, 0) < near(1, 0) ? -1 : 1;
    const corners = [[-1, -1], [1, -1], [1, 1], [-1, 1]];
    wordy = words;
    if (!words) corners.forEach((c, k) => line(project(...c, floor), project(...corners[(k + 1) % 4], floor), "#bbb", 1));
    for (const v of round(data.x)) text(short(v), project(unit(v, data.x), by * 1.12, floor - 0.04));
    for (const v of round(data.y)) text(short(v), project(bx * 1.12, unit(v, data.y), floor - 0.04));
    const side = (a, b) => { const p = project(a, b, floor - 0.12); p[1] += 16 * size; return p; };
    text("x", side(0, by * 1.22)); text("y", side(bx * 1.22, 0));
    const post = [-bx, by].map((v, k) => k ? by : -bx);
    if (!words) line(project(...post, floor), project(...post, 0.65), "#bbb", 1);
    for (let k = 0; k <= 4; k++) {
      const h = low + k / 4 * (high - low), p = project(post[0] * 1.03, post[1] * 1.03, lift(h));
      const right = p[0] > W / 2;
      text(short(log ? Math.pow(10, h) : h), [p[0] + (right ? 8 : -8), p[1] + 4], right ? "left" : "right");
    }
    ["height: loss" + (log ? " (logarithmic)" : ""), "x: " + data.labels[0], "y: " + data.labels[1]]
      .forEach((words, k) => text(words, [12, 3 + 17 * (k + 1) * size], "left"));
  }
  function faces() {
    const p = data.v.map((row, i) => row.map((v, j) => {
      const h = height(v);
      return h === null ? null : [...project(unit(data.x[i], data.x), unit(data.y[j], data.y), lift(h)), h];
    }));
    const all = [];
    for (let i = 0; i + 1 < n; i++) for (let j = 0; j + 1 < m; j++) {
      const q = [p[i][j], p[i + 1][j], p[i + 1][j + 1], p[i][j + 1]];
      if (q.some(c => c === null)) continue;
      const mean = (q[0][3] + q[1][3] + q[2][3] + q[3][3]) / 4;
      const sx = lift(q[1][3]) + lift(q[2][3]) - lift(q[0][3]) - lift(q[3][3]);
      const sy = lift(q[2][3]) + lift(q[3][3]) - lift(q[0][3]) - lift(q[1][3]);
      const a = -sx * n / 4, b = -sy * m / 4, light = (0.35 * a + 0.45 * b + 0.82) / Math.hypot(a, b, 1);
      all.push({ q, depth: (q[0][2] + q[1][2] + q[2][2] + q[3][2]) / 4,
        fill: colour((mean - low) / (high - low), 0.72 + 0.28 * Math.max(0, light)) });
    }
    all.push(...marks());
    all.sort((a, b) => b.depth - a.depth);
    for (const f of all) {
      if (f.paint) { f.paint(); continue; }
      pen.beginPath();
      f.q.forEach((c, k) => k ? pen.lineTo(c[0], c[1]) : pen.moveTo(c[0], c[1]));
      pen.closePath();
      pen.fillStyle = pen.strokeStyle = f.fill; pen.lineWidth = 0.7; pen.fill(); pen.stroke();
      if (n <= 61) { pen.strokeStyle = "rgba(0,0,0,.13)"; pen.lineWidth = 0.5; pen.stroke(); }
    }
  }
  function mark(p, q) {
    const h = at(p, q);
    return h === null ? null : project(unit(p, data.x), unit(q, data.y), lift(h) + 0.015);
  }
  function marks() {                          // path and models, hidden by what lies in front of them
    const found = [], front = 2.5 / Math.max(n, m, 8);
    let before = null;
    for (const [p, q] of data.path) {
      const here = mark(p, q), old = before;
      if (here && old) found.push({ depth: Math.min(here[2], old[2]) - front, paint: () => line(old, here, "#d62728", 2) });
      before = here;
    }
    data.models.forEach(([p, q], k) => {
      const here = mark(p, q), name = data.names[k];
      if (here) found.push({ depth: here[2] - front, paint: () => {
        pen.beginPath(); pen.arc(here[0], here[1], 4.5 * size, 0, 7);
        pen.fillStyle = "white"; pen.strokeStyle = "black"; pen.lineWidth = 1.2; pen.fill(); pen.stroke();
      } });
      if (here && name) found.push({ depth: -Infinity, paint: () => {    // in front of everything
        pen.font = "600 " + 13 * size + "px system-ui, sans-serif"; pen.textAlign = "center"; pen.lineJoin = "round";
        pen.strokeStyle = "white"; pen.lineWidth = 4; pen.strokeText(name, here[0], here[1] - 10 * size);
        pen.fillStyle = "#111"; pen.fillText(name, here[0], here[1] - 10 * size);
      } });
    });
    return found;
  }
  function draw() {
    range();
    size = Math.min(Math.max(W / (canvas.clientWidth || W), 1), 2);      // words stay readable in a narrow figure
    pen.setTransform(sharp, 0, 0, sharp, 0, 0);
    pen.clearRect(0, 0, W, H);
    frame(false); faces(); frame(true);
  }
  function nearest(event) {
    const r = canvas.getBoundingClientRect(), px = (event.clientX - r.left) * W / r.width;
    const py = (event.clientY - r.top) * H / r.height;
    let best = null, far = 400;
    data.v.forEach((row, i) => row.forEach((v, j) => {
      const h = height(v);
      if (h === null) return;
      const p = project(unit(data.x[i], data.x), unit(data.y[j], data.y), lift(h));
      const d = (p[0] - px) ** 2 + (p[1] - py) ** 2 + 20 * p[2];
      if (d < far) { far = d; best = [i, j]; }
    }));
    out.textContent = best === null ? "" : "x = " + short(data.x[best[0]]) + ", y = " + short(data.y[best[1]]) +
      ", loss = " + +data.v[best[0]][best[1]].toPrecision(5);
  }
  const bound = v => Math.min(Math.max(v, -0.2), 1.57);
  canvas.addEventListener("pointerdown", e => { held = [e.clientX, e.clientY]; canvas.setPointerCapture(e.pointerId); });
  canvas.addEventListener("pointerup", () => { held = null; });
  canvas.addEventListener("pointercancel", () => { held = null; });
  canvas.addEventListener("pointermove", e => {
    if (!held) { nearest(e); return; }
    turn -= (e.clientX - held[0]) * 0.01; tilt = bound(tilt + (e.clientY - held[1]) * 0.01);
    held = [e.clientX, e.clientY]; requestAnimationFrame(draw);
  });
  canvas.addEventListener("wheel", e => {
    e.preventDefault(); zoom = Math.min(Math.max(zoom * Math.exp(-e.deltaY * 0.001), 0.4), 4); draw();
  }, { passive: false });
  canvas.addEventListener("keydown", e => {
    const step = { ArrowLeft: [0.1, 0], ArrowRight: [-0.1, 0], ArrowUp: [0, 0.1], ArrowDown: [0, -0.1] }[e.key];
    if (!step) return;
    e.preventDefault(); turn += step[0]; tilt = bound(tilt + step[1]); draw();
  });
  window.addEventListener("resize", draw);
  box.addEventListener("change", () => { log = box.checked; draw(); });
  draw();
})();
