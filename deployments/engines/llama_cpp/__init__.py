"""llama.cpp in the process, all slots in one batch: `engine.LlamaCppEngine`."""
