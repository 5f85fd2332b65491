"""mini-ltx2: moving shapes with a tone per shape, in LTX-2's architecture."""
