"""What frozen tokens reveal about scenes: the premise of the paper, measured on a set of mini encoders."""
