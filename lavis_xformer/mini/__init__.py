"""The mini world's frozen models: the full-size classes, small, trained from scratch on rendered scenes."""
