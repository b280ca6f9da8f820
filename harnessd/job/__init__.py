"""Inside the job's process: standard library only, fast to import, passive on the harness's behalf."""
