"""Where a model's weights are, and when: profiles, what GPUs there are, and moving components."""
