"""The root process: forks, holds and reaps the runs. Standard library only; it decides nothing."""
