// One streamed turn of the AI SDK: `node ai_sdk.mjs responses|compatible|anthropic URL MODEL QUESTION TOKENS`.
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { streamText } from "ai";

const [kind, url, model, question, tokens] = process.argv.slice(2);
const options = { name: "pool", baseURL: `${url}/v1`, apiKey: "none" };
const models = {
  responses: () => createOpenAI(options).responses(model),
  compatible: () => createOpenAICompatible(options)(model),
  anthropic: () => createAnthropic(options)(model),
};

const answer = streamText({ model: models[kind](), prompt: question, maxOutputTokens: Number(tokens) });
for await (const part of answer.fullStream) {
  if (part.type === "error") throw part.error;
  if (part.type === "text-delta") process.stdout.write(part.text);
}
console.log();
console.log(JSON.stringify({ finish: await answer.finishReason, usage: await answer.usage }));
