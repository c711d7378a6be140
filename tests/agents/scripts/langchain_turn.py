"""One streamed turn of langchain: `langchain_turn.py chat|responses URL MODEL QUESTION TOKENS`."""

import sys

from langchain_openai import ChatOpenAI

kind, url, model, question, tokens = sys.argv[1:]
chat = ChatOpenAI(
    model=model, base_url=f"{url}/v1", api_key="none", use_responses_api=kind == "responses", max_tokens=int(tokens)
)
for chunk in chat.stream(question):
    print(chunk.text, end="", flush=True)
print()
