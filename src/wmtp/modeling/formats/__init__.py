"""What models look like on disk: which kinds there are, how each is read, and how a model is written."""
