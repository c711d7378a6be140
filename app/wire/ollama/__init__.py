"""Ollama's API: what its bodies mean in chat completions, and what the answers are in its lines of JSON."""
