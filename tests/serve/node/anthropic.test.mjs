// Anthropic's client for Node against a pool (POOL_URL) with the models `words` (the fake engine) and `smol` (real weights).
import assert from "node:assert/strict";
import { test } from "node:test";
import Anthropic from "@anthropic-ai/sdk";

const client = new Anthropic({ baseURL: process.env.POOL_URL, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "Add 2 and 3." }];
const WORDS = "words:0 words:1 words:2 words:3 words:4 ";

test("a message, whole and streamed", async () => {
  const whole = await client.messages.create({ model: "words", max_tokens: 5, messages });
  assert.equal(whole.content[0].text, WORDS);
  const said = [];
  const stream = client.messages.stream({ model: "words", max_tokens: 5, messages, system: "Be brief." });
  stream.on("text", (text) => said.push(text));
  const final = await stream.finalMessage();
  assert.equal(said.join(""), WORDS);
  assert.equal(final.content[0].text, WORDS);
  assert.equal(final.usage.output_tokens, 5);
});

test("a tool is called, streamed", async () => {
  const input_schema = { type: "object", properties: { a: { type: "integer" } }, required: ["a"] };
  const final = await client.messages
    .stream({
      model: "smol", max_tokens: 60, temperature: 0, messages,
      tools: [{ name: "add", input_schema }], tool_choice: { type: "tool", name: "add" },
    })
    .finalMessage();
  const call = final.content.find((block) => block.type === "tool_use");
  assert.equal(final.stop_reason, "tool_use");
  assert.deepEqual(Object.keys(call.input), ["a"]);
});

test("tokens are counted, and errors are the client's own", async () => {
  assert.ok((await client.messages.countTokens({ model: "smol", messages })).input_tokens > 0);
  await assert.rejects(client.messages.create({ model: "nobody", max_tokens: 5, messages }), Anthropic.NotFoundError);
});
