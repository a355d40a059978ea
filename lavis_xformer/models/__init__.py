"""X-Former's two stages and their parts."""
