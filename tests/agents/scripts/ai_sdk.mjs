// One streamed turn of the AI SDK: `node ai_sdk.mjs responses|compatible|anthropic URL MODEL QUESTION`.
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

// The packages are not installed beside this file.
const require = createRequire(`${process.env.SLOTPOOL_NODE_MODULES}/`);
const load = async (name) => import(pathToFileURL(require.resolve(name)));

const [kind, url, model, question] = process.argv.slice(2);
const { streamText } = await load("ai");

async function chosen() {
  const options = { baseURL: `${url}/v1`, apiKey: "none" };
  if (kind === "responses") return (await load("@ai-sdk/openai")).createOpenAI(options).responses(model);
  if (kind === "anthropic") return (await load("@ai-sdk/anthropic")).createAnthropic(options)(model);
  return (await load("@ai-sdk/openai-compatible")).createOpenAICompatible({ name: "pool", ...options })(model);
}

const answer = streamText({ model: await chosen(), prompt: question });
for await (const part of answer.fullStream) {
  if (part.type === "error") throw part.error;
  if (part.type === "text-delta") process.stdout.write(part.text);
}
console.log();
console.log(JSON.stringify({ finish: await answer.finishReason, usage: await answer.usage }));
