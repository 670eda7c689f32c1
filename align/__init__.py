"""Alignment of Mixture-of-Experts language models: SFT, then GRPO, with Ray, vLLM and DeepSpeed."""

__version__ = "0.1.0"
