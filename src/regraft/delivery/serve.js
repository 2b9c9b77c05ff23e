"use strict";
// No framework and no build step. All text comes in through textContent: names are never markup.
const AT_ONCE = 4; // requests side by side; assumed
const PATIENCE = 20; // times that a busy server is asked again; assumed
const MOST_CLASSES = 5; // shown on a card
const at = (id) => document.getElementById(id);
const results = at("results");
const records = []; // what was answered: {file, answer} or {file, error}
let waiting = [];
let working = 0;
let mostBytes = Infinity;
let explains = false;

function made(tag, name, text) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (text !== undefined) element.textContent = text;
  return element;
}

const percent = (share) =>
  share > 0.9995 && share < 1 ? "> 99.9 %" : share < 0.0005 && share > 0 ? "< 0.1 %" : `${(100 * share).toFixed(1)} %`;

// What cannot be seen, or turns a line around, is spelled out, as in the reports.
const readable = (text) =>
  text.replace(/(?![\u200c\u200d])[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/gu, (sign) => `\\u${sign.codePointAt(0).toString(16).padStart(4, "0")}`);

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  const token = sessionStorage.getItem("token");
  if (token) headers.Authorization = `Bearer ${token}`;
  const answer = await fetch(path, { ...options, headers });
  if (answer.status === 401) {
    at("wrong").textContent = token ? "That is not its token." : "";
    at("token").hidden = false;
    at("secret").focus();
  }
  return answer;
}

async function send(path, file) {
  if (file.size > mostBytes) {
    throw new Error(`too large: ${file.size.toLocaleString("en")} bytes, at most ${mostBytes.toLocaleString("en")}`);
  }
  for (let time = 0; ; time++) {
    let answer;
    try {
      answer = await ask(path, { method: "POST", body: file, headers: { "Content-Type": "application/octet-stream" } });
    } catch {
      throw new Error("the server does not answer");
    }
    if (answer.status === 503 && time < PATIENCE) {
      await new Promise((resolve) => setTimeout(resolve, 1000 * (Number(answer.headers.get("Retry-After")) || 1)));
      continue;
    }
    if (answer.ok) return answer;
    const told = await answer.json().catch(() => ({ error: `status ${answer.status}`, detail: "" }));
    throw new Error([told.error.replaceAll("-", " "), told.detail].filter(Boolean).join(": "));
  }
}

async function welcome() {
  const answer = await ask("/model");
  if (!answer.ok) return;
  const model = await answer.json();
  at("token").hidden = true;
  at("name").textContent = readable(model.name);
  document.title = `${readable(model.name)} · regraft`;
  const names = model.class_names;
  const some = names.slice(0, 12).map(readable).join(", ") + (names.length > 12 ? " and others" : "");
  at("about").textContent = `${names.length} classes: ${some}`;
  mostBytes = model.most_bytes ?? Infinity;
  explains = model.explains ?? false;
}

function add(files) {
  if (!files.length) return;
  document.body.classList.add("some");
  at("found").hidden = false;
  const cards = files.map((file) => {
    const card = made("li", "card waiting");
    const picture = made("div", "picture");
    const image = made("img");
    image.alt = "";
    image.src = URL.createObjectURL(file);
    image.onerror = () => {
      URL.revokeObjectURL(image.src);
      image.replaceWith(made("p", "", "no preview of this file"));
    };
    picture.append(image);
    const told = made("div", "told");
    told.append(made("h3", "", readable(file.name)), made("p", "answer", "reading…"));
    card.append(picture, told);
    return { file, card, picture, told };
  });
  results.prepend(...cards.map(({ card }) => card));
  waiting.push(...cards);
  work();
}

function work() {
  while (working < AT_ONCE && waiting.length) {
    working++;
    classify(waiting.shift()).finally(() => {
      working--;
      work();
      if (!working && !waiting.length) summarise();
    });
  }
}

async function classify({ file, card, picture, told }) {
  let record;
  try {
    const answer = await (await send("/predict", file)).json();
    record = { file: file.name, answer };
    showAnswer(told, file, answer, picture);
  } catch (error) {
    record = { file: file.name, error: error.message };
    card.classList.add("failed");
    told.querySelector(".answer").replaceWith(made("p", "answer", "No result"), made("p", "", readable(error.message)));
  }
  card.classList.remove("waiting");
  if (card.isConnected) records.push(record);
}

function showAnswer(told, file, answer, picture) {
  const ranked = Object.entries(answer.probabilities).sort((one, other) => other[1] - one[1]);
  const line = made("p", "answer");
  line.append(made("bdi", "", readable(answer.predicted)), made("span", "", percent(ranked[0][1])));
  const parts = [line];
  if (answer.unsure) parts.push(made("p", "flag", "unsure: look at it yourself"));
  if (answer.unfamiliar) parts.push(made("p", "flag", "unlike all images it has learned from"));
  const list = made("ul", "classes");
  for (const [name, share] of ranked.slice(0, MOST_CLASSES)) {
    const row = made("li");
    const bar = made("span", "bar");
    const filled = made("i");
    filled.style.width = `${100 * share}%`;
    bar.append(filled);
    row.append(made("bdi", "", readable(name)), made("span", "", percent(share)), bar);
    list.append(row);
  }
  parts.push(list);
  if (ranked.length > MOST_CLASSES) parts.push(made("p", "small", `and ${ranked.length - MOST_CLASSES} more classes`));
  if (explains) parts.push(explainButton(file, picture));
  told.querySelector(".answer").replaceWith(...parts);
}

function explainButton(file, picture) {
  const button = made("button", "", "Show where it looked");
  button.type = "button";
  button.setAttribute("aria-pressed", "false");
  button.onclick = async () => {
    if (!picture.querySelector(".overlay")) {
      button.disabled = true;
      try {
        const overlay = made("img", "overlay");
        overlay.src = URL.createObjectURL(await (await send("/explain", file)).blob());
        overlay.alt = `where the model looked in ${readable(file.name)}`;
        picture.append(overlay);
      } catch (error) {
        button.textContent = readable(error.message);
        return;
      }
      button.disabled = false;
    }
    const pressed = picture.classList.toggle("explained");
    button.setAttribute("aria-pressed", String(pressed));
  };
  return button;
}

function summarise() {
  const counts = new Map();
  for (const { answer } of records) {
    const name = answer ? readable(answer.predicted) : "no result";
    counts.set(name, (counts.get(name) ?? 0) + 1);
  }
  const told = [...counts].sort((one, other) => other[1] - one[1]).map(([name, number]) => `${number} ${name}`);
  at("summary").textContent = told.join(" · ");
  at("spoken").textContent = `${records.length} done: ${told.join(", ")}`;
}

// CWE-1236: a cell that a spreadsheet would take for a formula gets an apostrophe.
const cell = (value) => `"${String(value).replace(/^(?=[=+\-@\t\r\0])/, "'").replaceAll('"', '""')}"`;

function save() {
  const names = Object.keys(records.find(({ answer }) => answer)?.answer.probabilities ?? {});
  const marks = ["unsure", "unfamiliar"].filter((mark) => records.some(({ answer }) => answer && mark in answer));
  const rows = [["file", "predicted", ...names.map((name) => `p(${name})`), ...marks, "error"].map(cell)];
  for (const { file, answer, error } of records) {
    const numbers = names.map((name) => (answer ? answer.probabilities[name] : '""'));
    const marked = marks.map((mark) => cell(String(answer?.[mark] ?? "")));
    rows.push([cell(file), cell(answer?.predicted ?? ""), ...numbers, ...marked, cell(error ?? "")]);
  }
  const link = made("a");
  link.href = URL.createObjectURL(new Blob([rows.map((row) => row.join(",") + "\r\n").join("")], { type: "text/csv" }));
  link.download = "predictions.csv";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function clear() {
  waiting = [];
  records.length = 0;
  for (const image of results.querySelectorAll("img")) URL.revokeObjectURL(image.src);
  results.replaceChildren();
  at("found").hidden = true;
  document.body.classList.remove("some");
  at("summary").textContent = at("spoken").textContent = "";
  at("files").focus();
}

at("files").addEventListener("change", (event) => {
  add([...event.target.files]);
  event.target.value = ""; // so that the same file may be chosen again
});
addEventListener("paste", (event) => add([...event.clipboardData.files]));
addEventListener("dragover", (event) => {
  event.preventDefault();
  at("drop").classList.add("over");
});
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) at("drop").classList.remove("over");
});
addEventListener("drop", (event) => {
  event.preventDefault();
  at("drop").classList.remove("over");
  add([...event.dataTransfer.files]);
});
at("token").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", at("secret").value);
  welcome();
});
at("save").addEventListener("click", save);
at("clear").addEventListener("click", clear);
welcome();
