"""Search spaces: cells, supernets, edges, initialisations and derivations."""
