"""Tasks of LAVIS's registry, how they ask and how they score."""
