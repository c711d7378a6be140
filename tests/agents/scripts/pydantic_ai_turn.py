"""One streamed turn of pydantic-ai: `pydantic_ai_turn.py chat|responses|anthropic URL MODEL QUESTION TOKENS`."""

import asyncio
import sys

from pydantic_ai import Agent
from pydantic_ai.models import Model
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider

kind, url, model, question, tokens = sys.argv[1:]


def chosen() -> Model:
    if kind == "anthropic":
        return AnthropicModel(model, provider=AnthropicProvider(api_key="none", base_url=url))
    made = OpenAIResponsesModel if kind == "responses" else OpenAIChatModel
    return made(model, provider=OpenAIProvider(base_url=f"{url}/v1", api_key="none"))


async def main() -> None:
    agent = Agent(chosen(), instructions="Be brief.", model_settings={"max_tokens": int(tokens)})
    async with agent.run_stream(question) as answer:
        async for text in answer.stream_text(delta=True):
            print(text, end="", flush=True)
    print()
    print(answer.usage)


asyncio.run(main())
