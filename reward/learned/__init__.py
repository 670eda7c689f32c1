"""Learned rewards: a reward model in this process (`model`) or behind an HTTP endpoint (`endpoint`)."""

from reward.learned.model import NOTES, Scale, read_scale, reward_model

__all__ = ["NOTES", "Scale", "read_scale", "reward_model"]
