// The page: text to tokens, tokens to text, turns of one conversation on one sequence.

import { Template } from "@huggingface/jinja";
import { Tokenizer } from "@huggingface/tokenizers";
import { bestProvider, fetchJson, openModel, Sequence } from "./model.js";
import { choose } from "./sampling.js";

const PACKAGE = "package"; // serve.py answers for the package folder under this name
const element = (id) => document.getElementById(id);
const messages = [];
let model, tokenizer, template, settings, sequence, stopped;
let fed = []; // the tokens the sequence has read

async function start() {
  const asked = new URLSearchParams(location.search).get("provider");
  const provider = asked ?? (await bestProvider());
  show(`loading on ${provider}`);
  settings = await fetchJson(`${PACKAGE}/tokenizer_config.json`);
  tokenizer = new Tokenizer(await fetchJson(`${PACKAGE}/tokenizer.json`), settings);
  const file = await fetch(`${PACKAGE}/chat_template.jinja`);
  template = new Template(file.ok ? await file.text() : settings.chat_template);
  model = await openModel(PACKAGE, provider);
  sequence = new Sequence(model);
  element("temperature").value = model.genai.search.temperature;
  element("send").disabled = false;
  show(`ready on ${provider}`);
}

async function answer(prompt) {
  messages.push({ role: "user", content: prompt });
  add("user", prompt);
  const reply = add("assistant", "");
  const begin = performance.now();
  let count = 0;
  for await (const piece of generate(Number(element("temperature").value))) {
    count += 1;
    reply.textContent += piece;
    reply.scrollIntoView({ block: "end" });
    show(`${(count / (performance.now() - begin) * 1000).toFixed(1)} tokens/s on ${model.provider}`);
  }
  messages.push({ role: "assistant", content: reply.textContent });
}

/** Pieces of an answer, one a token; a piece is empty in the middle of a character. */
async function* generate(temperature) {
  const { eos_token_id, context_length } = model.genai.model;
  const ends = [eos_token_id].flat();
  let ids = await unread();
  let pending = [];
  stopped = false;
  while (!stopped && fed.length + ids.length <= context_length) {
    const logits = await sequence.step(ids);
    fed.push(...ids);
    const id = choose(logits, temperature, model.genai.search.top_p);
    if (ends.includes(id)) return;
    ids = [id];
    pending.push(id);
    const text = tokenizer.decode(pending, { skip_special_tokens: true });
    if (text.endsWith("\ufffd")) {
      yield "";
    } else {
      pending = [];
      yield text;
    }
  }
}

/** Tokens of the conversation that the sequence has not read. It begins anew where the template
 * rewrites what was said, for instance by leaving out the reasoning. */
async function unread() {
  const names = Object.keys(settings).filter((name) => name.endsWith("_token"));
  const special = Object.fromEntries(
    names.map((name) => [name, settings[name]?.content ?? settings[name]]),
  );
  const text = template.render({ messages, add_generation_prompt: true, ...special });
  const { ids } = tokenizer.encode(text, { add_special_tokens: false });
  if (fed.length >= ids.length || fed.some((id, i) => id !== ids[i])) {
    restart();
  }
  return ids.slice(fed.length);
}

function restart() {
  sequence.dispose();
  sequence = new Sequence(model);
  fed = [];
}

function add(role, text) {
  const box = document.createElement("div");
  box.className = role;
  box.textContent = text;
  element("messages").append(box);
  return box;
}

function show(text) {
  element("status").textContent = text;
}

element("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const prompt = element("prompt").value.trim();
  if (!prompt || element("send").disabled) return;
  element("prompt").value = "";
  element("send").disabled = true;
  element("stop").disabled = false;
  try {
    await answer(prompt);
  } catch (error) {
    show(`failed: ${error.message ?? error}`);
    restart(); // the states of a run that failed half-way mean nothing
    throw error;
  } finally {
    element("send").disabled = false;
    element("stop").disabled = true;
  }
});
element("stop").addEventListener("click", () => (stopped = true));
element("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    element("form").requestSubmit();
  }
});
start().catch((error) => {
  show(`failed: ${error.message ?? error}`);
  throw error;
});
