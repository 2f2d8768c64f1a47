"use strict";
const figures = JSON.parse(document.getElementById("figures").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const touch = matchMedia("(pointer: coarse)").matches;
const drawn = new Set();

// {"$": [light, dark]} stands for a colour.
function themed(value) {
  if (Array.isArray(value)) return value.map(themed);
  if (value === null || typeof value !== "object") return value;
  if ("$" in value) return value.$[dark.matches ? 1 : 0];
  return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, themed(inner)]));
}

function draw(element) {
  const plot = figures[element.dataset.figure][Number(element.dataset.panel)];
  const { data, layout } = themed({ data: plot.data, layout: plot.layout });
  const off = new Set([...element.closest("figure").querySelectorAll('[aria-pressed="false"]')].map((b) => b.dataset.name));
  for (const trace of data) if (off.has(trace.legendgroup)) trace.visible = false;
  if (touch) layout.dragmode = false;  // a finger scrolls the page
  drawn.add(element);
  return Plotly.react(element, data, layout, { responsive: true, displaylogo: false, displayModeBar: false });
}

const near = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    near.unobserve(entry.target);
    draw(entry.target);
  }
}, { rootMargin: "800px" });
document.querySelectorAll(".plot").forEach((element) => near.observe(element));
dark.addEventListener("change", () => drawn.forEach(draw));

document.querySelectorAll(".key button").forEach((button) => button.addEventListener("click", () => {
  button.setAttribute("aria-pressed", String(button.getAttribute("aria-pressed") !== "true"));
  button.closest("figure").querySelectorAll(".plot").forEach((element) => { if (drawn.has(element)) draw(element); });
}));

// While a run trains the page loads itself again, and stays where it was read.
const seconds = Number(document.body.dataset.refresh || 0);
if (seconds) {
  const place = "report:" + location.pathname;
  const saved = JSON.parse(sessionStorage.getItem(place) || "null");
  if (saved) {
    history.scrollRestoration = "manual";
    for (const id of saved.open) document.getElementById(id)?.setAttribute("open", "");
    scrollTo(0, saved.top);
  }
  setInterval(() => {
    if (document.hidden) return;
    const open = [...document.querySelectorAll("details[open]")].map((element) => element.id);
    sessionStorage.setItem(place, JSON.stringify({ top: scrollY, open }));
    location.reload();
  }, 1000 * seconds);
}
