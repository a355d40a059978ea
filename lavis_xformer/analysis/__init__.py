"""Inspecting a run: its curves (report), where its model looks (attend), whether it uses M (diagnose)."""
