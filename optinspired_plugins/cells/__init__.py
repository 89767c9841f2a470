"""Cells of section 9: operations, genotypes, the plan of a network of cells, and drawings."""
