"""Figures and reports drawn from the files that a run leaves; nothing here imports a model."""
