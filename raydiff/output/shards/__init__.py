"""Images and clips as samples in tars, as WebDataset reads them."""
