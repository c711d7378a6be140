"""External OpenAI-compatible servers: their kinds, their manifests, and the scheduler for them as a library."""
