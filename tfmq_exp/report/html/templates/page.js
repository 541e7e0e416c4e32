"use strict";
const plots = [...document.querySelectorAll(".plot")];
const charts = new Map(plots.map((place) => [place, JSON.parse(place.nextElementSibling.textContent)]));
const dark = matchMedia("(prefers-color-scheme: dark)");

// Colours of the page, as a plotly layout: figures carry only those of their curves.
function themed(layout, width) {
  const narrow = width < 480;
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();
  const axis = { gridcolor: colour("--grid"), linecolor: colour("--line"), tickcolor: colour("--line") };
  return {
    ...layout,
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("--ink") },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    xaxis: { ...layout.xaxis, ...axis, ...(narrow && layout.xaxis.type === "log" ? { tickangle: -60 } : {}) },
    yaxis: { ...layout.yaxis, ...axis, ...(narrow && layout.yaxis.type === "category" ? { tickfont: { size: 9 } } : {}) },
    legend: { ...layout.legend, bgcolor: "rgba(0,0,0,0)", maxheight: 2000 },
    hoverlabel: { bgcolor: colour("--raised"), bordercolor: colour("--line"), font: { color: colour("--ink") }, namelength: -1 },
  };
}

async function draw(place, index) {
  const { data, layout } = charts.get(place).views[index].figure;
  const config = { displaylogo: false, responsive: true, displayModeBar: matchMedia("(hover: hover)").matches ? "hover" : false,
    modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"] };
  place.dataset.view = index;
  await Plotly.react(place, data, themed(layout, place.clientWidth), config);
  await fitLegend(place);
}

// A legend of many lines takes its height from the page, not from the plot.
async function fitLegend(place) {
  const legend = place.querySelector(".legend");
  const above = legend ? legend.getBoundingClientRect().height : 0;
  const height = charts.get(place).views[place.dataset.view].figure.layout.height + Math.ceil(above);
  if (place.layout.height !== height) await Plotly.relayout(place, { height });
}

function choose(place, index) {
  const control = place.parentElement.querySelector(".views");
  control?.querySelectorAll("button").forEach((button, i) => button.setAttribute("aria-pressed", String(i === index)));
  return draw(place, index);
}

for (const place of plots) {
  const control = place.parentElement.querySelector(".views");
  control?.querySelectorAll("button").forEach((button, i) => button.addEventListener("click", () => choose(place, i)));
  control?.querySelector("select")?.addEventListener("change", (event) => choose(place, event.target.selectedIndex));
}
async function drawAll() {
  for (const place of plots) {
    await draw(place, Number(place.dataset.view ?? 0));
    await new Promise((go) => setTimeout(go));
  }
  document.body.dataset.charts = "drawn";
}
drawAll();
dark.addEventListener("change", drawAll);
addEventListener("beforeprint", () => {
  document.querySelectorAll("img").forEach((image) => (image.loading = "eager"));
  drawAll();
});
addEventListener("afterprint", drawAll);
let waiting;
addEventListener("resize", () => {
  clearTimeout(waiting);
  waiting = setTimeout(() => plots.forEach(fitLegend), 250);
});

document.querySelectorAll("input[data-filters]").forEach((input) => {
  const items = [...document.querySelectorAll(input.dataset.filters)];
  const count = input.closest(".tools").querySelector(".count");
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const item of items) {
      const text = (item.dataset.text ?? item.textContent).toLowerCase();
      const fits = words.every((word) => text.includes(word));
      item.classList.toggle("hidden", !fits);
      shown += fits;
    }
    count.textContent = words.length ? `${shown} of ${items.length}` : "";
  });
});

document.querySelectorAll("button.copy").forEach((button) =>
  button.addEventListener("click", async () => {
    const text = button.parentElement.querySelector("pre");
    try {
      await navigator.clipboard.writeText(text.textContent);
      button.textContent = "copied";
    } catch {
      getSelection().selectAllChildren(text);
      button.textContent = "selected: copy it with the keyboard";
    }
  }));
