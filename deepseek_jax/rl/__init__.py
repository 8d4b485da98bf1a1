"""Reinforcement learning: problems, rewards, rollouts, and GRPO."""
