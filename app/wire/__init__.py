"""Pure adapters between the families of routes and the chat stream: no HTTP, no Ray, no event loop."""
