// Asks the daemon again and again, and shows what it says. All of it is text, never markup.
"use strict";

const $ = (id) => document.getElementById(id);
let token = "";

// Numbers of 64 bits come as strings; what is 0 does not come.
const number = (value) => Number(value ?? 0);
const bytes = (value) => {
  let left = number(value), unit = 0;
  const units = ["B", "kB", "MB", "GB", "TB"];
  while (left >= 1000 && unit < units.length - 1) { left /= 1000; unit += 1; }
  return `${left.toFixed(unit ? 1 : 0)} ${units[unit]}`;
};
const state = (model) => (model.state ?? "").replace("MODEL_STATE_", "").toLowerCase();
const rate = (value) => number(value).toFixed(1);

const MODELS = [
  ["Name", (m) => m.name],
  ["State", state],
  ["Streams", (m) => number(m.active_requests), true],
  ["Running", (m) => number(m.statistics?.running_requests), true],
  ["Queued", (m) => number(m.statistics?.queued_requests), true],
  ["Tokens/s", (m) => rate(m.statistics?.generated_tokens_per_second), true],
  ["Leases", (m) => number(m.active_leases), true],
  ["Weights", (m) => bytes(m.details?.weight_bytes), true],
  ["Engine", (m) => m.details?.engine ?? ""],
  ["Trouble", (m) => m.failure?.message ?? ""],
];
const DEVICES = [
  ["Device", (d) => d.id],
  ["Name", (d) => d.name ?? ""],
  ["Memory", (d) => bytes(d.total_bytes), true],
  ["Free", (d) => bytes(d.free_bytes), true],
  ["Reserved", (d) => bytes(d.reserved_bytes), true],
  ["Held by", (d) => (d.holders ?? []).map((h) => `${h.name} (${bytes(h.bytes)})`).join(", ")],
];
const SNAPSHOTS = [
  ["Repository", (s) => s.repo_id],
  ["Commit", (s) => (s.commit ?? "").slice(0, 12)],
  ["Revisions", (s) => (s.refs ?? []).join(", ")],
  ["Size", (s) => bytes(s.size_bytes), true],
  ["Used by", (s) => (s.in_use_by ?? []).join(", ")],
];

function row(tag, columns, text) {
  const line = document.createElement("tr");
  for (const column of columns) {
    const cell = document.createElement(tag);
    cell.textContent = text(column);
    if (column[2]) cell.className = "number";
    line.append(cell);
  }
  return line;
}

function table(id, columns, items) {
  const head = row("th", columns, ([title]) => title);
  $(id).replaceChildren(head, ...items.map((item) => row("td", columns, ([, of]) => of(item))));
}

const VIEWS = [
  ["server", 2000, (told) => {
    const seconds = parseFloat(told.uptime ?? "0");
    const up = seconds < 3600 ? `${Math.floor(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
    const draining = told.draining ? ", draining" : "";
    $("server").textContent = `${told.version}, up ${up}, ${number(told.active_requests)} requests, ` +
      `${number(told.clients)} clients, ${number(told.standby_workers)} standby${draining}`;
  }],
  ["models", 1000, (told) => table("models", MODELS, told.models ?? [])],
  ["devices", 2000, (told) => table("devices", DEVICES, told.devices ?? [])],
  ["cache", 10000, (told) => {
    const limit = told.max_bytes ? ` of at most ${bytes(told.max_bytes)}` : "";
    $("disk").textContent = `${bytes(told.total_bytes)}${limit}, ${bytes(told.free_bytes)} free on the disk, ` +
      `${(told.downloads ?? []).length} downloads under way`;
    table("cache", SNAPSHOTS, told.snapshots ?? []);
  }],
];

const problems = new Map();
const timers = new Map();
let round = 0;

function tell(name, problem) {
  if (problem) problems.set(name, problem); else problems.delete(name);
  const [first] = problems.values();
  $("problem").textContent = first ?? "";
  $("problem").hidden = !first;
}

async function ask(view) {
  const [name, interval, show] = view;
  const mine = round;
  let problem = "";
  try {
    const headers = token ? { authorization: `Bearer ${token}` } : {};
    const answer = await fetch(`/status/${name}`, { headers, cache: "no-store" });
    const told = await answer.json();
    if (mine !== round) return; // it was asked again since, with another token
    if (answer.status === 401) $("access").hidden = false;
    if (answer.ok) show(told); else problem = told.error.message;
  } catch (error) {
    problem = `The daemon does not answer: ${error.message}`;
  }
  if (mine !== round) return;
  tell(name, problem);
  timers.set(name, setTimeout(ask, interval, view));
}

function askAll() {
  round += 1;
  timers.forEach((timer) => clearTimeout(timer));
  VIEWS.forEach(ask);
}

$("access").addEventListener("submit", (event) => {
  event.preventDefault();
  token = $("token").value;
  $("token").value = "";
  $("access").hidden = true;
  askAll();
});
askAll();
