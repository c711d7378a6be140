"""A bounded load generator for any server with OpenAI's chat route, and what it measured."""
