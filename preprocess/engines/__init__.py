"""Engines: ways to run independent build tasks."""
