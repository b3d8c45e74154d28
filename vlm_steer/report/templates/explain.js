"use strict";
(() => {
  const page = JSON.parse(document.getElementById("payload").textContent);
  const $ = (id) => document.getElementById(id);
  const make = (tag, text, className) => {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    if (className) element.className = className;
    return element;
  };
  const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const percent = (share) => (100 * share).toFixed(1) + " %";
  // No number is minus infinity: the word has no probability left.
  const log = (value, digits = 2) => (value === null ? "ruled out" : value.toFixed(digits));
  const PALETTES = {
    viridis: ["440154", "482878", "3e4989", "31688e", "26828e", "1f9e89", "35b779", "6ece58", "b5de2b", "fde725"],
    cividis: ["00224e", "123570", "3b496c", "575d6d", "707173", "8a8678", "a59c74", "c3b369", "e1cc55", "fee838"],
  };
  const BLOCKS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#999999", "#56b4e9", "#d55e00", "#f0e442"];
  const view = { arm: page.arms.length - 1, word: -1, locked: false, spot: null, cell: null };
  const within = (value, low, high) => Math.min(Math.max(value, low), high);

  // What a pointer reaches in a drawing, arrow keys reach too.
  function onArrows(target, step, leave) {
    target.tabIndex = 0;
    target.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      if (event.key === "Escape") { leave(); return; }
      const by = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] }[event.key];
      if (!by) return;
      event.preventDefault();
      step(...by);
    });
  }

  // Maps: one byte per image token, in units of the largest; attention to sinks lies beside them.
  const maps = page.arms.map((arm) => {
    if (!arm.maps) return null;
    const sinks = new Float32Array(bytes(arm.maps.sink_values).buffer);
    return { ...arm.maps, values: bytes(arm.maps.data), sinkValues: sinks };
  });
  const heads = page.arms.map((arm) => bytes(arm.heads.data));
  const trends = new Map();
  const cells = page.places ? page.places[0].length : 0;

  function mapOf(a, word, band, withSinks) {
    const map = maps[a];
    const n = cells;
    const row = word * map.bands.length + band;
    const values = new Float32Array(n);
    for (let i = 0; i < n; i++) values[i] = (map.values[row * n + i] / 255) * map.tops[row];
    if (withSinks) map.sinks.forEach((cell, k) => { values[cell] = map.sinkValues[row * map.sinks.length + k]; });
    return values;
  }

  // Per image token, the least-squares line through the words of an answer.
  function trendOf(a, band, withSinks) {
    const key = [a, band, withSinks].join();
    if (!trends.has(key)) {
      const n = maps[a].n_words, middle = (n - 1) / 2, spreadOfPlaces = (n * (n * n - 1)) / 12;
      const mean = new Float32Array(cells), slope = new Float32Array(cells);
      for (let w = 0; w < n; w++) mapOf(a, w, band, withSinks).forEach((v, i) => {
        mean[i] += v / n;
        slope[i] += (v * (w - middle)) / spreadOfPlaces;
      });
      trends.set(key, { mean, slope, middle });
    }
    return trends.get(key);
  }

  // One canvas per picture.
  const views = page.images.map((image, k) => {
    const canvas = $(`overlay-${k}`);
    if (!canvas) return null;
    const scale = Math.min(1, 512 / Math.max(image.width, image.height));
    canvas.width = Math.max(1, Math.round(image.width * scale));
    canvas.height = Math.max(1, Math.round(image.height * scale));
    const own = { canvas, number: k, places: page.places[k], across: canvas.width / image.width, down: canvas.height / image.height };
    own.unseen = spread(own, new Float32Array(cells).fill(1)).map((v) => (v > 0 ? 0 : 1));
    return own;
  }).filter(Boolean);
  const nameOf = (own) => (views.length > 1 ? ` in picture ${own.number + 1}` : "");

  // The values of one map per pixel of a canvas; boxes that overlap add up.
  function spread({ canvas, places, across, down }, values) {
    const { width, height } = canvas;
    const sum = new Float32Array(width * height);
    places.forEach((box, i) => {
      if (!box || values[i] <= 0) return;
      const [x0, x1] = [Math.floor(box[0] * across + 0.5), Math.floor(box[2] * across + 0.5)];
      const [y0, y1] = [Math.floor(box[1] * down + 0.5), Math.floor(box[3] * down + 0.5)];
      // Per share of the picture, so that pictures of any size compare.
      const density = (values[i] * width * height) / ((box[2] - box[0]) * across * (box[3] - box[1]) * down);
      for (let y = y0; y < Math.max(y1, y0 + 1) && y < height; y++)
        for (let x = x0; x < Math.max(x1, x0 + 1) && x < width; x++) sum[y * width + x] += density;
    });
    return sum;
  }

  function colour(share) {
    const stops = PALETTES[$("palette") ? $("palette").value : "viridis"];
    const at = Math.min(Math.max(share, 0), 1) * (stops.length - 1);
    const low = Math.min(Math.floor(at), stops.length - 2);
    const part = (hex, k) => parseInt(hex.slice(2 * k, 2 * k + 2), 16);
    return [0, 1, 2].map((k) => Math.round(part(stops[low], k) + (at - low) * (part(stops[low + 1], k) - part(stops[low], k))));
  }

  function shownValues() {
    const band = Number($("band").value), withSinks = $("sinks").checked;
    const values = mapOf(view.arm, view.word, band, withSinks);
    if ($("mode").value === "plain") return values;
    const { mean, slope, middle } = trendOf(view.arm, band, withSinks);
    const ahead = $("mode").value === "position" ? view.word - middle : 0;
    return values.map((v, i) => Math.max(0, v - mean[i] - slope[i] * ahead));
  }

  function drawOverlays() {
    if (!views.length) return;
    const hasMap = view.word >= 0 && view.word < maps[view.arm].n_words;
    const values = hasMap ? shownValues() : new Float32Array(cells);
    const sums = views.map((own) => spread(own, values));
    const top = sums.reduce((a, sum) => sum.reduce((b, c) => Math.max(b, c), a), 0);
    const most = values.reduce((a, b) => Math.max(a, b), 0);
    if (hasMap) $("scale-top").textContent = `most: ${percent(most)} on one image token`;
    views.forEach((own, k) => drawOverlay(own, sums[k], top, hasMap, hasMap ? values.indexOf(most) : -1));
  }

  function drawOverlay(own, sum, top, hasMap, strongest) {
    const { canvas, places, unseen, across, down } = own;
    const { width, height } = canvas;
    const image = page.images[own.number];
    const pen = canvas.getContext("2d");
    const picture = pen.createImageData(width, height);
    const opacity = Number($("opacity").value);
    for (let i = 0; i < sum.length; i++) {
      const share = top > 0 ? sum[i] / top : 0;
      const [r, g, b] = unseen[i] ? [128, 128, 128] : colour(share);
      const alpha = unseen[i] ? 0.55 : hasMap ? opacity * (0.15 + 0.85 * Math.sqrt(share)) : 0;
      picture.data.set([r, g, b, Math.round(255 * alpha)], 4 * i);
    }
    pen.putImageData(picture, 0, 0);
    const check = view.word >= 0 && page.arms[view.arm].checks[view.word];
    if (check && hasMap) {
      pen.strokeStyle = "#fff";
      pen.lineWidth = 1.5;
      check.cells.map((cell) => places[cell]).filter(Boolean).forEach(([x0, y0, x1, y1]) => {
        pen.strokeRect(x0 * across, y0 * down, (x1 - x0) * across, (y1 - y0) * down);
      });
    }
    if (view.spot && view.spot.picture === own.number) {
      pen.strokeStyle = "#fff";
      pen.lineWidth = 2;
      pen.beginPath();
      pen.arc(view.spot.x * width, view.spot.y * height, 6, 0, 7);
      pen.stroke();
    }
    canvas.dataset.word = hasMap ? `${view.arm}:${view.word}` : "";
    const box = strongest >= 0 && places[strongest];
    if (hasMap) canvas.setAttribute("aria-label", `Heat map of attention${nameOf(own)} for the word ${wordText(view.arm, view.word)}` +
      (box ? `, strongest around ${percent((box[0] + box[2]) / 2 / image.width)} from the left and ${percent((box[1] + box[3]) / 2 / image.height)} from the top` : ""));
  }

  function drawScale() {
    const strip = $("scale");
    if (!strip) return;
    const pen = strip.getContext("2d");
    for (let x = 0; x < strip.width; x++) {
      pen.fillStyle = `rgb(${colour(x / (strip.width - 1)).join()})`;
      pen.fillRect(x, 0, 1, strip.height);
    }
  }

  // The texts.
  const buttons = page.arms.map(() => []);
  const wordText = (a, w) => page.arms[a].text.slice(page.arms[a].words[w].start, page.arms[a].words[w].end);
  // Offsets are in characters, and JavaScript counts some characters twice.
  page.arms.forEach((arm) => {
    const letters = Array.from(arm.text);
    if (letters.length === arm.text.length) return;
    const offsets = [0];
    letters.forEach((letter) => offsets.push(offsets[offsets.length - 1] + letter.length));
    [...arm.words, ...arm.tokens].forEach((part) => { part.start = offsets[part.start]; part.end = offsets[part.end]; });
  });

  function buildArms() {
    page.arms.forEach((arm, a) => {
      const column = make("section", undefined, "arm");
      const name = a === 0 && page.arms.length > 1 ? "unsteered" : arm.name === "none" ? "answer" : arm.name;
      column.append(make("h2", name));
      const answer = make("p", undefined, "answer");
      answer.setAttribute("aria-label", `Words of the answer: ${name}`);
      answer.setAttribute("role", "group");
      let end = 0;
      arm.words.forEach((word, w) => {
        answer.append(document.createTextNode(arm.text.slice(end, word.start)));
        const button = make("button", wordText(a, w), "word" + (word.differs && page.arms.length > 1 ? " differs" : ""));
        button.classList.toggle("checked", w in arm.checks);
        button.type = "button";
        button.tabIndex = a === view.arm && w === 0 ? 0 : -1;
        button.dataset.arm = a;
        button.dataset.word = w;
        button.setAttribute("aria-pressed", "false");
        button.addEventListener("pointerenter", () => { if (!view.locked) show(a, w); });
        button.addEventListener("focus", () => { if (!view.locked || button.matches(":focus-visible")) show(a, w); });
        button.addEventListener("click", () => {
          const same = view.locked && view.arm === a && view.word === w;
          view.locked = !same;
          show(a, w);
        });
        button.addEventListener("keydown", (event) => move(event, a, w));
        answer.append(button);
        buttons[a].push(button);
        end = word.end;
      });
      answer.append(document.createTextNode(arm.text.slice(end)));
      column.append(answer);
      $("arms").append(column);
    });
  }

  function move(event, a, w) {
    const last = buttons[a].length - 1;
    const other = page.arms.length > 1 ? 1 - a : a;
    const targets = {
      ArrowRight: [a, Math.min(w + 1, last)], ArrowLeft: [a, Math.max(w - 1, 0)],
      Home: [a, 0], End: [a, last],
      ArrowDown: [other, Math.min(w, buttons[other].length - 1)], ArrowUp: [other, Math.min(w, buttons[other].length - 1)],
    };
    if (event.key === "Escape") { view.locked = false; show(a, w); return; }
    const target = targets[event.key];
    if (!target || event.ctrlKey || event.metaKey || event.altKey || target[1] < 0) return;
    event.preventDefault();
    buttons[target[0]][target[1]].focus();
    show(...target);
  }

  function show(a, w) {
    view.arm = a;
    view.word = w;
    buttons.flat().forEach((button) => {
      const isActive = Number(button.dataset.arm) === a && Number(button.dataset.word) === w;
      button.classList.toggle("active", isActive);
      button.classList.toggle("locked", isActive && view.locked);
      button.setAttribute("aria-pressed", String(isActive && view.locked));
      button.tabIndex = isActive ? 0 : -1;
    });
    drawOverlays();
    drawHeads();
    drawTimeline();
    drawLens();
    tell();
  }

  // Risk.
  function risks(a) { return page.arms[a].risk[$("detector").value] || []; }

  function setDetector() {
    const all = page.arms.flatMap((_, a) => risks(a)).filter((v) => v !== null);
    const slider = $("threshold");
    const isShare = all.every((v) => v >= 0 && v <= 1);
    const low = isShare ? 0 : Math.min(...all), high = isShare ? 1 : Math.max(...all);
    slider.min = low;
    slider.max = high;
    slider.step = (high - low) / 200 || 1;
    const sorted = [...all].sort((x, y) => x - y);
    const known = page.thresholds[$("detector").value];
    slider.value = known ?? sorted[Math.floor(0.8 * sorted.length)] ?? high;
    colourText();
  }

  function colourText() {
    const threshold = Number($("threshold").value), high = Number($("threshold").max);
    let flagged = 0, count = 0;
    $("threshold-value").textContent = threshold.toFixed(2);
    page.arms.forEach((arm, a) => {
      const values = risks(a);
      const latest = Math.max(...page.arms.flatMap((other) => other.position), 1e-9);
      arm.words.forEach((word, w) => {
        const risk = values[w];
        const isFlagged = risk !== null && risk !== undefined && risk >= threshold;
        const excess = high > threshold ? (risk - threshold) / (high - threshold) : 1;
        const button = buttons[a][w];
        button.style.backgroundColor = isFlagged ? `rgba(var(--risk), ${(0.25 + 0.5 * excess).toFixed(2)})` : "";
        button.style.borderBottomColor = `color-mix(in srgb, var(--place) ${Math.round((100 * arm.position[w]) / latest)}%, transparent)`;
        button.classList.toggle("flagged", isFlagged);
        button.title = `${$("detector").value} ${risk === null || risk === undefined ? "–" : risk.toFixed(3)} · by place alone: ${arm.position[w]} words before it`;
        if (a === page.arms.length - 1) { count += 1; flagged += isFlagged ? 1 : 0; }
      });
    });
    $("flagged").textContent = `${flagged} of ${count} words`;
  }

  function verdict(check) {
    if (check.without_cells === null && check.without_others === null) return "Ruled out with either of them cut off, which compares nothing.";
    if (check.without_cells === null) return "Looking there mattered: without it the word is ruled out.";
    const effect = check.without_others === null ? 0 : check.without_others - check.without_cells;
    return effect > 0.1 ? `Looking there mattered: ${effect.toFixed(2)} nats more are lost than with other tokens.`
      : "Looking there made no difference beyond that of other tokens.";
  }

  // What is known about the word.
  function tell() {
    const arm = page.arms[view.arm], word = arm.words[view.word];
    $("word-name").textContent = `“${wordText(view.arm, view.word)}”`;
    const table = make("table"), body = make("tbody");
    const row = (name, value) => {
      const line = make("tr"), head = make("th", name);
      head.scope = "row";
      line.append(head, make("td", value));
      body.append(line);
    };
    row("probability", word.logprob === null ? "0 %, ruled out" : `${percent(Math.exp(word.logprob))} (log ${log(word.logprob, 3)})`);
    Object.entries(arm.risk).forEach(([name, values]) => row(`risk: ${name}`, values[view.word] === null ? "–" : values[view.word].toFixed(3)));
    row("risk by place alone", `${arm.position[view.word]} words before it`);
    const masses = arm.masses.slice(...word.tokens);
    row("attention", arm.blocks.map((block, k) => `${block} ${percent(masses.reduce((sum, m) => sum + m[k], 0) / masses.length)}`).join(" · "));
    const check = arm.checks[view.word];
    if (check) {
      row("knockout check", `log-probability ${log(check.logprob)}; without the ${check.cells.length} image tokens it looked at most ${log(check.without_cells)}; ` +
        `without ${check.cells.length} others at random ${log(check.without_others)}; without the image ${log(check.without_image)}`);
      row("", verdict(check));
    } else row("knockout check", "not made for this word");
    table.append(body);
    $("word-facts").replaceChildren(table);
  }

  function fit(target, ratio) {
    const width = Math.max(200, target.clientWidth || 400);
    const sharp = window.devicePixelRatio || 1;
    target.width = Math.round(width * sharp);
    target.height = Math.round(width * ratio * sharp);
    target.style.height = `${Math.round(width * ratio)}px`;
    return target.getContext("2d");
  }

  function headShare(r, c) {
    const arm = page.arms[view.arm];
    return (heads[view.arm][(view.word * arm.layers.length + r) * arm.n_heads + c] / 255) * arm.heads.tops[view.word];
  }
  const headText = (r, c) => `layer ${page.arms[view.arm].layers[r]}, head ${c}: ${percent(headShare(r, c))} on the image`;

  // From head to head; upwards are later layers.
  function toHead(dx, dy) {
    const arm = page.arms[view.arm];
    if (view.word < 0 || view.word >= arm.heads.tops.length) return;
    const [r, c] = view.cell || [0, -dx];
    view.cell = [within(r - dy, 0, arm.layers.length - 1), within(c + dx, 0, arm.n_heads - 1)];
    drawHeads();
    $("head-cell").textContent = headText(...view.cell);
  }

  function drawHeads() {
    const arm = page.arms[view.arm], target = $("heads");
    const rows = arm.layers.length, columns = arm.n_heads;
    const pen = fit(target, Math.min(1, Math.max(0.4, rows / columns)));
    if (view.word < 0) return;
    if (view.word >= arm.heads.tops.length) {
      target.setAttribute("aria-label", "");
      $("heads-caption").textContent = "Heads are not kept for this word.";
      return;
    }
    const share = headShare;
    let best = [0, 0];
    for (let r = 0; r < rows; r++)
      for (let c = 0; c < columns; c++) {
        if (share(r, c) > share(...best)) best = [r, c];
        pen.fillStyle = `rgb(${colour(share(r, c) / arm.heads.tops[view.word]).join()})`;
        const x = Math.floor((c * target.width) / columns), y = Math.floor(((rows - 1 - r) * target.height) / rows);
        pen.fillRect(x, y, Math.ceil(target.width / columns), Math.ceil(target.height / rows));
      }
    if (view.cell) {
      const [r, c] = view.cell, wide = target.width / columns, high = target.height / rows;
      pen.strokeStyle = "#fff";
      pen.lineWidth = 3;
      pen.strokeRect(c * wide + 1, (rows - 1 - r) * high + 1, wide - 2, high - 2);
    }
    const strongest = `strongest: layer ${arm.layers[best[0]]}, head ${best[1]} with ${percent(share(...best))} of its attention on the image`;
    target.setAttribute("aria-label", `Attention on the image by layer and head for the word ${wordText(view.arm, view.word)}; ${strongest}`);
    $("heads-caption").textContent = `Rows are layers, the first at the bottom; columns are heads; ${strongest}.`;
    target.onpointermove = (event) => {
      const c = Math.floor((event.offsetX / target.clientWidth) * columns), r = rows - 1 - Math.floor((event.offsetY / target.clientHeight) * rows);
      if (r >= 0 && r < rows && c >= 0 && c < columns) target.title = headText(r, c);
    };
  }

  // When the word becomes likely: its probability at every layer, and what is likeliest there.
  function drawLens() {
    const table = $("lens"), lens = page.arms[view.arm].lens;
    if (!table || !lens || view.word < 0) return;
    const shares = lens.logprob[view.word].map((value) => Math.exp(value));
    const text = wordText(view.arm, view.word);
    const rows = [["layer", lens.layers.map(String)], ["this word", shares.map(percent)],
      ["likeliest", lens.best[view.word].map((token) => lens.names[token])]];
    table.tBodies[0].replaceChildren(...rows.map(([name, values], r) => {
      const line = make("tr"), head = make("th", name);
      head.scope = "row";
      line.append(head, ...values.map((value, k) => {
        const cell = make("td", r === 2 ? value.trim() || JSON.stringify(value) : value);
        cell.title = r === 2 ? `layer ${lens.layers[k]}: ${JSON.stringify(value)}` : "";
        if (r === 1) {
          const [red, green, blue] = colour(shares[k]);
          cell.style.background = `rgb(${[red, green, blue].join()})`;
          cell.style.color = 0.3 * red + 0.59 * green + 0.11 * blue > 128 ? "#000" : "#fff";
        }
        return cell;
      }));
      return line;
    }));
    const likely = shares.findIndex((_, k) => shares.slice(k).every((share) => share >= 0.5));
    $("lens-caption").textContent = `First token of “${text}”, read off each layer by the model's own final norm and output head. ` +
      (likely < 0 ? "It is not likelier than 50 % at the last layer." : `From layer ${lens.layers[likely]} on it is likelier than 50 %.`);
  }

  function drawTimeline() {
    const arm = page.arms[view.arm], target = $("timeline"), n = arm.masses.length;
    const pen = fit(target, 0.3), step = target.width / Math.max(n, 1);
    arm.masses.forEach((masses, t) => {
      let y = target.height;
      masses.forEach((mass, k) => {
        pen.fillStyle = BLOCKS[k % BLOCKS.length];
        pen.fillRect(Math.floor(t * step), y - mass * target.height, Math.ceil(step), mass * target.height);
        y -= mass * target.height;
      });
    });
    if (view.word >= 0) {
      const [first, last] = arm.words[view.word].tokens;
      pen.strokeStyle = getComputedStyle(document.body).color;
      pen.lineWidth = 3;
      pen.strokeRect(first * step + 1, 1, Math.max((last - first) * step, 4) - 2, target.height - 2);
    }
    const tokenAt = (event) => Math.min(n - 1, Math.floor((event.offsetX / target.clientWidth) * n));
    const wordAt = (t) => arm.words.findIndex((word) => word.tokens[0] <= t && t < word.tokens[1]);
    target.onpointermove = (event) => {
      const t = tokenAt(event), token = arm.tokens[t];
      if (token) target.title = `token ${t} “${arm.text.slice(token.start, token.end)}”: ` + arm.blocks.map((block, k) => `${block} ${percent(arm.masses[t][k])}`).join(", ");
    };
    target.onclick = (event) => { const w = wordAt(tokenAt(event)); if (w >= 0) { view.locked = true; show(view.arm, w); } };
    $("timeline-legend").replaceChildren(...arm.blocks.flatMap((block, k) => {
      const swatch = make("span", undefined, "swatch");
      swatch.style.background = BLOCKS[k % BLOCKS.length];
      return [swatch, document.createTextNode(` ${block}   `)];
    }));
  }

  // The other way round: which words looked at a point of a picture.
  function markLookers() {
    page.arms.forEach((arm, a) => {
      const seen = arm.words.map((_, w) => {
        if (!view.spot || w >= maps[a].n_words) return 0;
        const values = mapOf(a, w, Number($("band").value), $("sinks").checked);
        const { width, height } = page.images[view.spot.picture];
        const [x, y] = [view.spot.x * width, view.spot.y * height];
        return page.places[view.spot.picture].reduce((sum, box, i) => sum + (box && box[0] <= x && x < box[2] && box[1] <= y && y < box[3] ? values[i] : 0), 0);
      });
      const limit = [...seen].sort((p, q) => q - p)[Math.min(4, seen.length - 1)];
      seen.forEach((v, w) => buttons[a][w].classList.toggle("looks", v > 0 && v >= limit));
    });
    const looking = buttons.flat().filter((button) => button.classList.contains("looks")).map((button) => button.textContent);
    $("lookers").textContent = view.spot ? `Looked there most: ${looking.join(", ") || "no word"}.` : "";
    drawOverlays();
  }

  buildArms();
  Object.keys(page.arms[page.arms.length - 1].risk).forEach((name) => $("detector").append(make("option", name)));
  $("detector").addEventListener("change", setDetector);
  $("threshold").addEventListener("input", colourText);
  setDetector();
  if (views.length) {
    maps[view.arm].bands.forEach((name, k) => { const option = make("option", name); option.value = k; $("band").append(option); });
    const count = new Set(maps.flatMap((map) => map.sinks)).size;
    $("sinks-label").textContent = count ? `show sinks (${count} image tokens hidden)` : "show sinks (this model has none on the image)";
    $("sinks").disabled = count === 0;
    // Two words lie on a line, whatever they looked at.
    if (maps[view.arm].n_words < 3) [...$("mode").options].forEach((option) => { option.disabled = option.value !== "plain"; });
    ["band", "mode", "opacity", "sinks", "palette"].forEach((id) => $(id).addEventListener("input", () => { drawScale(); drawOverlays(); drawHeads(); }));
    views.forEach(({ canvas, number }) => canvas.addEventListener("click", (event) => {
      view.spot = { picture: number, x: event.offsetX / canvas.clientWidth, y: event.offsetY / canvas.clientHeight };
      markLookers();
    }));
    views.forEach(({ canvas, number }) => onArrows(canvas, (dx, dy) => {
      const { x, y } = view.spot && view.spot.picture === number ? view.spot : { x: 0.5, y: 0.5 };
      view.spot = { picture: number, x: within(x + dx / 20, 0, 0.999), y: within(y + dy / 20, 0, 0.999) };
      markLookers();
    }, () => { view.spot = null; markLookers(); }));
    drawScale();
    drawOverlays();
  }
  onArrows($("heads"), toHead, () => { view.cell = null; drawHeads(); $("head-cell").textContent = ""; });
  drawTimeline();
  window.addEventListener("resize", () => { drawHeads(); drawTimeline(); });
})();
