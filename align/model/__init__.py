"""Models as checkpoints hold them: loading, saving, names, sizes, LoRA adapters."""
