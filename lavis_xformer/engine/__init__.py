"""Parts of the training engine: torch only, no LAVIS, each usable and testable by itself."""
