"""Equal networks for evaluation, with fewer operations."""
