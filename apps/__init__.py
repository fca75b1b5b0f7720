"""Use it: the command line and what people touch."""
