"""A run's configuration: read, merged and checked before anything is built."""
