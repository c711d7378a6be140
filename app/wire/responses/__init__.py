"""The Responses API over the chat stream: the official one, and the pool dialect's flat rendering of it."""
