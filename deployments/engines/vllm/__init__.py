"""vLLM as an engine: its own OpenAI serving, called inside the engine's process."""
