"""Shell completion, computed from the source without heavy imports."""
