"""A static page over a run's results: index.html, its data and its thumbnails, without a server."""
