"""One module for each job, run with `python -m jobs.NAME`."""
