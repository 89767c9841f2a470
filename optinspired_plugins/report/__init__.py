"""A self-contained HTML page about a search or a retraining."""
