"""Sampling: noise schedules, samplers, guidance, and the state of a batch of unlike rows."""
