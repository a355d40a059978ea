"""Runners: LAVIS's made portable, and ``xformer_runner``; learning rate schedules."""
