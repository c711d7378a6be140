// OpenAI's client for Node against a pool (POOL_URL) with the models `words` (the fake engine) and `smol` (real weights).
import assert from "node:assert/strict";
import { test } from "node:test";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.env.POOL_URL}/v1`, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "Add 2 and 3." }];
const WORDS = "words:0 words:1 words:2 words:3 words:4 ";
const numbers = {
  type: "object",
  properties: { a: { type: "integer" }, b: { type: "integer" } },
  required: ["a", "b"],
  additionalProperties: false,
};

test("models are listed and shown", async () => {
  const ids = [];
  for await (const model of client.models.list()) ids.push(model.id);
  assert.deepEqual(ids.sort(), ["smol", "words"]);
  assert.equal((await client.models.retrieve("words")).id, "words");
});

test("a chat, whole and streamed by hand", async () => {
  const { data, response } = await client.chat.completions.create({ model: "words", messages }).withResponse();
  assert.equal(data.choices[0].message.content, WORDS);
  assert.ok(response.headers.get("x-request-id"));
  const stream = await client.chat.completions.create({
    model: "words", messages, stream: true, stream_options: { include_usage: true },
  });
  let text = "", usage;
  for await (const chunk of stream) {
    text += chunk.choices[0]?.delta.content ?? "";
    usage = chunk.usage ?? usage;
  }
  assert.equal(text, WORDS);
  assert.equal(usage.completion_tokens, 5);
});

test("a chat streamed by the helper", async () => {
  const said = [];
  const stream = client.chat.completions.stream({ model: "words", messages });
  stream.on("content", (delta) => said.push(delta));
  const final = await stream.finalChatCompletion();
  assert.equal(said.join(""), WORDS);
  assert.equal(final.choices[0].message.content, WORDS);
  assert.equal(final.choices[0].finish_reason, "stop");
});

test("a stream that its reader leaves", async () => {
  const stream = await client.chat.completions.create({ model: "words", messages, stream: true, max_tokens: 5000 });
  for await (const chunk of stream) if (chunk.choices[0].delta.content) break;
});

test("a completion", async () => {
  const answer = await client.completions.create({ model: "words", prompt: ["x", "y"] });
  assert.deepEqual(answer.choices.map((choice) => choice.text), [WORDS, WORDS]);
});

test("a tool is called, its result taken, and the helper runs it", async () => {
  const tool = { type: "function", function: { name: "add", parameters: numbers, strict: true } };
  const tool_choice = { type: "function", function: { name: "add" } };
  const asked = { model: "smol", messages, tools: [tool], tool_choice, temperature: 0, max_tokens: 60 };
  const whole = await client.chat.completions.create(asked);
  const [call] = whole.choices[0].message.tool_calls;
  assert.equal(call.function.name, "add");
  assert.deepEqual(Object.keys(JSON.parse(call.function.arguments)).sort(), ["a", "b"]);
  const streamed = await client.chat.completions.stream(asked).finalMessage();
  assert.deepEqual(JSON.parse(streamed.tool_calls[0].function.arguments), JSON.parse(call.function.arguments));
  const result = { role: "tool", tool_call_id: call.id, content: "5" };
  const after = await client.chat.completions.create({
    model: "smol", messages: [...messages, whole.choices[0].message, result], tools: [tool], max_tokens: 4,
  });
  assert.ok(after.usage.prompt_tokens > whole.usage.prompt_tokens);
  const given = [];
  const runnable = { type: "function", function: { ...tool.function, parse: JSON.parse, function: (args) => given.push(args) } };
  const runner = client.chat.completions.runTools({ ...asked, tools: [runnable] });
  assert.equal(await runner.finalFunctionToolCall().then((each) => each.name), "add");
  assert.deepEqual(Object.keys(given[0]).sort(), ["a", "b"]);
});

test("an answer is parsed by its schema", async () => {
  const json_schema = { name: "numbers", schema: numbers, strict: true };
  const parsed = await client.chat.completions.parse({
    model: "smol", messages, response_format: { type: "json_schema", json_schema }, temperature: 0, max_tokens: 60,
  });
  assert.deepEqual(Object.keys(JSON.parse(parsed.choices[0].message.content)).sort(), ["a", "b"]);
  const format = { type: "json_schema", name: "numbers", schema: numbers, strict: true };
  const response = await client.responses.parse({
    model: "smol", input: "Add 2 and 3.", text: { format }, temperature: 0, max_output_tokens: 60,
  });
  assert.deepEqual(Object.keys(JSON.parse(response.output_text)).sort(), ["a", "b"]);
});

test("embeddings, which the client asks for in base64", async () => {
  const found = await client.embeddings.create({ model: "words", input: ["one", "two"] });
  assert.deepEqual(found.data.map((row) => row.embedding.length), [8, 8]);
  const floats = await client.embeddings.create({ model: "words", input: "one", encoding_format: "float" });
  floats.data[0].embedding.forEach((value, index) => {
    assert.ok(Math.abs(value - found.data[0].embedding[index]) < 1e-6);
  });
});

test("a response is created, retrieved, continued, listed and deleted", async () => {
  const first = await client.responses.create({ model: "words", input: "x", instructions: "Be brief." });
  assert.equal(first.output_text, WORDS);
  assert.equal((await client.responses.retrieve(first.id)).output_text, WORDS);
  const second = await client.responses.create({ model: "words", input: "y", previous_response_id: first.id });
  assert.equal(second.previous_response_id, first.id);
  const items = [];
  for await (const item of client.responses.inputItems.list(second.id)) items.push(item);
  assert.equal(items[0].content[0].text, "y");
  await client.responses.delete(first.id);
  await assert.rejects(client.responses.retrieve(first.id), OpenAI.NotFoundError);
});

test("a response is streamed, and its helper has the whole of it", async () => {
  const types = [];
  const stream = client.responses.stream({ model: "words", input: "x" });
  for await (const event of stream) types.push(event.type);
  assert.equal(types[0], "response.created");
  assert.equal(types.at(-1), "response.completed");
  assert.equal(types.filter((type) => type === "response.output_text.delta").length, 5);
  assert.equal((await stream.finalResponse()).output_text, WORDS);
  const tool = { type: "function", name: "add", parameters: numbers, strict: true };
  const called = client.responses.stream({
    model: "smol", input: "Add 2 and 3.", tools: [tool], tool_choice: "required", temperature: 0, max_output_tokens: 60,
  });
  const item = (await called.finalResponse()).output.find((each) => each.type === "function_call");
  assert.equal(item.name, "add");
});

test("errors are the client's own", async () => {
  await assert.rejects(client.chat.completions.create({ model: "nobody", messages }), OpenAI.NotFoundError);
  await assert.rejects(client.chat.completions.create({ model: "words", messages: [] }), (error) => {
    assert.ok(error instanceof OpenAI.BadRequestError);
    assert.equal(error.param, "messages");
    return true;
  });
});
