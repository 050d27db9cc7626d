"""SteerLM 2.0 as torchtune recipes. Importing the package imports nothing else."""

__version__ = "0.1.0"
