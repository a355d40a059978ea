"""Tasks in LAVIS's registry, how they query models and how they score answers."""
