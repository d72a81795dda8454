"""Several ranks on one machine or many: planned, started, watched, ended."""
