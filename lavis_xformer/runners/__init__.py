"""What trains: LAVIS's runner on any machine, and ``xformer_runner``; the schedules."""
