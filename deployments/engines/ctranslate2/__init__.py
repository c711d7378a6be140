"""CTranslate2: converted generator models, on CPUs and GPUs, in batches that are decoded together."""
