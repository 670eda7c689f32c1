"""The learner: a model in DeepSpeed ranks, each a Ray actor, and the group of them that a stage updates."""
