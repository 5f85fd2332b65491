"""One file per model family: encode, denoise and decode as three separate methods."""
