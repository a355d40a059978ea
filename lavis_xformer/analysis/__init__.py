"""What can be seen of a run: its curves (report), where its model looks (attend), whether it uses M (diagnose)."""
