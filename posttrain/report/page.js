// Draws the charts in the page's colours (and again when light changes to dark), and shows one rollout after another.
// Text of models is only ever set as text (textContent), never as markup.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const TOKEN = /^--[a-z0-9]+(@[\d.]+)?$/;

  function colour(token) {
    const [name, opacity] = token.split("@");
    const value = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
    if (!opacity) return value;
    const part = (i) => parseInt(value.slice(i, i + 2), 16);
    return `rgba(${part(1)},${part(3)},${part(5)},${opacity})`;
  }

  function resolved(value) {
    if (typeof value === "string") return TOKEN.test(value) ? colour(value) : value;
    if (Array.isArray(value)) return value.map(resolved);
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, resolved(item)]));
    }
    return value;
  }

  // ---- charts
  const plots = [...document.querySelectorAll(".plot")];
  const family = getComputedStyle(document.documentElement).fontFamily;

  function draw() {
    document.querySelectorAll("[data-colour]").forEach((mark) => { mark.style.color = colour(mark.dataset.colour); });
    if (typeof Plotly === "undefined") return;
    for (const plot of plots) {
      const { data: traces, layout } = resolved(data.charts[Number(plot.dataset.chart)]);
      layout.font = { ...layout.font, family };
      layout.hoverlabel = { ...layout.hoverlabel, font: { ...layout.hoverlabel.font, family } };
      Plotly.react(plot, traces, layout, { displayModeBar: false, responsive: true, doubleClick: "reset" });
    }
  }

  // ---- rollouts
  const node = (tag, kind, text) => {
    const made = document.createElement(tag);
    if (kind) made.className = kind;
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const VERDICT = { true: "right", false: "wrong", null: "unscored" };
  const TINTS = ["--c1", "--c2", "--c3", "--c5", "--c4", "--c7"];
  const trim = (value) => Number(value.toPrecision(3)).toString();

  function shown(rollout) {
    const page = document.createDocumentFragment();
    const head = node("div", "leaf-head");
    const verdict = VERDICT[rollout.right];
    const reward = rollout.reward === null ? "" : `, reward ${trim(rollout.reward)}`;
    head.append(node("span", `leaf-verdict ${verdict}`, verdict + reward));
    if (rollout.reason) head.append(node("span", "", rollout.reason));
    page.append(head);
    const numbers = { next: 1 };
    for (const message of rollout.prompt) {
      const turn = node("div", `turn ${message.role === "system" ? "system" : ""}`);
      const said = node("div", "said", message.content);
      if (message.pictures) said.append(gallery(message.pictures, numbers));
      turn.append(node("div", "role", message.role), said);
      page.append(turn);
    }
    for (const turn of rollout.turns) page.append(spoken(turn, rollout.turns.length > 1));
    if (rollout.hidden) page.append(node("p", "leaf-empty", `${rollout.hidden} more turns are not shown.`));
    const foot = node("div", "leaf-foot");
    const fact = (name, value) => {
      if (value === null || value === "") return;
      const item = node("span", "", `${name} `);
      item.append(node("b", "", String(value)));
      foot.append(item);
    };
    fact("capability", rollout.capability);
    fact("status", rollout.status.replace(":", ": ").replaceAll("_", " "));
    fact("trained at step", rollout.step);
    fact("staleness", rollout.staleness);
    fact("advantage", rollout.advantage === null ? null : trim(rollout.advantage));
    fact("tokens", rollout.tokens);
    const branches = rollout.turns.filter((turn) => turn.keeps !== null).length;
    fact("branches", branches ? branches + 1 : null);
    fact("ended by", rollout.finish === "stop" ? "end of turn" : rollout.finish);
    fact("prompt", rollout.prompt_id);
    page.append(foot);
    return page;
  }

  // The pictures of a turn, small; a click shows one large, another click small again.
  function gallery(keys, numbers) {
    const row = node("div", "pictures");
    for (const key of keys) {
      const name = `picture ${numbers.next++}`;
      if (key === null) { row.append(node("span", "leaf-empty", `${name} is not in this page`)); continue; }
      const frame = node("button", "picture");
      const image = node("img");
      image.src = data.pictures[key];
      image.alt = frame.title = name;
      frame.setAttribute("aria-pressed", "false");
      frame.addEventListener("click", () => frame.setAttribute("aria-pressed", String(frame.classList.toggle("large"))));
      frame.append(image);
      row.append(frame);
    }
    return row;
  }

  // What followed the prompt: the one reply, or a segment of an episode.
  function spoken(part, isEpisode) {
    const turn = node("div", `turn ${part.number === null ? "world" : "reply"}`);
    const said = node("div", "said");
    const written = part.pieces.filter((piece) => piece.text !== "");
    const versions = part.pieces.filter((piece) => piece.v !== null);
    const tint = (piece) => TINTS[versions.indexOf(piece) % TINTS.length];
    for (const piece of written) {
      const text = node("span", "v", piece.text);
      if (written.length > 1 && piece.v !== null) text.style.background = colour(`${tint(piece)}@0.2`);
      said.append(text);
    }
    const who = !isEpisode ? "reply" : part.number === null ? "world" : `policy, turn ${part.number}`;
    turn.append(node("div", "role", who), said, node("div", "role", ""));
    const names = node("div", "keys");
    if (isEpisode && part.number !== null) names.append(node("span", "key", part.trained ? "trained on" : "not trained on"));
    if (part.reward !== null) names.append(node("span", "key", `reward ${trim(part.reward)}`));
    if (part.advantage !== null) names.append(node("span", "key", `advantage ${trim(part.advantage)}`));
    if (part.keeps !== null) {
      const why = `new branch: the chat template rewrote earlier turns, and the first ${part.keeps} tokens stay`;
      names.append(node("span", "key", why));
    }
    for (const piece of versions) {
      const key = node("span", "key");
      if (written.length > 1) {
        const box = node("i", "box");
        box.style.color = colour(`${tint(piece)}@0.5`);
        key.append(box);
      }
      key.append(`policy version ${piece.v}` + (piece.n === null ? "" : `, ${piece.n} tokens`));
      names.append(key);
    }
    turn.append(names);
    return turn;
  }

  function leaf(root) {
    const all = data.leaves[Number(root.dataset.leaf)];
    const read = {
      capability: (rollout) => rollout.capability,
      status: (rollout) => rollout.status.replace(":", ": ").replaceAll("_", " "),
      right: (rollout) => VERDICT[rollout.right],
    };
    const selects = [...root.querySelectorAll("select")];
    for (const select of selects) {
      const values = [...new Set(all.map(read[select.dataset.filter]))].filter((value) => value !== "").sort();
      for (const value of ["any", ...values]) select.append(new Option(value, value));
      select.addEventListener("change", () => { place = 0; show(); });
    }
    const trained = (r) => r.status === "trained";
    const several = (r) => trained(r) && r.turns.some((turn) => turn.pieces.length > 1 && turn.pieces[0].v !== null);
    let place = Math.max(0, all.some(several) ? all.findIndex(several) : all.findIndex(trained));
    function show() {
      const found = all.filter((r) => selects.every((s) => s.value === "any" || read[s.dataset.filter](r) === s.value));
      if (found.length) place = (place + found.length) % found.length;
      root.querySelector(".leaf-place").textContent = found.length ? `${place + 1} of ${found.length}` : "none";
      const empty = node("p", "leaf-empty", "No sampled rollout matches these filters.");
      root.querySelector(".leaf-page").replaceChildren(found.length ? shown(found[place]) : empty);
    }
    const turn = (by) => { place += by; show(); };
    root.querySelectorAll("[data-turn]").forEach((b) => b.addEventListener("click", () => turn(Number(b.dataset.turn))));
    root.addEventListener("keydown", (event) => {
      if (event.target.tagName === "SELECT") return;
      if (event.key === "ArrowLeft") turn(-1);
      if (event.key === "ArrowRight") turn(1);
    });
    show();
    return show;
  }

  const shows = [...document.querySelectorAll(".leaf")].map(leaf);
  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { draw(); shows.forEach((show) => show()); });

  // ---- the section that the reader sees, marked in the navigation
  const links = new Map([...document.querySelectorAll("nav a")].map((a) => [a.getAttribute("href").slice(1), a]));
  const watch = new IntersectionObserver((entries) => {
    for (const entry of entries) links.get(entry.target.id)?.classList.toggle("here", entry.isIntersecting);
  }, { rootMargin: "-20% 0px -70% 0px" });
  document.querySelectorAll("section").forEach((section) => watch.observe(section));
})();
