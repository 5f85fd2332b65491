"""Contact sheets of a run."""
