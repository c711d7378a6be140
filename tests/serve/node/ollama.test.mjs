// Ollama's client for Node against a pool (POOL_URL) with the models `words` (the fake engine) and `smol` (real weights).
import assert from "node:assert/strict";
import { test } from "node:test";
import { Ollama } from "ollama";

const client = new Ollama({ host: process.env.POOL_URL });
const messages = [{ role: "user", content: "Say hello." }];
const WORDS = "words:0 words:1 words:2 words:3 words:4 ";

test("chat and generate, whole and streamed", async () => {
  assert.equal((await client.chat({ model: "words", messages })).message.content, WORDS);
  let text = "";
  for await (const part of await client.chat({ model: "words", messages, stream: true })) text += part.message.content;
  assert.equal(text, WORDS);
  assert.equal((await client.generate({ model: "words", prompt: "x" })).response, WORDS);
});

test("embeddings, lists and what is not done here", async () => {
  assert.equal((await client.embed({ model: "words", input: ["one", "two"] })).embeddings.length, 2);
  assert.deepEqual((await client.list()).models.map((model) => model.name).sort(), ["smol", "words"]);
  assert.ok((await client.show({ model: "smol" })).capabilities.includes("completion"));
  await assert.rejects(client.pull({ model: "words" }), /configur/);
});
