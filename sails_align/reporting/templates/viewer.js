"use strict";
// All texts are data: they reach the page through textContent only.
const data = JSON.parse(document.getElementById("data").textContent);
const SIZE = 100, EXCERPT = 240, two = data.names.length === 2;
const form = document.getElementById("filters"), table = document.getElementById("prompts");
const body = table.tBodies[0], chosen = {};
let search = "", page = 0, shown = data.rows;

// Control characters, and invisible ones that reorder, split or hide text, are shown by their codes.
const HIDDEN = /(?![\t\n\u200c\u200d])[\p{Cc}\p{Cf}\u2028\u2029]/gu;
function visible(text) {
  return text.replace(HIDDEN, (character) => `⟨U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);
}

function element(tag, options = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) {
    if (name === "text") made.textContent = visible(value);
    else if (name === "class") made.className = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

const excerpt = (text) => (text.length > EXCERPT ? `${text.slice(0, EXCERPT)} …` : text).replace(/\s+/g, " ");
const textOf = (row) => row.messages[row.messages.length - 1][1];

// What is searched in: texts, explanations and ids, in lower case; made when it is first needed.
function haystack(row) {
  row.haystack ??= [
    row.id, row.prefill, ...row.messages.map((message) => message[1]),
    ...row.runs.flatMap((run) => [run.text ?? "", run.error ?? "", ...run.verdicts.map((verdict) => verdict[4] ?? "")]),
  ].join("\n").toLowerCase();
  return row.haystack;
}

const HAS = {
  kind: (row, value) => row.kind === value,
  category: (row, value) => row.category === value,
  change: (row, value) => data.changes[row.change] === value,
  words0: (row, value) => row.runs[0].words.includes(value),
  words1: (row, value) => row.runs[1].words.includes(value),
  reason: (row, value) => row.runs.some((run) => run.reasons.includes(value)),
};

function labelled(label, control) {
  const name = `filter-${control.name}`;
  control.id = name;
  form.append(element("div", {}, element("label", { for: name, text: label, title: visible(label) }), control));
}

function makeFilters() {
  const field = element("input", { type: "search", name: "search", autocomplete: "off", spellcheck: "false" });
  let timer = 0;
  field.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(() => { search = field.value.toLowerCase(); update(); }, 120);
  });
  labelled("Search in prompts, responses, explanations", field);
  for (const filter of data.filters) {
    const select = element("select", { name: filter.name }, element("option", { value: "", text: "all" }));
    filter.options.forEach(([value, n], place) => {
      select.append(element("option", { value: String(place + 1), text: `${value} (${n.toLocaleString("en")})` }));
    });
    select.addEventListener("change", () => {
      chosen[filter.name] = select.value === "" ? undefined : filter.options[Number(select.value) - 1][0];
      update();
    });
    labelled(filter.label, select);
  }
  form.append(element("button", { type: "reset", text: "Clear filters" }));
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => {
    clearTimeout(timer);
    search = "";
    for (const name of Object.keys(chosen)) chosen[name] = undefined;
    setTimeout(update); // once the fields are empty
  });
}

function makeHead() {
  const heads = [["prompt", "Prompt"], ["kind", "Kind"], ["category", "Category"],
    ...data.names.map((name) => ["response", two ? name : "Response and verdict"])];
  if (two) heads.push(["change", "Change"]);
  table.tHead.append(element("tr", {}, ...heads.map(([name, text]) => element("th", { scope: "col", class: name, text }))));
}

function update() {
  const active = Object.entries(chosen).filter(([, value]) => value !== undefined);
  shown = data.rows.filter((row) => active.every(([name, value]) => HAS[name](row, value))
    && (search === "" || haystack(row).includes(search)));
  for (const control of form.querySelectorAll("input, select")) control.classList.toggle("active", control.value !== "");
  show(0);
}

function show(number) {
  page = number;
  const n = Math.max(1, Math.ceil(shown.length / SIZE));
  body.replaceChildren(...shown.slice(page * SIZE, (page + 1) * SIZE).map(rowOf));
  document.getElementById("count").textContent =
    `${shown.length.toLocaleString("en")} of ${data.rows.length.toLocaleString("en")} prompts`;
  document.getElementById("page").textContent = `Page ${page + 1} of ${n}`;
  document.getElementById("previous").disabled = page === 0;
  document.getElementById("next").disabled = page + 1 >= n;
}

function verdictOf(run) {
  const kind = run.good === null ? "unknown" : run.good ? "good" : "bad";
  const reasons = run.reasons.length ? `: ${run.reasons.join("; ")}` : "";
  return element("span", { class: `verdict ${kind}`, text: run.words.join(", ") + reasons });
}

function rowOf(row) {
  const opener = element("button", { type: "button", class: "opener", "aria-expanded": "false" },
    element("span", { class: "excerpt", text: excerpt(textOf(row)), dir: "auto" }));
  const made = element("tr", {},
    element("th", { scope: "row", class: "prompt" }, opener),
    element("td", { class: "kind", text: row.kind.replace("_", " ") }),
    element("td", { class: "category", text: row.category }),
    ...row.runs.map((run) => element("td", { class: "response" }, verdictOf(run), run.text === null
      ? element("span", { class: "excerpt missing", text: "no response" })
      : element("span", { class: "excerpt", text: excerpt(run.text), dir: "auto" }))));
  if (two) made.append(element("td", { class: "change", text: data.changes[row.change] }));
  opener.addEventListener("click", () => {
    const opens = opener.getAttribute("aria-expanded") === "false";
    opener.setAttribute("aria-expanded", String(opens));
    made.classList.toggle("open", opens);
    if (opens) made.after(element("tr", { class: "details" },
      element("td", { colspan: String([...made.cells].filter((cell) => cell.offsetParent !== null).length) },
        ...detailsOf(row))));
    else made.nextSibling.remove();
  });
  return made;
}

function message(role, text) {
  return [element("p", { class: "role", text: role }), element("pre", { class: "text", text, dir: "auto", tabindex: "0" })];
}

function detailsOf(row) {
  const about = [["id", row.id], ["kind", row.kind.replace("_", " ")], ["category", row.category],
    ...Object.entries(row.about)];
  if (two) about.push(["change", data.changes[row.change]]);
  const parts = [
    element("p", { class: "about", text: about.map(([name, value]) => `${name}: ${value}`).join(" · ") }),
    element("h2", { text: "Conversation" }),
    ...row.messages.flatMap(([role, text]) => message(role, text)),
  ];
  if (row.prefill) parts.push(...message("the response had to begin with", row.prefill));
  if (row.features !== null) parts.push(...featuresOf(row.features));
  parts.push(element("div", { class: "models" }, ...row.runs.map((run, place) => modelOf(run, data.names[place]))));
  return parts;
}

function modelOf(run, name) {
  const ended = run.finish === null ? "" : ` (ended by: ${run.finish})`;
  const section = element("section", {}, element("h2", { text: `Response of ${name}${ended}` }));
  if (run.text === null) section.append(element("p", { class: "missing", text: "no response" }));
  else section.append(element("pre", { class: "text", text: run.text, dir: "auto", tabindex: "0" }));
  if (run.error !== null) section.append(...message("error", run.error));
  if (run.verdicts.length === 0) {
    section.append(element("p", { class: "missing", text: "not judged" }));
    return section;
  }
  const rows = run.verdicts.map(([task, judge, score, reason, explanation]) => element("tr", {},
    element("th", { scope: "row", text: `${task}, ${judge}` }),
    element("td", { text: score === null ? `unscored: ${reason}` : String(Math.round(score * 1000) / 1000),
      class: score === null ? "unknown" : "" }),
    element("td", { text: explanation ?? "", dir: "auto" })));
  const head = ["task, judge", "score", "explanation"].map((text) => element("th", { scope: "col", text }));
  section.append(element("table", { class: "verdicts" }, element("caption", { text: "Verdicts" }),
    element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...rows)));
  return section;
}

function featuresOf(features) {
  const title = element("h2", { text: "Features active at the end of the prompt, in the base model" });
  if (features.length === 0) return [title, element("p", { class: "missing", text: "none of the subspace" })];
  const items = features.map(([layer, id, activation, words]) =>
    element("li", { text: `layer ${layer}, feature ${id}: ${activation.toFixed(2)} (promotes ${words})` }));
  return [title, element("ul", {}, ...items)];
}

document.getElementById("previous").addEventListener("click", () => { show(page - 1); scrollTo(0, form.offsetTop); });
document.getElementById("next").addEventListener("click", () => { show(page + 1); scrollTo(0, form.offsetTop); });
// Narrow windows show fewer columns, which opened rows span.
matchMedia("(max-width: 48rem)").addEventListener("change", () => show(page));
makeFilters();
makeHead();
show(0);
