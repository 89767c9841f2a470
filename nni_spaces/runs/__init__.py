"""Searches and retrainings in a folder: data, callback, checkpoints."""
