"""Parts of the training engine: built on torch without LAVIS, each usable and testable on its own."""
