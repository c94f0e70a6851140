"use strict";
// What needs no plots: a filter, copies of commands, the data as a file.
(() => {
  const which = document.getElementById("which");
  const shown = {
    all: () => true,
    wrong: (row) => row.dataset.right === "0",
    missed: (row) => row.dataset.missed === "1",
    right: (row) => row.dataset.right === "1",
  };
  which?.addEventListener("change", () => {
    const rows = [...document.querySelectorAll("table.marks tbody tr")];
    for (const row of rows) row.hidden = !shown[which.value](row);
    const left = rows.filter((row) => !row.hidden).length;
    document.getElementById("count").textContent = `Shown: ${left} of ${rows.length}.`;
  });

  for (const button of document.querySelectorAll("button.copy")) {
    button.hidden = false;
    button.addEventListener("click", async () => {
      const command = button.previousElementSibling;
      try {
        await navigator.clipboard.writeText(command.textContent);
        button.textContent = "Copied";
      } catch {
        // Without leave to write: the text is chosen, for the reader's own Ctrl-C.
        getSelection().selectAllChildren(command);
        button.textContent = "Press Ctrl-C";
      }
      setTimeout(() => { button.textContent = "Copy"; }, 2000);
    });
  }

  const download = document.getElementById("download");
  download.hidden = false;
  download.addEventListener("click", () => {
    const text = document.getElementById("data").textContent;
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    link.download = "cartridge-report.json";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  });
})();

(async () => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const tokenTitle = JSON.parse(document.getElementById("token-title").textContent);
  const coarse = matchMedia("(pointer: coarse)");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const hidden = new Set();
  let axis = "step";

  // plotly.js lies in the page compressed, to be a third of its size.
  async function unpack(id) {
    const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).text();
  }

  // Ground, grid and text follow light and dark; the curves' colours are readable on both.
  function themed(layout) {
    const css = getComputedStyle(document.documentElement);
    const colour = (name) => css.getPropertyValue(name).trim();
    const lines = { gridcolor: colour("--line"), linecolor: colour("--line") };
    const font = { family: colour("--sans"), size: 12, color: colour("--muted") };
    return {
      ...layout,
      font,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      hoverlabel: { bgcolor: colour("--raised"), bordercolor: colour("--line"), font: { ...font, color: colour("--ink") } },
      // On a touch screen a finger on a plot scrolls the page.
      dragmode: coarse.matches ? false : "zoom",
      xaxis: {
        ...layout.xaxis,
        ...lines,
        title: { ...layout.xaxis.title, font },
        showline: true,
        fixedrange: coarse.matches,
      },
      yaxis: { ...layout.yaxis, ...lines, fixedrange: coarse.matches },
    };
  }

  // All curves end at the same place, so that they can be read one above the other.
  function lastPlace() {
    const curves = Object.values(figures).filter((figure) => figure.curve);
    return Math.max(...curves.flatMap((figure) => figure.data.flatMap((trace) => trace.meta[axis])));
  }

  function draw(id) {
    const { data, layout, curve } = figures[id];
    const byTokens = curve && axis === "tokens";
    const traces = data.map((trace) => ({
      ...trace,
      x: curve ? trace.meta[axis] : trace.x,
      visible: !hidden.has(trace.legendgroup),
    }));
    const shown = themed(layout);
    if (curve) {
      const last = lastPlace();
      // A bar stands around its step: half of the last one would be cut off.
      const bars = axis === "step" && data.some((trace) => trace.type === "bar");
      shown.xaxis.range = [0, bars ? Math.max(last + 0.6, 1.03 * last) : 1.03 * last];
      if (axis === "step" && last <= 10) shown.xaxis.dtick = 1;
    }
    if (byTokens) {
      shown.xaxis.tickformat = "~s";
      shown.xaxis.title.text = tokenTitle;
    }
    return Plotly.react(id, traces, shown, { displayModeBar: false, responsive: true });
  }

  const drawAll = () => Promise.all(Object.keys(figures).map(draw));

  try {
    const script = document.createElement("script");
    script.textContent = await unpack("plotly");
    document.head.append(script);
    await drawAll();
  } catch (error) {
    for (const place of document.querySelectorAll(".canvas")) {
      place.textContent = "This plot needs a browser of 2023 or later.";
    }
    throw error;
  }
  document.documentElement.dataset.plots = "drawn";

  // Folded away, a plot has no width to be drawn in.
  for (const folded of document.querySelectorAll("details.flat")) {
    folded.addEventListener("toggle", () => {
      for (const place of folded.querySelectorAll(".canvas")) draw(place.id);
    });
  }
  for (const input of document.querySelectorAll("input[name=axis]")) {
    input.addEventListener("change", () => { axis = input.value; drawAll(); });
  }
  for (const button of document.querySelectorAll(".legend button")) {
    button.addEventListener("click", () => {
      const off = button.getAttribute("aria-pressed") === "true";
      button.setAttribute("aria-pressed", String(!off));
      off ? hidden.add(button.dataset.group) : hidden.delete(button.dataset.group);
      drawAll();
    });
  }
  for (const change of [dark, coarse]) change.addEventListener("change", drawAll);
})();
