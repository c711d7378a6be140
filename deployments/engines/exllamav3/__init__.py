"""ExLlamaV3, which runs on NVIDIA GPUs only; its library is imported when a model of it is loaded."""
