"""Find a checkpoint (local or on the Hub), read its headers, and load it tensor by tensor."""
