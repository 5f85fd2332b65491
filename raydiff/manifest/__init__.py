"""The manifest: Parquet files of prompts, read as a stream and turned into validated requests."""
