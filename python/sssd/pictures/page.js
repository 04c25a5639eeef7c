"use strict";
// Steps through recorded requests. Texts reach the page as text nodes only; pictures are parsed as SVG, and no script of
// them runs, for the page's policy knows this script alone.
const at = (id) => document.getElementById(id);
const pick = at("request"), slider = at("step"), shown = { data: null, index: 0, load: 0 };

async function unpack(id) {
  const bytes = Uint8Array.from(atob(at(id).textContent.trim()), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

function span(text, kind) {
  const element = document.createElement("span");
  element.textContent = text;
  if (kind) element.className = kind;
  return element;
}

function write() {
  const { data } = shown, text = at("text");
  text.replaceChildren(span(data.prompt, "prompt"));
  data.tokens.forEach((token, place) => {
    const source = data.sources[place];
    const element = span(token, source ? `drafted ${source}` : "");
    const step = data.steps.findIndex((candidate) => place < candidate.to);
    if (place >= (data.steps[0]?.from ?? 0)) element.dataset.step = step;
    text.append(element);
  });
  if (data.left > 0) text.append(span(` … ${data.left} more tokens, not shown`, "prompt"));
}

function show(index, scroll = true) {
  const { data } = shown;
  if (!data || !data.steps.length) {
    at("why").textContent = "This request took no step.";
    at("tree").replaceChildren();
    return;
  }
  shown.index = Math.max(0, Math.min(index, data.steps.length - 1));
  const step = data.steps[shown.index];
  slider.value = shown.index;
  slider.setAttribute("aria-valuetext", `step ${shown.index + 1} of ${data.steps.length}`);
  at("place").textContent = `${shown.index + 1} / ${data.steps.length}`;
  at("why").textContent = step.why;
  const picture = new DOMParser().parseFromString(step.svg, "image/svg+xml").documentElement;
  at("tree").replaceChildren(document.importNode(picture, true));
  const tokens = [...at("text").children].slice(1);
  tokens.forEach((element, place) => {
    element.classList.toggle("now", place >= step.from && place < step.to);
    element.classList.toggle("later", place >= step.to);
  });
  const now = tokens[step.from], box = at("text");
  if (scroll && now) box.scrollTop = now.offsetTop - box.offsetTop - box.clientHeight / 2;
}

async function open() {
  const load = ++shown.load, data = await unpack(pick.value);
  if (load !== shown.load) return; // another was picked meanwhile
  shown.data = data;
  slider.max = Math.max(data.steps.length - 1, 0);
  write();
  show(data.steps.findIndex((step) => step.to - step.from > 1)); // -1: the first
  at("viewer").dataset.ready = pick.value;
}

pick.addEventListener("change", open);
slider.addEventListener("input", () => show(Number(slider.value)));
at("back").addEventListener("click", () => show(shown.index - 1));
at("on").addEventListener("click", () => show(shown.index + 1));
at("text").addEventListener("click", (event) => {
  const step = event.target.dataset.step;
  if (step !== undefined) show(Number(step), false);
});
document.addEventListener("keydown", (event) => {
  if (event.target.closest("input, select, button") || event.ctrlKey || event.metaKey || event.altKey) return;
  const moves = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10 };
  if (!(event.key in moves) || !at("viewer").matches(":hover, :focus-within")) return;
  event.preventDefault();
  show(shown.index + moves[event.key]);
});
open();
