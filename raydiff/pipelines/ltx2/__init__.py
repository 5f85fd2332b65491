"""LTX-2: prompts and first frames to clips with sound."""
