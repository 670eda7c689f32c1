"""What works on a machine's GPU, and how fast: every section is a question with its measurement (docs/gpu.md)."""
