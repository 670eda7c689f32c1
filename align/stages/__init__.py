"""The stages: SFT, reward models, preference data and GRPO, each a loop, and what their loops share."""
