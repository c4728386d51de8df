"""Reinforcement learning: responses that the policy draws, and what scores them."""
