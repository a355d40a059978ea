"""The mini world's frozen models: small, trained from scratch on rendered scenes, of the full-size models' classes."""
