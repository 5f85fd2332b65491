"""A run as a dataset that other libraries load: WebDataset, folders, Parquet."""
