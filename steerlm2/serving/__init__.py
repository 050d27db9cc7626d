"""Servers, and the command that starts vLLM on an export."""
