"""Anthropic's Messages: what its bodies mean in chat completions, and what the answers are in its events."""
